"""A day of a fleet: its Redis fails in every way, its workers are killed, suspended, replaced."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from chunkq.errors import ErrorCode
from chunkq.queue.backends.rq.connect import PASSWORD_VARIABLE
from chunkq.queue.contract.executor import MAX_ATTEMPTS
from chunkq.queue.contract.settings import WorkerSettings
from tests.harness.processes import RunningCommand
from tests.harness.servers.failover import PASSWORD, RedisPair, redis_pair
from tests.harness.volumes import write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace, output_files, run_inline

NETWORK = """
import os
import time

import numpy as np


def net(batch):
    if "FLEET_TRACE" in os.environ:
        file = os.open(os.environ["FLEET_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{time.time():.3f} {os.environ['FLEET_NODE']}\\n".encode())
        os.close(file)
    time.sleep(float(os.environ.get("FLEET_SLEEP", 0)))
    x = np.asarray(batch, np.float32) / 100
    return np.concatenate([x, 1 - x], axis=1)
"""
PATCH = 8
DEPTH = 3
LEASE = WorkerSettings().lease
NODES = 3
SETTINGS = '{"server_answer": 3, "restart_delay": 0.2, "early_death": 0}'
PAUSE = 5.0
"""Time (s) without a batch on a node that is a pause. Redis is away for longer."""
KILLED = re.compile(r"worker (\S+) was killed by signal 9.*; (\d+) chunks? requeued")
LATER = re.compile(r"worker (\S+): (\d+) chunks? requeued")
CODED_LINE = re.compile(r"^(\d\d:\d\d:\d\d) \S+ queue: .*\[queue_\w+\]$", re.MULTILINE)


@dataclass
class Node:
    """A `chunkq work` of the fleet, and the times (s, Unix) when the test disturbed it."""

    name: str
    command: RunningCommand
    disturbed: list[tuple[float, float]] = field(default_factory=list)
    is_lost: bool = False

    @property
    def worker(self) -> psutil.Process:
        """The worker process."""
        module = "chunkq_worker.worker_process"

        def find() -> psutil.Process | None:
            children = [psutil.Process(pid) for pid in self.command.children()]
            return next((child for child in children if module in child.cmdline()), None)

        process = wait_until(find, "the node has a worker process")
        assert process is not None
        return process

    def reports(self, code: ErrorCode) -> int:
        """Return how often a worker has logged a problem of the queue."""
        return len(re.findall(rf" queue: .*\[{code}\]$", self.command.output(), re.MULTILINE))

    @contextmanager
    def disturbance(self) -> Iterator[None]:
        """Note that the node has a reason to pause."""
        start = time.time()
        yield
        self.disturbed.append((start, time.time()))


class Fleet:
    """Nodes that work on one job, which come and go."""

    def __init__(self, folder: Path, pair: RedisPair, chunks: int, stack: ExitStack) -> None:
        self.folder, self.pair, self.chunks = folder, pair, chunks
        self._stack = stack
        self.nodes: list[Node] = []
        self.gone: list[Node] = []
        self.password = folder / "password"
        self.password.write_text(PASSWORD)
        environment = {PASSWORD_VARIABLE: str(self.password), "CHUNKQ_WORKER_SETTINGS": SETTINGS}
        self.workspace = Workspace(folder, job_values(folder, chunks), environment, pair.url)
        self.lost_leases = 0
        """How many chunks lost an attempt at most, besides those that logs count."""

    def join(self) -> Node:
        """Start a node."""
        name = f"node{len(self.nodes) + len(self.gone)}"
        trace = {"FLEET_TRACE": str(self.folder / "trace"), "FLEET_NODE": name}
        command = self.workspace.start(
            "work", "--gpus", "none", "--depth", str(DEPTH), FLEET_SLEEP="0.3", **trace
        )
        self.nodes.append(Node(name, self._stack.enter_context(command)))
        return self.nodes[-1]

    def done(self) -> int:
        folder = self.workspace.done_folder()
        return len(os.listdir(folder)) if folder.exists() else 0

    def wait_for_progress(self, share: float) -> None:
        """Wait until a share of all chunks more is done than now; some must be left."""
        goal = self.done() + max(1, round(share * self.chunks))
        assert goal < self.chunks
        wait_until(lambda: self.done() >= goal, f"{goal} chunks are done", timeout=300)

    @contextmanager
    def reported(self, code: ErrorCode) -> Iterator[None]:
        """Wait, at the end, until every node has reported a problem of the queue once more.

        A worker that starts while the queue is away does not wait for it, but is started again.
        """
        for node in self.nodes:
            wait_until(lambda node=node: " done in " in node.command.output(), "each node works")
        before = {node.name: node.reports(code) for node in self.nodes}
        yield
        for node in self.nodes:
            wait_until(
                lambda node=node: node.reports(code) > before[node.name],
                f"{node.name} reports {code}: {node.command.output()[-2000:]}",
            )

    # ------------------------------------------------------------------------- the queue

    def restart_of_redis(self) -> None:
        with self.reported(ErrorCode.QUEUE_UNAVAILABLE):
            self.pair.primary.kill()
        self.pair.restart_primary()

    def failover(self) -> None:
        with self.reported(ErrorCode.QUEUE_UNAVAILABLE):
            self.pair.primary.kill()
        self.pair.promote()
        self.pair.restart_replica()

    def failover_with_losses(self) -> None:
        """Fail over to a replica that lacks the last chunks."""
        self.pair.detach()
        self.wait_for_progress(0.01)
        self.failover()

    def failback(self) -> None:
        with self.reported(ErrorCode.QUEUE_READ_ONLY):
            self.pair.point_to_replica()
        self.pair.exchange()

    def full_disk(self) -> None:
        with self.reported(ErrorCode.QUEUE_FULL):
            file = self.pair.fill_disk()
        file.unlink()
        self.pair.rewrite_disk()

    def too_many_clients(self) -> None:
        with self.pair.primary.client as client:
            with self.reported(ErrorCode.QUEUE_UNAVAILABLE):
                client.config_set("maxclients", 1)
                client.client_kill_filter(user="default")
            client.config_set("maxclients", 1000)

    def new_password(self) -> None:
        with self.reported(ErrorCode.QUEUE_DENIED):
            self.pair.set_password("second")
        self.password.write_text("second")

    def eviction(self) -> None:
        """Let Redis delete keys until chunks are missing, then queue them again."""
        with self.pair.primary.client as client:
            client.config_set("maxmemory-policy", "allkeys-random")
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory", int(0.9 * used))
            wait_until(lambda: client.info("stats")["evicted_keys"] > 20, "keys are deleted")
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")
        start = time.time()
        self.workspace.produce("--resume")
        for node in self.nodes:
            node.disturbed.append((start, time.time()))

    # ------------------------------------------------------------------------- the nodes

    def kill_a_worker(self) -> None:
        node = self.nodes[0]
        before = len(KILLED.findall(node.command.output()))
        with node.disturbance():
            node.worker.kill()
            wait_until(
                lambda: len(KILLED.findall(node.command.output())) > before, "it is replaced"
            )

    def lose_a_node(self) -> None:
        node = self.nodes.pop(0)
        self.gone.append(node)
        node.is_lost = True
        self.lost_leases += DEPTH
        node.command.children()
        node.command.process.kill()
        self.join()

    def suspend_briefly(self) -> None:
        node = self.nodes[1]
        with node.disturbance():
            node.worker.suspend()
            time.sleep(2)  # part of the disturbance
            node.worker.resume()

    def suspend_for_long(self) -> None:
        node = self.nodes[1]
        self.lost_leases += DEPTH
        with node.disturbance():
            node.worker.suspend()
            time.sleep(LEASE + 5)  # part of the disturbance
            node.worker.resume()

    def preempt(self) -> None:
        node = self.nodes.pop(0)
        self.gone.append(node)
        node.command.process.send_signal(signal.SIGTERM)
        assert node.command.wait().code == 0, node.command.output()
        self.join()

    # ------------------------------------------------------------------------- accounts

    def lost_attempts(self) -> int:
        """Return how many attempts the chunks have lost, committed or still on the queue."""
        commits = sum(commit.attempt - 1 for commit in self.workspace.commits())
        with self.pair.primary.client as client:
            left = [
                int(client.hget(key, "retries_left") or MAX_ATTEMPTS - 1)
                for key in client.scan_iter("rq:job:*", count=1000)
            ]
        return commits + sum(MAX_ATTEMPTS - 1 - retries for retries in left)

    def explained_attempts(self) -> int:
        """Return how many attempts kills and suspensions may have cost, from logs and by count."""
        logs = "\n".join(node.command.output() for node in (*self.nodes, *self.gone))
        killed = {worker: int(count) for worker, count in KILLED.findall(logs)}
        later = sum(int(count) for worker, count in LATER.findall(logs) if worker in killed)
        return sum(killed.values()) + later + self.lost_leases

    def story(self) -> str:
        """Return the logs of all nodes without the lines of chunks that are done."""
        lines = []
        for node in (*self.nodes, *self.gone):
            output = node.command.output().splitlines()
            lines += [f"{node.name}: {line}" for line in output if " done in " not in line]
        return "\n".join(lines)

    def unexplained_pauses(self) -> list[str]:
        """Return the pauses of nodes that neither a line of their log nor the test explains."""
        times: dict[str, list[float]] = {}
        for line in (self.folder / "trace").read_text().splitlines():
            moment, name = line.split()
            times.setdefault(name, []).append(float(moment))
        pauses = []
        for node in (*self.nodes, *self.gone):
            reasons = [*node.disturbed, *logged_times(node, times[node.name][0])]
            moments = sorted(times[node.name])
            for start, end in pairwise(moments):
                if end - start > PAUSE and not any(
                    first <= end + 1 and last >= start - 1 for first, last in reasons
                ):
                    pauses.append(
                        f"{node.name}: {end - start:.1f} s from {datetime.fromtimestamp(start)}"
                    )
        return pauses


def logged_times(node: Node, start: float) -> list[tuple[float, float]]:
    """Return the times (s, Unix) of the lines of a node's log about the queue."""
    first, times = datetime.fromtimestamp(start), []
    for text in CODED_LINE.findall(node.command.output()):
        clock = datetime.strptime(text, "%H:%M:%S").time()
        moment = datetime.combine(first.date(), clock)
        moment += timedelta(days=moment < first - timedelta(minutes=1))
        times.append((moment.timestamp(), moment.timestamp() + 1))
    return times


def job_values(folder: Path, chunks: int) -> dict[str, object]:
    """Write input and network of a job with so many chunks, which overlap along the last axis."""
    rows = 20 if chunks >= 1000 else 5
    volume = np.random.default_rng(0).integers(
        1, 100, (PATCH, rows * PATCH, chunks // rows * PATCH), dtype=np.uint8
    )
    write_zarr(folder / "in.zarr", volume, (PATCH,) * 3)
    (folder / "net.py").write_text(NETWORK)
    return {
        "input": str(folder / "in.zarr"),
        "output": str(folder / "out.zarr"),
        "inference_type": "sliding_window",
        "strides": [PATCH, PATCH, PATCH // 2],
        "combine": "weighted_avg",
        "chunksize": [PATCH] * 3,
        "storage_chunks": [PATCH // 2] * 3,
        "threads": 1,
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(folder / "net.py"),
            "class_name": "net",
            "model_input_shape": [1, PATCH, PATCH, PATCH],
            "model_output_shape": [2, PATCH, PATCH, PATCH],
            "max_batch_size": 2,
        },
    }


@contextmanager
def fleet_at_work(folder: Path, chunks: int) -> Iterator[Fleet]:
    """Yield a fleet whose nodes have begun."""
    with redis_pair(folder) as pair, ExitStack() as stack:
        fleet = Fleet(folder, pair, chunks, stack)
        fleet.workspace.produce()
        for _ in range(NODES):
            fleet.join()
        fleet.wait_for_progress(0.02)
        yield fleet


def finish(fleet: Fleet) -> None:
    """Wait for the last chunk; compare bytes, attempts and pauses with what explains them."""
    workspace = fleet.workspace
    wait_until(lambda: fleet.done() == fleet.chunks, "all chunks are done", timeout=600)
    assert fleet.lost_attempts() <= fleet.explained_attempts(), fleet.story()
    assert workspace.failures() == []
    assert fleet.unexplained_pauses() == []
    for node in fleet.nodes:
        node.command.process.send_signal(signal.SIGTERM)
        assert node.command.wait().code == 0, node.command.output()
        assert "Traceback" not in node.command.output()
    workspace.finalize().ok()
    quiet = fleet.folder / "quiet.zarr"
    run_inline({**workspace.values, "output": str(quiet)})
    assert workspace.stored() == output_files(quiet)


@pytest.mark.proof("fleet")
def test_a_day_of_a_fleet_costs_no_attempt_and_no_byte(tmp_path: Path) -> None:
    with fleet_at_work(tmp_path, 2000) as fleet:
        for fault in (
            fleet.restart_of_redis,
            fleet.failover,
            fleet.failback,
            fleet.failover_with_losses,
            fleet.full_disk,
            fleet.too_many_clients,
            fleet.new_password,
            fleet.eviction,
        ):
            fault()
            fleet.wait_for_progress(0.02)
            lost = fleet.lost_attempts()
            assert lost == 0, f"{fault.__name__}\n{fleet.story()}"
        for fault in (
            fleet.kill_a_worker,
            fleet.suspend_briefly,
            fleet.restart_of_redis,
            fleet.lose_a_node,
            fleet.failover,
            fleet.preempt,
            fleet.failback,
            fleet.suspend_for_long,
            fleet.kill_a_worker,
            fleet.full_disk,
            fleet.too_many_clients,
            fleet.lose_a_node,
            fleet.eviction,
            fleet.join,
        ):
            fault()
            fleet.wait_for_progress(0.02)
        finish(fleet)


def test_a_bad_hour_of_a_fleet_costs_no_attempt_and_no_byte(tmp_path: Path) -> None:
    with fleet_at_work(tmp_path, 100) as fleet:
        fleet.failover()
        fleet.new_password()
        assert fleet.lost_attempts() == 0
        fleet.kill_a_worker()
        finish(fleet)
