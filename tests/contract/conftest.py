"""Fixtures of the contract of the queue backends."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkq.queue.contract.executor import Executor
from chunkq.queue.registry import open_executor
from tests.harness.queue_backends import CLUSTERS, LOCAL, SHARED, Backend, parameters


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test on the local backends, and tests marked `transport` also on clusters.

    Clusters use the same task table as sqlite, so that only the transport differs. Tests marked
    `processes` need worker processes.
    """
    if "backend" not in metafunc.fixturenames:
        return
    backends = LOCAL
    if metafunc.definition.get_closest_marker("transport"):
        backends = (*LOCAL, *CLUSTERS)
    if metafunc.definition.get_closest_marker("processes"):
        backends = SHARED
    metafunc.parametrize("backend", parameters(backends))


@pytest.fixture
def url(backend: Backend, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return backend.make_url(tmp_path, request)


@pytest.fixture
def queue(url: str) -> Iterator[Executor]:
    executor = open_executor(url)
    yield executor
    executor.close()
