"""Measure the queues: filling, memory, draining, a busy device, and the cost of an idle worker.

Run: python benchmarks/queues.py [PART …] [--queue NAME] [--json FILE]. The script starts a Redis
server with chunkq's settings in a temporary folder and stops it at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import redis
from rich.console import Console
from rich.table import Table
from rq import Queue, Retry, SimpleWorker
from rq.serializers import JSONSerializer

from benchmarks.planning import job_over, plan_over
from chunkq.geometry.axes import plain_axes
from chunkq.job.items import Image
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_path import job_folder_of
from chunkq.job.record import JobRecord
from chunkq.job.task_records import Commit
from chunkq.job.tasks import JobId, Task, chunk_name
from chunkq.queue.backends.rq.names import rq_id
from chunkq.queue.backends.rq.server import Server, find_server
from chunkq.queue.contract.executor import Attempt, WorkerOptions
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.registry import open_executor
from chunkq.storage.images import ImageSource

CLUSTERS = ("dask", "ray")
JOB = JobId("s3://lab-volumes/2024/mouse-07/stack-03/nuclei.zarr.chunkq", "0a1b2c3d")
FILLED, ROUNDS = 100_000, 3
BARE_FILLED, BARE_BATCH = 5000, 1000
DRAINED, BARE_DRAINED, PROCESSES, DEPTH = 20_000, 1000, 2, 4
COMMITTED_EDGE = 12
STAGE_SECONDS, STAGED = 0.1, 48
SETTLING_SECONDS = 4.0
IDLE_SECONDS = 2 * WorkerSettings().lease / 3  # two heartbeats, at any phase of the first one
TIMEOUT = 120.0


@dataclass(frozen=True)
class Figure:
    """One measured value, its target, and the value of a bare baseline."""

    part: str
    queue: str
    label: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None
    bare: float | None = None
    ratio: float | None = None

    @property
    def verdict(self) -> str:
        """`met` or `MISSED`; empty without a target."""
        if self.least is None and self.most is None:
            return ""
        good = self.value >= (self.least or 0) and self.value <= (self.most or float("inf"))
        return "met" if good else "MISSED"

    @property
    def target(self) -> str:
        """The target as text; empty without one."""
        if self.least is not None:
            return f"at least {self.least:g}"
        return "" if self.most is None else f"at most {self.most:g}"


class QueueServers:
    """Servers of the queues: SQLite files in a folder, Redis, and clusters that start on first use.

    The Dask scheduler and the Ray head stop when `stack` is closed.
    """

    def __init__(self, folder: Path, port: int, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._clusters: dict[str, str] = {}
        self.redis = redis.Redis(port=port)
        self._redis_url = f"redis://127.0.0.1:{port}/0"
        self._files = iter(range(10**6))

    def empty_queue(self, queue: str) -> str:
        """Return the URL of an empty queue."""
        if queue == "rq":
            self.redis.flushall()
            return self._redis_url
        if queue in CLUSTERS:
            url = self._clusters.get(queue) or self._start(queue)
            with closing(open_executor(url)) as executor:
                for job in executor.jobs():
                    executor.cancel(job)
            return url
        return f"sqlite://{self.folder}/queue-{next(self._files)}.db"

    def _start(self, queue: str) -> str:
        if queue == "dask":
            from chunkq.queue.backends.dask.scheduler import start_scheduler

            process, url = start_scheduler("127.0.0.1")
            self._stack.callback(process.communicate)
            self._stack.callback(process.kill)
        else:
            from chunkq.queue.backends.ray.head import start_head

            head = start_head(alone=True, cpus=PROCESSES, gpus=False)
            address = self._stack.enter_context(head).address  # the token is in the environment
            url = f"ray://auto?address={address}"
        self._clusters[queue] = url
        return url

    def server_process(self, queue: str) -> psutil.Process:
        """Return the process that stores the queue of a cluster."""
        mark = "chunkq.queue.backends.dask.scheduler" if queue == "dask" else "ray::QueueHost"
        [process] = [p for p in psutil.process_iter() if any(mark in word for word in _cmdline(p))]
        return process


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def queue_servers() -> Iterator[QueueServers]:
    """Start Redis with chunkq's settings in a temporary folder; stop all servers at the end."""
    with (
        tempfile.TemporaryDirectory() as name,
        socket.socket() as probe,
        ExitStack() as stack,
    ):
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        folder = Path(name)
        data = folder / "redis"
        data.mkdir()
        log = os.open(data / "log", os.O_WRONLY | os.O_CREAT)
        server = Server(data, port).start(find_server(), log)
        os.close(log)
        try:
            servers = QueueServers(folder, port, stack)
            _wait_for(servers.redis, data / "log")
            # The benchmarks flush it, so it must be the server started above.
            assert servers.redis.info("server")["process_id"] == server.pid, "port already taken"
            yield servers
        finally:
            server.terminate()
            server.wait(TIMEOUT)


def _wait_for(client: redis.Redis, log: Path) -> None:
    limit = time.monotonic() + TIMEOUT
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            if time.monotonic() > limit:
                raise RuntimeError(log.read_text()) from None
            time.sleep(0.05)


def tasks(count: int, job: JobId = JOB) -> Iterator[Task]:
    """Yield tasks in the order of a volume with 64 × 64 chunks per slice."""
    indices = product(range(10**6), range(64), range(64))
    return (Task("infer", *job, 0, index) for index in islice(indices, count))


def fill(url: str, count: int, job: JobId = JOB) -> float:
    """Submit tasks; return the rate (tasks/s)."""
    with closing(open_executor(url)) as executor:
        batch = list(tasks(count, job))
        before = time.perf_counter()
        assert executor.submit(batch) == count
        return count / (time.perf_counter() - before)


def fill_bare_sqlite(url: str, count: int) -> float:
    """Insert the same rows into a plain table in one transaction; return the rate (tasks/s)."""
    import sqlite3

    batch = list(tasks(count))
    with closing(sqlite3.connect(url.removeprefix("sqlite://"))) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE tasks (id TEXT UNIQUE, job TEXT, message TEXT)")
        before = time.perf_counter()
        rows = ((rq_id(task), task.job, task.to_json()) for task in batch)
        database.executemany("INSERT INTO tasks VALUES (?, ?, ?)", rows)
        database.commit()
        return count / (time.perf_counter() - before)


def fill_bare_rq(url: str, count: int, function: str = "chunkq.infer") -> float:
    """Queue the same messages with RQ's `enqueue_many`, three tries each; return the rate."""
    messages = iter(list(tasks(count)))
    with closing(redis.Redis.from_url(url)) as client:
        queue = Queue("bare", connection=client, serializer=JSONSerializer)
        before = time.perf_counter()
        while batch := list(islice(messages, BARE_BATCH)):
            queue.enqueue_many(
                Queue.prepare_data(
                    function, [task.as_dict()], job_id=rq_id(task), timeout=-1, result_ttl=0,
                    failure_ttl=-1, retry=Retry(max=2),
                )
                for task in batch
            )  # fmt: skip
        return count / (time.perf_counter() - before)


def enqueueing(queue: str, servers: QueueServers) -> list[Figure]:
    """Measure `submit` (tasks/s), in each round against the bare baseline."""
    pairs = []
    for _ in range(ROUNDS):
        rate = fill(servers.empty_queue(queue), FILLED)
        if queue == "rq":
            bare = fill_bare_rq(servers.empty_queue(queue), BARE_FILLED)
        else:  # tables of clusters are in memory, so SQLite is a bound, not an equal
            bare = fill_bare_sqlite(servers.empty_queue("sqlite"), FILLED)
        pairs.append((rate, bare))
    return [
        Figure(
            "enqueue", queue, f"submit {FILLED:,} tasks", statistics.median(a for a, _ in pairs),
            "tasks/s", least=7000 if queue == "rq" else None,
            bare=statistics.median(b for _, b in pairs),
            ratio=statistics.median(a / b for a, b in pairs),
        )
    ]  # fmt: skip


def memory(queue: str, servers: QueueServers) -> list[Figure]:
    """Measure the size of queued tasks: Redis's memory against RQ's, and disk; SQLite's disk."""
    if queue == "sqlite":
        with closing(open_executor(servers.empty_queue(queue))) as executor:
            executor.submit(tasks(FILLED))
            database = executor.url.removeprefix("sqlite://")
            written = _bytes_below(Path(database).parent, Path(database).name)
        return [_per_task("disk of queued tasks, the log included", queue, written, FILLED)]
    if queue in CLUSTERS:
        url = servers.empty_queue(queue)
        process = servers.server_process(queue)
        before = process.memory_info().rss
        fill(url, FILLED)
        size = process.memory_info().rss - before
        return [
            _per_task("memory of queued tasks, in the process that keeps them", queue, size, FILLED)
        ]

    def used() -> int:
        return int(servers.redis.info("memory")["used_memory"])

    url = servers.empty_queue(queue)
    empty = used()
    fill_bare_rq(url, BARE_FILLED)
    bare = (used() - empty) / BARE_FILLED
    servers.empty_queue(queue)
    empty = used()
    with closing(open_executor(url)) as executor:
        executor.submit(tasks(FILLED))
        figure = _per_task("memory of queued tasks", queue, used() - empty, FILLED)
    figure = replace(figure, most=700, bare=bare, ratio=figure.value / bare)
    servers.redis.bgrewriteaof()
    _until(lambda: not servers.redis.info("persistence")["aof_rewrite_in_progress"])
    disk = _bytes_below(servers.folder / "redis", "")
    return [figure, _per_task("disk of queued tasks, log rewritten", queue, disk, FILLED)]


def _per_task(label: str, queue: str, amount: int, count: int) -> Figure:
    return Figure("memory", queue, label, amount / count, "B/task")


def _bytes_below(folder: Path, start: str) -> int:
    files = (path for path in folder.rglob(f"{start}*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def _until(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + TIMEOUT
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.05)


def run_together(count: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Run a function in new processes that start at once; return their answers.

    The function receives a barrier to wait at when it is ready, and a queue for its answer.
    """
    context = get_context("spawn")
    barrier, answers = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=work, args=(barrier, answers, *arguments)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    try:
        return [answers.get(timeout=TIMEOUT) for _ in processes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def drain(barrier: Any, answers: Any, url: str) -> None:
    """Run a queue of tasks that do nothing until it is empty; answer with start and end."""
    executor = open_executor(url)
    barrier.wait(TIMEOUT)
    started = time.time()
    executor.run_tasks(
        lambda task, attempt: None, WorkerOptions(f"bench:cpu:{os.getpid()}", DEPTH, burst=True)
    )
    answers.put((started, time.time()))


def drain_bare_rq(barrier: Any, answers: Any, url: str) -> None:
    """Run a queue with RQ's SimpleWorker until it is empty; answer with start and end."""
    client = redis.Redis.from_url(url)
    worker = SimpleWorker(["bare"], connection=client, serializer=JSONSerializer)
    barrier.wait(TIMEOUT)
    started = time.time()
    worker.work(burst=True, logging_level="WARNING")
    answers.put((started, time.time()))


def draining(queue: str, servers: QueueServers) -> list[Figure]:
    """Measure the rate (tasks/s) at which two processes of depth 4 reserve and ack tasks."""

    def rate(count: int, work: Callable[..., None]) -> float:
        spans = run_together(PROCESSES, work, url)
        return count / (max(end for _, end in spans) - min(start for start, _ in spans))

    url, bare = servers.empty_queue(queue), None
    if queue == "rq":
        fill_bare_rq(url, BARE_DRAINED, "operator.not_")
        bare = rate(BARE_DRAINED, drain_bare_rq)
        servers.empty_queue(queue)
    fill(url, DRAINED)
    measured = rate(DRAINED, drain)
    label = f"{DRAINED:,} tasks that do nothing, {PROCESSES} processes, depth {DEPTH}"
    return [
        Figure("drain", queue, label, measured, "tasks/s", least=300, bare=bare,
               ratio=None if bare is None else measured / bare)
    ]  # fmt: skip


def working(queue: str, servers: QueueServers) -> list[Figure]:
    """Measure `chunkq work` on chunks and blocks with commit records, less its start-up time.

    The worker reads the ledger and counts the blocks of each chunk; it computes nothing.
    """
    plan, url = plan_over(COMMITTED_EDGE), servers.empty_queue(queue)
    job = JobFolder(job_folder_of(str(servers.folder / f"{queue}.zarr")))
    source = ImageSource(
        "zarr", "/missing/in.zarr", plain_axes(plan.volume.shape), plan.volume.dtype
    )
    record = job.create_record(
        JobRecord(job_over(), (Image(0, "", (source,)),), {}, (("",),), "0a1b2c3d")
    )
    indices = list(plan.active_indices())
    for kind in ("infer", "finalize"):
        folder = Path(job.ledger(record.epoch).path) / "done" / kind / "0"
        folder.mkdir(parents=True)
        for index in indices:
            commit = Commit(kind, 0, index, 1, "bench", 0.0, 1.0)
            (folder / chunk_name(index)).write_bytes(commit.to_json(record.epoch))

    def work() -> float:
        command = [sys.executable, "-m", "chunkq", "work", "--queue", url, "--gpus", "none"]
        command += ["-w", str(PROCESSES), "--depth", str(DEPTH), "--burst", "--quiet"]
        before = time.perf_counter()
        subprocess.run(command, check=True)
        return time.perf_counter() - before

    start_seconds = work()
    with closing(open_executor(url)) as executor:
        executor.submit(Task("infer", job.path, record.epoch, 0, index) for index in indices)
        seconds = work()
        assert executor.jobs() == {}
    shutil.rmtree(job.path)
    rate = len(indices) / (seconds - start_seconds)
    label = f"`chunkq work -w {PROCESSES}`, {len(indices):,} chunks committed before"
    return [Figure("work", queue, label, rate, "tasks/s")]


class StagedChunks:
    """Handler that sleeps for reading, the network and writing, the network in a device thread."""

    def __init__(self) -> None:
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self.spans: list[tuple[float, float]] = []

    def __call__(self, task: Task, attempt: Attempt) -> None:
        time.sleep(STAGE_SECONDS)
        self._device.submit(self._network).result()
        time.sleep(STAGE_SECONDS)

    def _network(self) -> None:
        before = time.perf_counter()
        time.sleep(STAGE_SECONDS)
        self.spans.append((before, time.perf_counter()))


def run_stages(barrier: Any, answers: Any, url: str, depths: Sequence[int]) -> None:
    """Run the same chunks at each depth; answer with the device's busy shares."""
    shares = []
    for depth in depths:
        chunks, executor = StagedChunks(), open_executor(url)
        executor.submit(tasks(STAGED))
        before = time.perf_counter()
        executor.run_tasks(chunks, WorkerOptions(f"bench:cpu:{depth}", depth, burst=True))
        total = time.perf_counter() - before
        assert len(chunks.spans) == STAGED
        executor.close()
        busy = sum(end - start for start, end in chunks.spans)
        shares.append((busy / (chunks.spans[-1][1] - chunks.spans[0][0]), busy / total))
    answers.put(shares)


def device(queue: str, servers: QueueServers) -> list[Figure]:
    """Measure the busy share of the device at depths 1 to 4 of one worker process.

    Between stages: busy seconds / (end of the last network stage - start of the first). The share
    of the complete run includes reading the first chunk, writing the last and polling the queue.
    """
    depths = range(1, DEPTH + 1)
    ((shares),) = run_together(1, run_stages, servers.empty_queue(queue), depths)
    figures = []
    for depth, (between, total) in zip(depths, shares, strict=True):
        least = 0.97 if depth == DEPTH else None
        figures += [
            Figure("device", queue, f"busy between stages, depth {depth}", between, "", least),
            Figure("device", queue, f"busy in the whole run, depth {depth}", total, ""),
        ]
    return figures


def idle_worker(barrier: Any, answers: Any, url: str) -> None:
    """Wait on an empty queue; answer with the resources used per second."""
    executor = open_executor(url)
    options = WorkerOptions(f"bench:cpu:{os.getpid()}", DEPTH)
    worker = threading.Thread(target=executor.run_tasks, args=(lambda task, attempt: None, options))
    worker.start()
    time.sleep(SETTLING_SECONDS)
    before = _resources(url)
    time.sleep(IDLE_SECONDS)
    after = _resources(url)
    options.stop.set()
    worker.join()
    answers.put({label: (after[label] - before[label]) / IDLE_SECONDS for label in after})


def _resources(url: str) -> dict[str, float]:
    """Return the resources that this process and its Redis have used, without this query."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = {"processor": (used.ru_utime + used.ru_stime) * 1000}
    if url.startswith("redis"):
        with closing(redis.Redis.from_url(url)) as client:
            commands, persistence = client.info("commandstats"), client.info("persistence")
        calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in commands.items()}
        excluded = ("info", "client|setinfo", "client", "hello")
        spent["commands"] = sum(count for name, count in calls.items() if name not in excluded)
        spent["scripts"] = calls.get("evalsha", 0)
        spent["log"] = persistence["aof_current_size"]
    return spent


def idle(queue: str, servers: QueueServers) -> list[Figure]:
    """Measure the cost of one idle worker, at its longest polling interval."""
    (spent,) = run_together(1, idle_worker, servers.empty_queue(queue))
    names = {
        "processor": ("processor of an idle worker, depth {}", "ms/s"),
        "commands": (
            "Redis commands of an idle worker, depth {}, including those of scripts",
            "1/s",
        ),
        "scripts": ("scripts among them", "1/s"),
        "log": ("growth of the Redis log", "B/s"),
    }
    return [
        Figure("idle", queue, names[label][0].format(DEPTH), value, names[label][1])
        for label, value in spent.items()
    ]


PARTS: dict[str, Callable[[str, QueueServers], list[Figure]]] = {
    "memory": memory,
    "enqueue": enqueueing,
    "drain": draining,
    "work": working,
    "device": device,
    "idle": idle,
}
QUEUES = ("sqlite", "rq", *CLUSTERS)


def table(figures: Sequence[Figure]) -> Table:
    """Return a table with one row per figure."""
    rows = Table("part", "queue", "label", title="Queues")
    for name in ("value", "unit", "target", "", "bare", "ratio"):
        rows.add_column(name, justify="right" if name in ("value", "bare", "ratio") else "left")
    for f in figures:
        bare = "" if f.bare is None else _number(f.bare)
        ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
        row = (f.part, f.queue, f.label, _number(f.value), f.unit, f.target, f.verdict, bare, ratio)
        rows.add_row(*row)
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Measure, print a table, and write JSON if requested."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}")
    options.add_argument("--queue", choices=QUEUES)
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if unknown := set(arguments.parts) - set(PARTS):
        options.error(f"invalid part {', '.join(sorted(unknown))}; use one of {', '.join(PARTS)}")
    figures: list[Figure] = []
    before = time.perf_counter()
    with queue_servers() as servers:
        for part in arguments.parts or PARTS:
            for queue in QUEUES if arguments.queue is None else (arguments.queue,):
                figures += PARTS[part](queue, servers)
    Console(width=150).print(table(figures))
    print(f"{time.perf_counter() - before:.0f} s in total")
    if arguments.json:
        rows = [{**asdict(f), "verdict": f.verdict} for f in figures]
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
