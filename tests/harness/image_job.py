"""A job over generated images, the expected table, and a network that stops on request."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tests.harness.image_files import CLASSES, DAMAGES, EDGE, NETWORK, ListedImage
from tests.harness.processes import RunningCommand, is_alive
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace
from tests.image_reference import Result, Settings, plain_loop

MEAN, STD, SCALE = 0.5, 0.25, 255.0
SETTINGS = Settings(EDGE, EDGE, SCALE, (MEAN,) * 3, (STD,) * 3)
NAMES = [f"class_{number}" for number in range(CLASSES)]
CHUNK, BATCH = 64, 16
TOLERANCE = 1e-5
TIME = 1800.0
"""Seconds that a job takes, at most."""

HOOKS = '''
import glob
import os
import sys
import time
import zlib

CHECKS = ("check_images", "check_repeated")


def reach(step):
    """Stop this process if the file NET_STOP names the step and enough chunks are committed.

    One process stops until it is killed: a worker process, or the one that writes the table.
    """
    stop = os.environ.get("NET_STOP")
    if not stop or not os.path.exists(stop):
        return
    if step != "export" and "chunkq_worker.worker_process" not in sys.orig_argv:
        return  # the check of the network
    try:
        with open(stop) as file:
            name, after = file.read().split()
    except FileNotFoundError:
        return
    if name != step or commits() < int(after):
        return
    try:
        os.rename(stop, stop + ".taken")
    except FileNotFoundError:
        return
    with open(stop + ".partial", "w") as file:
        file.write(str(os.getpid()))
    os.rename(stop + ".partial", stop + ".stopped")
    while True:
        time.sleep(60)


def commits():
    return len(glob.glob(glob.escape(os.environ["NET_JOB"]) + "/*/done/infer/0/*"))


def is_checked():
    """Return whether chunkq runs this batch for a check only."""
    frame = sys._getframe()
    while frame is not None:
        if any(name in frame.f_code.co_qualname for name in CHECKS):
            return True
        frame = frame.f_back
    return False


def record(batch):
    if "NET_TRACE" in os.environ:
        file = os.open(os.environ["NET_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, "".join(f"{zlib.crc32(image.tobytes())}\\n" for image in batch).encode())
        os.close(file)


def patch_ledger():
    from chunkq.job.ledger import ItemLedger

    put_piece, commit = ItemLedger.put_piece, ItemLedger.commit

    def put_piece_and_stop(self, *args):
        written = put_piece(self, *args)
        reach("piece")
        return written

    def stop_and_commit(self, record):
        reach("commit" if record.kind == "infer" else record.kind)
        return commit(self, record)

    ItemLedger.put_piece, ItemLedger.commit = put_piece_and_stop, stop_and_commit
'''
HOOKED = (
    HOOKS
    + NETWORK
    + '''

class Hooked(Net):
    """The network that records its images and stops on request."""

    def __init__(self):
        super().__init__()
        if "NET_STOP" in os.environ:
            reach("load")
            patch_ledger()

    def forward(self, x):
        if not is_checked():
            reach("forward")
            record(x)
        return super().forward(x)
'''
)
SITE = """
import os
import sys

if "NET_STOP" in os.environ and any(name in sys.orig_argv for name in ("run", "finalize")):
    sys.path.insert(0, os.environ["NET_FOLDER"])
    import network

    network.patch_ledger()
"""
"""Patches the process that writes the table, too."""


@dataclass(frozen=True)
class ImageWorkspace(Workspace):
    """A folder with a job over images; `name` is that of its table."""

    name: str = "out.parquet"
    images: Path = field(kw_only=True)
    """Folder of the network, which several workspaces share."""

    @property
    def output(self) -> Path:
        return self.folder / self.name

    @property
    def job_folder(self) -> Path:
        return self.folder / f"{self.name}.chunkq"

    @property
    def errors(self) -> Path:
        return self.epoch_folder / "errors.parquet"

    @property
    def stop(self) -> Path:
        return self.folder / "stop"

    @property
    def process_env(self) -> dict[str, str]:
        """The environment of a command in a separate process, with the network's variables."""
        paths = [str(self.images / "hooks"), os.environ.get("PYTHONPATH", "")]
        return super().process_env | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "NET_TRACE": str(self.folder / "trace"),
            "NET_JOB": str(self.job_folder),
            "NET_STOP": str(self.stop),
            "NET_FOLDER": str(self.images),
        }

    def stop_at(self, step: str, commits: int = 0) -> None:
        """Let the next process stop that reaches a step after some commits."""
        (self.folder / "stop.partial").write_text(f"{step} {commits}")
        (self.folder / "stop.partial").rename(self.stop)

    def wait_until_stopped(self, command: RunningCommand) -> int:
        """Wait until a process of a command has stopped; return its process id."""
        stopped = self.stop.with_name("stop.stopped")

        def is_stopped() -> bool:
            assert is_alive(command.pid), "the command ended before a process stopped"
            return stopped.exists()

        wait_until(is_stopped, "a process stops", TIME)
        number = int(stopped.read_text())
        stopped.unlink()
        return number

    def computed(self) -> Counter[str]:
        """Return how often the network got each image, by the CRC-32 of its input."""
        trace = self.folder / "trace"
        return Counter(trace.read_text().split()) if trace.exists() else Counter()

    def tables(self) -> tuple[bytes, bytes]:
        """Return the bytes of both tables."""
        return self.output.read_bytes(), self.errors.read_bytes()


def write_network(folder: Path) -> None:
    """Write the network and the hooks that its workspaces use."""
    (folder / "hooks").mkdir(parents=True)
    (folder / "hooks" / "sitecustomize.py").write_text(SITE)
    (folder / "network.py").write_text(HOOKED)


def job_values(images: Path, source: str, **changes: Any) -> dict[str, Any]:
    """Return the keys of a job over a list of images."""
    return {
        "input": source,
        "output": "out.parquet",
        "inference_type": "image",
        "image": {"resize": EDGE, "crop": EDGE, "scale": SCALE, "mean": MEAN, "std": STD},
        "classes": NAMES,
        "truth": {"regex": "/(class_[0-9])/"},
        "chunksize": [CHUNK],
        "threads": 1,
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(images / "network.py"),
            "class_name": "Hooked",
            "max_batch_size": BATCH,
        },
    } | changes


def write_local(folder: Path, images: Sequence[ListedImage]) -> dict[str, str | None]:
    """Write images below a folder; return the code of the error of each path, in their order.

    A damaged path that names no image is replaced by one of an unknown scheme.
    """
    codes: dict[str, str | None] = {}
    for image in images:
        path = folder / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        code = DAMAGES[image.damage].code if image.damage else None
        if image.damage == "trick":
            codes[f"nothing://bucket/{image.name}"] = code
            continue
        if image.damage == "folder":
            path.mkdir()
        if image.content is not None:
            path.write_bytes(image.content)
        if image.damage == "permission":
            path.chmod(0)
            code = None if os.access(path, os.R_OK) else code  # root reads everything
        codes[str(path)] = code
    return codes


def write_list(path: Path, paths: Iterable[str]) -> None:
    """Write a table of paths with a column of their own numbers."""
    lines = [f'{number},"{name}"' for number, name in enumerate(paths)]
    path.write_text("\n".join(["site,path", *lines]) + "\n")


def reference(paths: Iterable[str], contents: dict[str, bytes]) -> Result:
    """Return what a plain loop finds; a path without a content is missing."""

    def read(path: str) -> bytes:
        if path not in contents:
            raise FileNotFoundError(path)
        return contents[path]

    names: dict[str, Any] = {}
    exec(NETWORK, names)
    return plain_loop(paths, read, names["Net"](), SETTINGS)


def assert_expected(
    output: Path, errors: Path, codes: dict[str, str | None], expected: Result
) -> None:
    """Compare the tables of a job with the plain loop and with how the images were damaged."""
    bad = {path for path, code in codes.items() if code is not None}
    assert expected.unreadable == bad
    rows = pq.read_table(output).to_pylist()
    assert [row["path"] for row in rows] == [path for path in codes if path not in bad]
    numbers = {path: number for number, path in enumerate(codes)}
    for row in rows:
        scores = expected.scores[row["path"]]
        best = np.sort(scores)[::-1]
        assert abs(row["score"] - best[0]) < TOLERANCE
        np.testing.assert_allclose(row["top_scores"], best[:5], rtol=0, atol=TOLERANCE)
        if best[0] - best[1] > TOLERANCE:
            assert row["prediction"] == scores.argmax()
        assert row["label"] == row["top_labels"][0] == NAMES[row["prediction"]]
        for label, score in zip(row["top_labels"], row["top_scores"], strict=True):
            assert abs(scores[NAMES.index(label)] - score) < TOLERANCE
        assert row["truth"] in row["path"]
        assert row["correct"] == (row["truth"] == row["label"])
        assert row["site"] == numbers[row["path"]]
    failed = pq.read_table(errors).to_pylist()
    assert [(row["path"], row["row"], row["code"]) for row in failed] == [
        (path, numbers[path], codes[path]) for path in codes if path in bad
    ]
