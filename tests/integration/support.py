"""What the integration tests share: a small job, a network that tells and waits, real processes."""

import contextlib
import io
import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self
from unittest import mock

import numpy as np
import numpy.typing as npt
import psutil
import yaml

from chunkq.cli import main
from chunkq.executors import open_executor
from chunkq.executors.base import Counts, Executor, Running
from chunkq.opened import OpenJob, open_job
from chunkq.tasks import chunk_name
from tests.waiting import PATIENCE, wait_until

SHAPE = (24, 36, 40)
POISONOUS = (20, 30, 35)
"""The one voxel of the input that is 255."""

NETWORK = '''
"""A network that writes down what it is given, and waits, sleeps or fails where it is told."""
import os
import threading
import time
import zlib

import torch

go_on = threading.Event()
go_on.set()


def tell(lines):
    if "NET_TRACE" in os.environ:
        file = os.open(os.environ["NET_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, "".join(f"{os.getpid()} {line}\\n" for line in lines).encode())
        os.close(file)


def commits():
    folder = os.environ["NET_DONE"]
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return len([name for name in names if not name.startswith(".")])


def reach(place):
    """Stop the first process that comes here once enough chunks are committed; all its threads."""
    go_on.wait(300)
    if os.environ.get("NET_HOLD") != place or commits() < int(os.environ.get("NET_AFTER", 0)):
        return
    gate = os.environ["NET_GATE"]
    try:
        os.mkdir(gate)
    except FileExistsError:
        return
    go_on.clear()
    with open(gate + "/partial", "w") as file:
        file.write(str(os.getpid()))
    os.rename(gate + "/partial", gate + "/held")
    while not os.path.exists(gate + "/open"):
        time.sleep(0.005)
    go_on.set()


def wrap_folder():
    from chunkq.ledger import JobFolder

    put_piece, commit = JobFolder.put_piece, JobFolder.commit

    def told_put_piece(self, *args):
        written = put_piece(self, *args)
        reach("piece")
        return written

    def told_commit(self, record):
        if record.kind == "infer":
            reach("commit")
        elif os.environ["NET_HOLD"] == "block":
            reach("block")
        return commit(self, record)

    JobFolder.put_piece, JobFolder.commit = told_put_piece, told_commit


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        reach("load")
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=1)
        with torch.no_grad():
            for number, values in enumerate(self.conv.parameters()):
                steps = torch.arange(values.numel(), dtype=torch.float32)
                values.copy_(torch.sin(steps + number).reshape(values.shape))
        if "NET_HOLD" in os.environ:
            wrap_folder()

    def forward(self, x):
        real = [item for item in x if bool(item.any())]
        if real:
            reach("forward")
            time.sleep(float(os.environ.get("NET_SLEEP", 0)))
            if os.path.exists(os.environ.get("NET_BROKEN", "")):
                raise ArithmeticError("broken for every chunk")
            if os.path.exists(os.environ.get("NET_POISON", "")) and bool((x == 255).any()):
                raise ArithmeticError("a poisonous voxel")
            tell(str(zlib.crc32(item.to(torch.uint8).numpy().tobytes())) for item in real)
        return self.conv(x / 255)
'''

HOOKS = """
import os
import sys

if "TEST_PRELOAD" in os.environ and "chunkq_worker.child" in sys.orig_argv:
    import torch
"""

JOB: dict[str, Any] = {
    "inference_type": "sliding_window",
    "strides": [4, 4, 4],
    "combine": "weighted_avg",
    "weight_function": ["weight_gaussian"],
    "activation": "softmax",
    "chunksize": [12, 12, 12],
    "storage_chunks": [6, 6, 6],
    "threads": 1,
    "model_config": {
        "runtime": "torch",
        "type": "class",
        "class_name": "Net",
        "model_input_shape": [1, 8, 8, 8],
        "model_output_shape": [2, 8, 8, 8],
        "max_batch_size": 8,
    },
}


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@dataclass(frozen=True)
class Materials:
    """What every place shares: the input volume, the network and the job file without output."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Self:
        import zarr

        made = cls(folder)
        array = zarr.create_array(folder / "in.zarr", shape=SHAPE, chunks=(8, 8, 8), dtype="uint8")
        array[:] = made.volume
        (folder / "net.py").write_text(NETWORK)
        (folder / "hooks").mkdir()
        (folder / "hooks" / "sitecustomize.py").write_text(HOOKS)
        return made

    @cached_property
    def volume(self) -> npt.NDArray[np.uint8]:
        volume = np.random.default_rng(0).integers(1, 200, SHAPE, dtype=np.uint8)
        volume[POISONOUS] = 255
        return volume

    def job(self, **more: Any) -> dict[str, Any]:
        """A job file's values; `model` among `more` is merged into `model_config`."""
        model = JOB["model_config"] | {"class_file": str(self.folder / "net.py")}
        model |= more.pop("model", {})
        return JOB | {"input": str(self.folder / "in.zarr"), "model_config": model} | more


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """The lines on stderr that the command itself says."""
        return [line for line in self.err.splitlines() if line.startswith("chunkq: ")]


@dataclass
class Crew:
    """A real command in a process of its own, with all processes it started."""

    process: subprocess.Popen[str]
    log: Path
    known: set[int] = field(default_factory=set)

    def children(self) -> list[int]:
        """The processes below the command that live now."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.known |= {child.pid for child in found}
        return [child.pid for child in found]

    def says(self) -> str:
        return self.log.read_text()

    def ended(self, patience: float = PATIENCE) -> Ended:
        """Wait for its end."""
        code = self.process.wait(patience)
        return Ended(code, "", self.says())

    def leaves_nothing_behind(self) -> None:
        """Wait until none of the processes ever seen below it lives."""
        wait_until(lambda: not any(map(is_alive, self.known)), "its processes are gone")


@dataclass(frozen=True)
class Place:
    """One job in a folder of its own, with its own output; its own queue too, unless at `url`."""

    materials: Materials
    folder: Path
    keys: Mapping[str, Any] = field(default_factory=dict)
    url: str | None = None

    @property
    def output(self) -> Path:
        return self.folder / "out.zarr"

    @property
    def job_folder(self) -> Path:
        return self.folder / "out.zarr.chunkq"

    @property
    def queue_url(self) -> str:
        return self.url or f"sqlite://{self.folder / 'queue.db'}"

    @property
    def job_file(self) -> Path:
        path = self.folder / "job.yaml"
        if not path.exists():
            path.write_text(yaml.safe_dump(self.materials.job(**self.keys, output="out.zarr")))
        return path

    @property
    def job(self) -> OpenJob:
        return open_job(str(self.job_folder))

    @contextmanager
    def queue(self) -> Iterator[Executor]:
        executor = open_executor(self.queue_url)
        yield executor
        executor.close()

    def counts(self) -> Counts:
        with self.queue() as queue:
            return queue.counts(str(self.job_folder))

    def running(self) -> list[Running]:
        with self.queue() as queue:
            return queue.running(str(self.job_folder))

    def attempts(self) -> list[int]:
        """How often each task still on the queue was begun; of the embedded queue only."""
        import sqlite3

        with contextlib.closing(sqlite3.connect(self.folder / "queue.db")) as database:
            return [n for (n,) in database.execute("SELECT attempts FROM tasks")]

    def command(self, *arguments: str) -> Ended:
        """Run a light command of chunkq's in this process."""
        out, err = io.StringIO(), io.StringIO()
        environment = {"CHUNKQ_QUEUE": self.queue_url}
        with (
            mock.patch.object(sys, "argv", ["chunkq", *arguments]),
            mock.patch.dict(os.environ, environment),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main()
        return Ended(code, out.getvalue(), err.getvalue())

    def produce(self, *arguments: str) -> Ended:
        ended = self.command("produce", str(self.job_file), *arguments)
        assert ended.code == 0, ended.err
        return ended

    def finalize(self) -> Ended:
        return self.command("finalize", str(self.output))

    def finish(self) -> None:
        """Finalize a job whose chunks are all done."""
        ended = self.finalize()
        assert ended.code == 0, ended.err

    def status(self) -> dict[str, Any]:
        ended = self.command("status", str(self.output), "--json")
        assert ended.code == 0, ended.err
        found: dict[str, Any] = json.loads(ended.out)
        return found

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.job_folder / "report.json").read_text())
        return found

    @contextmanager
    def start(self, *arguments: str, **environment: str) -> Iterator[Crew]:
        """Start a command for real; whatever of it still lives at the end is killed."""
        log = self.folder / f"log-{len(list(self.folder.glob('log-*')))}"
        every = {k: v for k, v in os.environ.items() if not k.startswith(("CHUNKQ_", "NET_"))}
        every |= {
            "CHUNKQ_QUEUE": self.queue_url,
            "PYTHONPATH": os.pathsep.join(
                [
                    str(self.materials.folder / "hooks"),
                    *filter(None, [os.environ.get("PYTHONPATH")]),
                ]
            ),
            "NET_TRACE": str(self.folder / "trace"),
            "NET_DONE": str(self.job_folder / "done" / "infer"),
            "NET_GATE": str(self.folder / "gate"),
        }
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "chunkq", *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=every | environment,
                text=True,
            )
        crew = Crew(process, log)
        try:
            yield crew
        except AssertionError as error:
            error.add_note(f"`chunkq {' '.join(arguments)}` said: {crew.says()[-4000:]}")
            raise
        finally:
            crew.children()
            for pid in [process.pid, *filter(is_alive, crew.known)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
            process.wait()

    def work(self, *arguments: str, **environment: str) -> Ended:
        """Work until nothing is left to do."""
        with self.start("work", "--burst", "--gpus", "none", *arguments, **environment) as crew:
            return crew.ended()

    def wait_for_full_hands(self, depth: int) -> None:
        """Wait until every worker that has tasks has `depth` of them to commit."""

        def full() -> bool:
            running, done = self.running(), self.done()
            hands = Counter(r.worker for r in running if chunk_name(r.task.chunk) not in done)
            return bool(hands) and set(hands.values()) == {depth}

        wait_until(full, f"{depth} chunks are in flight")

    def held(self) -> int:
        """Wait until a process stands at the gate; returns its id."""
        gate = self.folder / "gate" / "held"
        wait_until(gate.exists, "a process holds")
        return int(gate.read_text())

    def open_gate(self) -> None:
        (self.folder / "gate" / "open").touch()

    def stored(self) -> dict[str, bytes]:
        """Every file of the output store."""
        return files_below(self.output)

    def done(self, kind: str = "infer") -> dict[str, tuple[bytes, int]]:
        """Content and time of every commit record, by chunk name."""
        folder = self.job_folder / "done" / kind
        found = folder.glob("[!.]*") if folder.is_dir() else iter(())
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    def record(self, name: str) -> dict[str, Any]:
        """The commit record of a chunk."""
        found: dict[str, Any] = json.loads(self.done()[name][0])
        return found

    def pieces(self) -> list[Path]:
        return [path for path in (self.job_folder / "pieces").rglob("*") if path.is_file()]

    def computed(self) -> Counter[int]:
        """How often the network was given each patch, by the CRC-32 of the patch's voxels."""
        trace = self.folder / "trace"
        lines = trace.read_text().splitlines() if trace.exists() else []
        return Counter(int(line.split()[1]) for line in lines)

    def patches(self) -> dict[str, set[int]]:
        """The CRC-32 of every patch that each chunk owns, by chunk name; cut here, from NumPy."""
        plan, volume = self.job.plan, self.materials.volume
        return {
            ".".join(map(str, index)): {
                zlib.crc32(volume[patch.source.slices((0, 0, 0))].tobytes())
                for patch in plan.patches(plan.chunk(index))
            }
            for index in plan.indices()
        }


@cache
def materials(make_folder: Callable[[str], Path]) -> Materials:
    """The shared materials, made once per test session."""
    return Materials.make(make_folder("materials"))


@cache
def calm_place(make_folder: Callable[[str], Path]) -> Place:
    """The job done by one worker to which nothing happened; made once per test session."""
    place = Place(materials(make_folder), make_folder("calm"))
    place.produce()
    ended = place.work()
    assert ended.code == 0, ended.err
    place.finish()
    return place
