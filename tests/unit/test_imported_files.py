"""Tests of the modules that a user's file imports: found from its text, and as they are loaded."""

import sys
from pathlib import Path

import pytest

from chunkq.errors import JobError
from chunkq.job import imported_files as search
from chunkq.job.imported_files import imported_files
from chunkq.job.user_code import load_names
from chunkq.job.user_modules import MODULE_PREFIX, UserModules

KEY = "model_config.class_file"


def found(folder: Path, files: dict[str, str], main: str = "net.py") -> set[str]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = set(sys.modules)
    result = imported_files(str(folder / main), KEY)
    base = (folder / main).parent
    assert all((base / name).samefile(path) for name, path in result.items())
    assert not [name for name in set(sys.modules) - before if name.startswith(MODULE_PREFIX)]
    return set(result)


PACK = {
    "pack/__init__.py": "from .base import Base\n__all__ = ['extra']\n",
    "pack/base.py": "from . import deep\nfrom .deep import bottom\nBase = object\n",
    "pack/deep/__init__.py": "",
    "pack/deep/bottom.py": "from ..sibling import x\n",
    "pack/sibling.py": "x = 1\n",
    "pack/extra.py": "y = 2\n",
    "pack/unused.py": "raise RuntimeError\n",
}
REACHED = {
    "pack/__init__.py", "pack/base.py", "pack/deep/__init__.py", "pack/deep/bottom.py",
    "pack/sibling.py",
}  # fmt: skip
RAISES = "raise RuntimeError('was run')\n"


@pytest.mark.parametrize(
    "text",
    [
        "import near",
        "import near as other, os",
        "from near import value",
        "from near import *",
        "def f():\n    import near",
        "class A:\n    def forward(self):\n        from near import value",
        "try:\n    import near\nexcept ImportError:\n    pass",
        "import importlib\nimportlib.import_module('near')",
        "from importlib import import_module\nx = import_module('near')",
        "__import__('near')",
        "if False:\n    import near",
    ],
)
def test_an_import_of_a_neighbor_is_found_wherever_it_is_and_nothing_is_run(
    tmp_path: Path, text: str
) -> None:
    files = {"net.py": f"{text}\n{RAISES}", "near.py": f"import far\n{RAISES}", "far.py": RAISES}
    assert found(tmp_path, files) == {"near.py", "far.py"}


@pytest.mark.parametrize(
    "text",
    [
        "import numpy, os, torch_is_not_here",
        "import sys, builtins, time",
        "name = 'near'\n__import__(name)",
        "# import near\n'import near'",
        "def broken(:\n",
        "\0",
    ],
)
def test_what_is_no_literal_import_of_a_neighbor_is_not_found(tmp_path: Path, text: str) -> None:
    files = {"net.py": text, "near.py": "", "sys.py": "", "time.py": ""}
    assert found(tmp_path, files) == set()


def test_packages_are_followed_into_the_modules_that_they_import(tmp_path: Path) -> None:
    assert found(tmp_path, {"net.py": "import pack", **PACK}) == REACHED
    assert found(tmp_path, {"net.py": "import pack.unused"}) == {*REACHED, "pack/unused.py"}
    assert found(tmp_path, {"net.py": "from pack import extra, Base"}) == {
        *REACHED, "pack/extra.py",
    }  # fmt: skip
    assert found(tmp_path, {"net.py": "from pack import *"}) == {*REACHED, "pack/extra.py"}


def test_a_file_in_a_package_finds_the_modules_of_its_package_relatively(tmp_path: Path) -> None:
    files = {"pack/net.py": "from .sibling import x\nfrom . import extra", **PACK}
    reached = {"__init__.py", "base.py", "deep/__init__.py", "deep/bottom.py", "sibling.py"}
    assert found(tmp_path, files, "pack/net.py") == {*reached, "extra.py"}
    files = {"pack/deep/net.py": "from ..sibling import x"}
    assert found(tmp_path, files, "pack/deep/net.py") == {
        "../__init__.py", "../base.py", "__init__.py", "bottom.py", "../sibling.py",
    }  # fmt: skip


def test_a_file_that_runs_as_a_script_does_not_run_the_package_of_its_folder(
    tmp_path: Path,
) -> None:
    assert found(tmp_path, {"pack/net.py": "import sibling", **PACK}, "pack/net.py") == {
        "sibling.py"
    }


def test_modules_that_import_each_other_are_found_once(tmp_path: Path) -> None:
    files = {"net.py": "import a", "a.py": "import b", "b.py": "import a, net, b"}
    assert found(tmp_path, files) == {"a.py", "b.py"}


def test_folders_without_init_are_packages_after_installed_modules(tmp_path: Path) -> None:
    files = {"net.py": "import parts.near, numpy.near", "parts/near.py": "", "numpy/near.py": ""}
    assert found(tmp_path, files) == {"parts/near.py"}


def test_compiled_modules_are_found_and_installed_packages_are_not_read(tmp_path: Path) -> None:
    files = {"net.py": "import near", "near.abi3.so": ""}
    assert found(tmp_path, files) == {"near.abi3.so"}
    inside = tmp_path / "site-packages" / "pack"
    assert found(inside, {"net.py": "import near", "near.py": ""}) == set()


def test_more_modules_than_the_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MAX_MODULES", 2)
    files = {"net.py": "import a0", **{f"a{n}.py": f"import a{n + 1}" for n in range(4)}}
    assert found(tmp_path, {**files, "a1.py": ""}) == {"a0.py", "a1.py"}
    with pytest.raises(JobError, match=r"^model_config.class_file: .*net.py"):
        found(tmp_path, files)


def test_the_modules_that_are_found_are_those_that_are_loaded(tmp_path: Path) -> None:
    files = {"net.py": "import pack.unused, near\nfrom pack import extra", **PACK}
    names = found(tmp_path, files | {"pack/unused.py": "", "near.py": "import importlib"})
    owner = UserModules()
    with owner.collect():
        load_names(str(tmp_path / "net.py"), KEY)
        modules = [m for name, m in sys.modules.items() if name.startswith(MODULE_PREFIX)]
        paths = [Path(str(m.__file__)) for m in modules if getattr(m, "__file__", None) is not None]
        # Other tests of this process have left modules of other folders.
        loaded = {str(p.relative_to(tmp_path)) for p in paths if p.is_relative_to(tmp_path)}
    owner.release()
    assert loaded - {"net.py"} == names
