"""A small torch network for 2-D patches in every form, for the tests of the torch runtime."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.steps import Steps

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.job_parsing import parse_job
from chunkq.plan.volume import Volume
from tests.harness.predictions import each_prediction
from tests.strategies import JobPlan

CLASS = """\
import torch


class Net(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, width, 3, padding=1)

    def forward(self, x):
        return self.layer(x)


class Other(torch.nn.Module):
    def forward(self, x):
        return [None]
"""


PATCH = (8, 8)


def namespace() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "user"}
    exec(CLASS, names)
    return names


def trained() -> torch.nn.Module:
    torch.manual_seed(3)
    module: torch.nn.Module = namespace()["Net"](width=3)
    return module


def scripted(module: torch.nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Trace and save a module. Scripting would need a source file of its class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(module, torch.zeros((2, 1, *PATCH), dtype=dtype)).save(str(path))
    return path


def create_plan(
    folder: Path, shape: tuple[int, int] = (32, 16), dtype: str = "float32", **more: Any
) -> JobPlan:
    (folder / "net.py").write_text(CLASS)
    (folder / "kwargs.py").write_text("kwargs = {'width': 3}\n")
    model = {
        "runtime": "torch",
        "type": "class",
        "class_file": str(folder / "net.py"),
        "class_name": "Net",
        "kwargs_file": str(folder / "kwargs.py"),
        "model_input_shape": [1, *PATCH],
        "model_output_shape": [3, *PATCH],
        "max_batch_size": 4,
    } | more.pop("model", {})
    values = {"input": "/in.zarr", "output": "/out.zarr", "chunksize": [16, 16]} | more
    return JobPlan.of(parse_job({**values, "model_config": model}), Volume(shape, dtype))


def load(plan: JobPlan, steps: Steps | None = None) -> Runtime:
    return load_runtime(plan.job.model, steps or Steps(), 1)


def predictions(plan: JobPlan, runtime: Any = None, steps: Steps | None = None) -> npt.NDArray[Any]:
    """Return the predictions (patches, C, *Q) of chunk 0.0 for a fixed input."""
    chunk = plan.chunk((0, 0))
    values = np.random.default_rng(1).random(chunk.halo.shape)
    region = (values if plan.volume.dtype.startswith("float") else values * 100).astype(
        plan.volume.dtype
    )
    batcher = Batcher(plan, plan.job.model, runtime or load(plan), steps or Steps())
    pairs = each_prediction(batcher, list(plan.patches(chunk)), [region], chunk.halo.start)
    return np.stack([np.asarray(prediction).copy() for _, prediction in pairs])


class FakeRuntime(Runtime):
    """A runtime that records its batches. Raise `error` for more than `max_items` items."""

    device = "cpu"

    def __init__(self, max_items: int = 1000, error: Exception | None = None) -> None:
        self.batches: list[npt.NDArray[Any]] = []
        self._max_items, self._error = max_items, error or RuntimeError("can't allocate memory")

    def __call__(self, batch: npt.NDArray[Any]) -> tuple[Any, ...]:
        return (self.forward(batch),)

    def forward(self, batch: npt.NDArray[Any]) -> Any:
        if len(batch) > self._max_items:
            raise self._error
        self.batches.append(batch.copy())
        return torch.from_numpy(batch.astype(np.float32)).repeat(1, 3, 1, 1) / 7

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Any:
        return torch.from_numpy(np.zeros(shape, dtype))

    def to_device(self, array: npt.NDArray[Any]) -> Any:
        return torch.from_numpy(array)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return "can't allocate memory" in str(error)

    def close(self) -> None:
        pass


def exhaust_cpu_memory() -> None:
    """Raise torch's error for a failed allocation."""
    torch.empty(1 << 55, dtype=torch.uint8)


def as_file(path: Path, **more: Any) -> dict[str, Any]:
    """Return the keys of model_config for a pickled module."""
    removed = {"class_file": None, "class_name": None, "kwargs_file": None}
    return {"type": "file", "model_file": str(path), "trusted": True} | removed | more


def as_script(path: Path, **more: Any) -> dict[str, Any]:
    return as_file(path) | {"type": "torchscript", "ts_file": str(path), "model_file": None} | more


def as_program(path: Path, **more: Any) -> dict[str, Any]:
    return as_file(path) | {"type": "exported", "trusted": False} | more


def program(
    path: Path,
    module: torch.nn.Module | None = None,
    shape: tuple[int, ...] = (4, 1, *PATCH),
    **limits: int,
) -> Path:
    """Export a module for batches of this shape, or for the batch sizes `min` to `max`."""
    sizes = {"x": {0: torch.export.Dim("batch", **limits)}} if limits else None
    module = (module or trained()).eval().requires_grad_(False)
    exported = torch.export.export(module, (torch.zeros(shape),), dynamic_shapes=sizes)
    torch.export.save(exported, path)
    return path


def load_error(folder: Path, code: ErrorCode = ErrorCode.MODEL_UNUSABLE, /, **model: Any) -> str:
    """Return the message of the ModelError that loading or warming up a network raises."""
    plan = create_plan(folder, model=model)
    with pytest.raises(ModelError) as caught:
        Batcher(plan, plan.job.model, load(plan), Steps()).warm_up()
    line = str(caught.value)
    assert caught.value.code is code, line
    assert "\n" not in line
    assert "\x1b" not in line
    return line


def conv() -> torch.nn.Module:
    """Return a network that uses only classes of torch."""
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.Dropout(0.5))


class TrainedNet(FakeRuntime):
    """Calls the trained network directly."""

    def forward(self, batch: npt.NDArray[Any]) -> Any:
        with torch.inference_mode():
            return trained()(torch.from_numpy(batch))
