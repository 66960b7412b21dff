"""Source files of small networks for the runtimes numpy and torch; both give the same values."""

from pathlib import Path
from typing import Any

RUNTIME = "numpy"
"""The runtime of `toy_model` and of the standard job's network."""

TORCH_TOY = '''\
"""Toy networks, the same as those of tests/reference.py, for any rank."""
import itertools, math, os, time
import torch


def crop(y, output):
    for axis, q in enumerate(output, start=2):
        y = y.narrow(axis, (y.shape[axis] - q) // 2, q)
    return y


class Toy(torch.nn.Module):
    """`kind` is pointwise, position_dependent or box_blur; inputs are divided by `scale`.

    TOY_DELAY in the environment makes every batch take that many seconds.
    A voxel above `poison` turns the patch's first voxel into NaN.
    """

    def __init__(self, kind, channels, patch, output, scale=1.0, poison=None):
        super().__init__()
        self.kind, self.patch, self.output = kind, tuple(patch), tuple(output)
        self.scale, self.poison = scale, poison
        one = (1,) * len(self.patch)
        self.t = ((torch.arange(channels, dtype=torch.float64) + 0.5) / channels).reshape(-1, *one)
        self.gain = torch.ones(one, dtype=torch.float64)
        if kind == "position_dependent":
            axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in self.patch]
            u = sum(torch.meshgrid(*axes, indexing="ij")) / len(axes)
            phases = torch.arange(channels, dtype=torch.float64).reshape(-1, *one)
            self.gain = 1 + torch.cos(2 * math.pi * u + phases) / 2

    def forward(self, batch):
        time.sleep(float(os.environ.get("TOY_DELAY", "0")))
        values = batch.reshape(len(batch), 1, *self.patch)
        x = values / self.scale
        if self.kind == "box_blur":
            wide = torch.nn.functional.pad(x, (1, 1) * len(self.patch))
            x = torch.zeros_like(x)
            for shift in itertools.product(range(3), repeat=len(self.patch)):
                part = wide
                for axis, (s, n) in enumerate(zip(shift, self.patch), start=2):
                    part = part.narrow(axis, s, n)
                x = x + part
            x = x / 3 ** len(self.patch)
        y = x * (2 * self.t * self.gain).to(x.dtype) - (self.t * self.t).to(x.dtype)
        y = crop(y, self.output).contiguous()
        if self.poison is not None:
            bad = values.flatten(1).amax(1) > self.poison
            y.flatten(1)[bad, 0] = math.nan
        return y
'''

NUMPY_TOY = '''\
"""Toy networks, the same as those of tests/reference.py, for any rank."""
import itertools, math, os, time
import numpy as np


class Toy:
    """`kind` is pointwise, position_dependent or box_blur; inputs are divided by `scale`.

    TOY_DELAY in the environment makes every batch take that many seconds.
    A voxel above `poison` turns the patch's first voxel into NaN.
    """

    def __init__(self, kind, channels, patch, output, scale=1.0, poison=None):
        self.kind, self.patch, self.output = kind, tuple(patch), tuple(output)
        self.scale, self.poison = scale, poison
        one = (1,) * len(self.patch)
        self.t = ((np.arange(channels, dtype=np.float64) + 0.5) / channels).reshape(-1, *one)
        self.gain = np.ones(one)
        if kind == "position_dependent":
            axes = [(np.arange(n, dtype=np.float64) + 0.5) / n for n in self.patch]
            u = sum(np.meshgrid(*axes, indexing="ij")) / len(axes)
            phases = np.arange(channels, dtype=np.float64).reshape(-1, *one)
            self.gain = 1 + np.cos(2 * math.pi * u + phases) / 2

    def __call__(self, batch):
        return self.forward(batch)

    def forward(self, batch):
        time.sleep(float(os.environ.get("TOY_DELAY", "0")))
        values = batch.reshape(len(batch), 1, *self.patch)
        x = values if batch.dtype.kind == "f" else values.astype(np.float32)
        x = x / self.scale
        if self.kind == "box_blur":
            wide = np.pad(x, [(0, 0), (0, 0), *[(1, 1)] * len(self.patch)])
            x = np.zeros_like(x)
            for shift in itertools.product(range(3), repeat=len(self.patch)):
                x += wide[(..., *(slice(s, s + n) for s, n in zip(shift, self.patch)))]
            x /= 3 ** len(self.patch)
        y = x * (2 * self.t * self.gain).astype(x.dtype) - (self.t * self.t).astype(x.dtype)
        crop = [slice((p - q) // 2, (p - q) // 2 + q) for p, q in zip(self.patch, self.output)]
        y = np.ascontiguousarray(y[(..., *crop)])
        if self.poison is not None:
            poisoned = values.reshape(len(batch), -1).max(1) > self.poison
            y.reshape(len(y), -1)[poisoned, 0] = math.nan
        return y
'''

TOYS = {"numpy": NUMPY_TOY, "torch": TORCH_TOY}

TRACE = '''
"""A network that records its patches and stops, sleeps or fails according to NET_ variables."""
import json
import os
import sys
import threading
import time
import zlib

resumed = threading.Event()
resumed.set()


def is_checked():
    """Return whether chunkq runs this batch for a check only."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in ("check_on_patches", "compare"):
            return True
        frame = frame.f_back
    return False


def record(lines):
    if "NET_TRACE" in os.environ:
        file = os.open(os.environ["NET_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, "".join(f"{os.getpid()} {line}\\n" for line in lines).encode())
        os.close(file)


def commits():
    """Count the chunks that are committed in the job's current epoch."""
    try:
        with open(os.environ["NET_JOB"] + "/job.json") as file:
            epoch = json.load(file)["epoch"]
        return len(os.listdir(os.environ["NET_JOB"] + f"/{epoch}/done/infer/0"))
    except FileNotFoundError:
        return 0


def reach(step):
    """Stop this process if NET_HOLD names the step and NET_AFTER chunks are committed.

    Only the first process that arrives stops, with all its threads, until the gate opens.
    """
    resumed.wait(300)
    if os.environ.get("NET_HOLD") != step or commits() < int(os.environ.get("NET_AFTER", 0)):
        return
    gate = os.environ["NET_GATE"]
    try:
        os.mkdir(gate)
    except FileExistsError:
        if "NET_OTHERS_WAIT" in os.environ:
            wait_for_holder(gate)
        return
    resumed.clear()
    with open(gate + "/partial", "w") as file:
        file.write(str(os.getpid()))
    os.rename(gate + "/partial", gate + "/stopped")
    while not os.path.exists(gate + "/open"):
        time.sleep(0.005)
    resumed.set()


def wait_for_holder(gate):
    """Wait until the gate opens or the process that stopped at it ends."""
    while not os.path.exists(gate + "/stopped"):
        time.sleep(0.005)
    with open(gate + "/stopped") as file:
        holder = int(file.read())
    while not os.path.exists(gate + "/open"):
        try:
            os.kill(holder, 0)
        except ProcessLookupError:
            return
        time.sleep(0.005)


def patch_ledger():
    from chunkq.job.ledger import ItemLedger

    put_piece, commit = ItemLedger.put_piece, ItemLedger.commit

    def put_piece_and_stop(self, *args):
        written = put_piece(self, *args)
        reach("piece")
        return written

    def stop_and_commit(self, record):
        if record.kind == "infer":
            reach("commit")
        elif os.environ["NET_HOLD"] == "block":
            reach("block")
        return commit(self, record)

    ItemLedger.put_piece, ItemLedger.commit = put_piece_and_stop, stop_and_commit
'''

TORCH_NET = """
import torch


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
            patch_ledger()

    def forward(self, x):
        real = [item for item in x if bool(item.any()) and not is_checked()]
        if real:
            reach("forward")
            time.sleep(float(os.environ.get("NET_SLEEP", 0)))
            if os.path.exists(os.environ.get("NET_BROKEN", "")):
                raise ArithmeticError("broken for every chunk")
            if os.path.exists(os.environ.get("NET_POISON", "")) and bool((x == 255).any()):
                raise ArithmeticError("a poisonous voxel")
            record(str(zlib.crc32(item.to(torch.uint8).numpy().tobytes())) for item in real)
        return self.conv(x / 255)
"""

NUMPY_NET = '''
import numpy as np


class Net:
    """A convolution of 3 x 3 x 3 voxels with padding, from one channel to two."""

    def __init__(self):
        reach("load")
        weights = np.sin(np.arange(54, dtype=np.float32)).reshape(2, 27)
        self.weights, self.bias = weights, np.sin(np.arange(2, dtype=np.float32) + 1)
        if "NET_HOLD" in os.environ:
            patch_ledger()

    def __call__(self, x):
        return self.forward(x)

    def forward(self, x):
        real = [item for item in x if item.any() and not is_checked()]
        if real:
            reach("forward")
            time.sleep(float(os.environ.get("NET_SLEEP", 0)))
            if os.path.exists(os.environ.get("NET_BROKEN", "")):
                raise ArithmeticError("broken for every chunk")
            if os.path.exists(os.environ.get("NET_POISON", "")) and bool((x == 255).any()):
                raise ArithmeticError("a poisonous voxel")
            record(str(zlib.crc32(item.astype(np.uint8).tobytes())) for item in real)
        return self.convolve(np.asarray(x, dtype=np.float32) / np.float32(255))

    def convolve(self, x):
        wide = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1), (1, 1)])
        d, h, w = x.shape[2:]
        shifts = [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]
        y = np.zeros((len(x), 2, d, h, w), np.float32) + self.bias.reshape(2, 1, 1, 1)
        for weights, (i, j, k) in zip(self.weights.T, shifts):
            y += wide[:, :, i : i + d, j : j + h, k : k + w] * weights.reshape(2, 1, 1, 1)
        return y
'''

NETWORK = TRACE + {"numpy": NUMPY_NET, "torch": TORCH_NET}[RUNTIME]
"""The standard job's network: it records its patches, and stops, sleeps or fails on request."""


def toy_model(
    folder: Path,
    patch: tuple[int, ...],
    *,
    channels: int = 3,
    kind: str = "box_blur",
    output: tuple[int, ...] | None = None,
    scale: float = 1.0,
    poison: float | None = None,
    runtime: str = RUNTIME,
) -> dict[str, Any]:
    """Write the toy network's files; return the `model_config` that names them."""
    output = output or patch
    (folder / "network.py").write_text(TOYS[runtime])
    kwargs = {
        "kind": kind,
        "channels": channels,
        "patch": patch,
        "output": output,
        "scale": scale,
        "poison": poison,
    }
    (folder / "kwargs.py").write_text(f"kwargs = {kwargs!r}\n")
    return {
        "runtime": runtime,
        "type": "class",
        "class_file": str(folder / "network.py"),
        "class_name": "Toy",
        "kwargs_file": str(folder / "kwargs.py"),
        "model_input_shape": [1, *patch],
        "model_output_shape": [channels, *output],
        "max_batch_size": 4,
    }
