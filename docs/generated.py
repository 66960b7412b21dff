"""Hook of the documentation site: tables taken from the code, and the figures.

A page names a table by a line `<!-- generated: NAME -->`. The figures of `figures.py` are added
to the site's files, one version for the light and one for the dark scheme.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import figures
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from chunkq import errors
from chunkq.queue.contract.settings import WorkerSettings

ROOT = Path(__file__).parents[1]
PACKAGES = ("chunkq", "chunkq_user", "producer", "worker")
MARK = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the figures to the site."""
    for name, draw in figures.FIGURES.items():
        for scheme in figures.SCHEMES:
            path = f"figures/{name}-{scheme}.svg"
            files.append(File.generated(config, path, content=draw(scheme)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the generated tables in the place of their marks."""

    def table(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise PluginError(f"{page.file.src_uri}: no table {match[1]!r}; one of {[*TABLES]}")
        return "\n".join(TABLES[match[1]]())

    return MARK.sub(table, markdown)


# ---------------------------------------------------------------------------------- error codes


def error_codes() -> Iterator[str]:
    """Yield a table of the error codes: the classes that carry each, and what it means."""
    members = griffe.load("chunkq.errors", try_relative_path=False)["ErrorCode"].attributes
    carried = _codes_raised() | {(c.code.name, c) for c in _error_classes().values()}
    yield "| code | class | exit code | meaning |"
    yield "|---|---|---|---|"
    for code in errors.ErrorCode:
        docstring = members[code.name].docstring
        if docstring is None:
            raise PluginError(f"ErrorCode.{code.name} has no docstring")
        alike = {c for name, c in carried if name == code.name} or {
            # Passed as a variable: the class of the other codes of that kind.
            c
            for name, c in carried
            if name.partition("_")[0] == code.name.partition("_")[0]
        }
        classes = sorted(alike, key=lambda c: c.__name__)
        names = ", ".join(f"`{c.__name__}`" for c in classes)
        exits = ", ".join(sorted({str(c.exit_code) for c in classes}))
        yield f"| `{code}`{{ #{code} }} | {names} | {exits} | {docstring.value} |"


def _error_classes() -> dict[str, type[errors.ChunkqError]]:
    found = {name: c for name, c in vars(errors).items() if isinstance(c, type)}
    return {name: c for name, c in found.items() if issubclass(c, errors.ChunkqError)}


def _codes_raised() -> set[tuple[str, type[errors.ChunkqError]]]:
    """Return the codes that the sources pass to an error class, as (name of the code, class)."""
    classes, found = _error_classes(), set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                    continue
                codes = [ast.unparse(k.value) for k in node.keywords if k.arg == "code"]
                for code in codes:
                    if node.func.id in classes and code.startswith("ErrorCode."):
                        found.add((code.removeprefix("ErrorCode."), classes[node.func.id]))
    return found


def worker_settings() -> Iterator[str]:
    """Yield a table of a worker's settings and their defaults."""
    yield "| setting | default |"
    yield "|---|---|"
    for field in dataclasses.fields(WorkerSettings):
        yield f"| `{field.name}` | {field.default:g} |"


# ---------------------------------------------------------------------------------- modules


def modules() -> Iterator[str]:
    """Yield a table per package: each module, and the first sentence of its docstring."""
    for package in PACKAGES:
        root = ROOT / package
        root = root if package.startswith("chunkq") else root / f"chunkq_{package}"
        paths = sorted(root.rglob("*.py"), key=lambda path: (path.parent, path.name))
        for folder in dict.fromkeys(path.parent for path in paths):
            inside = [path for path in paths if path.parent == folder]
            name = ".".join(folder.relative_to(root.parent).parts)
            title = next(_summary(path) for path in inside if path.name == "__init__.py")
            yield f"## `{name}`\n\n{title}\n"
            modules = [path for path in inside if path.name != "__init__.py"]
            yield from ["| module | contents |", "|---|---|"] if modules else ()
            yield from (f"| `{path.stem}` | {_summary(path)} |" for path in modules)
            yield ""


def _summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring, as one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if docstring is None:
        raise PluginError(f"{path}: no docstring")
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")


TABLES = {
    "error codes": error_codes,
    "worker settings": worker_settings,
    "modules": modules,
}
