"""Hook of the documentation site: tables taken from the code, and the figures.

A page names a table by a line `<!-- generated: NAME -->`. The figures of `figures.py` are added
to the site's files, one version for the light and one for the dark scheme.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import figures
import griffe
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from chunkq import errors
from chunkq.job.job_file import job_schema
from chunkq.queue.contract.settings import WorkerSettings

DESCRIPTIONS = Path(__file__).with_name("job_keys.yaml")
PACKAGES = ("chunkq", "chunkq_user", "producer", "worker")
MARK = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)
LARGEST = 1 << 40
"""The upper bound of every whole number in a job file; said once on the page, not in each row."""
WORDS = {"string": "text", "number": "number", "boolean": "`true` or `false`"}


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


# ---------------------------------------------------------------------------------- job file


def job_file() -> Iterator[str]:
    """Yield a table per section of the job file: key, type, default, description."""
    schema = job_schema()
    sections = {"": schema}
    for key, value in schema["properties"].items():
        name = _section_of(value)
        if name is not None:
            sections[key] = schema["$defs"][name]
    described = _descriptions(sections)
    for section, content in sections.items():
        yield f"## {f'`{section}`' if section else 'Top level'}\n"
        yield from _key_table(section, content, described)
        yield ""


def _descriptions(sections: Mapping[str, Any]) -> Mapping[str, str]:
    """Return what each key means; raises PluginError unless every key has one description."""
    described: dict[str, str] = yaml.safe_load(DESCRIPTIONS.read_text(encoding="utf-8"))
    paths = {_path(s, key): v for s, c in sections.items() for key, v in c["properties"].items()}
    in_schema = {path: v["description"] for path, v in paths.items() if "description" in v}
    if unknown := described.keys() - paths.keys():
        raise PluginError(f"{DESCRIPTIONS.name}: the job file has no key {sorted(unknown)}")
    if missing := paths.keys() - described.keys() - in_schema.keys():
        raise PluginError(f"{DESCRIPTIONS.name}: no description of {sorted(missing)}")
    return described | in_schema


def _key_table(section: str, content: Any, described: Mapping[str, str]) -> Iterator[str]:
    yield "| key | type | default | description |"
    yield "|---|---|---|---|"
    required = content.get("required", [])
    for key, value in content["properties"].items():
        default = "**required**" if key in required else _default(value)
        path = _path(section, key)
        name = f"`{key}`{{ #key-{path.replace('.', '-')} }}"
        yield f"| {name} | {_type(value)} | {default} | {' '.join(described[path].split())} |"


def _path(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _section_of(value: Mapping[str, Any]) -> str | None:
    reference = value.get("$ref") or next((o.get("$ref") for o in value.get("allOf", ())), None)
    return None if reference is None else reference.rpartition("/")[2]


def _type(value: Mapping[str, Any]) -> str:
    """Return a schema's type in words."""
    if _section_of(value) is not None:
        return "section below"
    if choices := value.get("enum", [value["const"]] if "const" in value else []):
        return " \\| ".join(f"`{_shown(choice)}`" for choice in choices)
    if "anyOf" in value:
        options = [_type(option) for option in value["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    if value.get("type") == "array":
        return f"list of {_plural(_type(value.get('items', {})))}"
    if value.get("type") == "integer":
        return _integer(value)
    return WORDS.get(value.get("type", ""), "anything")


def _integer(value: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in value:
        return f"integer > {value['exclusiveMinimum']}"
    least = value.get("minimum", -LARGEST)
    return "integer" if least == -LARGEST else f"integer ≥ {least}"


def _plural(kind: str) -> str:
    plurals = {"integer": "integers", "text": "texts", "list": "lists"}
    first, space, rest = kind.partition(" ")
    return f"{plurals.get(first, first)}{space}{rest}"


def _default(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    return "" if default is None or _section_of(value) else f"`{_shown(default)}`"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


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
        for path in (DESCRIPTIONS.parents[1] / package).rglob("*.py"):
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
        root = DESCRIPTIONS.parents[1] / package
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
    "job file": job_file,
    "error codes": error_codes,
    "worker settings": worker_settings,
    "modules": modules,
}
