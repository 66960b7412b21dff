"""Queue backends and the worker's main function, found by entry points."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chunkq.errors import ErrorCode, JobError, QueueError
from chunkq.queue.backends.hosted.remote_workers import load_serve
from chunkq.queue.backends.inprocess import InProcessExecutor
from chunkq.queue.registry import load_backend, open_executor, schemes

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with these entry points, and nothing else."""

    def install(entry_points: str) -> None:
        info = tmp_path / "shelf-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])

    return install


def test_a_package_adds_a_queue_backend_by_an_entry_point(install: Install) -> None:
    install("[chunkq.queues]\nshelf = chunkq.queue.backends.inprocess:InProcessExecutor\n")
    assert isinstance(open_executor("shelf://a"), InProcessExecutor)
    assert schemes()[-1] == "shelf"
    with pytest.raises(JobError, match=r"shelf://.*did you mean 'shelf'") as error:
        open_executor("shlef://a")
    assert error.value.code is ErrorCode.QUEUE_ADDRESS_INVALID


def test_a_package_cannot_replace_a_queue_backend_of_chunkq(install: Install) -> None:
    install("[chunkq.queues]\ninprocess = os:system\n")
    assert load_backend("inprocess") is InProcessExecutor


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
