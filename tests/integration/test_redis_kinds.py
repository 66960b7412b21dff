"""Redis servers that are unsupported as queues: every command reports one line with a code."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis as redis_client

from chunkq.errors import ErrorCode, QueueError
from chunkq.queue.backends.rq.connect import translated_errors
from chunkq.queue.contract.executor import EXIT_QUEUE_UNREACHABLE, EXIT_REFUSED, ExitStatus
from chunkq.queue.registry import open_executor
from tests.harness.servers.redis import RedisServer, free_port, redis_server, server_program
from tests.harness.standard_job import StandardJob
from tests.harness.waiting import wait_until


class ClusterNode(RedisServer):
    """A cluster of one node, which has no slots at first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, extra="cluster-enabled yes\n")
        # The cluster bus listens on this port + 10 000.
        port = next(port for port in iter(free_port, None) if port < 50_000)
        self.settings = replace(self.settings, port=port)

    def assign_all_slots(self) -> None:
        with self.client as client:
            for first in range(0, 16384, 4096):
                client.execute_command("CLUSTER", "ADDSLOTS", *range(first, first + 4096))

            def is_up() -> bool:
                return "cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO"))

            wait_until(is_up, "the cluster is up")


class Sentinel(RedisServer):
    """A Sentinel that monitors no server. It requires a configuration file."""

    @property
    def command(self) -> list[str]:
        file = self.settings.folder / "sentinel.conf"
        file.write_text(f"port {self.settings.port}\nbind 127.0.0.1\n")
        return [server_program(), str(file), "--sentinel"]

    @property
    def client(self) -> redis_client.Redis:
        return redis_client.Redis(port=self.settings.port)


@contextmanager
def running(kind: type[RedisServer], *, slots: bool = False) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        server = kind(Path(folder))
        server.start()
        try:
            if isinstance(server, ClusterNode) and slots:
                server.assign_all_slots()
            yield server.url
        finally:
            server.kill()


@contextmanager
def replica() -> Iterator[str]:
    with redis_server(extra="replicaof 127.0.0.1 1\n") as server:
        yield server.url


KINDS: dict[str, tuple[Callable[[], AbstractContextManager[str]], ErrorCode]] = {
    "cluster": (lambda: running(ClusterNode, slots=True), ErrorCode.QUEUE_UNSUPPORTED),
    "cluster without slots": (lambda: running(ClusterNode), ErrorCode.QUEUE_UNSUPPORTED),
    "Sentinel": (lambda: running(Sentinel), ErrorCode.QUEUE_UNSUPPORTED),
    "replica": (replica, ErrorCode.QUEUE_READ_ONLY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_rejects_an_unsupported_server(
    kind: str, standard_job: StandardJob, tmp_path: Path
) -> None:
    server, code = KINDS[kind]
    with server() as url:
        workspace = standard_job.workspace(tmp_path, url=url)
        for command in (
            ("produce", str(workspace.job_file)),
            ("run", str(workspace.job_file)),
            ("work", "--gpus", "none"),
            *([] if kind == "replica" else [("jobs",)]),  # a replica supports reads
        ):
            answer = workspace.call(*command)
            answer.refused(1, code, "chunkq: queue: ", kind.partition(" ")[0])
            assert len(answer.err.splitlines()) == 1
        with pytest.raises(QueueError) as error:
            open_executor(url).check_ready()
        assert error.value.code is code
        assert not workspace.job_folder.exists()


def test_a_database_number_on_a_cluster_is_rejected() -> None:
    with running(ClusterNode, slots=True) as url, pytest.raises(QueueError) as error:
        open_executor(url.replace("/0", "/1"))
    assert error.value.code is ErrorCode.QUEUE_UNSUPPORTED


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        ("ClusterCrossSlotError", ErrorCode.QUEUE_UNSUPPORTED, EXIT_REFUSED),
        ("ClusterDownError", ErrorCode.QUEUE_UNSUPPORTED, EXIT_REFUSED),
        ("BusyLoadingError", ErrorCode.QUEUE_BUSY, EXIT_QUEUE_UNREACHABLE),
        ("ReadOnlyError", ErrorCode.QUEUE_READ_ONLY, EXIT_QUEUE_UNREACHABLE),
        ("MasterDownError", ErrorCode.QUEUE_READ_ONLY, EXIT_QUEUE_UNREACHABLE),
        ("ConnectionError", ErrorCode.QUEUE_UNAVAILABLE, EXIT_QUEUE_UNREACHABLE),
    ],
)
def test_a_worker_waits_only_for_a_server_that_may_become_usable(
    error: str, code: ErrorCode, exit_code: int
) -> None:
    with pytest.raises(QueueError) as raised, translated_errors("redis://host"):
        raise getattr(redis_client.exceptions, error)("message of the server")
    assert raised.value.code is code
    assert ExitStatus.from_error(raised.value).code == exit_code
