"""The queues: filling, memory, draining, a device kept busy, and what an idle worker costs.

Run: python benchmarks/queues.py [PART …] [--queue NAME] [--json FILE]. Redis is a server of its
own, with the shipped settings, in a temporary folder; it ends with the run.
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

from benchmarks.planning import job_over
from chunkq.executors import open_executor
from chunkq.executors.base import Attempt, WorkerOptions
from chunkq.executors.rq.server import Server, find_server
from chunkq.executors.settings import WorkerSettings
from chunkq.ledger import ITEM, Commit, JobFolder, folder_of
from chunkq.ome import Space
from chunkq.record import JobRecord
from chunkq.stores import Source
from chunkq.tasks import Task, chunk_name

CLUSTERS = ("dask", "ray")
JOB = "s3://lab-volumes/2024/mouse-07/stack-03/nuclei.zarr.chunkq"
FILLED, ROUNDS = 100_000, 3
BARE_FILLED, BARE_BATCH = 5000, 1000
DRAINED, BARE_DRAINED, PROCESSES, DEPTH = 20_000, 1000, 2, 4
COMMITTED_EDGE = 12
STAGE_SECONDS, STAGED = 0.1, 48
SETTLING_SECONDS = 4.0
IDLE_SECONDS = 2 * WorkerSettings().lease / 3  # two heartbeats, wherever the first one falls
PATIENCE = 120.0


@dataclass(frozen=True)
class Figure:
    """One measured value, what it is asked to be, and the same of a bare baseline."""

    part: str
    queue: str
    what: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None
    bare: float | None = None
    ratio: float | None = None

    @property
    def verdict(self) -> str:
        if self.least is None and self.most is None:
            return ""
        good = self.value >= (self.least or 0) and self.value <= (self.most or float("inf"))
        return "met" if good else "MISSED"

    @property
    def target(self) -> str:
        if self.least is not None:
            return f"at least {self.least:g}"
        return "" if self.most is None else f"at most {self.most:g}"


class Places:
    """Where the queues are: fresh SQLite files in a folder, the others emptied each time.

    The Dask scheduler and the Ray head are started when first asked for, and end with `stack`.
    """

    def __init__(self, folder: Path, port: int, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._clusters: dict[str, str] = {}
        self.redis = redis.Redis(port=port)
        self._redis_url = f"redis://127.0.0.1:{port}/0"
        self._files = iter(range(10**6))

    def fresh(self, queue: str) -> str:
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
            from chunkq.executors.dask_scheduler import start_scheduler

            process, url = start_scheduler("127.0.0.1")
            self._stack.callback(process.communicate)
            self._stack.callback(process.kill)
        else:
            from chunkq.executors.ray_head import start_head

            address = self._stack.enter_context(start_head(alone=True, cpus=PROCESSES, gpus=False))
            url = f"ray://auto?address={address}"
        self._clusters[queue] = url
        return url

    def keeper(self, queue: str) -> psutil.Process:
        """Return the process that keeps a cluster's queue."""
        mark = "chunkq.executors.dask_scheduler" if queue == "dask" else "ray::QueueHost"
        [found] = [p for p in psutil.process_iter() if any(mark in word for word in _words(p))]
        return found


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def places() -> Iterator[Places]:
    """A folder and a Redis server with the shipped settings; both are gone at the end."""
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
            found = Places(folder, port, stack)
            _wait_for(found.redis, data / "log")
            # It is emptied again and again: never somebody else's.
            assert found.redis.info("server")["process_id"] == server.pid, "port already taken"
            yield found
        finally:
            server.terminate()
            server.wait(PATIENCE)


def _wait_for(client: redis.Redis, log: Path) -> None:
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            if time.monotonic() > limit:
                raise RuntimeError(log.read_text()) from None
            time.sleep(0.05)


def tasks(count: int, job: str = JOB) -> Iterator[Task]:
    """Tasks as a volume of 64 × 64 chunks a slice has them."""
    indices = product(range(10**6), range(64), range(64))
    return (Task("infer", job, index) for index in islice(indices, count))


def fill(url: str, count: int, job: str = JOB) -> float:
    """Submit tasks; returns how many a second."""
    with closing(open_executor(url)) as executor:
        given = list(tasks(count, job))
        before = time.perf_counter()
        assert executor.submit(given) == count
        return count / (time.perf_counter() - before)


def fill_bare_sqlite(url: str, count: int) -> float:
    """Put the same rows into a plain table in one transaction."""
    import sqlite3

    given = list(tasks(count))
    with closing(sqlite3.connect(url.removeprefix("sqlite://"))) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE tasks (id TEXT UNIQUE, job TEXT, message TEXT)")
        before = time.perf_counter()
        rows = ((task.id, task.job, task.to_json()) for task in given)
        database.executemany("INSERT INTO tasks VALUES (?, ?, ?)", rows)
        database.commit()
        return count / (time.perf_counter() - before)


def fill_bare_rq(url: str, count: int, function: str = "chunkq.infer") -> float:
    """Queue the same messages with RQ's own `enqueue_many`; every job may be tried three times."""
    given = iter(list(tasks(count)))
    with closing(redis.Redis.from_url(url)) as client:
        queue = Queue("bare", connection=client, serializer=JSONSerializer)
        before = time.perf_counter()
        while batch := list(islice(given, BARE_BATCH)):
            queue.enqueue_many(
                Queue.prepare_data(
                    function, [task.as_dict()], job_id=task.id, timeout=-1, result_ttl=0,
                    failure_ttl=-1, retry=Retry(max=2),
                )
                for task in batch
            )  # fmt: skip
        return count / (time.perf_counter() - before)


def enqueueing(queue: str, at: Places) -> list[Figure]:
    """Tasks a second of `submit`, round by round beside the bare baseline."""
    pairs = []
    for _ in range(ROUNDS):
        ours = fill(at.fresh(queue), FILLED)
        if queue == "rq":
            bare = fill_bare_rq(at.fresh(queue), BARE_FILLED)
        else:  # the table of the others lies in memory, so that this is a bound, no equal
            bare = fill_bare_sqlite(at.fresh("sqlite"), FILLED)
        pairs.append((ours, bare))
    return [
        Figure(
            "enqueue", queue, f"submit {FILLED:,} tasks", statistics.median(a for a, _ in pairs),
            "tasks/s", least=7000 if queue == "rq" else None,
            bare=statistics.median(b for _, b in pairs),
            ratio=statistics.median(a / b for a, b in pairs),
        )
    ]  # fmt: skip


def memory(queue: str, at: Places) -> list[Figure]:
    """What queued tasks take: Redis's memory, beside RQ's own, and its disk; SQLite's disk."""
    if queue == "sqlite":
        with closing(open_executor(at.fresh(queue))) as executor:
            executor.submit(tasks(FILLED))
            database = executor.url.removeprefix("sqlite://")
            written = _bytes_below(Path(database).parent, Path(database).name)
        return [_per_task("disk of queued tasks, the log included", queue, written, FILLED)]
    if queue in CLUSTERS:
        url = at.fresh(queue)
        keeper = at.keeper(queue)
        before = keeper.memory_info().rss
        fill(url, FILLED)
        taken = keeper.memory_info().rss - before
        return [
            _per_task(
                "memory of queued tasks, in the process that keeps them", queue, taken, FILLED
            )
        ]

    def used() -> int:
        return int(at.redis.info("memory")["used_memory"])

    url = at.fresh(queue)
    empty = used()
    fill_bare_rq(url, BARE_FILLED)
    bare = (used() - empty) / BARE_FILLED
    at.fresh(queue)
    empty = used()
    with closing(open_executor(url)) as executor:
        executor.submit(tasks(FILLED))
        figure = _per_task("memory of queued tasks", queue, used() - empty, FILLED)
    figure = replace(figure, most=700, bare=bare, ratio=figure.value / bare)
    at.redis.bgrewriteaof()
    _until(lambda: not at.redis.info("persistence")["aof_rewrite_in_progress"])
    disk = _bytes_below(at.folder / "redis", "")
    return [figure, _per_task("disk of queued tasks, log rewritten", queue, disk, FILLED)]


def _per_task(what: str, queue: str, amount: int, count: int) -> Figure:
    return Figure("memory", queue, what, amount / count, "B/task")


def _bytes_below(folder: Path, start: str) -> int:
    found = (path for path in folder.rglob(f"{start}*") if path.is_file())
    return sum(path.stat().st_size for path in found)


def _until(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.05)


def together(count: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Run a function in fresh processes, begun at once; returns what each puts as its answer.

    It is given a barrier to pass when it is ready, and a queue for its answer.
    """
    context = get_context("spawn")
    barrier, answers = context.Barrier(count), context.Queue()
    crew = [context.Process(target=work, args=(barrier, answers, *arguments)) for _ in range(count)]
    for process in crew:
        process.start()
    try:
        return [answers.get(timeout=PATIENCE) for _ in crew]
    finally:
        for process in crew:
            process.join(10)
            process.kill()


def drain(barrier: Any, answers: Any, url: str) -> None:
    """Work off a queue whose tasks do nothing; answer when that began and ended."""
    executor = open_executor(url)
    barrier.wait(PATIENCE)
    began = time.time()
    executor.run_tasks(
        lambda task, attempt: None, WorkerOptions(f"bench:cpu:{os.getpid()}", DEPTH, burst=True)
    )
    answers.put((began, time.time()))


def drain_bare_rq(barrier: Any, answers: Any, url: str) -> None:
    """The same with RQ's own worker that does not fork."""
    client = redis.Redis.from_url(url)
    worker = SimpleWorker(["bare"], connection=client, serializer=JSONSerializer)
    barrier.wait(PATIENCE)
    began = time.time()
    worker.work(burst=True, logging_level="WARNING")
    answers.put((began, time.time()))


def draining(queue: str, at: Places) -> list[Figure]:
    """Tasks a second that two processes of depth 4 lease and finish."""

    def rate(count: int, work: Callable[..., None]) -> float:
        spans = together(PROCESSES, work, url)
        return count / (max(end for _, end in spans) - min(begin for begin, _ in spans))

    url, bare = at.fresh(queue), None
    if queue == "rq":
        fill_bare_rq(url, BARE_DRAINED, "operator.not_")
        bare = rate(BARE_DRAINED, drain_bare_rq)
        at.fresh(queue)
    fill(url, DRAINED)
    ours = rate(DRAINED, drain)
    what = f"{DRAINED:,} tasks that do nothing, {PROCESSES} processes, depth {DEPTH}"
    return [
        Figure("drain", queue, what, ours, "tasks/s", least=300, bare=bare,
               ratio=None if bare is None else ours / bare)
    ]  # fmt: skip


def working(queue: str, at: Places) -> list[Figure]:
    """`chunkq work` over chunks and blocks that all have commit records: its start taken off.

    Each chunk is looked up in the ledger and its blocks are counted; nothing is computed.
    """
    plan, url = job_over(COMMITTED_EDGE), at.fresh(queue)
    job = JobFolder(folder_of(str(at.folder / f"{queue}.zarr")))
    source = Source("/nowhere/in.zarr", plan.volume, Space.plain(3))
    record = job.create_record(JobRecord(plan.job, (source,), {}, ("",), "0a1b2c3d"))
    indices = list(plan.indices())
    for kind in ("infer", "finalize"):
        folder = Path(job.ledger(record.epoch).path) / "done" / kind / ITEM
        folder.mkdir(parents=True)
        for index in indices:
            commit = Commit(kind, index, 1, "bench", 0.0, 1.0)
            (folder / chunk_name(index)).write_bytes(commit.to_json(record.epoch))

    def work() -> float:
        command = [sys.executable, "-m", "chunkq", "work", "--queue", url, "--gpus", "none"]
        command += ["-w", str(PROCESSES), "--depth", str(DEPTH), "--burst", "--quiet"]
        before = time.perf_counter()
        subprocess.run(command, check=True)
        return time.perf_counter() - before

    start = work()
    with closing(open_executor(url)) as executor:
        executor.submit(Task("infer", job.path, index) for index in indices)
        whole = work()
        assert executor.jobs() == {}
    shutil.rmtree(job.path)
    rate = len(indices) / (whole - start)
    what = f"`chunkq work -w {PROCESSES}`, {len(indices):,} chunks committed before"
    return [Figure("work", queue, what, rate, "tasks/s")]


class StagedChunks:
    """A handler that sleeps for read, network and write; the network in one device thread."""

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
    """Work off the same chunks at each depth; answer with the device's busy shares."""
    shares = []
    for depth in depths:
        chunks, executor = StagedChunks(), open_executor(url)
        executor.submit(tasks(STAGED))
        before = time.perf_counter()
        executor.run_tasks(chunks, WorkerOptions(f"bench:cpu:{depth}", depth, burst=True))
        whole = time.perf_counter() - before
        assert len(chunks.spans) == STAGED
        executor.close()
        busy = sum(end - begin for begin, end in chunks.spans)
        shares.append((busy / (chunks.spans[-1][1] - chunks.spans[0][0]), busy / whole))
    answers.put(shares)


def device(queue: str, at: Places) -> list[Figure]:
    """Share of the time in which the device is busy, at depths 1 to 4 of one worker process.

    Between stages: busy seconds / (end of the last network stage - begin of the first). Of the
    whole run, reading the first chunk, writing the last and looking for more count too.
    """
    depths = range(1, DEPTH + 1)
    ((shares),) = together(1, run_stages, at.fresh(queue), depths)
    figures = []
    for depth, (between, whole) in zip(depths, shares, strict=True):
        least = 0.97 if depth == DEPTH else None
        figures += [
            Figure("device", queue, f"busy between stages, depth {depth}", between, "", least),
            Figure("device", queue, f"busy in the whole run, depth {depth}", whole, ""),
        ]
    return figures


def idle_worker(barrier: Any, answers: Any, url: str) -> None:
    """Wait for tasks that never come; answer with what that costs a second."""
    executor = open_executor(url)
    options = WorkerOptions(f"bench:cpu:{os.getpid()}", DEPTH)
    worker = threading.Thread(target=executor.run_tasks, args=(lambda task, attempt: None, options))
    worker.start()
    time.sleep(SETTLING_SECONDS)
    before = _spent(url)
    time.sleep(IDLE_SECONDS)
    after = _spent(url)
    options.stop.set()
    worker.join()
    answers.put({what: (after[what] - before[what]) / IDLE_SECONDS for what in after})


def _spent(url: str) -> dict[str, float]:
    """Return what this process and its Redis have done so far; asking is not counted."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = {"processor": (used.ru_utime + used.ru_stime) * 1000}
    if url.startswith("redis"):
        with closing(redis.Redis.from_url(url)) as client:
            ran, persistence = client.info("commandstats"), client.info("persistence")
        calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in ran.items()}
        asking = ("info", "client|setinfo", "client", "hello")
        spent["commands"] = sum(count for name, count in calls.items() if name not in asking)
        spent["scripts"] = calls.get("evalsha", 0)
        spent["log"] = persistence["aof_current_size"]
    return spent


def idle(queue: str, at: Places) -> list[Figure]:
    """What one worker that waits costs, once it looks as seldom as it ever does."""
    (spent,) = together(1, idle_worker, at.fresh(queue))
    names = {
        "processor": ("processor of an idle worker, depth {}", "ms/s"),
        "commands": ("Redis commands of an idle worker, depth {}, those of scripts too", "1/s"),
        "scripts": ("scripts among them", "1/s"),
        "log": ("growth of Redis's log meanwhile", "B/s"),
    }
    return [
        Figure("idle", queue, names[what][0].format(DEPTH), value, names[what][1])
        for what, value in spent.items()
    ]


PARTS: dict[str, Callable[[str, Places], list[Figure]]] = {
    "memory": memory,
    "enqueue": enqueueing,
    "drain": draining,
    "work": working,
    "device": device,
    "idle": idle,
}
QUEUES = ("sqlite", "rq", *CLUSTERS)


def table(figures: Sequence[Figure]) -> Table:
    """Lay the figures out, one a row."""
    shown = Table("part", "queue", "what", title="Queues")
    for name in ("value", "unit", "asked for", "", "bare", "ratio"):
        shown.add_column(name, justify="right" if name in ("value", "bare", "ratio") else "left")
    for f in figures:
        bare = "" if f.bare is None else _number(f.bare)
        ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
        row = (f.part, f.queue, f.what, _number(f.value), f.unit, f.target, f.verdict, bare, ratio)
        shown.add_row(*row)
    return shown


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    options.add_argument("--queue", choices=QUEUES)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if unknown := set(given.parts) - set(PARTS):
        options.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    figures: list[Figure] = []
    before = time.perf_counter()
    with places() as at:
        for part in given.parts or PARTS:
            for queue in QUEUES if given.queue is None else (given.queue,):
                figures += PARTS[part](queue, at)
    Console(width=150).print(table(figures))
    print(f"{time.perf_counter() - before:.0f} s in all")
    if given.json:
        rows = [{**asdict(f), "verdict": f.verdict} for f in figures]
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
