"""Processes of a replaced job that are suspended anywhere do not change the output of the new job.

Actors are threads. Each runs one command or task and stops before every access to storage until
the test resumes it, so the accesses of two processes can occur in every order.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chunkq_worker.run_task import run_task
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chunkq.create import check_job, create_job
from chunkq.errors import ChunkqError
from chunkq.finalize import finalize_job
from chunkq.job.job_handle import JobHandle, open_job
from chunkq.job.job_reading import load_job
from chunkq.job.record import JobRecord
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import Attempt
from chunkq.storage.formats.zarr_arrays import TensorStoreArray
from chunkq.storage.objects import ObjectFolder
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.waiting import TIMEOUT
from tests.harness.workspace import run_inline

SHAPE = (16, 12)
CHUNKS = [(0, 0), (0, 1), (1, 0), (1, 1)]
JOBS = ({"strides": [2, 2]}, {"strides": [3, 3], "weight_function": ["weight_gaussian"]})
ACCESSES = [
    (ObjectFolder, "get"),
    (ObjectFolder, "get_array"),
    (ObjectFolder, "exists"),
    (ObjectFolder, "list"),
    (ObjectFolder, "folders"),
    (ObjectFolder, "put_parts"),
    (ObjectFolder, "put_new"),
    (ObjectFolder, "delete"),
    (ObjectFolder, "delete_folder"),
    (TensorStoreArray, "write"),
    (os, "rename"),
    (os, "replace"),
    (os, "link"),
]
CHANGES = frozenset(["put_parts", "link", "delete", "delete_folder", "write", "rename", "replace"])
STOPS = [
    *itertools.product(["infer"], ["write", "put_parts", "link", "delete"]),
    *itertools.product(["finalize"], ["write", "put_parts", "link", "delete", "rename", "replace"]),
    *itertools.product(["produce"], ["put_parts", "link", "delete", "delete_folder", "rename"]),
    *itertools.product(["overwrite"], ["put_parts", "link", "delete", "rename", "replace"]),
]
"""(operation of an actor, access before which it is suspended first)."""


class Actor:
    """A thread that stops before every access to storage."""

    current: threading.local = threading.local()

    def __init__(self, work: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self.is_over = False
        self.next_access = ""
        self._runs_freely = False
        self._work = work
        self._permits = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def step(self, accesses: int) -> None:
        """Run the actor for a number of accesses."""
        for _ in range(accesses):
            if self.is_over:
                return
            self._permits.release()
            self._wait()

    def step_before(self, accesses: Collection[str], times: int) -> None:
        """Run the actor until it stops before the n-th access with one of these names."""
        while not self.is_over and (times := times - (self.next_access in accesses)):
            self.step(1)

    def finish(self) -> None:
        """Run the actor to its end."""
        self._runs_freely = True
        self._permits.release()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()

    def reach(self, access: str) -> None:
        """Stop the calling thread, which belongs to this actor."""
        if not self._runs_freely:
            self.next_access = access
            self._stopped.release()
            self._permits.acquire()

    def _wait(self) -> None:
        assert self._stopped.acquire(timeout=TIMEOUT)

    def _run(self) -> None:
        Actor.current.actor = self
        try:
            self._work()
        except BaseException as error:
            self.error = error
        self.is_over = True
        self._stopped.release()


class ActorPool(ThreadPoolExecutor):
    """Thread pool whose threads belong to the actor that submits the work."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        actor = getattr(Actor.current, "actor", None)

        def call() -> Any:
            Actor.current.actor = actor
            return fn(*args, **kwargs)

        return super().submit(call)


def stopping(name: str, access: Callable[..., Any]) -> Callable[..., Any]:
    def stop_and_access(*args: Any, **kwargs: Any) -> Any:
        actor = getattr(Actor.current, "actor", None)
        if actor is not None:
            actor.reach(name)
        return access(*args, **kwargs)

    return stop_and_access


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the actors before every access to storage."""
    for owner, name in ACCESSES:
        monkeypatch.setattr(owner, name, stopping(name, getattr(owner, name)))
    monkeypatch.setattr(import_module("chunkq.finalize"), "ThreadPoolExecutor", ActorPool)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> "Jobs":
    return Jobs(tmp_path_factory.mktemp("jobs"))


class Jobs:
    """Two jobs over one volume, and their outputs."""

    def __init__(self, folder: Path) -> None:
        write_zarr(folder / "in.zarr", random_volume(SHAPE), (4, 4))
        self.values = {
            "input": str(folder / "in.zarr"),
            "inference_type": "sliding_window",
            "chunksize": [8, 6],
            "storage_chunks": [2, 2],
            "threads": 1,
            "model_config": toy_model(folder, (4, 4), scale=100.0),
        }
        self.results: list[npt.NDArray[Any]] = []
        for number, output in enumerate(["one.zarr", "two.zarr"]):
            run_inline(self.job(number, folder / output))
            self.results.append(read_output(folder / output))

    def job(self, number: int, output: Path) -> dict[str, Any]:
        return self.values | JOBS[number] | {"output": str(output)}

    def number(self, record: JobRecord) -> int:
        return [job["strides"] for job in JOBS].index([*(record.job.strides or ())])


class Suspensions(RuleBasedStateMachine):
    """Two jobs that replace each other on one output, and suspended actors."""

    jobs: Jobs
    folders: Iterator[Path]

    @initialize()
    def produce_first(self) -> None:
        self.output = next(self.folders) / "out.zarr"
        self.path = f"{self.output}.chunkq"
        self.actors: list[Actor] = []
        self.produce(0)

    def produce(self, number: int, *, overwrite: bool = False) -> None:
        job = load_job(self.jobs.job(number, self.output))
        create_job(check_job(job), overwrite=overwrite)

    def open(self) -> JobHandle:
        return open_job(self.path)

    def infer(self, job: JobHandle, *chunks: tuple[int, ...]) -> None:
        for chunk in chunks:
            run_task(Task("infer", *job.id, 0, chunk), Attempt(1, "worker"))

    def work(self, operation: str, chunk: tuple[int, int]) -> Callable[[], object]:
        """Return the function with which an actor runs the operation on the current job."""
        job = self.open()
        number = self.jobs.number(job.record)
        functions = {
            "infer": lambda: self.infer(job, chunk),
            "finalize": lambda: finalize_job(job, worker="old", threads=1),
            "produce": lambda: self.produce(number),
            "overwrite": lambda: self.produce(1 - number, overwrite=True),
        }
        return functions[operation]

    @precondition(lambda self: len(self.actors) < 4)
    @rule(
        stop=st.sampled_from(STOPS),
        chunk=st.sampled_from(CHUNKS),
        times=st.integers(1, 2),
    )
    def start(self, stop: tuple[str, str], chunk: tuple[int, int], times: int) -> None:
        """Start an actor on the current job, and suspend it before a change."""
        operation, access = stop
        actor = Actor(self.work(operation, chunk))
        self.actors.append(actor)
        actor.step_before([access], times)

    @precondition(lambda self: self.actors)
    @rule(which=st.integers(0, 3), accesses=st.integers(1, 30))
    def step(self, which: int, accesses: int) -> None:
        self.actors[which % len(self.actors)].step(accesses)

    @precondition(lambda self: self.actors)
    @rule(which=st.integers(0, 3))
    def finish(self, which: int) -> None:
        """Run an actor to its end. It may only raise ChunkqError or OSError."""
        actor = self.actors.pop(which % len(self.actors))
        actor.finish()
        assert actor.error is None or isinstance(actor.error, (ChunkqError, OSError)), actor.error

    @rule()
    def compute(self) -> None:
        with contextlib.suppress(ChunkqError):
            self.infer(self.open(), *CHUNKS)

    @rule()
    def complete(self) -> None:
        """Run the current job like `chunkq run`, which may fail."""
        with contextlib.suppress(ChunkqError):
            self.complete_job()

    @rule()
    def replace(self) -> None:
        """Replace the job with the other one, which may fail."""
        with contextlib.suppress(ChunkqError):
            self.produce(1 - self.jobs.number(self.open().record), overwrite=True)

    @rule()
    def replace_under_all_actors(self) -> None:
        """Replace and compute the job, resume all actors, and finalize the job."""
        self.replace()
        self.compute()
        while self.actors:
            self.finish(0)
        self.complete()

    def complete_job(self) -> None:
        self.produce(self.jobs.number(self.open().record))
        job = self.open()
        self.infer(job, *CHUNKS)
        finalize_job(job, worker="new", threads=1)
        assert job.output.is_sealed()

    @invariant()
    def sealed_output_is_correct(self) -> None:
        if not hasattr(self, "path"):
            return
        job = self.open()
        if job.ledger.is_sealed() and job.output.is_sealed():
            expected = self.jobs.results[self.jobs.number(job.record)]
            np.testing.assert_array_equal(read_output(self.output), expected)

    def teardown(self) -> None:
        """Run all actors to their ends. One more run must then complete the job."""
        while getattr(self, "actors", None):
            self.finish(0)
            self.sealed_output_is_correct()
        if hasattr(self, "path"):
            number = self.jobs.number(self.open().record)
            with contextlib.suppress(ChunkqError):
                self.complete_job()
            if not self.open().output.is_sealed():  # an actor deleted its output
                self.produce(number, overwrite=True)
                self.complete_job()
            self.sealed_output_is_correct()
            assert {path.name for path in self.output.iterdir()} == {"zarr.json", "0"}
            epoch = self.open().record.epoch
            assert {path.name for path in Path(self.path).iterdir()} == {"job.json", epoch}


@pytest.fixture
def model(stops: None, tmp_path: Path, jobs: Jobs) -> type[Suspensions]:
    folders = (tmp_path / str(number) for number in itertools.count())
    Suspensions.jobs, Suspensions.folders = jobs, folders
    return Suspensions


@pytest.mark.parametrize("resumed", ["before the new job is sealed", "after the new job is sealed"])
@pytest.mark.parametrize("operation", ["infer", "finalize", "produce"])
def test_a_process_that_is_suspended_before_a_change_does_not_change_a_later_job(
    model: type[Suspensions], operation: str, resumed: str
) -> None:
    for times in itertools.count(1):
        case = model()
        case.produce_first()
        if operation == "finalize":
            case.compute()
        elif operation == "produce":  # a sealed job that lost a result has the most changes
            case.complete_job()
            case.open().items[0].ledger.delete_commits("infer", [(1, 1)])
        actor = Actor(case.work(operation, (0, 0)))
        actor.step_before(CHANGES, times)
        if actor.is_over:
            assert times > 3
            return
        case.actors.append(actor)
        with contextlib.suppress(ChunkqError):  # fails while the old process holds a claim
            case.produce(1, overwrite=True)
            case.compute()
            if resumed.startswith("after"):
                case.complete_job()
        case.teardown()


def test_a_sealed_output_is_correct_after_processes_of_two_jobs_were_suspended_anywhere(
    model: type[Suspensions],
) -> None:
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=6,
            stateful_step_count=8,
            deadline=None,
            database=None,
            derandomize=os.environ.get("HYPOTHESIS_PROFILE") != "explore",
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
