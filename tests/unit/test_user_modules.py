"""Tests of imports in the user's code: it finds its neighbors, and libraries do not."""

import importlib
import inspect
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from chunkq.errors import ErrorCode, JobError
from chunkq.job.allowed_paths import ALLOW_VARIABLE
from chunkq.job.user_code import load_names, sibling_imports
from chunkq.job.user_modules import MODULE_PREFIX, PACKAGE, UserModules, _decode, _encode

KEY = "model_config.class_file"


def user_modules() -> set[str]:
    return {name for name in sys.modules if name.startswith(MODULE_PREFIX)}


@pytest.fixture(autouse=True)
def modules() -> Iterator[UserModules]:
    """Own the user's modules of a test; see that it has changed nothing else of this process."""
    importlib.import_module(PACKAGE)
    folders, finders, before = list(sys.path), list(sys.meta_path), user_modules()
    owner = UserModules()
    with owner.collect():
        yield owner
    owner.release()
    assert (sys.path, sys.meta_path) == (folders, finders)
    assert user_modules() == before
    assert not {"neighbor", "library", "pack"} & sys.modules.keys()


def load(folder: Path, files: dict[str, str], main: str = "net.py") -> dict[str, Any]:
    """Write files, and return the names of one of them."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return load_names(str(folder / main), KEY)


NEIGHBOR = {"neighbor.py": "value = 2"}
IN_PACKAGE = {"pack/__init__.py": "constant = 3", "pack/parts.py": "value = 2"}


@pytest.mark.parametrize(
    "statements",
    [
        "import neighbor; return neighbor.value",
        "import neighbor as other; return other.value",
        "from neighbor import value; return value",
        "return __import__('neighbor').value",
        "names = {}; exec('from neighbor import value', globals(), names); return names['value']",
        "import importlib; return importlib.import_module('neighbor').value",
        "import importlib.util; return importlib.import_module('neighbor').value",
        "from importlib import import_module; return import_module('neighbor').value",
        "import importlib, neighbor; return importlib.reload(neighbor).value",
        "import pickle; return pickle.loads(b'cneighbor\\nvalue\\n.')",
    ],
)
def test_a_function_imports_neighbors_early_and_late_and_in_threads(
    tmp_path: Path, statements: str
) -> None:
    text = f"def function():\n    {statements}\n"
    late = load(tmp_path, NEIGHBOR | {"net.py": text})["function"]
    early = load(tmp_path, {"early.py": f"{text}early = function()\n"}, "early.py")["early"]
    results = [late(), early]
    thread = threading.Thread(target=lambda: results.append(late()))
    thread.start()
    thread.join()
    assert results == [2, 2, 2]


@pytest.mark.parametrize(
    ("main", "text", "result"),
    [
        ("net.py", "from pack import parts\nx = parts.value", 2),
        ("net.py", "import pack.parts\nx = pack.parts.value + pack.constant", 5),
        ("net.py", "import pack.parts as parts\nx = parts.value", 2),
        ("net.py", "from pack.parts import *\nx = value", 2),
        ("net.py", "from bare import more\nx = more.value", 4),  # a folder without __init__.py
        ("net.py", "from .neighbor import value as x", 2),
        ("pack/net.py", "from .parts import value as x", 2),
        ("pack/net.py", "from . import parts, constant\nx = parts.value + constant", 5),
        ("pack/net.py", "from parts import value as x", 2),
        ("pack/net.py", "from pack.parts import value as x", 2),
        ("pack/net.py", "from ..neighbor import value as x", 2),
        ("pack/sub/net.py", "from ..parts import value as x", 2),
        ("bare/net.py", "from ..neighbor import value as x", 2),
        ("my-net.v2.py", "from neighbor import value as x", 2),
        ("2d.txt", "from neighbor import value as x", 2),
        ("pack.py", "from neighbor import value as x", 2),  # beside a folder of the same name
    ],
)
def test_packages_and_relative_imports(tmp_path: Path, main: str, text: str, result: int) -> None:
    files = NEIGHBOR | IN_PACKAGE | {"bare/more.py": "value = 4", "pack/sub/__init__.py": ""}
    assert load(tmp_path, files | {main: text}, main)["x"] == result


def test_a_package_may_import_the_file_that_imports_it(tmp_path: Path) -> None:
    files = {
        "pack/__init__.py": "from .net import Net",
        "pack/parts.py": "value = 2",
        "pack/net.py": "from .parts import value\nclass Net:\n    factor = value",
    }
    network = load(tmp_path, files, "pack/net.py")["Net"]
    assert network.factor == 2
    assert sys.modules[network.__module__].Net is network
    assert sys.modules[network.__module__.rpartition(".")[0]].Net is network


def test_a_file_that_imports_nothing_from_its_package_does_not_run_it(tmp_path: Path) -> None:
    files = {"pack/__init__.py": "import no_such_module", "pack/net.py": "x = 1"}
    assert load(tmp_path, files, "pack/net.py")["x"] == 1


def test_libraries_do_not_import_files_that_are_named_like_their_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They import modules when the user's code runs for the first time, or when it calls them."""
    site = tmp_path / "site-packages"
    site.mkdir()
    for name, text in {
        "library.py": "import library_part\n"
        "try:\n    import neighbor\nexcept ImportError:\n    neighbor = None\n"
        "def call():\n    import library_late\n    return library_late.value",
        "library_part.py": "",
        "library_late.py": "value = 'installed'",
    }.items():
        (site / name).write_text(text)
    monkeypatch.syspath_prepend(site)
    hostile = "raise SystemExit('not the library')"
    files = {"library_part.py": hostile, "library_late.py": hostile, "neighbor.py": hostile}
    text = "import library\nx = library.call(), library.neighbor\nlate = library.call"
    names = load(tmp_path / "jobs", files | {"net.py": text})
    assert names["x"] == ("installed", None)
    with sibling_imports(str(tmp_path / "jobs" / "net.py")):
        assert names["late"]() == "installed"
    for name in ("library", "library_part", "library_late"):
        del sys.modules[name]


def test_the_folder_comes_before_installed_modules_for_the_users_code(tmp_path: Path) -> None:
    files = {"statistics.py": "value = 1", "net.py": "import statistics\nx = statistics.value"}
    assert load(tmp_path, files)["x"] == 1
    assert not hasattr(sys.modules.get("statistics"), "value")


def test_modules_of_the_interpreter_come_before_the_folder(tmp_path: Path) -> None:
    files = {"os.py": "1 / 0", "sys.py": "1 / 0", "net.py": "import os, sys\nx = os.sep"}
    assert load(tmp_path, files)["x"] == "/"


def test_a_folder_of_data_does_not_hide_a_library(tmp_path: Path) -> None:
    (tmp_path / "numpy").mkdir()
    assert load(tmp_path, {"net.py": "import numpy\nx = numpy.ones(2).sum()"})["x"] == 2


def test_a_file_named_like_a_library_imports_the_library(tmp_path: Path) -> None:
    files = {"numpy.py": "import numpy\nx = numpy.ones(2).sum()"}
    assert load(tmp_path, files, "numpy.py")["x"] == 2


def test_two_jobs_have_neighbors_of_the_same_name(tmp_path: Path) -> None:
    text = "import neighbor as n\ndef f():\n    import neighbor\n    return neighbor is n, n.v"
    first, second = (
        load(tmp_path / str(value), {"net.py": text, "neighbor.py": f"v = {value}"})["f"]
        for value in (1, 2)
    )
    assert [first(), second(), first()] == [(True, 1), (True, 2), (True, 1)]


def test_each_load_reads_the_neighbors_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytecode does not tell files of the same second and size apart."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    values = []
    for number in (1, 2):
        (tmp_path / "neighbor.py").write_text(f"value = {number}")
        os.utime(tmp_path / "neighbor.py", (1e9, 1e9))
        values.append(load(tmp_path, {"net.py": "from neighbor import value"})["value"])
    assert values == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["neighbor.py", "net.py"]


@pytest.mark.parametrize("position", ["insert(0, ", "append("])
def test_folders_that_the_code_adds_to_the_path_are_its_own(tmp_path: Path, position: str) -> None:
    files = {
        "lib/neighbor.py": "value = 2",
        "nets/net.py": "import sys\nfrom pathlib import Path\n"
        f"sys.path.{position}str(Path(__file__).parents[1] / 'lib'))\n"
        "from neighbor import value\n"
        "def late():\n    import neighbor\n    return neighbor.value",
    }
    names = load(tmp_path, files, "nets/net.py")
    assert (names["value"], names["late"]()) == (2, 2)


def test_pickles_of_a_training_script_find_its_classes(tmp_path: Path) -> None:
    files = IN_PACKAGE | {"net.py": "import pickle\nx = pickle.loads(b'cpack.parts\\nvalue\\n.')"}
    assert load(tmp_path, files)["x"] == 2


def test_a_library_imports_a_neighbor_by_the_name_that_the_code_passes(tmp_path: Path) -> None:
    text = "import pydoc\nx = pydoc.locate('neighbor.value')"
    assert load(tmp_path, NEIGHBOR | {"net.py": text})["x"] == 2


def test_a_child_process_unpickles_functions_and_finds_their_neighbors(tmp_path: Path) -> None:
    text = "def f(n):\n    import neighbor\n    return n * neighbor.value"
    function = load(tmp_path, NEIGHBOR | {"net.py": text})["f"]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(function, 21).result() == 42


def test_sources_are_found_by_inspect(tmp_path: Path) -> None:
    text = "import neighbor\nclass Net:\n    width = 3\n"
    names = load(tmp_path, NEIGHBOR | {"net.py": text})
    assert inspect.getsource(names["Net"]) == "class Net:\n    width = 3\n"
    assert inspect.getsource(names["neighbor"]) == "value = 2\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("from .parts import x", "ModuleNotFoundError: No module named 'parts'"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("from neighbor import x", "ImportError: cannot import name 'x' from 'neighbor' ("),
    ],
)
def test_errors_name_modules_as_the_code_does(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(JobError) as error:
        load(tmp_path, NEIGHBOR | {"net.py": text})
    assert f" raised {problem}" in str(error.value)


def test_a_late_import_of_a_link_that_leads_out_of_the_allowed_paths_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_VARIABLE, str(tmp_path / "jobs"))
    (tmp_path / "neighbor.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    late = load(tmp_path / "jobs", {"net.py": "def f():\n    import neighbor"})["f"]
    (tmp_path / "jobs" / "neighbor.py").symlink_to(tmp_path / "neighbor.py")
    with pytest.raises(JobError) as error:
        late()
    assert error.value.code is ErrorCode.PATH_NOT_ALLOWED
    assert not (tmp_path / "ran").exists()


def test_a_parent_package_outside_the_allowed_paths_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_VARIABLE, str(tmp_path / "pack" / "sub"))
    files = IN_PACKAGE | {
        "pack/sub/__init__.py": "",
        "pack/sub/net.py": "from ..parts import value",
    }
    with pytest.raises(JobError) as error:
        load(tmp_path, IN_PACKAGE | files, "pack/sub/net.py")
    assert error.value.code is ErrorCode.PATH_NOT_ALLOWED


def test_released_modules_are_gone_and_their_functions_still_work(tmp_path: Path) -> None:
    owner, before = UserModules(), user_modules()
    with owner.collect():
        text = "import neighbor\ndef f():\n    return neighbor.value"
        function = load(tmp_path, NEIGHBOR | {"net.py": text})["f"]
    assert user_modules() > before
    owner.release()
    assert user_modules() == before
    assert function() == 2


@pytest.mark.parametrize("path", ["/a/b-c.d_e/n\u00e9t.py", "s3://bucket/net.py", "/_5f/\udcff.py"])
def test_the_name_of_a_package_contains_the_path_of_its_file(path: str) -> None:
    assert _decode(_encode(path)) == path
    assert _encode(path).isidentifier() or path[0] != "/"
