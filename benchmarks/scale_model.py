"""Discrete-event simulation of a job on thousands of workers, and upper bounds of its rate.

scale_work.py computes the needs of a task. A volume of 1 PB has millions of chunks, so only a
window is simulated, and of many workers only a slice, with its share of queue and store. The
workers start spread over the time of one chunk, so several rounds are not measured; the rate of
the rounds after them is taken as the rate of the job. The simulation omits the first and the last
minutes, failures and stragglers.

Each of a worker's `depth` loops reserves a task (a request to the queue), reads (requests to the
store, bytes through the worker's link and the store's shared bandwidth, decoding), computes (one
chunk at a time on the device), writes and commits. Then, as in `leases.py`, it records its
contributions in the queue, completes one block (each block has one last contributor) and acks the
task (another request).
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import simpy

from benchmarks.scale_inputs import Inputs
from benchmarks.scale_work import Load, Task, Work
from chunkq.queue.contract.executor import DEFAULT_DEPTH_GPU
from chunkq.queue.contract.settings import WorkerSettings

RESERVE = ACK = RENEW = RECORD_CONTRIBUTIONS = 0.5
"""Requests in units of a drained task, which is one reserve and one ack."""
HEARTBEATS_PER_S = 3 / WorkerSettings().lease
WARM_ROUNDS, MEASURED_ROUNDS = 1.5, 1.5
"""Rounds of `depth` chunks per worker: skipped first, then measured."""
MIN_TASKS = 600
"""Smallest number of measured tasks."""

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Setup:
    """Workers and their tasks: `workers` workers with `depth` tasks in flight each.

    `block` is the average block that a loop completes after its task. The queue serves
    `tasks_per_s`, renewals of leases included.
    """

    inputs: Inputs
    task: Task
    workers: int
    depth: int = DEFAULT_DEPTH_GPU
    block: Task | None = None
    tasks_per_s: float = math.inf

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of one turn of a loop."""
        return (self.task,) if self.block is None else (self.task, self.block)

    @property
    def queue_requests(self) -> float:
        """Requests of one turn, in units of a drained task."""
        return RESERVE + ACK + (0 if self.block is None else RECORD_CONTRIBUTIONS)

    @property
    def queue_per_s(self) -> float:
        """The queue's rate that heartbeats do not use; at least 0."""
        return max(0.0, self.tasks_per_s - RENEW * HEARTBEATS_PER_S * self.workers)

    def slice(self, most: int) -> tuple[Setup, float]:
        """Return at most `most` workers with their share of shared resources, and that share.

        The bounds keep their ratios. A request takes longer, so waiting times are overestimated.
        """
        share = min(1.0, most / self.workers)
        shared = (f for f in fields(Inputs) if f.name.startswith(("store_", "folder_")))
        rates = {f.name: getattr(self.inputs, f.name) for f in shared if f.name.endswith("_per_s")}
        inputs = replace(self.inputs, **{name: rate * share for name, rate in rates.items()})
        workers = min(most, self.workers)
        part = replace(self, inputs=inputs, workers=workers, tasks_per_s=self.tasks_per_s * share)
        return part, share

    @property
    def seconds_alone(self) -> float:
        """Seconds of one turn of a loop if it has queue, store and device for itself."""
        i = self.inputs
        seconds = i.queue_latency_s * (2 if self.block is None else 3)
        seconds += _over(self.queue_requests, self.queue_per_s)
        link = min(i.worker_bytes_per_s, i.store_bytes_per_s)
        for task in self.tasks:
            seconds += _over(task.patches, i.patches_per_s) + _over(task.bytes, link)
            seconds += _over(task.coded, i.codec_bytes_per_s)
            seconds += _over(task.reads, i.store_reads_per_s)
            seconds += _over(task.writes, i.store_writes_per_s)
            seconds += _over(task.commits, i.folder_writes_per_s)
            seconds += i.store_latency_s * sum(_rounds(self, task))
        return seconds

    def bounds(self) -> dict[str, float]:
        """Return the largest rate (tasks/s) that each resource allows."""
        i, tasks = self.inputs, self.tasks
        moved, coded = sum(t.bytes for t in tasks), sum(t.coded for t in tasks)
        return {
            "device": self.workers * _per(i.patches_per_s, sum(t.patches for t in tasks)),
            "queue": _per(self.queue_per_s, self.queue_requests),
            "store bandwidth": _per(i.store_bytes_per_s, moved),
            "store reads": _per(i.store_reads_per_s, sum(t.reads for t in tasks)),
            "store writes": _per(i.store_writes_per_s, sum(t.writes for t in tasks)),
            "commits": _per(i.folder_writes_per_s, max(t.commits for t in tasks)),
            "worker's link": self.workers * _per(i.worker_bytes_per_s, moved),
            "worker's codec": self.workers * _per(i.codec_bytes_per_s, coded),
            "depth": _per(self.workers * self.depth, self.seconds_alone),
        }

    @property
    def bound(self) -> float:
        """Upper bound of the rate (tasks/s)."""
        return min(self.bounds().values())


def _over(amount: float, rate: float) -> float:
    """Return the seconds for an amount; 0 for none, at any rate."""
    if not amount:
        return 0.0
    return amount / rate if rate else math.inf


def _per(rate: float, amount: float) -> float:
    """Return how often a rate provides an amount; infinity for none."""
    return rate / amount if amount else math.inf


def _rounds(setup: Setup, task: Task) -> tuple[float, float, float]:
    """Return the numbers of sequential latencies: of reading, of writing, of small requests."""
    in_flight = setup.inputs.requests_in_flight
    read = math.ceil(_per(task.read.objects, in_flight))
    write = math.ceil(_per(task.write.objects, in_flight))
    return read, write, task.small_reads + task.small_writes


class Server:
    """Serves requests one by one at `rate` per second, in order of arrival."""

    def __init__(self, env: simpy.Environment, rate: float) -> None:
        self._env, self._rate, self._free = env, rate, 0.0

    def serve(self, amount: float, delay: float = 0.0) -> simpy.Event:
        """Return the event that `amount` requests are served and `delay` seconds have passed."""
        now = self._env.now
        self._free = max(self._free, now) + _over(amount, self._rate)
        return self._env.timeout(self._free - now + delay)


class Bandwidth:
    """Bandwidth (bytes/s) that all transfers share equally, each with at most `most`.

    A transfer ends when the bytes per transfer, counted since the start, reach their value at its
    begin plus its size. Only the smallest of these marks must be watched.
    """

    def __init__(self, env: simpy.Environment, rate: float, most: float) -> None:
        self._env, self._rate, self._most = env, rate, most
        self._moved, self._updated = 0.0, 0.0
        self._ends: list[tuple[float, int, simpy.Event]] = []
        self._transfers = self._timer = 0
        self._due = math.inf

    def move(self, size: float) -> simpy.Event:
        """Return the event that `size` bytes are moved."""
        done = self._env.event()
        if not size or math.isinf(min(self._rate, self._most)):
            return done.succeed()
        self._update()
        self._transfers += 1
        heapq.heappush(self._ends, (self._moved + size, self._transfers, done))
        self._set_timer()
        return done

    @property
    def _each(self) -> float:
        return min(self._most, self._rate / len(self._ends))

    def _update(self) -> None:
        if self._ends:
            self._moved += (self._env.now - self._updated) * self._each
        self._updated = self._env.now

    def _set_timer(self) -> None:
        """Set a timer that is never late; one that is early, because others came, is set again."""
        remaining = max(0.0, self._ends[0][0] - self._moved) / self._each
        if self._env.now + remaining >= self._due:
            return
        self._due = self._env.now + remaining
        self._timer += 1
        number = self._timer
        timer = self._env.timeout(remaining)
        assert timer.callbacks is not None
        timer.callbacks.append(lambda _: self._end(number))

    def _end(self, number: int) -> None:
        if number != self._timer:
            return  # replaced by an earlier timer
        self._due = math.inf
        self._update()
        # A remainder too small to advance the clock is a rounding error.
        rounding = 4 * math.ulp(self._env.now) * self._each
        while self._ends and self._ends[0][0] <= self._moved + rounding:
            heapq.heappop(self._ends)[2].succeed()
        if self._ends:
            self._set_timer()


@dataclass
class Run:
    """A simulated run: the numbers of the tasks in the order of their ends, and the times (s)."""

    tasks: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def rate(self, first: int) -> float:
        """Return the rate (tasks/s) from the end of task number `first` to the last."""
        return (len(self.times) - 1 - first) / (self.times[-1] - self.times[first])


class Simulation:
    """Simulation of one setup. With a `seed` latencies are random, otherwise constant."""

    def __init__(self, setup: Setup, seed: int | None = None) -> None:
        self.setup, self.env = setup, simpy.Environment()
        self._random = None if seed is None else random.Random(seed)
        i = setup.inputs
        self._queue = Server(self.env, setup.queue_per_s)
        self._reads = Server(self.env, i.store_reads_per_s)
        self._writes = Server(self.env, i.store_writes_per_s)
        # Chunks and blocks commit into separate folders.
        self._folders = [Server(self.env, i.folder_writes_per_s) for _ in setup.tasks]
        self._store = Bandwidth(self.env, i.store_bytes_per_s, i.worker_bytes_per_s)
        self._full, self._last = self.env.event(), -1
        self.run = Run()

    def complete(self, tasks: int) -> Run:
        """Simulate `tasks` tasks that start at once, until the last one ends."""
        self._start(iter(range(tasks)), 0.0)
        self.env.run()
        return self.run

    def steady(self) -> float:
        """Return the steady rate (tasks/s) after the warm-up rounds."""
        loops = self.setup.workers * self.setup.depth
        warm = max(MIN_TASKS // 2, int(WARM_ROUNDS * loops))
        self._last = warm + max(MIN_TASKS, int(MEASURED_ROUNDS * loops))
        self._start(iter(range(self._last + loops)), self.setup.workers / self.setup.bound)
        self.env.run(self._full)
        return self.run.rate(warm)

    def _start(self, tasks: Iterator[int], period: float) -> None:
        """Start the loops; `period` is the time between the tasks of a worker (s)."""
        workers = self.setup.workers
        for w in range(workers):
            worker = _Worker(self.env, self.setup.inputs)
            for d in range(self.setup.depth):
                self.env.process(self._loop(worker, tasks, period * (d + w / workers)))

    def _loop(self, worker: _Worker, tasks: Iterator[int], start: float) -> Process:
        i, setup = self.setup.inputs, self.setup
        yield self.env.timeout(start)
        for number in tasks:
            yield self._queue.serve(RESERVE, i.queue_latency_s)
            yield from self._run_task(worker, setup.task, self._folders[0])
            if setup.block is not None:
                yield self._queue.serve(RECORD_CONTRIBUTIONS, i.queue_latency_s)
                yield from self._run_task(worker, setup.block, self._folders[1])
            yield self._queue.serve(ACK, i.queue_latency_s)
            self.run.tasks.append(number)
            self.run.times.append(self.env.now)
            if len(self.run.tasks) == self._last:
                self._full.succeed()

    def _run_task(self, worker: _Worker, task: Task, folder: Server) -> Process:
        read, write, small = _rounds(self.setup, task)
        if task.reads:
            yield self._reads.serve(task.reads, self._latency(read))
        yield from self._move(worker, task.read)
        if task.read.coded:
            yield worker.codec.serve(task.read.coded)
        if task.patches:
            yield worker.device.serve(task.patches)
        if task.write.coded:
            yield worker.codec.serve(task.write.coded)
        if task.writes:
            yield self._writes.serve(task.writes, self._latency(write))
        yield from self._move(worker, task.write)
        if task.commits or small:
            yield folder.serve(task.commits, self._latency(small))

    def _move(self, worker: _Worker, load: Load) -> Process:
        """Move the bytes of one chunk after another through a worker's link."""
        if load.bytes:
            if worker.sending:
                turn = self.env.event()
                worker.waiting.append(turn)
                yield turn
            worker.sending = True
            yield self._store.move(load.bytes)
            worker.sending = bool(worker.waiting)
            if worker.waiting:
                worker.waiting.popleft().succeed()

    def _latency(self, rounds: float) -> float:
        mean = self.setup.inputs.store_latency_s
        if self._random is None or not mean or not rounds:
            return mean * rounds
        return self._random.gammavariate(rounds, mean)


class _Worker:
    """Resources of one worker: device, codec, and the link with the transfers waiting for it."""

    def __init__(self, env: simpy.Environment, inputs: Inputs) -> None:
        self.device = Server(env, inputs.patches_per_s)
        self.codec = Server(env, inputs.codec_bytes_per_s)
        self.sending, self.waiting = False, deque[simpy.Event]()


def setup_for(
    inputs: Inputs, work: Work, executor: str, workers: int, depth: int = DEFAULT_DEPTH_GPU
) -> Setup:
    """Return the setup of workers on a job's chunks, and on its blocks if it has any."""
    block = _scaled(work.block, work.blocks / work.chunks) if work.blocks else None
    rate = inputs.queue(executor, "tasks_per_s")
    return Setup(inputs, work.infer, workers, depth, block, rate)


def _scaled(task: Task, share: float) -> Task:
    """Return the average needs if only a share of the tasks exists."""
    values = {f.name: getattr(task, f.name) for f in fields(Task)}
    return Task(**{name: _share(value, share) for name, value in values.items()})


def _share(value: Load | float, share: float) -> Any:
    if isinstance(value, Load):
        return Load(value.bytes * share, value.objects * share, value.coded * share)
    return value * share
