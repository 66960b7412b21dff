"""Find the modules beside a user's Python file that it imports, without running them.

The modules are those that `chunkq.job.user_modules` would load. Imports are read from the text of
the files: statements anywhere in a file, also in functions, and calls of `importlib.import_module`
and `__import__` with a literal name.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import SOURCE_SUFFIXES, ModuleSpec

from chunkq.errors import JobError
from chunkq.job.user_modules import INSTALLED, UserPackage, package_levels
from chunkq.paths import is_url, read_bytes

MAX_MODULES = 1000
"""Modules that one file may import from its folder; reading so many takes seconds."""
MAX_SOURCE_BYTES = 4 << 20
"""Size above which a module is data; its imports are not read."""
IMPORT_FUNCTIONS = frozenset({"import_module", "__import__"})


def imported_files(path: str, key: str) -> dict[str, str]:
    """Return the files of the modules that a local file imports from its folder, transitively.

    The result maps paths relative to the folder of the file to absolute paths. It is empty for a
    URL, for a file that cannot be read or is not Python, and inside `site-packages`. `key` is the
    job key of the file. Raises JobError if there are more than `MAX_MODULES`.
    """
    if is_url(path) or INSTALLED.intersection(path.split(os.sep)):
        return {}
    tree = _parsed(path)
    if tree is None:
        return {}
    package = UserPackage(path, package_levels(path, tree))
    try:
        files = _Search(package, key).run(tree)
    finally:
        package.remove()
    folder = os.path.dirname(path)
    return {os.path.relpath(file, folder): file for file in sorted(files - {path})}


class _Search:
    """The modules of a user's package that are reachable from its main file."""

    def __init__(self, package: UserPackage, key: str) -> None:
        self._package, self._key = package, key
        self._specs: dict[str, ModuleSpec | None] = {}
        self._pending: list[tuple[str, bool, ast.AST]] = []

    def run(self, tree: ast.AST) -> set[str]:
        """Return the files of all modules that `tree`, the main file, imports."""
        main = self._package.main
        self._add(main.rpartition(".")[0])  # a member of a package runs its `__init__.py`
        self._pending.append((main, False, tree))
        while self._pending:
            module, is_package, tree = self._pending.pop()
            for name in self._imported(module, is_package, tree):
                self._add(name)
        specs = (spec for spec in self._specs.values() if spec is not None)
        return {spec.origin for spec in specs if spec.has_location and spec.origin is not None}

    def _imported(self, module: str, is_package: bool, tree: ast.AST) -> Iterator[str]:
        """Yield the full names of the modules of this package that a module may import."""
        parent = module if is_package else module.rpartition(".")[0]
        for name, members in _imports(tree):
            full_name = self._resolved(name, parent, module)
            if full_name is None:
                continue
            yield full_name
            names = self._all(full_name) if members == ("*",) else members
            yield from (f"{full_name}.{member}" for member in names)

    def _resolved(self, name: str, parent: str, importer: str) -> str | None:
        """Return the full name of a module; None if it is none of this package."""
        relative = name.lstrip(".")
        if relative == name:
            return self._package.neighbor(name, importer)
        levels = len(name) - len(relative) - 1
        base = parent.rsplit(".", levels)[0] if levels else parent
        if not f"{base}.".startswith(f"{self._package.name}."):
            return None
        return f"{base}.{relative}" if relative else base

    def _add(self, name: str) -> ModuleSpec | None:
        """Find a module and the packages that contain it, each once."""
        if name in (self._package.main, self._package.name):
            return self._package.find_spec(name, ())
        if name in self._specs:
            return self._specs[name]
        parent = self._add(name.rpartition(".")[0])
        locations: Sequence[str] = (parent and parent.submodule_search_locations) or ()
        spec = self._package.find_spec(name, list(locations)) if locations else None
        self._specs[name] = spec
        if spec is not None and spec.origin is not None and spec.has_location:
            self._read(name, spec, spec.origin)
        return spec

    def _read(self, name: str, spec: ModuleSpec, path: str) -> None:
        if sum(spec is not None for spec in self._specs.values()) > MAX_MODULES:
            raise JobError(
                f"{self._key}: {self._package.path} imports more than {MAX_MODULES} modules of its "
                "folder; install them as a package, and set class_name to the full name of the "
                "class"
            )
        if path.endswith(tuple(SOURCE_SUFFIXES)) and (tree := _parsed(path)) is not None:
            self._pending.append((name, spec.submodule_search_locations is not None, tree))

    def _all(self, name: str) -> tuple[str, ...]:
        """Return the literal `__all__` of a package, whose modules `import *` imports."""
        spec = self._add(name)
        if spec is None or spec.origin is None or spec.submodule_search_locations is None:
            return ()
        tree = _parsed(spec.origin)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
            ):
                values = getattr(node.value, "elts", ())
                return tuple(text for value in values if (text := _text(value)))
        return ()


def _parsed(path: str) -> ast.AST | None:
    """Return the syntax tree of a file; None if it is no Python file of a usual size."""
    try:
        if os.path.getsize(path) > MAX_SOURCE_BYTES:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are shown when the file is run
            return ast.parse(read_bytes(path), path)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # running the file reports it


def _imports(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name in each import, with leading dots, and the names that it imports from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            yield name, tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in IMPORT_FUNCTIONS:
            yield from ((text, ()) for text in map(_text, node.args[:1]) if text)


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _text(node: ast.AST) -> str:
    value = getattr(node, "value", None)
    return value if isinstance(node, ast.Constant) and isinstance(value, str) else ""
