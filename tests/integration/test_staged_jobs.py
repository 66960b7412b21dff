"""Whole jobs on a simulated device: the same bytes as on the host, whatever is late or early."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker import inference_engine
from chunkq_worker.batching import Batcher
from chunkq_worker.inference_engine import Device
from chunkq_worker.runtimes.base import BatchFeed, Runtime
from chunkq_worker.runtimes.torch import TorchRuntime
from chunkq_worker.runtimes.torch_files import LOADERS, LoadedNetwork
from chunkq_worker.steps import Steps

from chunkq.errors import ModelError, PredictionError
from chunkq.job import ModelConfig
from chunkq.plan import Plan
from tests.harness.networks import toy_model
from tests.harness.torch_networks import Fake, conv, plan_of
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import run_inline
from tests.simulated_device import SimulatedDevice

each_device = pytest.mark.parametrize("early", [False, True], ids=["copies late", "copies early"])


def on(device: SimulatedDevice) -> Callable[[ModelConfig, Steps, int | None], Runtime]:
    """Load networks as for CUDA, but onto a simulated device."""

    def load(model: ModelConfig, steps: Steps, threads: int | None) -> Runtime:
        here = model.model_copy(update={"device": "cpu"})
        return TorchRuntime(LOADERS[model.type](here), model, steps, threads, device)

    return load


def job(folder: Path, **more: Any) -> dict[str, Any]:
    """Six chunks of overlapping patches; the last batch of each is a smaller one."""
    if not (folder / "in.zarr").exists():
        write_zarr(folder / "in.zarr", random_volume((24, 16, 20), "uint16"), (8, 8, 8))
    model = toy_model(folder, (8, 8, 8), scale=100.0, runtime="torch") | {"max_batch_size": 5}
    values: dict[str, Any] = {
        "input": str(folder / "in.zarr"),
        "inference_type": "sliding_window",
        "strides": [4, 6, 5],
        "weight_function": ["weight_gaussian"],
        "chunksize": [8, 12, 10],
        "storage_chunks": [4, 4, 5],
        "combine": "soft",
        "threads": 1,
    }
    return values | more | {"model_config": model | more.get("model_config", {})}


def result(
    values: dict[str, Any], output: Path, device: SimulatedDevice | None
) -> dict[str, bytes]:
    """Run a job; returns every file of the output's array."""
    values = values | {"output": str(output)}
    if device is None:
        run_inline(values)
    else:
        model = values["model_config"] | {"device": "cuda"}
        with (
            mock.patch.object(inference_engine, "load_runtime", on(device)),
            mock.patch.object(inference_engine, "_device", Device()),
        ):
            run_inline(values | {"model_config": model})
    assert len(np.unique(read_output(output))) > 1
    files = [path for path in (output / "0").rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


STEPS = """\
def preprocessing(batch):
    return batch.astype("float32")[:, :, ::-1] / 2

def postprocessing_protected(batch):
    return batch.mul_(2)
"""


@each_device
@pytest.mark.parametrize("graph", [False, True], ids=["called", "captured"])
@pytest.mark.parametrize("combine", ["soft", "hard", "weighted_avg"])
def test_a_job_on_a_device_writes_the_same_bytes_as_on_the_host(
    tmp_path: Path, combine: str, graph: bool, early: bool
) -> None:
    values = job(tmp_path, combine=combine)
    expected = result(values, tmp_path / "host.zarr", None)
    device = SimulatedDevice(early=early)
    values["model_config"]["cuda_graph"] = graph
    assert result(values, tmp_path / "device.zarr", device) == expected
    assert device.copies > 20


@each_device
def test_steps_of_the_users_own_change_nothing_about_that(tmp_path: Path, early: bool) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    steps = {"processing_steps": str(tmp_path / "steps.py")}
    values = job(tmp_path, combine="weighted_avg", model_config=steps)
    expected = result(values, tmp_path / "host.zarr", None)
    assert result(values, tmp_path / "device.zarr", SimulatedDevice(early=early)) == expected


# --------------------------------------------------------------------- one batch in advance


class Noting(Fake):
    """A network that notes when batches are written, sent and run; its feed takes one ahead."""

    any_batch = True

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.notes: list[str] = []

    def feed(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> BatchFeed:
        return NotingFeed(self.notes, shape, dtype)

    def __call__(self, batch: npt.NDArray[Any]) -> Any:
        self.notes.append(f"run {batch.flat[0]:.0f}")
        return super().__call__(batch)


class NotingFeed(BatchFeed):
    ahead = True

    def __init__(self, notes: list[str], shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._notes, self._shape, self._dtype = notes, shape, dtype

    def buffer(self) -> npt.NDArray[Any]:
        return np.zeros(self._shape, self._dtype)

    def send(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self._notes.append(f"send {batch.flat[0]:.0f}")
        return batch


def six_patches(folder: Path, **more: Any) -> tuple[Plan, npt.NDArray[np.float32]]:
    """A chunk of six patches, three rows of two; the n-th row holds n everywhere."""
    plan = plan_of(folder, shape=(24, 16), chunksize=[24, 16], model={"max_batch_size": 2}, **more)
    return plan, np.repeat(np.arange(1, 4, dtype=np.float32), 8)[:, None].repeat(16, 1)


def test_one_batch_is_on_its_way_while_one_is_computed_and_no_more(tmp_path: Path) -> None:
    plan, halo = six_patches(tmp_path)
    runtime = Noting()
    patches = list(plan.patches(plan.chunk((0, 0))))
    for _ in Batcher(plan, runtime, Steps()).predictions(patches, [halo], (0, 0)):
        runtime.notes.append("use")
    use = ["use", "use"]
    steps = [["send 1", "run 1", "send 2"], use, ["run 2", "send 3"], use, ["run 3"], use]
    assert runtime.notes == [note for step in steps for note in step]


def test_what_is_wrong_with_a_batch_is_told_before_what_is_wrong_with_the_next(
    tmp_path: Path,
) -> None:
    plan, halo = six_patches(tmp_path)
    patches = list(plan.patches(plan.chunk((0, 0))))
    halo[0] = np.nan

    def refuse_the_second(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if batch.max() == 2:
            raise ValueError("two")
        return batch

    batcher = Batcher(plan, Noting(), Steps(preprocessing=refuse_the_second))
    with pytest.raises(PredictionError, match="the input has NaN"):
        list(batcher.predictions(patches, [halo], (0, 0)))
    halo[0] = 1
    with pytest.raises(ValueError, match="two"):
        list(batcher.predictions(patches, [halo], (0, 0)))


def test_a_batch_sent_in_advance_that_turns_out_too_large_is_sent_again(tmp_path: Path) -> None:
    class Shrinking(Noting):
        def __call__(self, batch: npt.NDArray[Any]) -> Any:
            self._max_items = 2 if len(self.batches) < 1 else 1
            return super().__call__(batch)

    plan, halo = six_patches(tmp_path)
    patches = list(plan.patches(plan.chunk((0, 0))))
    runtime = Shrinking()
    found = list(Batcher(plan, runtime, Steps()).predictions(patches, [halo], (0, 0)))
    assert [patch for patch, _ in found] == patches
    assert [float(p[0, 0, 0]) for _, p in found] == pytest.approx(
        [n / 7 for n in (1, 1, 2, 2, 3, 3)]
    )
    assert [len(batch) for batch in runtime.batches] == [2, 1, 1, 1, 1]


# -------------------------------------------------------------------------- captured networks


class Waiting(torch.nn.Module):
    """Looks at its values, for which the host has to wait."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 3, 1, 1) if float(x.sum()) >= 0 else x


def test_a_network_that_cannot_be_captured_is_one_line(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, model={"device": "cuda", "cuda_graph": True})
    loaded = LoadedNetwork(Waiting())
    waiting = TorchRuntime(loaded, plan.job.model, Steps(), None, SimulatedDevice())
    with pytest.raises(ModelError) as caught:
        Batcher(plan, waiting, Steps()).warm_up()
    assert str(caught.value).startswith("model_config.cuda_graph: ")
    assert str(caught.value).endswith("remove cuda_graph")


def test_a_captured_network_has_its_last_batch_filled_up(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, model={"device": "cuda", "cuda_graph": True})
    model, loaded = plan.job.model, LoadedNetwork(conv().eval())
    assert not TorchRuntime(loaded, model, Steps(), None, SimulatedDevice()).any_batch
    free = model.model_copy(update={"cuda_graph": False})
    assert TorchRuntime(loaded, free, Steps(), None, SimulatedDevice()).any_batch
