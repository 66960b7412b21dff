"""Jobs on a simulated device: the output has the same bytes as on the host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker import device as device_module
from chunkq_worker import inference_engine
from chunkq_worker.batching import Batcher
from chunkq_worker.device import Device
from chunkq_worker.runtimes.base import BatchFeed, Runtime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.torch import TorchRuntime
from chunkq_worker.runtimes.torch_files import LOADERS, LoadedNetwork
from chunkq_worker.steps import Steps

from chunkq.errors import ErrorCode, ModelError, PredictionError
from chunkq.job.model_config import ModelConfig
from chunkq.plan.plan import Plan
from tests.harness.networks import toy_model
from tests.harness.predictions import each_prediction
from tests.harness.torch_networks import FakeRuntime, conv, create_plan
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import run_inline
from tests.simulated_device import SimulatedDevice

each_device = pytest.mark.parametrize("early", [False, True], ids=["copies late", "copies early"])


def loader_for(device: SimulatedDevice) -> Callable[..., Runtime]:
    """Return a loader that loads networks as for CUDA, but onto a simulated device."""

    def load(
        model: ModelConfig, steps: Steps, threads: int | None, _: ItemShapes, network: object = None
    ) -> Runtime:
        on_cpu = model.model_copy(update={"device": "cpu"})
        return TorchRuntime(LOADERS[model.type](on_cpu), model, steps, threads, device)

    return load


def job(folder: Path, **more: Any) -> dict[str, Any]:
    """Return a job of chunks with overlapping patches; the last batch of each is smaller."""
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


def output_files(
    values: dict[str, Any], output: Path, device: SimulatedDevice | None
) -> dict[str, bytes]:
    """Run a job; return path -> content of the files of the output array."""
    values = values | {"output": str(output)}
    if device is None:
        run_inline(values)
    else:
        model = values["model_config"] | {"device": "cuda"}
        with (
            mock.patch.object(inference_engine, "load_runtime", loader_for(device)),
            mock.patch.object(device_module, "_device", Device()),
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
    expected = output_files(values, tmp_path / "host.zarr", None)
    device = SimulatedDevice(early=early)
    values["model_config"]["cuda_graph"] = graph
    assert output_files(values, tmp_path / "device.zarr", device) == expected
    assert device.counts.uploaded > 0


@each_device
def test_a_job_with_processing_steps_writes_the_same_bytes_as_on_the_host(
    tmp_path: Path, early: bool
) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    steps = {"processing_steps": str(tmp_path / "steps.py")}
    values = job(tmp_path, combine="weighted_avg", model_config=steps)
    expected = output_files(values, tmp_path / "host.zarr", None)
    assert output_files(values, tmp_path / "device.zarr", SimulatedDevice(early=early)) == expected


def test_a_nan_in_the_input_is_the_error_of_the_host(tmp_path: Path) -> None:
    volume = random_volume((24, 16, 20), "float32")
    volume[13, 9, 11] = np.nan
    write_zarr(tmp_path / "in.zarr", volume, (8, 8, 8))
    errors = []
    for device in (None, SimulatedDevice()):
        with pytest.raises(PredictionError) as caught:
            output_files(job(tmp_path), tmp_path / f"{device is None}.zarr", device)
        errors.append((caught.value.code, str(caught.value)))
    assert errors[0] == errors[1]
    assert errors[0][0] is ErrorCode.PREDICTION_INVALID


# ------------------------------------------------------------------------ one batch ahead


class RecordingNetwork(FakeRuntime):
    """Record when batches are sent and run; the feed sends one batch ahead."""

    any_batch = True

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.events: list[str] = []

    def feed(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> BatchFeed:
        return RecordingFeed(self.events, shape, dtype)

    def forward(self, batch: npt.NDArray[Any]) -> Any:
        self.events.append(f"run {batch.flat[0]:.0f}")
        return super().forward(batch)


class RecordingFeed(BatchFeed):
    double_buffered = True

    def __init__(self, events: list[str], shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._events, self._shape, self._dtype = events, shape, dtype

    def buffer(self) -> npt.NDArray[Any]:
        return np.zeros(self._shape, self._dtype)

    def send(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self._events.append(f"send {batch.flat[0]:.0f}")
        return batch


def six_patches(folder: Path, **more: Any) -> tuple[Plan, npt.NDArray[np.float32]]:
    """Return the plan of one chunk of six patches in three rows; the n-th row has the value n."""
    plan = create_plan(
        folder, shape=(24, 16), chunksize=[24, 16], model={"max_batch_size": 2}, **more
    )
    return plan, np.repeat(np.arange(1, 4, dtype=np.float32), 8)[:, None].repeat(16, 1)


def test_one_batch_is_sent_while_the_one_before_it_is_computed(tmp_path: Path) -> None:
    plan, halo = six_patches(tmp_path)
    runtime = RecordingNetwork()
    patches = list(plan.patches(plan.chunk((0, 0))))
    for _ in each_prediction(
        Batcher(plan, plan.job.model, runtime, Steps()), patches, [halo], (0, 0)
    ):
        runtime.events.append("use")
    use = ["use", "use"]
    steps = [["send 1", "run 1", "send 2"], use, ["run 2", "send 3"], use, ["run 3"], use]
    assert runtime.events == [event for step in steps for event in step]


def test_an_error_of_a_batch_is_raised_before_an_error_of_the_next_batch(
    tmp_path: Path,
) -> None:
    plan, halo = six_patches(tmp_path)
    patches = list(plan.patches(plan.chunk((0, 0))))
    halo[0] = np.nan

    def fail_for_the_second(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if batch.max() == 2:
            raise ValueError("two")
        return batch

    batcher = Batcher(
        plan, plan.job.model, RecordingNetwork(), Steps(preprocessing=fail_for_the_second)
    )
    with pytest.raises(PredictionError, match=r"input.*NaN") as error:
        list(each_prediction(batcher, patches, [halo], (0, 0)))
    assert error.value.code is ErrorCode.PREDICTION_INVALID
    halo[0] = 1
    with pytest.raises(ValueError, match="two"):
        list(each_prediction(batcher, patches, [halo], (0, 0)))


def test_a_batch_sent_ahead_that_is_too_large_is_sent_again(tmp_path: Path) -> None:
    class Shrinking(RecordingNetwork):
        def forward(self, batch: npt.NDArray[Any]) -> Any:
            self._max_items = 2 if len(self.batches) < 1 else 1
            return super().forward(batch)

    plan, halo = six_patches(tmp_path)
    patches = list(plan.patches(plan.chunk((0, 0))))
    runtime = Shrinking()
    results = list(
        each_prediction(Batcher(plan, plan.job.model, runtime, Steps()), patches, [halo], (0, 0))
    )
    assert [patch for patch, _ in results] == patches
    assert [float(p[0, 0, 0]) for _, p in results] == pytest.approx(
        [n / 7 for n in (1, 1, 2, 2, 3, 3)]
    )
    assert [len(batch) for batch in runtime.batches] == [2, 1, 1, 1, 1]


# -------------------------------------------------------------------------- captured networks


class SynchronizingNetwork(torch.nn.Module):
    """Branches on its values, so the host has to wait for the device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 3, 1, 1) if float(x.sum()) >= 0 else x


def test_a_network_that_cannot_be_captured_is_an_error_of_one_line(tmp_path: Path) -> None:
    plan = create_plan(tmp_path, model={"device": "cuda", "cuda_graph": True})
    loaded = LoadedNetwork(SynchronizingNetwork())
    runtime = TorchRuntime(loaded, plan.job.model, Steps(), None, SimulatedDevice())
    with pytest.raises(ModelError, match=r"^model_config\.cuda_graph: ") as error:
        Batcher(plan, plan.job.model, runtime, Steps()).warm_up()
    assert error.value.code is ErrorCode.MODEL_UNUSABLE
    assert "\n" not in str(error.value)


def test_the_last_batch_of_a_captured_network_is_padded(tmp_path: Path) -> None:
    plan = create_plan(tmp_path, model={"device": "cuda", "cuda_graph": True})
    model, loaded = plan.job.model, LoadedNetwork(conv().eval())
    assert not TorchRuntime(loaded, model, Steps(), None, SimulatedDevice()).any_batch
    uncaptured = model.model_copy(update={"cuda_graph": False})
    assert TorchRuntime(loaded, uncaptured, Steps(), None, SimulatedDevice()).any_batch
