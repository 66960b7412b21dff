"""Slices with neighbors, several inputs, and the job file of SPINN."""

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from chunkq.errors import ErrorCode, JobError
from chunkq.job.job_reading import load_job
from tests import reference as ref
from tests.harness.files import files_below
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace, run_inline

NETWORK = '''
"""Return a different weighted sum along one axis of the batch in each channel."""
import torch


class Mix(torch.nn.Module):
    def __init__(self, axis, count, channels, squeeze):
        super().__init__()
        self.axis, self.squeeze = axis, squeeze
        steps = torch.arange(count * channels, dtype=torch.float32).reshape(channels, count)
        self.weights = torch.cos(steps)

    def forward(self, batch):
        parts = batch.movedim(self.axis, 0)
        mixed = [sum(w * part for w, part in zip(row, parts)) for row in self.weights]
        y = torch.stack(mixed, dim=1)
        return y if self.squeeze else y.unsqueeze(self.axis + 1)
'''
SHAPE = (11, 13, 17)
CHANNELS = 2


def mixture(parts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the output of `Mix`, (CHANNELS, *S), for the input (count, *S)."""
    count = len(parts)
    weights = np.cos(np.arange(count * CHANNELS, dtype=np.float64).reshape(CHANNELS, count))
    return np.einsum("cn,n...->c...", weights, parts)


@dataclass(frozen=True)
class Case:
    """Keys of a job, parameters of its network, and the setup of the reference."""

    model: dict[str, Any]
    axis: int
    count: int
    setup: ref.Setup
    squeeze: bool = False
    keys: dict[str, Any] = field(default_factory=dict)
    inputs: int = 1
    lost: int | None = None


SLICE, WITH_NEIGHBOURS = (6, 1, 6), (6, 5, 6)
CASES = {
    "a slice with its neighbors": Case(
        {"model_input_shape": [6, 5, 6], "model_output_shape": [2, 6, 1, 6], "lost_dim": 1},
        axis=2,
        count=5,
        setup=ref.patch(SHAPE, WITH_NEIGHBOURS, SLICE, pad_width=(0, 2, 0)),
        keys={"pad_width": [0, 2, 0]},
        lost=1,
    ),
    "a network output without the lost axis": Case(
        {"model_input_shape": [6, 5, 6], "model_output_shape": [2, 6, 1, 6], "lost_dim": 1},
        axis=2,
        count=5,
        squeeze=True,
        setup=ref.patch(SHAPE, WITH_NEIGHBOURS, SLICE, pad_width=(0, 2, 0)),
        lost=1,
    ),
    "overlapping slices with more padding": Case(
        {"model_input_shape": [6, 5, 6], "model_output_shape": [2, 6, 1, 6], "lost_dim": 1},
        axis=2,
        count=5,
        setup=ref.sliding_window(
            SHAPE, WITH_NEIGHBOURS, (3, 1, 4), SLICE, pad_width=(3, 2, 3), pad_mode="reflect"
        ),
        keys={
            "inference_type": "sliding_window",
            "strides": [3, 1, 4],
            "pad_width": [3, 2, 3],
            "pad_mode": "reflect",
            "weight_function": ["weight_gaussian"],
        },
        lost=1,
    ),
    "three inputs as channels of 2-D slices": Case(
        {"model_input_shape": [1, 6, 6], "model_output_shape": [2, 1, 6, 6], "join_dim": 1},
        axis=1,
        count=3,
        setup=ref.patch(SHAPE, (1, 6, 6), pad_mode="edge"),
        keys={"pad_mode": "edge"},
        inputs=3,
    ),
    "two inputs as channels of a 3-D network, overlapping": Case(
        {"model_input_shape": [1, 6, 6, 6], "model_output_shape": [2, 6, 6, 6], "join_dim": 1},
        axis=1,
        count=2,
        squeeze=True,
        setup=ref.sliding_window(SHAPE, (6, 6, 6), (3, 3, 3)),
        keys={"inference_type": "sliding_window", "strides": [3, 3, 3]},
        inputs=2,
    ),
}


def truth(case: Case, volumes: list[npt.NDArray[Any]]) -> ref.Reference:
    setup = case.setup

    def predict(patch: npt.NDArray[np.float64], start: tuple[int, ...]) -> Any:
        if case.lost is not None:
            slices = np.moveaxis(patch, case.lost, 0)
            return np.expand_dims(mixture(slices), case.lost + 1)
        parts = [
            ref.pad_read(volume, start, setup.input_patch, setup.pad_mode, 0) for volume in volumes
        ]
        return mixture(np.stack(parts).astype(np.float64))

    weight = case.keys.get("weight_function", ["weight_uniform"])[0]
    return ref.reference(setup, volumes[0], predict, "weighted_avg", weight)


def job_of(case: Case, folder: Path, volumes: list[npt.NDArray[Any]]) -> dict[str, Any]:
    paths = [
        str(write_zarr(folder / f"in{n}.zarr", volume, (8, 8, 8)))
        for n, volume in enumerate(volumes)
    ]
    (folder / "net.py").write_text(NETWORK)
    kwargs = {"axis": case.axis, "count": case.count, "channels": CHANNELS}
    (folder / "kwargs.py").write_text(f"kwargs = {kwargs | {'squeeze': case.squeeze}}\n")
    model = {
        "runtime": "torch",
        "type": "class",
        "class_file": str(folder / "net.py"),
        "class_name": "Mix",
        "kwargs_file": str(folder / "kwargs.py"),
        "max_batch_size": 4,
    }
    return {
        "input": paths if len(paths) > 1 else paths[0],
        "output": str(folder / "out.zarr"),
        "chunksize": [6, 8, 8],
        "storage_chunks": [3, 4, 4],
        "threads": 1,
        "model_config": model | case.model,
        **case.keys,
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_slices_with_neighbors_and_several_inputs_equal_the_reference(
    tmp_path: Path, case: Case
) -> None:
    dtypes = ["uint8", "int16", "float32"][: case.inputs]
    volumes = [np.roll(random_volume(SHAPE, dtype), n, axis=0) for n, dtype in enumerate(dtypes)]
    job, report = run_inline(job_of(case, tmp_path, volumes))
    expected = truth(case, volumes).average
    output = read_output(job.folder.output)
    assert output.shape == (CHANNELS, *SHAPE)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(output / scale, expected / scale, rtol=0, atol=1e-6)
    assert report["patches"] == report["planned_patches"] == len(ref.patches(case.setup))
    assert report["bytes"]["input"] == report["planned_bytes"]["input"]


def test_model_output_shape_may_be_omitted_for_slices(tmp_path: Path) -> None:
    case = CASES["a slice with its neighbors"]
    values = job_of(case, tmp_path, [random_volume(SHAPE)])
    del values["model_config"]["model_output_shape"]
    (tmp_path / "kwargs.py").write_text(
        "kwargs = {'axis': 2, 'count': 5, 'channels': 1, 'squeeze': True}\n"
    )
    (tmp_path / "net.py").write_text(
        NETWORK.replace("y = torch.stack(mixed, dim=1)", "y = mixed[0]")
    )
    job, _ = run_inline(values)
    expected = truth(case, [random_volume(SHAPE)]).average[0]
    np.testing.assert_allclose(read_output(job.folder.output), expected, rtol=0, atol=1e-3)


def test_each_input_of_a_list_without_join_dim_is_an_image_of_the_output_group(
    tmp_path: Path,
) -> None:
    case = CASES["overlapping slices with more padding"]
    volumes = {"scan": random_volume(SHAPE), "scan_2": random_volume((9, 12, 8), "float32")}
    alone = []
    for name, volume in volumes.items():
        folder = tmp_path / name
        folder.mkdir()
        alone.append(job_of(case, folder, [volume]))
        source = folder / "scan.zarr"  # both inputs have the same name
        Path(alone[-1]["input"]).rename(source)
        alone[-1]["input"] = str(source)
    output = tmp_path / "both.zarr"
    _, report = run_inline(
        alone[0] | {"input": [job["input"] for job in alone], "output": str(output)}
    )

    series = json.loads((output / "OME" / "zarr.json").read_text())["attributes"]["ome"]["series"]
    assert series == list(volumes)
    reports = []
    for job, (name, volume) in zip(alone, volumes.items(), strict=True):
        reports.append(run_inline(job)[1])
        assert files_below(output / name / "0") == files_below(Path(job["output"]) / "0")
        expected = truth(replace(case, setup=replace(case.setup, volume=volume.shape)), [volume])
        np.testing.assert_allclose(read_output(output / name), expected.average, rtol=0, atol=1e-3)
    assert report["patches"] == sum(alone["patches"] for alone in reports)


# ------------------------------------------------------------------------- invalid inputs


def problems(tmp_path: Path, **model: Any) -> list[str]:
    """Return the problems of a job with three inputs and a changed model_config."""
    case = CASES["three inputs as channels of 2-D slices"]
    values = job_of(case, tmp_path, [random_volume(SHAPE)] * 3)
    values["model_config"] |= model
    values["model_config"] = {k: v for k, v in values["model_config"].items() if v is not None}
    with pytest.raises(JobError) as error:
        run_inline(values)
    assert error.value.code is ErrorCode.JOB_INVALID
    return list(error.value.problems)


INVALID: dict[str, tuple[dict[str, Any], str, str]] = {
    "an axis that a batch does not have": ({"join_dim": 4}, "model_config.join_dim", "4"),
    "the batch axis": ({"join_dim": 0}, "model_config.join_dim", "0"),
    "an axis with more than one entry": ({"join_dim": 2}, "model_config.join_dim", "6"),
    "an even number of slices": (
        {"model_input_shape": [1, 6, 6], "model_output_shape": [2, 1, 1, 6], "lost_dim": 1},
        "model_config.lost_dim",
        "6",
    ),
    "more than one slice in the output": (
        {"model_input_shape": [1, 5, 6], "model_output_shape": [2, 1, 5, 6], "lost_dim": 1},
        "model_config.lost_dim",
        "5",
    ),
    "a lost axis that does not exist": ({"lost_dim": 3}, "model_config.lost_dim", "3"),
}


@pytest.mark.parametrize(("model", "key", "value"), INVALID.values(), ids=INVALID.keys())
def test_inputs_that_cannot_be_stacked_and_invalid_slices_are_reported(
    tmp_path: Path, model: dict[str, Any], key: str, value: str
) -> None:
    lines = problems(tmp_path, **model)
    assert any(line.startswith(f"{key}: ") and value in line for line in lines), lines


def test_inputs_of_different_shapes_are_rejected_with_their_shapes(tmp_path: Path) -> None:
    case = CASES["two inputs as channels of a 3-D network, overlapping"]
    volumes = [random_volume(SHAPE), random_volume((11, 13, 16))]
    with pytest.raises(JobError) as error:
        run_inline(job_of(case, tmp_path, volumes))
    [line] = error.value.problems
    assert line.startswith("input.1: ")
    assert "[11, 13, 16]" in line
    assert "[11, 13, 17]" in line


# -------------------------------------------------------------------- the job file of SPINN


SPINN = {
    "cluster": "slurm",
    "hardware": "gpu",
    "combine": "soft",
    "chunksize": [3, 384, 384],
    "pad_width": [0, 128, 128],
    "dask_config": {"n_workers": 4, "threads_per_worker": 10},
    "ray_config": {},
    "model_config": {
        "runtime": "torch",
        "processing_steps": "steps.py",
        "max_batch_size": 256,
        "model_input_shape": [1, 128, 128],
        "model_output_shape": [21, 1, 128, 128],
        "dtype": "float32",
        "device": "cuda",
        "type": "torchscript",
        "ts_file": "ts_model.pt",
    },
}
STEPS = """
def preprocessing(batch):
    return batch / 255.0

def preprocessing_protected(batch):
    return batch * 2 - 1

def postprocessing_protected(batch):
    return batch.softmax(1).unsqueeze(2)

def postprocessing(batch):
    return batch
"""
MAKE_MODEL = """
import sys, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(1, 21, 3, padding=1)

    def forward(self, x):
        return self.conv(x)

torch.jit.script(Net().eval()).save(sys.argv[1])
"""


@pytest.fixture
def spinn(tmp_path: Path) -> Workspace:
    write_zarr(tmp_path / "in.zarr", random_volume((4, 200, 200)), (4, 64, 64))
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "make.py").write_text(MAKE_MODEL)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", tmp_path / "make.py", tmp_path / "ts_model.pt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    workspace = Workspace(tmp_path, environment={"CUDA_VISIBLE_DEVICES": ""})
    (tmp_path / "config.json").write_text(json.dumps(SPINN))
    return workspace


RUN = ("-i", "in.zarr", "-o", "out.zarr", "config.json")


def test_a_spinn_config_is_a_valid_job_file(spinn: Workspace) -> None:
    job = load_job(spinn.folder / "config.json", input="in.zarr", output="out.zarr")
    assert job.inference_type == "patch"
    assert job.model.processing_steps == str(spinn.folder / "steps.py")
    answer = spinn.call("plan", *RUN).ok()
    assert "patches" in answer.out
    assert not spinn.output.exists()


def test_a_spinn_config_for_a_cluster_with_gpus_is_rejected_with_one_line_per_key(
    spinn: Workspace,
) -> None:
    answer = spinn.run("run", "-e", "sqlite", *RUN)
    answer.refused(2, "cluster: slurm", "GPU")
    assert len(answer.err.splitlines()) == 2
    assert not spinn.output.exists()
    for engine in ("dask", "ray"):
        answer = spinn.run("run", "-e", engine, "--queue", f"{engine}://", *RUN)
        answer.refused(2, "cluster: slurm", "GPU")


def test_a_spinn_config_runs_after_three_keys_are_changed_to_this_machine(spinn: Workspace) -> None:
    model = {**SPINN["model_config"], "device": "cpu", "max_batch_size": 8}  # type: ignore[dict-item]
    values = {**SPINN, "cluster": "local", "hardware": "cpu_only", "model_config": model}
    (spinn.folder / "config.json").write_text(json.dumps(values))
    answer = spinn.run("run", "-e", "sqlite", *RUN, timeout=300).ok()
    assert "dask_config" in answer.err
    labels = read_output(spinn.output)
    assert labels.shape == (4, 200, 200)
    assert labels.dtype == np.uint8
    import torch

    torch.manual_seed(3)
    net = torch.nn.Conv2d(1, 21, 3, padding=1)
    # One patch: rows and columns 0 to 127 of slice 1.
    window = random_volume((4, 200, 200))[1, :128, :128]
    with torch.inference_mode():
        batch = torch.from_numpy(window)[None, None].float() / 255 * 2 - 1
        expected = net(batch)[0].argmax(0).numpy()
    np.testing.assert_array_equal(labels[1, :128, :128], expected)
