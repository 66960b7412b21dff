"""Run mutated job files: each must be planned or rejected with one line per mistake."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import yaml

from chunkq.cli import main
from chunkq.create import check_job
from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.job.job_reading import load_job
from chunkq.job.record import JobRecord
from chunkq.plan.costs import total_costs
from chunkq.plan.footprint import largest_footprint
from tests.fuzz.findings import Finding, of_error, of_text
from tests.fuzz.mutations import encode, mutated_text, mutated_values, odd_file
from tests.harness.standard_job import JOB

CPU_SECONDS = 10
"""CPU seconds after which loading and planning a job file counts as a hang."""
MAX_LINE_LENGTH = 2000
"""Characters of a message that a user can read."""
ROOT = Path(__file__).parents[2]

CODE = """
import numpy as np

def weights(shape):
    return np.ones(shape)

def zeros(shape):
    return np.zeros(shape)

class Net:
    def __call__(self, batch):
        return batch
"""


class HangError(BaseException):
    """A case used more CPU time than its limit."""


def create_lab(folder: Path) -> None:
    """Write the volumes and files that base job files and mutations refer to."""
    import zarr

    folder.mkdir(parents=True)
    for rank, shape in {1: (90,), 2: (30, 26), 3: (24, 36, 40), 4: (8, 8, 8, 8)}.items():
        array = zarr.create_array(folder / f"in{rank}.zarr", shape=shape, dtype="uint8")
        array[...] = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    zarr.create_array(folder / "void.zarr", shape=(0, 3, 4), dtype="uint8")
    zarr.create_array(folder / "strings.zarr", shape=(8, 8, 8), dtype="<U4", zarr_format=2)
    broken = folder / "broken.zarr"
    broken.mkdir()
    (broken / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array", "shape": "x"}')
    np.save(folder / "in.npy", np.zeros((24, 36, 40), np.float32))
    np.save(folder / "wide.npy", np.zeros((24, 36, 40), np.uint64))
    np.save(folder / "objects.npy", np.array([None, 1], dtype=object), allow_pickle=True)
    (folder / "cut.npy").write_bytes((folder / "in.npy").read_bytes()[:60])
    (folder / "net.py").write_text(CODE)
    (folder / "bad.py").write_text("raise SystemExit('no')")
    (folder / "kwargs.txt").write_text("{}")
    (folder / "model.bin").write_bytes(b"a network")
    (folder / "garbage.bin").write_bytes(Random(1).randbytes(3000))
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")


def bases() -> list[dict[str, Any]]:
    """Return valid job files of every kind, including the one in examples/."""
    standard = JOB | {"input": "in3.zarr", "output": "out.zarr"}
    standard["model_config"] = JOB["model_config"] | {"class_file": "net.py"}
    model = standard["model_config"]
    brain = yaml.safe_load((ROOT / "examples/brain/job.yaml").read_text())
    brain |= {"input": "in3.zarr", "pad_width": [20, 20, 20]}
    brain["model_config"] |= {"model_file": "model.bin"}
    torch = {"runtime": "torch", "type": "torchscript", "ts_file": "model.bin"}
    flat = {"input": "in2.zarr", "output": "out.zarr"}
    return [
        standard,
        standard | {"input": "in.npy", "output_dtype": "float16", "queue": "sqlite:///tmp/q.db"},
        standard | {"combine": "hard", "weight_function": ["net.py", "weights"], "nan": "zero"},
        brain,
        flat | {
            "inference_type": "crop_margin", "margin": [2, 1], "chunksize": [12, 12],
            "pad_mode": "reflect", "zarr_format": 2,
            "model_config": torch | {"model_input_shape": [12, 12], "model_output_shape": [8, 10]},
        },
        flat | {
            "offsets": [[3, 3], [-2, 1]], "pad_width": [2, 2], "combine": "soft",
            "model_config": torch | {"model_input_shape": [1, 6, 6], "device": "cuda"},
        },
        {
            "input": ["in3.zarr", "in3.zarr"], "output": "out.zarr", "chunksize": [12, 12, 12],
            "model_config": model | {"join_dim": 1, "kwargs_file": "kwargs.txt"},
        },
        {
            "input": "in3.zarr", "output": "out.zarr", "cluster": "running",
            "dask_config": {"address": "host:8786", "protocol": "ucx"},
            "model_config": {
                "runtime": "onnx", "type": "file", "model_file": "model.bin", "lost_dim": 0,
                "model_input_shape": [3, 12, 12], "model_output_shape": [1, 12, 12],
            },
        },
        {
            "input": "in4.zarr", "output": "out.zarr", "activation": "sigmoid", "edge": "pad",
            "ray_config": {"address": "host", "port": 6380},
            "model_config": {
                "runtime": "tensorflow", "type": "json", "json_file": "model.bin",
                "model_input_shape": [4, 4, 4, 4], "checkpoint": "model.bin",
            },
        },
        {
            "input": "in1.zarr", "output": "out.zarr", "inference_type": "sliding_window",
            "strides": [5], "hardware": "cpu_only", "threads": 2,
            "model_config": torch | {"model_input_shape": [16], "processing_steps": "net.py"},
        },
    ]  # fmt: skip


BASES = bases()


def write_case(seed: int, lab: Path) -> Path:
    """Write the job file of a seed into the lab folder; return its path."""
    rng = Random(f"job file {seed}")
    if rng.random() < 0.01:
        return odd_file(rng, lab)
    suffix = rng.choice((".yaml", ".yaml", ".json", ".yml", ""))
    values = rng.choice(BASES)
    mutates_text = rng.random() < 0.35
    if not mutates_text or rng.random() < 0.2:
        values = mutated_values(rng, values)
    try:
        text = encode(rng, values, suffix)
    except (yaml.YAMLError, UnicodeError, RecursionError):  # YAML cannot store every string
        text = encode(rng, values, ".json")
    if mutates_text:
        text = mutated_text(rng, text)
    path = lab / f"job{suffix}"
    path.write_bytes(text)
    return path


def judge(seed: int, lab: Path) -> Finding | None:
    """Load, prepare and plan the job file of a seed; return a finding if that misbehaves."""
    path = write_case(seed, lab)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited():
            # A command-line argument cannot contain a null character.
            by_command = seed % 10 == 0 and "\0" not in str(path)
            finding = _judge_command(path) if by_command else _judge_call(path)
    except BaseException as error:
        return of_error(error)
    if finding is None and err.getvalue():
        return of_text("output on stderr", err.getvalue())
    return finding


def _judge_call(path: Path) -> Finding | None:
    try:
        prepared = check_job(load_job(path))
    except ChunkqError as error:
        return judge_error(error)
    record = prepared.record
    stored = JobRecord.from_json(record.to_json())
    if stored.digest != record.digest or total_costs(stored.plans()) != prepared.costs:
        return Finding("stored record differs", "the record read back has another digest or plan")
    if largest_footprint(prepared.plans).peak_bytes(2) < 0:
        return Finding("negative footprint", str(prepared.largest.chunksize))
    return None


def _judge_command(path: Path) -> Finding | None:
    """Plan with the command line; its messages must be on stderr, one per line."""
    err = io.StringIO()
    arguments = ["chunkq", "plan", str(path), "--json"]
    with mock.patch.object(sys, "argv", arguments), contextlib.redirect_stderr(err):
        code = main()
    if code not in (0, 1, 2):
        return Finding(f"exit code {code}", err.getvalue())
    lines = err.getvalue().splitlines()
    unexpected = [
        line for line in lines if not line.startswith(("chunkq: ", "Usage: ", "Try ", "Error: "))
    ]
    if (code == 0) != (not lines) or any(line for line in unexpected):
        detail = "\n".join(unexpected) or f"{code} {err.getvalue()}"
        return of_text("unexpected lines on stderr", detail)
    return None


def judge_error(error: ChunkqError) -> Finding | None:
    """Return a finding if an error has no code or no line, or a line is invalid."""
    if not isinstance(error.code, ErrorCode):
        return Finding("no code", repr(error))
    lines = error.problems if isinstance(error, JobError) else [str(error)]
    if not lines:
        return Finding("no line", repr(error))
    for line in lines:
        if reason := _line_fault(line):
            return of_error(error, reason)
    return None


def _line_fault(line: str) -> str:
    """Return why a message cannot be printed as one line, or an empty string."""
    if not line.strip():
        return "empty message"
    if len(line) > MAX_LINE_LENGTH:
        return "message too long"
    if not line.isprintable():
        return "message is not one printable line"
    return "message shows a secret" if "secret" in line and "secret@" in line else ""


@contextmanager
def limited() -> Iterator[None]:
    """Raise HangError in a block that exceeds its CPU time limit."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise HangError(f"more than {CPU_SECONDS} s of CPU time")

    previous = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
