"""The path of a job through chunkq: `python -m tests.prove.call_path [FILE.json]`.

It runs a small job in this process and prints each function of the control side when a reader
meets it: the calls in their order, each function at its first call only. It counts how often the
reader goes back to a module that was left before, either to read on after a call or to read
another function. With a file, the figures and the names of all functions go there as JSON.

The control side is the producer, and the modules of the core that create, queue and finalize a
job, in the main thread. Sinks of events are left out: no other code depends on what they do.
"""

import inspect
import json
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

from tests.harness.small_job import small_workspace

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / name for name in ("chunkq", "producer/chunkq_producer", "worker/chunkq_worker")]
MODULES = {
    str(file): ".".join(file.relative_to(folder.parent).with_suffix("").parts)
    for folder in FOLDERS
    for file in folder.rglob("*.py")
}
"""File -> module."""
CONTROL = re.compile(
    r"chunkq_producer\.(?!run_display).*|chunkq\.(cli|create|enqueue|finalize)", re.DOTALL
)


class Step(NamedTuple):
    """The first call of a function, and the module of the function that called it."""

    module: str
    function: str
    caller: str | None

    @property
    def name(self) -> str:
        """Name of the function: its module without the package, and its qualified name."""
        return f"{self.module.partition('.')[2]}.{self.function}"


@dataclass(frozen=True)
class CallPath:
    """Functions of the control side, and of all of chunkq, in the order of their first calls."""

    control: Sequence[Step]
    names: Sequence[str]

    @property
    def modules(self) -> list[str]:
        """The modules in the order in which a reader of the control side enters them."""
        visited = [name for step in self.control for name in (step.caller, step.module) if name]
        return [name for n, name in enumerate(visited) if n == 0 or visited[n - 1] != name]

    @property
    def returns(self) -> int:
        """How often the reader goes back to a module that was left before."""
        return len(self.modules) - len(set(self.modules))


def record(action: Callable[[], object]) -> CallPath:
    """Run an action in the main thread and return its path."""
    control: dict[tuple[str, str], Step] = {}
    names: dict[str, None] = {}
    callers: list[tuple[FrameType, str]] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "return" and callers and callers[-1][0] is frame:
            callers.pop()
        if event != "call" or not _is_function(frame.f_code):
            return
        module = MODULES.get(frame.f_code.co_filename)
        if module is None:
            return
        step = Step(module, frame.f_code.co_qualname, callers[-1][1] if callers else None)
        names.setdefault(step.name)
        if CONTROL.fullmatch(module) and threading.current_thread() is threading.main_thread():
            control.setdefault(step[:2], step)
            callers.append((frame, module))

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return CallPath(tuple(control.values()), tuple(names))


def _is_function(code: CodeType) -> bool:
    """Return whether code is a named function: no module, body of a class or comprehension."""
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")


def record_run() -> CallPath:
    """Return the path of a small job that `chunkq run` computes in this process."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = small_workspace(Path(folder))
        return record(lambda: workspace.call("run", "job.json", "--queue", "inprocess://path").ok())


def main() -> None:
    """Print the path."""
    path = record_run()
    module = None
    for step in path.control:
        if step.module != module:
            print(step.module)  # noqa: T201
        print(f"    {step.function}")  # noqa: T201
        module = step.module
    modules = set(path.modules)
    print(f"{len(path.control)} functions, {len(modules)} modules, {path.returns} returns")  # noqa: T201
    if sys.argv[1:]:
        values = {"returns": path.returns, "modules": path.modules, "names": path.names}
        Path(sys.argv[1]).write_text(json.dumps(values))


if __name__ == "__main__":
    main()
