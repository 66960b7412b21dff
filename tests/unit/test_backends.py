"""Queue backends and the worker's main function, found by entry points."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chunkq.errors import ErrorCode, JobError, QueueError
from chunkq.queue.backends.hosted.remote_workers import load_serve
from chunkq.queue.backends.inprocess import InProcessExecutor
from chunkq.queue.registry import load_backend, open_executor, schemes
from tests.harness.packages import install_package

Install = Callable[..., None]
SHELF = "[chunkq.queues]\nshelf = chunkq.queue.backends.inprocess:InProcessExecutor\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install distributions with these entry points, and nothing else."""

    def install(*entry_points: str) -> None:
        for number, text in enumerate(entry_points):
            install_package(tmp_path, f"shelf{number}", text)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])

    return install


def test_a_package_adds_a_queue_backend_by_an_entry_point(install: Install) -> None:
    install(SHELF)
    assert isinstance(open_executor("shelf://a"), InProcessExecutor)
    assert schemes()[-1] == "shelf"
    with pytest.raises(JobError, match=r"shelf://.*did you mean 'shelf'") as error:
        open_executor("shlef://a")
    assert error.value.code is ErrorCode.QUEUE_ADDRESS_INVALID


def test_a_package_cannot_replace_a_queue_backend_of_chunkq(install: Install) -> None:
    install("[chunkq.queues]\ninprocess = os:system\n")
    assert load_backend("inprocess") is InProcessExecutor


def test_two_packages_with_one_scheme_are_refused(install: Install) -> None:
    install(SHELF, SHELF)
    with pytest.raises(QueueError, match="'shelf' of the package shelf1"):
        open_executor("shelf://a")


@pytest.mark.parametrize("value", ["os:system", "missing_module:Executor", "builtins:dict"])
def test_a_queue_backend_that_cannot_be_used_is_one_line_with_its_package(
    install: Install, value: str
) -> None:
    install(f"[chunkq.queues]\nshelf = {value}\n")
    with pytest.raises(QueueError, match="shelf0") as error:
        open_executor("shelf://a")
    assert error.value.code is ErrorCode.PACKAGE_MISSING
    assert "\n" not in str(error.value)


def test_processes_of_a_cluster_run_the_worker_that_is_installed(install: Install) -> None:
    install("[chunkq.worker]\nserve = chunkq_worker.worker_main:serve\n")
    from chunkq_worker.worker_main import serve

    assert load_serve() is serve


def test_a_cluster_without_the_worker_package_is_reported(install: Install) -> None:
    install("[console_scripts]\nshelf = shelf:main\n")
    with pytest.raises(QueueError) as error:
        load_serve()
    assert error.value.code is ErrorCode.PACKAGE_MISSING
    assert len(str(error.value).splitlines()) == 1
