"""A whole job on this machine: produce, worker processes of its own, finalize."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

from chunkq.errors import ChunkqError, IncompleteError, ModelError
from chunkq.executors import QUEUE_VARIABLE, open_executor
from chunkq.finalize import finalize_job
from chunkq.job import Job
from chunkq.ledger import JobRecord
from chunkq.opened import OpenJob, open_job
from chunkq.paths import SERVERS
from chunkq_producer import submit
from chunkq_producer.machine import check_machine, unused
from chunkq_producer.probe import Probe, probe
from chunkq_producer.watch import Look

log = logging.getLogger("chunkq.run")

REFRESH_SECONDS = 0.5


class InterruptedRunError(ChunkqError):
    """The user stopped the run; nothing is lost."""

    exit_code = 130


class Teller:
    """Is told how a run goes. This one logs complaints and is quiet besides."""

    def say(self, line: str) -> None:
        """Take a line for the user: something that did not go as asked."""
        log.warning("%s", line)

    def try_network(self, record: JobRecord) -> Probe:
        """Try the network on one batch."""
        return probe(record)

    def meter(self, label: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Return what is called with (done, total) while one step goes on."""
        return nullcontext(lambda done, total: None)

    def looking(self) -> AbstractContextManager[Callable[[Look], None]]:
        """Return what is given a look at the job now and then while workers run."""
        return nullcontext(lambda look: None)


@dataclass(frozen=True)
class Ran:
    """A job that is complete, and its report."""

    job: OpenJob
    report: dict[str, Any]


def run_job(
    job: Job,
    *,
    url: str,
    workers: int | None = None,
    gpus: str = "all",
    depth: int | None = None,
    overwrite: bool = False,
    teller: Teller,
) -> Ran:
    """Do all of a job on the queue at `url`; the same call again continues.

    Raises what checking, producing and finalizing raise, ModelError if the network fails its
    trial, ChunkqError if the workers give up, InterruptedRunError if it was told to stop. An
    error that the workers explained carries their words as notes.
    """
    check_machine(job)
    prepared = submit.prepare(job)
    submit.check_place(prepared, overwrite=overwrite)
    for line in unused(job):
        teller.say(f"chunkq: {line}")
    if url.partition("://")[0] in SERVERS:
        with closing(open_executor(url)) as executor:
            executor.ready()  # away or refusing, it is said before the network is loaded
    tried = teller.try_network(prepared.record)
    if tried.error is not None:
        raise ModelError(tried.error)
    with closing(open_executor(url)) as executor:
        with teller.meter("queueing chunks") as meter:
            made = submit.produce(prepared, executor, overwrite=overwrite, progress=meter)
        opened = open_job(made.folder.path)
        causes: list[str] = []
        if made.done < made.chunks:
            command = [sys.executable, "-m", "chunkq", "work", "--burst", "--quiet"]
            on_cpu = job.model.device == "cpu" or job.hardware == "cpu_only"
            command += ["--gpus", "none" if on_cpu else gpus, "--lifeline"]
            command += ["--job", opened.folder.output]
            command += ["-w", str(workers)] if workers else []
            command += ["--depth", str(depth)] if depth else []
            look = Look(opened.folder, opened.plan, executor)
            again = "the same command" + (" without --overwrite" if overwrite else "")
            ended = _work(command, {**os.environ, QUEUE_VARIABLE: url}, look, teller)
            if ended.code is None:
                raise InterruptedRunError(f"stopped; {again} continues where it was")
            if ended.code not in (0, IncompleteError.exit_code):
                raise _explained(
                    ChunkqError(f"the worker gave up, and said why; {again} continues"),
                    ended.said,
                )
            causes = _failures(look)
    for line in causes:
        teller.say(line)
    try:
        with teller.meter("finalizing blocks") as meter:
            report = finalize_job(opened, worker=socket.gethostname(), progress=meter)
    except IncompleteError as error:
        raise _explained(error, causes) from None
    return Ran(opened, report)


def _failures(look: Look) -> list[str]:
    """Return what went wrong with chunks that did not get done; finalizing then lists them."""
    lines = []
    for group in look().failures:
        chunks = ", ".join(group.chunks[:6]) + (" …" if len(group.chunks) > 6 else "")
        lines.append(f"failed: chunk {chunks}: {group.message}")
    return lines


def _explained(error: ChunkqError, lines: list[str]) -> ChunkqError:
    for line in lines:
        error.add_note(line)
    return error


@dataclass(frozen=True)
class _Ended:
    """How the worker ended: its exit code, None if it was told to stop; what it said."""

    code: int | None
    said: list[str]


def _work(command: list[str], environment: dict[str, str], look: Look, teller: Teller) -> _Ended:
    """Run a worker to its end and show how far the job is; signals are passed on to it.

    The queue's address, which may hold a password, travels in the environment: a command line
    can be seen by everyone.
    """
    worker = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    interrupted = threading.Event()
    said: list[str] = []
    try:
        with _passing_on(worker, interrupted), teller.looking() as show:
            reader = threading.Thread(target=_repeat, args=(worker, teller, said), daemon=True)
            reader.start()
            while worker.poll() is None:
                _try_to_show(show, look, teller)
                _wait(worker, look.rest(REFRESH_SECONDS))
            reader.join()
            _try_to_show(show, look, teller)
    finally:
        worker.kill()
        worker.wait()
        if worker.stdin is not None:
            worker.stdin.close()
    return _Ended(None if interrupted.is_set() else worker.returncode, said)


@contextmanager
def _passing_on(worker: subprocess.Popen[str], interrupted: threading.Event) -> Iterator[None]:
    """Have signals to stop reach the worker; only the main thread is ever sent any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        worker.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _try_to_show(show: Callable[[Look], None], look: Look, teller: Teller) -> None:
    """Show how far the job is; if it cannot be seen just now, the work goes on all the same."""
    try:
        show(look)
    except Exception as error:
        reason = " ".join(str(error).split())
        teller.say(f"progress cannot be seen: {reason}")


def _wait(worker: subprocess.Popen[str], seconds: float) -> None:
    try:
        worker.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _repeat(worker: subprocess.Popen[str], teller: Teller, said: list[str]) -> None:
    """Pass on what the worker says."""
    if worker.stderr is None:
        return
    with worker.stderr as lines:
        for line in lines:
            said.append(line.rstrip("\n"))
            teller.say(said[-1])
