"""Import the neighbors of the user's files for the user's code only.

The modules in the folder of a user's file are its *neighbors*. The file and its neighbors are
modules of a package of their own, `chunkq_user.LABEL`. The folder is not on `sys.path`, so no
library imports a file that is named like one of its modules. The built-in `__import__` of these
modules finds neighbors by absolute names, whenever the import runs. Each load of a file has a
package of its own, so jobs with different neighbors of the same name can share a process.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    BuiltinImporter,
    ExtensionFileLoader,
    FileFinder,
    FrozenImporter,
    ModuleSpec,
    PathFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from importlib.util import spec_from_file_location
from itertools import count
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from typing_extensions import override

from chunkq.errors import ErrorCode, JobError
from chunkq.job.allowed_paths import AllowedPaths
from chunkq.job.job_path import printable_path
from chunkq.paths import is_url, read_bytes

PACKAGE = "chunkq_user"
MODULE_PREFIX = f"{PACKAGE}."
"""Start of the names of the user's modules."""
LABEL = re.compile(r"n\d+_(\d+)_(\w+)")
"""Last part of the name of a `UserPackage`: a number, `levels`, and the encoded path."""
INSTALLED = frozenset({"site-packages", "dist-packages"})

_numbers = count(1)
_packages: dict[str, UserPackage] = {}
_importing: ContextVar[UserPackage | None] = ContextVar("importing", default=None)
_owner: ContextVar[UserModules | None] = ContextVar("owner", default=None)


class UserModules:
    """Owner of the modules of the user's files that are loaded inside `collect`.

    They stay in `sys.modules` until `release`. Without an owner they stay until the process ends.
    """

    def __init__(self) -> None:
        self._packages: list[UserPackage] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Own what this thread loads in the `with` block. Release it if the block raises."""
        token = _owner.set(self)
        try:
            yield
        except BaseException:
            self.release()
            raise
        finally:
            _owner.reset(token)

    def add(self, package: UserPackage) -> None:
        """Own the modules of a package."""
        self._packages.append(package)

    def release(self) -> None:
        """Remove the modules from `sys.modules`. Objects in use stay alive."""
        while self._packages:
            self._packages.pop().remove()


class UserPackage:
    """The package of one load of a user's file, with the modules of its folder.

    The file is the module `main`. The `levels` folders above it are packages, too. `builtins` are
    the built-in names of all these modules.
    """

    def __init__(self, path: str, levels: int = 0, label: str | None = None) -> None:
        """Create the package, which this thread's `UserModules` own. `label` is of another one."""
        label = label or f"n{next(_numbers)}_{levels}_{_encode(path)}"
        self.path, self.name = path, MODULE_PREFIX + label
        folder, file_name = os.path.split(path)
        stem = os.path.splitext(file_name)[0]
        parents = Path(folder).parts[-levels:] if levels else ()
        self._folder_name = ".".join([self.name, *parents])
        self.main = f"{self._folder_name}.{stem if stem.isidentifier() else _encode(stem)}"
        self._folder = None if is_url(path) else folder
        self._root = str(Path(path).parents[levels]) if self._folder else None
        self._first_folders, self._last_folders = list[str](), list[str]()
        self._process_folders = frozenset(sys.path)
        self._finders: dict[str, FileFinder] = {}
        self._aliases: dict[str, str] = {}
        self._importlib = _Importlib(self)
        self.builtins: dict[str, Any] = {**vars(builtins), "__import__": self._import}
        importlib.import_module(PACKAGE)
        _packages[self.name] = self
        if (owner := _owner.get()) is not None:
            owner.add(self)

    @classmethod
    def of(cls, module: str) -> UserPackage | None:
        """Return the package of a user's module by its name; create it in a child process."""
        label = module.split(".")[1]
        package = _packages.get(MODULE_PREFIX + label)
        if package is None and (match := LABEL.fullmatch(label)):
            return cls(_decode(match[2]), int(match[1]), label)
        return package

    def remove(self) -> None:
        """Remove the modules of the package from `sys.modules`."""
        self._remove_aliases()
        _packages.pop(self.name, None)
        for name in list(sys.modules):
            if f"{name}.".startswith(f"{self.name}."):
                del sys.modules[name]
        vars(sys.modules.get(PACKAGE, ModuleType(PACKAGE))).pop(self.name.split(".")[1], None)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Let libraries import neighbors on behalf of the user's code, as pickles need.

        Only this thread does so, inside the `with` block, by names that are not installed. At the
        end, folders that the user's code has added to `sys.path` become folders of this package.
        """
        token = _importing.set(self)
        try:
            yield
        finally:
            _importing.reset(token)
            self._remove_aliases()
            self._adopt_folders()
            adopted = {self._root, self._folder, *self._first_folders, *self._last_folders}
            adopted -= self._process_folders
            sys.path[:] = [path for path in sys.path if path not in adopted]

    def neighbor(self, name: str, importer: str | None = None) -> str | None:
        """Return the name of the neighbor that an absolute import in the user's code means.

        None means a module of the process. As for a script, the folder precedes installed modules,
        but not those of the interpreter itself. Installed modules precede folders without
        `__init__.py`, and the module `importer` itself.
        """
        top = name.partition(".")[0]
        if self._root is None or BuiltinImporter.find_spec(top) or FrozenImporter.find_spec(top):
            return None
        self._adopt_folders()
        for parent, folder in self._search_order():
            spec = self._find(f"{parent}.{top}", [folder])
            if spec is None:
                continue
            precedes = spec.loader and spec.name != importer and folder not in self._last_folders
            if precedes or not self._is_installed(top):
                return f"{parent}.{name}"
        return None

    def find_spec(self, name: str, folders: Sequence[str]) -> ModuleSpec | None:
        """Return the spec of a module of this package, or None. JobError if it is not allowed."""
        if name == self.name:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [] if self._root is None else [self._root]
            return spec
        if name == self.main:
            return spec_from_file_location(name, self.path, loader=_SourceLoader(name, self.path))
        if name.rpartition(".")[0] == self.name and self._root is not None:
            folders = [*self._first_folders, self._root, *self._last_folders]
        return self._find(name, folders)

    def find_alias(self, name: str) -> ModuleSpec | None:
        """Return the spec of a neighbor under its absolute name, if a library imports it by name.

        None for an import statement: that of a library means an installed module.
        """
        parent, _, last = name.rpartition(".")
        if parent:
            neighbor = f"{self._aliases[parent]}.{last}" if parent in self._aliases else None
        elif _is_import_statement() or self._is_installed(name):
            return None
        else:
            neighbor = self.neighbor(name)
        if neighbor is None:
            return None
        module = importlib.import_module(neighbor)
        self._aliases[name] = neighbor
        return ModuleSpec(name, _AliasLoader(module))

    def _import(
        self,
        name: str,
        globals: dict[str, Any] | None = None,
        locals: dict[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        """Import a module for the user's code, with the parameters of `__import__`."""
        importer = (globals or {}).get("__name__")
        neighbor = None if level else self.neighbor(name, importer)
        try:
            if neighbor is None:
                module = __import__(name, globals, locals, fromlist or (), level)
                return self._importlib if module is importlib else module
            if fromlist:
                return __import__(neighbor, globals, locals, fromlist)
            if isinstance(fromlist, list):
                return self._import_for_c(name, neighbor)
            importlib.import_module(neighbor)
        except ImportError as error:
            error.msg = without_package(error.msg)
            raise
        return sys.modules[neighbor.removesuffix(name) + name.partition(".")[0]]

    def _import_for_c(self, name: str, neighbor: str) -> ModuleType:
        """Import a neighbor for C code such as `pickle.load`, which then looks in `sys.modules`."""
        if self._is_installed(name.partition(".")[0]):
            return importlib.import_module(name)
        package = neighbor.removesuffix(name)
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            alias = ".".join(parts[:end])
            self._aliases[alias] = package + alias
            sys.modules[alias] = importlib.import_module(package + alias)
        return sys.modules[name]

    def _search_order(self) -> Iterator[tuple[str, str]]:
        """Yield the folders in which neighbors are, each with the package for its modules."""
        if self._folder is None or self._root is None:
            return
        yield from ((self.name, folder) for folder in self._first_folders)
        if self._folder != self._root:
            yield self._folder_name, self._folder
        yield from ((self.name, folder) for folder in (self._root, *self._last_folders))

    def _find(self, name: str, folders: Sequence[str]) -> ModuleSpec | None:
        """Find a module in folders. One without `__init__.py` counts if there is nothing else."""
        portions: list[str] = []
        for folder in folders:
            if folder not in self._finders:
                self._finders[folder] = FileFinder(folder, *LOADERS)
            spec = self._finders[folder].find_spec(name)
            if spec is not None and spec.loader is not None:
                self._check_allowed(spec.origin)
                return spec
            if spec is not None:
                portions += spec.submodule_search_locations or ()
        if not portions:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = portions
        return spec

    def _check_allowed(self, origin: str | None) -> None:
        """Raise JobError if a module of the user's folder is not in an allowed path."""
        allowed = AllowedPaths.from_environment()
        if allowed is None or origin is None or not origin.startswith(f"{self._root}{os.sep}"):
            return
        if allowed.locate(origin) is None:
            raise JobError(
                f"{printable_path(origin)} -> {printable_path(os.path.realpath(origin))} "
                "is outside the paths from which this worker runs code; "
                "copy the module, or allow its folder",
                code=ErrorCode.PATH_NOT_ALLOWED,
            )

    def _remove_aliases(self) -> None:
        while self._aliases:
            alias, neighbor = self._aliases.popitem()
            if getattr(sys.modules.get(alias), "__name__", None) == neighbor:
                del sys.modules[alias]

    def _adopt_folders(self) -> None:
        """Note the folders that the user's code has added to `sys.path`, not those of packages."""
        is_first = True
        for path in sys.path:
            if path in self._process_folders:
                is_first = False
            elif os.path.isdir(path) and not INSTALLED.intersection(path.split(os.sep)):
                folders = self._first_folders if is_first else self._last_folders
                known = (self._root, self._folder, *self._first_folders, *self._last_folders)
                if path not in known:
                    folders.append(path)

    def _is_installed(self, top: str) -> bool:
        """Return whether the process has a module with this name."""
        if top in sys.modules:
            return top not in self._aliases
        paths = [path for path in sys.path if path in self._process_folders]
        return PathFinder.find_spec(top, paths) is not None or any(
            finder.find_spec(top, None) is not None
            for finder in sys.meta_path
            if finder is not PathFinder and not isinstance(finder, UserModuleFinder)
        )


class UserModuleFinder(MetaPathFinder):
    """Finds the modules of the user's packages, and neighbors that libraries import by name."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module, or None so that other finders look for it."""
        if fullname.startswith(MODULE_PREFIX):
            package = UserPackage.of(fullname)
            return None if package is None else package.find_spec(fullname, path or ())
        package = _importing.get()
        return None if package is None else package.find_alias(fullname)


class _SourceLoader(SourceFileLoader):
    """Runs the text of a file. Bytecode beside it is not used, because it can be out of date."""

    @override
    def path_stats(self, path: Any) -> Any:
        raise OSError

    @override
    def get_data(self, path: Any) -> bytes:
        return read_bytes(os.fspath(path))

    @override
    def exec_module(self, module: ModuleType) -> None:
        _set_builtins(module)
        super().exec_module(module)


class _BytecodeLoader(SourcelessFileLoader):
    """Runs a `.pyc` file without source."""

    @override
    def exec_module(self, module: ModuleType) -> None:
        _set_builtins(module)
        super().exec_module(module)


class _ExtensionLoader(ExtensionFileLoader):
    """Loads a compiled module once per process, because few of them can be loaded again."""

    _loaded: dict[str, ModuleType] = {}  # noqa: RUF012 - shared by all loaders

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        path = os.path.realpath(self.path)
        if path not in self._loaded:
            name = spec.name.rpartition(".")[2]
            loader = ExtensionFileLoader(name, self.path)
            module = loader.create_module(ModuleSpec(name, loader, origin=self.path))
            loader.exec_module(module)
            self._loaded[path] = module
        return self._loaded[path]

    @override
    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: `create_module` has run it."""


class _AliasLoader(Loader):
    """Returns a module that is loaded under another name."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    @override
    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Importlib(ModuleType):
    """`importlib` for the user's code: its `import_module` finds neighbors."""

    def __init__(self, package: UserPackage) -> None:
        super().__init__("importlib", importlib.__doc__)
        self._package = package

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib, name)

    def import_module(self, name: str, package: str | None = None) -> ModuleType:
        """Import a module by its absolute or relative name."""
        neighbor = None if name.startswith(".") else self._package.neighbor(name)
        return importlib.import_module(neighbor or name, package)


LOADERS = (
    (_ExtensionLoader, EXTENSION_SUFFIXES),
    (_SourceLoader, SOURCE_SUFFIXES),
    (_BytecodeLoader, BYTECODE_SUFFIXES),
)
"""Loaders and their suffixes, in the order in which Python looks for them."""


def install() -> None:
    """Add the finder to this process, before those that would load the same files as others."""
    if not any(isinstance(finder, UserModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, UserModuleFinder())


def open_package(path: str) -> UserPackage:
    """Return the last loaded package of a file that is not released, or a new one."""
    packages = (p for p in reversed(_packages.values()) if p.path == path)
    return next(packages, None) or UserPackage(path)


def package_levels(path: str, tree: ast.AST) -> int:
    """Return how many folders above a file are packages that the file itself imports from.

    0 for a file that runs as a script does, also in a folder with `__init__.py`.
    """
    parents: list[str] = []
    folder = Path(path).parent
    while not is_url(path) and folder.name.isidentifier() and (folder / "__init__.py").is_file():
        parents.append(folder.name)
        folder = folder.parent
    dots, names = 0, set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = max(dots, node.level)
            names |= set() if node.level else {(node.module or "").partition(".")[0]}
    if dots or names.intersection(parents[-1:]):
        return max(len(parents), dots - 1)
    return 0


def without_package(text: str) -> str:
    """Return a message with the names of modules as the user's code writes them."""
    return re.sub(rf"{PACKAGE}\.n\d+_\w+\.", "", text)


def _set_builtins(module: ModuleType) -> None:
    package = UserPackage.of(module.__name__)
    if package is not None:
        vars(module)["__builtins__"] = package.builtins


def _is_import_statement() -> bool:
    """Return whether the current import is a statement, and not a call with a name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_code.co_filename == __file__
        or frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        frame = frame.f_back
    if frame is None:
        return False
    return frame.f_code.co_code[frame.f_lasti] == dis.opmap["IMPORT_NAME"]


def _encode(text: str) -> str:
    """Return a text as a part of a module's name, with `_` and two hexadecimal digits per byte."""
    characters = map(chr, os.fsencode(text))
    return "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):02x}" for c in characters)


def _decode(text: str) -> str:
    return os.fsdecode(
        re.sub(rb"_([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), text.encode())
    )
