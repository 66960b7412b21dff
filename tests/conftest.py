"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest

from chunkq.queue.backends.dask.scheduler import start_scheduler
from chunkq.queue.registry import open_executor
from tests.harness.network_namespace import NetworkNamespace
from tests.harness.servers.ray import ray_cluster
from tests.harness.servers.redis import RedisServer, redis_server


@pytest.fixture(scope="session")
def redis_of_session() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis(redis_of_session: RedisServer) -> RedisServer:
    """An empty Redis."""
    with redis_of_session.client as client:
        client.flushall()
    return redis_of_session


@pytest.fixture(scope="session")
def dask_of_session() -> Iterator[str]:
    process, url = start_scheduler("127.0.0.1")
    yield url
    process.kill()
    process.communicate()


@pytest.fixture
def dask(dask_of_session: str) -> str:
    """The URL of an empty queue in a Dask scheduler."""
    empty(dask_of_session)
    return dask_of_session


@pytest.fixture(scope="session")
def ray_of_session() -> Iterator[tuple[NetworkNamespace, str]]:
    network = NetworkNamespace()
    with ray_cluster(network) as url:
        yield network, url
    network.close()


@pytest.fixture
def ray(ray_of_session: tuple[NetworkNamespace, str]) -> Iterator[str]:
    """The URL of an empty queue in a Ray cluster; the test runs in the cluster's network."""
    network, url = ray_of_session
    with network.inside():
        empty(url)
        yield url


def empty(url: str) -> None:
    """Cancel every job of a queue."""
    executor = open_executor(url)
    for job in executor.jobs():
        executor.cancel(job)
    executor.close()
