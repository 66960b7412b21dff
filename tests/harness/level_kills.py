"""End a process at a step of a task that writes a part of a pyramid.

Run as a program: `python -m tests.harness.level_kills STEP NUMBER TRACE COMMAND…` runs a command of
chunkq, which is ended by SIGKILL.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from chunkq.job.ledger import ItemLedger
from chunkq.job.level_arrays import LevelArray
from chunkq.plan.chunk import Index
from chunkq.stages import downsample
from chunkq.storage.formats.zarr_writing import WritableArray

KIND = downsample.DownsampleStage.kind


class Step(NamedTuple):
    """A function of chunkq, and whether the process ends before it, in it or after it."""

    owner: Any
    name: str
    moment: str


STEPS = {
    "before the read": Step(LevelArray, "read", "before"),
    "after the read": Step(LevelArray, "read", "after"),
    "before the write": Step(LevelArray, "store", "before"),
    "in the write": Step(WritableArray, "_put", "in"),
    "after the write": Step(LevelArray, "store", "after"),
    "before the commit": Step(ItemLedger, "commit", "before"),
    "after the commit": Step(ItemLedger, "commit", "after"),
}


def end_at(
    name: str,
    number: int,
    end: Callable[[], None],
    started: Callable[[Index], None],
    replace: Callable[[Any, str, Any], None] = setattr,
) -> None:
    """Call `end` at a step of the task that starts as number `number`, counted from 1.

    `started` receives the chunk of each task. Tasks run one after the other.
    """
    count, is_ended = 0, False
    run, step = downsample._downsample, STEPS[name]
    function = getattr(step.owner, step.name)

    def counted(item: Any, chunk: Index, attempt: Any) -> None:
        nonlocal count
        if is_ended:
            return end()  # a pool starts another task before it receives the exception
        count += 1
        started(chunk)
        return run(item, chunk, attempt)

    def ending(owner: Any, *arguments: Any) -> Any:
        nonlocal is_ended
        is_other = step.name == "commit" and arguments[0].kind != KIND
        if count != number or is_ended or is_other:
            return function(owner, *arguments)
        is_ended = True
        if step.moment == "in":
            _write_partly(owner, *arguments)
        elif step.moment == "after":
            function(owner, *arguments)
        return end()

    replace(downsample, "_downsample", counted)
    replace(step.owner, step.name, ending)


def _write_partly(array: WritableArray, objects: list[tuple[str, bytes]]) -> None:
    """Store all objects but the last one, which tensorstore begins to write."""
    for name, content in objects[:-1]:
        array._kvstore.write(name, content).result()
    name, content = objects[-1]
    path = Path(array.path, f"{name}.__lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content[: len(content) // 2])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tracing(path: str) -> Callable[[Index], None]:
    """Return a function that adds the chunk of a task to a file."""

    def started(chunk: Index) -> None:
        with open(path, "a") as file:
            file.write(".".join(map(str, chunk)) + "\n")

    return started


if __name__ == "__main__":
    from chunkq.cli import main

    step, number, trace, *command = sys.argv[1:]
    end_at(step, int(number), kill, tracing(trace))
    sys.argv = ["chunkq", *command]
    sys.exit(main())
