"""A job on thousands of workers as a discrete-event simulation, and the bounds it cannot exceed.

What a task needs of the store and the device is said by scale_work.py. A 1 PB volume has millions
of chunks, so only a window is simulated (and of a very large crew a slice of it, with its share of
queue and store): every worker begins its loops spread over one chunk's time, so many rounds pass
unmeasured, and the rate of the next ones is taken for the rate of the whole job. The first and the
last minutes, failures and stragglers are left out.

Each of a worker's `depth` loops takes a task (a request to the queue), reads (requests to the
store, bytes through its own link and the store's shared bandwidth, decoding), computes (one chunk
at a time on the device), writes and commits. It then notes at the queue to which blocks it has
contributed and completes one of them, since each has one last contributor, and finishes (another
request), as `leases.py` does.
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
from chunkq.executors.base import DEPTH_ON_GPU
from chunkq.executors.settings import WorkerSettings

TAKE = FINISH = RENEW = NOTE = 0.5
"""Requests in units of a drained task, which is one take and one finish."""
HEARTBEATS_PER_S = 3 / WorkerSettings().lease
WARM_ROUNDS, MEASURED_ROUNDS = 1.5, 1.5
"""Rounds of `depth` chunks a worker: passed first, then measured."""
LEAST_TASKS = 600
"""Tasks measured at least."""

Happening = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Setup:
    """Who works on what: so many workers, each with `depth` tasks in flight.

    `then` is the block that a loop completes after its task, on average. Tasks come off a queue
    that leases `tasks_per_s`, renewals of leases included.
    """

    inputs: Inputs
    task: Task
    workers: int
    depth: int = DEPTH_ON_GPU
    then: Task | None = None
    tasks_per_s: float = math.inf

    @property
    def all_in(self) -> tuple[Task, ...]:
        """The tasks that one loop does in a turn."""
        return (self.task,) if self.then is None else (self.task, self.then)

    @property
    def queue_requests(self) -> float:
        """Requests of one turn, in units of a drained task."""
        return TAKE + FINISH + (0 if self.then is None else NOTE)

    @property
    def queue_per_s(self) -> float:
        """What the heartbeats leave of the queue's rate; 0 if nothing."""
        return max(0.0, self.tasks_per_s - RENEW * HEARTBEATS_PER_S * self.workers)

    def slice(self, most: int) -> tuple[Setup, float]:
        """Return a crew of `most` workers with their share of all that is shared, and that share.

        Bounds are shared out alike; a request takes the longer, so that waiting is overestimated.
        """
        share = min(1.0, most / self.workers)
        shared = (f for f in fields(Inputs) if f.name.startswith(("store_", "folder_")))
        rates = {f.name: getattr(self.inputs, f.name) for f in shared if f.name.endswith("_per_s")}
        inputs = replace(self.inputs, **{name: rate * share for name, rate in rates.items()})
        workers = min(most, self.workers)
        part = replace(self, inputs=inputs, workers=workers, tasks_per_s=self.tasks_per_s * share)
        return part, share

    @property
    def undisturbed(self) -> float:
        """Seconds of one turn of a loop that is alone with queue, store and device."""
        i = self.inputs
        seconds = i.queue_latency_s * (2 if self.then is None else 3)
        seconds += _over(self.queue_requests, self.queue_per_s)
        link = min(i.worker_bytes_per_s, i.store_bytes_per_s)
        for task in self.all_in:
            seconds += _over(task.patches, i.patches_per_s) + _over(task.bytes, link)
            seconds += _over(task.coded, i.codec_bytes_per_s)
            seconds += _over(task.reads, i.store_reads_per_s)
            seconds += _over(task.writes, i.store_writes_per_s)
            seconds += _over(task.commits, i.folder_writes_per_s)
            seconds += i.store_latency_s * sum(_rounds(self, task))
        return seconds

    def bounds(self) -> dict[str, float]:
        """Return the tasks a second that each resource allows at most, by its name."""
        i, every = self.inputs, self.all_in
        moved, coded = sum(t.bytes for t in every), sum(t.coded for t in every)
        return {
            "device": self.workers * _per(i.patches_per_s, sum(t.patches for t in every)),
            "queue": _per(self.queue_per_s, self.queue_requests),
            "store bandwidth": _per(i.store_bytes_per_s, moved),
            "store reads": _per(i.store_reads_per_s, sum(t.reads for t in every)),
            "store writes": _per(i.store_writes_per_s, sum(t.writes for t in every)),
            "commits": _per(i.folder_writes_per_s, max(t.commits for t in every)),
            "worker's link": self.workers * _per(i.worker_bytes_per_s, moved),
            "worker's codec": self.workers * _per(i.codec_bytes_per_s, coded),
            "depth": _per(self.workers * self.depth, self.undisturbed),
        }

    @property
    def bound(self) -> float:
        """The tasks a second that cannot be exceeded."""
        return min(self.bounds().values())


def _over(amount: float, rate: float) -> float:
    """Seconds that an amount takes; nothing takes none, whatever the rate."""
    if not amount:
        return 0.0
    return amount / rate if rate else math.inf


def _per(rate: float, amount: float) -> float:
    return rate / amount if amount else math.inf


def _rounds(setup: Setup, task: Task) -> tuple[float, float, float]:
    """Latencies one after another: of reading, of writing, of the small requests."""
    flying = setup.inputs.requests_in_flight
    read = math.ceil(_per(task.read.objects, flying))
    write = math.ceil(_per(task.write.objects, flying))
    return read, write, task.small_reads + task.small_writes


class Server:
    """Serves requests one after another, `rate` a second, in the order in which they come."""

    def __init__(self, env: simpy.Environment, rate: float) -> None:
        self._env, self._rate, self._free = env, rate, 0.0

    def serve(self, amount: float, then: float = 0.0) -> simpy.Event:
        """Return the event that so many requests are served, and `then` s have passed."""
        now = self._env.now
        self._free = max(self._free, now) + _over(amount, self._rate)
        return self._env.timeout(self._free - now + then)


class Bandwidth:
    """Bytes a second that all transfers share alike, none of them faster than `most`.

    A transfer ends once each has been given as many bytes, counted from the start, as stood there
    when it began, plus its own: so only the least of these marks is looked at.
    """

    def __init__(self, env: simpy.Environment, rate: float, most: float) -> None:
        self._env, self._rate, self._most = env, rate, most
        self._given, self._since = 0.0, 0.0
        self._ends: list[tuple[float, int, simpy.Event]] = []
        self._begun = self._timer = 0
        self._due = math.inf

    def move(self, size: float) -> simpy.Event:
        """Return the event that so many bytes are moved."""
        done = self._env.event()
        if not size or math.isinf(min(self._rate, self._most)):
            return done.succeed()
        self._pass()
        self._begun += 1
        heapq.heappush(self._ends, (self._given + size, self._begun, done))
        self._look()
        return done

    @property
    def _each(self) -> float:
        return min(self._most, self._rate / len(self._ends))

    def _pass(self) -> None:
        if self._ends:
            self._given += (self._env.now - self._since) * self._each
        self._since = self._env.now

    def _look(self) -> None:
        """Have a timer that is never late; one that is early, as others came, is set again."""
        left = max(0.0, self._ends[0][0] - self._given) / self._each
        if self._env.now + left >= self._due:
            return
        self._due = self._env.now + left
        self._timer += 1
        number = self._timer
        timer = self._env.timeout(left)
        assert timer.callbacks is not None
        timer.callbacks.append(lambda _: self._end(number))

    def _end(self, number: int) -> None:
        if number != self._timer:
            return  # an earlier one was needed
        self._due = math.inf
        self._pass()
        # What is left may be too little to move the clock on: that is rounding, and done.
        speck = 4 * math.ulp(self._env.now) * self._each
        while self._ends and self._ends[0][0] <= self._given + speck:
            heapq.heappop(self._ends)[2].succeed()
        if self._ends:
            self._look()


@dataclass
class Run:
    """What was simulated: the tasks in the order in which they ended, and when each did (s)."""

    ended: list[int] = field(default_factory=list)
    when: list[float] = field(default_factory=list)

    def rate(self, first: int) -> float:
        """Return the tasks a second from the end of number `first` to the last."""
        return (len(self.when) - 1 - first) / (self.when[-1] - self.when[first])


class Simulation:
    """One setup, simulated from the first task on. With a `seed` latencies vary, else none do."""

    def __init__(self, setup: Setup, seed: int | None = None) -> None:
        self.setup, self.env = setup, simpy.Environment()
        self._random = None if seed is None else random.Random(seed)
        i = setup.inputs
        self._queue = Server(self.env, setup.queue_per_s)
        self._reads = Server(self.env, i.store_reads_per_s)
        self._writes = Server(self.env, i.store_writes_per_s)
        # Chunks and blocks commit into folders of their own.
        self._folders = [Server(self.env, i.folder_writes_per_s) for _ in setup.all_in]
        self._store = Bandwidth(self.env, i.store_bytes_per_s, i.worker_bytes_per_s)
        self._full, self._last = self.env.event(), -1
        self.run = Run()

    def complete(self, tasks: int) -> Run:
        """Simulate so many tasks, begun all at once, to the last one's end."""
        self._start(iter(range(tasks)), 0.0)
        self.env.run()
        return self.run

    def steady(self) -> float:
        """Return the tasks a second once the workers have fallen into step."""
        loops = self.setup.workers * self.setup.depth
        warm = max(LEAST_TASKS // 2, int(WARM_ROUNDS * loops))
        self._last = warm + max(LEAST_TASKS, int(MEASURED_ROUNDS * loops))
        self._start(iter(range(self._last + loops)), self.setup.workers / self.setup.bound)
        self.env.run(self._full)
        return self.run.rate(warm)

    def _start(self, tasks: Iterator[int], period: float) -> None:
        """Begin the loops; `period` is the time from one task of a worker to its next (s)."""
        workers = self.setup.workers
        for w in range(workers):
            worker = _Worker(self.env, self.setup.inputs)
            for d in range(self.setup.depth):
                self.env.process(self._loop(worker, tasks, period * (d + w / workers)))

    def _loop(self, worker: _Worker, tasks: Iterator[int], begin: float) -> Happening:
        i, setup = self.setup.inputs, self.setup
        yield self.env.timeout(begin)
        for number in tasks:
            yield self._queue.serve(TAKE, i.queue_latency_s)
            yield from self._do(worker, setup.task, self._folders[0])
            if setup.then is not None:
                yield self._queue.serve(NOTE, i.queue_latency_s)
                yield from self._do(worker, setup.then, self._folders[1])
            yield self._queue.serve(FINISH, i.queue_latency_s)
            self.run.ended.append(number)
            self.run.when.append(self.env.now)
            if len(self.run.ended) == self._last:
                self._full.succeed()

    def _do(self, worker: _Worker, task: Task, folder: Server) -> Happening:
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

    def _move(self, worker: _Worker, load: Load) -> Happening:
        """Bytes of one chunk after another through a worker's link."""
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
    """What is a worker's own: its device, its codec, its link with those who wait for it."""

    def __init__(self, env: simpy.Environment, inputs: Inputs) -> None:
        self.device = Server(env, inputs.patches_per_s)
        self.codec = Server(env, inputs.codec_bytes_per_s)
        self.sending, self.waiting = False, deque[simpy.Event]()


def setup_for(
    inputs: Inputs, work: Work, executor: str, workers: int, depth: int = DEPTH_ON_GPU
) -> Setup:
    """Return workers on a job's chunks, and on its blocks if it has any to complete."""
    then = _scaled(work.block, work.blocks / work.chunks) if work.blocks else None
    rate = inputs.queue(executor, "tasks_per_s")
    return Setup(inputs, work.infer, workers, depth, then, rate)


def _scaled(task: Task, share: float) -> Task:
    """Return what a task needs on average if only a share of them is there."""
    whole = {f.name: getattr(task, f.name) for f in fields(Task)}
    return Task(**{name: _share(value, share) for name, value in whole.items()})


def _share(value: Load | float, share: float) -> Any:
    if isinstance(value, Load):
        return Load(value.bytes * share, value.objects * share, value.coded * share)
    return value * share
