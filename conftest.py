"""Test session: temporary folder, its guardian process, and distribution over processes."""

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.harness.durations import DurationsReport
from tests.harness.groups import mark_servers, select_proof, sort_groups, write_groups
from tests.harness.guardian import SessionGuardian

settings.register_profile("steady", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

GUARDIAN = pytest.StashKey[SessionGuardian]()
PROXIES = ("all_proxy", "ftp_proxy", "http_proxy", "https_proxy")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add this project's options."""
    parser.addoption("--proof", help="run the tests of this proof, and no others")
    parser.addoption("--durations-file", type=Path, help="write the durations as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Put all files of the session into one folder that a guardian process removes."""
    if hasattr(config, "workerinput"):
        return  # a pytest-xdist worker inherits the controller's environment
    config.pluginmanager.register(DurationsReport(config.getoption("--durations-file")))
    guardian = SessionGuardian()
    config.stash[GUARDIAN] = guardian
    folder = guardian.folder
    os.environ["TEST_SESSION"] = os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    config.option.basetemp = config.option.basetemp or folder / "tests"
    # Libraries use these folders, which are otherwise in the home folder or the checkout.
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["XDG_CONFIG_HOME"] = str(folder / "config")
    os.environ["KERAS_HOME"] = str(folder / "keras")
    # Ray uses a token that it finds in the home folder for a new cluster, but not for its clients.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")
    if os.environ.get("HYPOTHESIS_PROFILE") != "explore":  # that profile keeps its examples
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
    if " " in sys.prefix:  # torch's compiler and Ray split paths at spaces
        (folder / "venv").symlink_to(sys.prefix)
        sys.executable = str(folder / "venv" / "bin" / Path(sys.executable).name)
    # A shell's background jobs ignore SIGINT, and their child processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Otherwise hundreds of processes would each compile chunkq.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Tests connect only to this machine.
    for name in [name for name in os.environ if name.lower() in PROXIES]:
        del os.environ[name]
    processes = getattr(config.option, "numprocesses", None)
    if processes:
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select and mark tests; distribute them over the processes of `pytest -n`."""
    select_proof(config, items)
    mark_servers(items)
    if hasattr(config, "workerinput"):
        sort_groups(items)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Write the groups of the tests for the scheduler."""
    if hasattr(session.config, "workerinput"):
        write_groups(session.items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Distribute whole groups over the processes."""
    from tests.harness.scheduling import GroupScheduling

    return GroupScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Kill the processes that tests left running, and print their command lines."""
    guardian = config.stash.get(GUARDIAN, None)
    if guardian is not None:
        for line in guardian.close():
            config.get_terminal_writer().line(f"leaked process: {line}", yellow=True)
