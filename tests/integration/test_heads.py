"""Jobs whose outputs are heads of a network: those of separate jobs, from one pass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from chunkq_producer.check_model import complete_job
from chunkq_worker import inference_engine
from chunkq_worker.model_check import report_check
from chunkq_worker.predictor import Predictor
from chunkq_worker.runtimes.torch import TorchRuntime
from chunkq_worker.runtimes.torch_files import LOADERS

import chunkq
from chunkq.create import check_job, create_job
from chunkq.errors import ErrorCode, JobError, ModelError
from chunkq.finalize import finalize_job
from chunkq.job.events import StageProgress
from chunkq.job.job_reading import load_job
from tests.harness.files import files_below
from tests.harness.small_job import SHAPE, small_workspace
from tests.harness.volumes import random_volume
from tests.harness.workspace import Workspace, run_inline, run_tasks
from tests.simulated_device import SimulatedDevice

PATCH = [8, 8]
HEADS = """
import dataclasses
import numpy as np

CALLS = __file__ + ".calls"


@dataclasses.dataclass
class Prediction:
    scores: object
    distance: object
    aux: object = None
    parts: object = None


def everything(batch):
    with open(CALLS, "ab") as file:
        file.write(b"x")
    x = batch.astype(np.float32) / 100
    ramp = np.linspace(0, 1, x.shape[-1], dtype=np.float32)
    scores = np.stack([np.sin(7 * x + n) * (1 + ramp) for n in range(3)], axis=1)
    return Prediction(scores, 50 * x * ramp, x[:, ::2, ::2], np.floor(x * 3.999).astype(np.uint8))


def as_dataclass(batch):
    return everything(batch)


def as_dict(batch):
    return vars(everything(batch))


def as_tuple(batch):
    one = everything(batch)
    return one.scores, one.distance, one.aux, one.parts


def tissue(batch):
    return everything(batch).scores


def edge(batch):
    return everything(batch).scores[:, [2]]


def distance(batch):
    return everything(batch).distance


def parts(batch):
    return everything(batch).parts[:, None]
"""
OUTPUTS: dict[str, dict[str, Any]] = {
    "tissue": {"head": "scores", "activation": "softmax", "combine": "soft"},
    "edge": {"head": "scores", "channels": [2], "activation": "sigmoid"},
    "distance": {"head": "distance", "output_dtype": "float16", "fill_value": -1},
    "parts": {"head": "parts", "classes": 4, "combine": "soft"},
}
SEVERAL: dict[str, Any] = {
    "outputs": OUTPUTS
    | {
        "coarse": {"head": "aux", "scale": [2, 2], "storage_chunks": [2, 2]},
        "near": {"head": "distance", "output_dtype": "uint8", "range": [0, 50]},
        "doubt": {"head": "scores", "activation": "softmax", "combine": "std"},
    },
    "pyramid": {"levels": 3},
    "chunksize": [16, 16],
}
"""Four heads in different dtypes, one of them at another scale, with levels."""
SHAPES = {"tissue": [3, *PATCH], "edge": [1, *PATCH], "distance": PATCH, "parts": [1, *PATCH]}
INDICES = {"scores": 0, "distance": 1, "parts": 3}


def model(folder: Path, function: str, shape: Any = None) -> dict[str, Any]:
    (folder / "heads.py").write_text(HEADS)
    keys = {"runtime": "numpy", "type": "class", "class_file": str(folder / "heads.py")}
    more = {} if shape is None else {"model_output_shape": shape}
    return keys | more | {"class_name": function, "model_input_shape": PATCH, "max_batch_size": 4}


def workspace_of(folder: Path, function: str = "as_dict", **changes: Any) -> Workspace:
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {"outputs": OUTPUTS, "model_config": model(folder, function)}
    return small_workspace(folder, **(values | changes))


def run_all(workspace: Workspace) -> dict[str, Any]:
    """Run a job in this process; return its report."""
    job = create_job(check_job(complete_job(load_job(workspace.folder / "job.json"))))
    run_tasks(job)
    return finalize_job(job, worker="test")


def stored_objects(output: Path) -> dict[str, bytes]:
    """Return the stored objects of all arrays of an output, whose metadata have a digest."""
    files = files_below(output)
    return {name: content for name, content in files.items() if "c/" in name}


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, bytes]]:
    """Return the files of the array of each output, of a job whose network returns it alone."""
    files = {}
    for name, keys in OUTPUTS.items():
        folder = tmp_path_factory.mktemp(name)
        own = {key: value for key, value in keys.items() if key not in ("head", "channels")}
        network = model(folder, name, SHAPES[name])
        workspace = small_workspace(folder, **own, model_config=network)
        run_all(workspace)
        files[name] = files_below(workspace.output / "0")
    return files


def calls(folder: Path) -> int:
    path = folder / "heads.py.calls"
    count = len(path.read_bytes()) if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


def with_indices() -> dict[str, Any]:
    return {name: keys | {"head": INDICES[keys["head"]]} for name, keys in OUTPUTS.items()}


@pytest.mark.parametrize("function", ["as_dict", "as_dataclass", "as_tuple"])
def test_heads_of_one_job_have_the_bytes_of_separate_jobs(
    tmp_path: Path, separate: Mapping[str, dict[str, bytes]], function: str
) -> None:
    outputs = with_indices() if function == "as_tuple" else OUTPUTS
    workspace = workspace_of(tmp_path, function, outputs=outputs)
    report = run_all(workspace)
    assert report["missing"] == []
    for name, expected in separate.items():
        assert files_below(workspace.output / name / "0") == expected, name
        assert len(expected) > 1


def test_a_head_at_half_resolution_has_the_bytes_that_it_has_alone(tmp_path: Path) -> None:
    coarse = {"coarse": {"head": "aux", "scale": [2, 2], "storage_chunks": [3, 3]}}
    files = []
    for name, more in (("together", {"tissue": OUTPUTS["tissue"]}), ("alone", {})):
        workspace = workspace_of(tmp_path / name, outputs=coarse | more)
        run_all(workspace)
        files.append(files_below(workspace.output / "coarse" / "0"))
    assert files[0] == files[1]
    assert zarr.open_array(tmp_path / "together/out.zarr/coarse/0").shape == (16, 11)


CHANNELS_FIRST = """
import numpy as np


def first(batch):
    x = batch.astype(np.float32)
    return {"main": np.concatenate([x, x * 2], axis=1), "half": x[..., ::2, ::2]}
"""


def write_channels_last(path: Path) -> None:
    """Write the network `first` as ONNX with the channels as last axis."""
    import onnx

    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    constants = {
        "factors": np.array([1, 2], np.float32),
        "starts": np.array([0, 0]),
        "stops": np.array(PATCH),
        "axes": np.array([1, 2]),
        "steps": np.array([2, 2]),
    }
    nodes = [
        helper.make_node("Mul", ["x", "factors"], ["main"]),
        helper.make_node("Slice", ["x", "starts", "stops", "axes", "steps"], ["half"]),
    ]
    graph = helper.make_graph(
        nodes,
        "last",
        [helper.make_tensor_value_info("x", float32, ["n", *PATCH, 1])],
        [
            helper.make_tensor_value_info("main", float32, ["n", *PATCH, 2]),
            helper.make_tensor_value_info("half", float32, ["n", 4, 4, 1]),
        ],
        [onnx.numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)


def test_a_coarser_output_of_a_network_with_channels_last_is_that_of_channels_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "first.py").write_text(CHANNELS_FIRST)
    write_channels_last(tmp_path / "last.onnx")
    outputs = {
        "main": {"head": "main"},
        "coarse": {"head": "half", "scale": [2, 2], "storage_chunks": [2, 2]},
    }
    first = {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(tmp_path / "first.py"),
        "class_name": "first",
        "model_input_shape": [1, *PATCH],
        "model_output_shape": {"main": [2, *PATCH], "half": [1, 4, 4]},
    }
    last = {
        "runtime": "onnx",
        "type": "file",
        "model_file": str(tmp_path / "last.onnx"),
        "model_input_shape": [*PATCH, 1],
        "model_output_shape": {"main": [*PATCH, 2], "half": [4, 4, 1]},
    }
    stored = []
    for name, network in (("first", first), ("last", last)):
        keys = {"outputs": outputs, "model_config": network | {"max_batch_size": 4}}
        workspace = small_workspace(tmp_path / name, **keys)
        run_inline(workspace.job_file)
        stored.append(stored_objects(workspace.output))
    assert stored[0] == stored[1]
    assert zarr.open_array(tmp_path / "last/out.zarr/coarse/0").shape == (1, 16, 11)


def test_the_network_runs_once_per_batch_for_all_heads(tmp_path: Path) -> None:
    network = model(tmp_path, "as_dict") | {"stochastic": True}  # no batch is repeated
    workspace = workspace_of(tmp_path, model_config=network)
    job = create_job(check_job(complete_job(load_job(workspace.job_file))))
    assert calls(tmp_path) == 1
    run_tasks(job)
    plan = job.items[0].plan
    batches = sum(-(-plan.chunk(index).patches // 4) for index in job.items[0].tasks.chunks())
    assert calls(tmp_path) == batches


def test_shapes_are_found_once_and_kept_by_the_job(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path)
    job, events = load_job(workspace.job_file), list[Any]()
    first = create_job(check_job(complete_job(job, events.append)))
    assert [event for event in events if isinstance(event, StageProgress)]
    shapes = {"scores": (3, *PATCH), "distance": (8, 8), "parts": (8, 8)}
    assert first.record.job.model.model_output_shape == shapes
    (tmp_path / "heads.py").chmod(0o644)
    calls(tmp_path)
    again = create_job(check_job(complete_job(job)))  # resumed without a look at the network
    assert calls(tmp_path) == 0
    assert again.record == first.record
    declared = model(tmp_path, "as_dict", {key: list(value) for key, value in shapes.items()})
    written = load_job({**job.as_dict(), "model_config": declared})
    assert complete_job(written) is written


def test_the_check_of_a_network_lists_heads_that_no_output_names(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path)
    checked = check_job(complete_job(load_job(workspace.job_file)))
    report = report_check(checked.record.to_json())
    assert report.check is not None
    [note] = report.check.notes
    assert "'aux'" in note
    assert not any(repr(head) in note for head in INDICES)
    assert {name for name, _ in report.check.values.output_ranges} == {*OUTPUTS}


@pytest.mark.parametrize("declared", [False, True])
def test_a_missing_head_is_refused_before_work_starts(tmp_path: Path, declared: bool) -> None:
    outputs = OUTPUTS | {"depth": {"head": "depth"}}
    shapes = {"scores": [3, *PATCH], "distance": PATCH, "parts": PATCH, "depth": PATCH}
    network = model(tmp_path, "as_dict", shapes if declared else None)
    workspace = workspace_of(tmp_path, outputs=outputs, model_config=network)
    with pytest.raises(ModelError) as caught:
        chunkq.run(workspace.job_file, queue="inprocess://")
    assert caught.value.code is ErrorCode.HEAD_MISSING
    assert "'depth'" in str(caught.value)
    assert "'scores', 'distance', 'aux' and 'parts'" in str(caught.value)
    assert not workspace.output.exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"outputs": {"a": {"head": "scores"}, "b": {}}}, "outputs.b.head"),
        ({"outputs": {"a": {"head": 0}, "b": {"head": "0"}}}, "outputs"),
        (
            {"outputs": {"a": {"head": "x"}}, "shape": {"y": PATCH}},
            "model_config.model_output_shape.y",
        ),
        ({"outputs": {"a": {}}, "shape": {"y": PATCH}}, "model_config.model_output_shape.y"),
        ({"outputs": None, "shape": {"y": PATCH}}, "model_config.model_output_shape.y"),
    ],
)
def test_heads_and_shapes_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    network = model(tmp_path, "as_dict", changes.pop("shape", None))
    workspace = workspace_of(tmp_path, model_config=network, **changes)
    with pytest.raises(JobError) as caught:
        load_job(workspace.job_file)
    assert [line.partition(":")[0] for line in caught.value.problems] == [key]


def test_integer_heads_need_classes(tmp_path: Path) -> None:
    outputs = OUTPUTS | {"parts": {"head": "parts"}}
    workspace = workspace_of(tmp_path, outputs=outputs)
    with pytest.raises(ModelError) as caught:
        run_all(workspace)
    assert caught.value.code is ErrorCode.OUTPUT_IS_LABELS
    assert "head 'parts'" in str(caught.value)


class Deep(torch.nn.Module):
    """Returns predictions at full, half and quarter resolution."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        full = torch.cat([9 * x, 4 - 9 * x], dim=1)
        return [full, full[..., ::2, ::2], full[..., ::4, ::4]]


def predictor(network: Any, **keys: Any) -> Predictor:
    return Predictor.from_model(network, model_input_shape=[1, *PATCH], chunksize=[12, 12], **keys)


def test_a_predictor_reads_the_first_of_a_list_of_deep_supervision() -> None:
    volume = random_volume(SHAPE, "float32") / 100
    outputs = {"seg": {"head": 0, "activation": "softmax"}}
    with predictor(Deep(), outputs=outputs) as deep:
        result = deep.predict(volume)["seg"].probabilities
    with predictor(lambda x: Deep()(x)[0], runtime="torch", model_output_shape=[2, *PATCH],
                   activation="softmax") as single:  # fmt: skip
        expected = single.predict(volume).probabilities
    assert result.tobytes() == expected.tobytes()


def use_simulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run networks of torch on one simulated device."""
    device = SimulatedDevice()

    def load(model: Any, steps: Any, threads: Any, shapes: Any, network: Any = None) -> Any:
        loaded = LOADERS["class"](model) if network is None else network
        from chunkq_worker.runtimes.torch_files import LoadedNetwork

        module = loaded if isinstance(loaded, torch.nn.Module) else loaded.module
        return TorchRuntime(
            LoadedNetwork(module.eval()), model, steps, threads, device, heads=shapes.names
        )

    monkeypatch.setattr(inference_engine, "load_runtime", load)


TORCH_HEADS = """
import torch


class Net(torch.nn.Module):
    def forward(self, batch):
        x = batch[:, 0] / 100
        ramp = torch.linspace(0, 1, x.shape[-1])
        if hasattr(batch, "owner"):
            ramp = batch.owner.to_device(ramp)
        scores = torch.stack([(5 * x + n) * (1 + ramp) for n in range(3)], dim=1)
        return {
            "scores": scores,
            "distance": 50 * x * ramp,
            "aux": x[:, ::2, ::2],
            "parts": (x * 3.999).to(torch.uint8),
        }
"""
SHAPES_OF_HEADS = {"scores": [3, *PATCH], "distance": PATCH, "aux": [4, 4], "parts": PATCH}


def test_a_job_on_a_device_writes_the_outputs_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(TORCH_HEADS)
    network = {
        "runtime": "torch",
        "type": "class",
        "class_file": str(tmp_path / "net.py"),
        "class_name": "Net",
        "model_input_shape": [1, *PATCH],
        "model_output_shape": SHAPES_OF_HEADS,
        "max_batch_size": 32,
    }
    stored = {}
    for device in ("cpu", "cuda"):
        workspace = workspace_of(
            tmp_path / device, model_config=network | {"device": device}, **SEVERAL
        )
        with monkeypatch.context() as patch:
            if device == "cuda":
                use_simulated_device(patch)
            assert run_inline(workspace.job_file)[1]["missing"] == []
        group = zarr.open_group(workspace.output, mode="r")
        stored[device] = {
            f"{name}/{level}": np.asarray(group[f"{name}/{level}"])
            for name in SEVERAL["outputs"]
            for level in range(3)
        }
    for name, values in stored["cpu"].items():
        assert stored["cuda"][name].dtype == values.dtype
        step = 2.0**-5 if values.dtype == np.float16 else 1e-6  # of values up to 32 and 1
        np.testing.assert_allclose(stored["cuda"][name], values, rtol=0, atol=step, err_msg=name)


@pytest.mark.parametrize("resident", [True, False])
def test_heads_on_a_device_have_the_bytes_of_single_outputs(
    monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    use_simulated_device(monkeypatch)
    volume = random_volume(SHAPE, "float32") / 100

    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"seg": torch.cat([x, 1 - x], dim=1), "depth": x * x}

    steps = {} if resident else {"preprocessing": lambda batch: batch}
    shapes = {"seg": [2, *PATCH], "depth": [1, *PATCH]}
    outputs = {"seg": {"head": "seg", "combine": "hard"}, "depth": {"head": "depth"}}
    with predictor(Two(), outputs=outputs, model_output_shape=shapes, **steps) as both:
        together = both.predict(volume)
    for name, keys in outputs.items():
        with predictor(
            Two(), outputs={name: keys}, model_output_shape={name: shapes[name]}, **steps
        ) as one:
            alone = one.predict(volume)[name]
        assert together[name].labels.tobytes() == alone.labels.tobytes()
    assert together["depth"].probabilities.tobytes() == alone.probabilities.tobytes()


def test_a_step_in_numpy_gets_the_heads_by_name(tmp_path: Path) -> None:
    volume = random_volume(SHAPE, "float32") / 100
    outputs = {"seg": {"head": 0}, "half": {"head": "far"}}
    steps = {
        "postprocessing_protected": lambda all: {0: all[0], "far": all[0][:, :1] + 1},
        "postprocessing": lambda heads: {name: 2 * values for name, values in heads.items()},
    }
    with predictor(Deep(), outputs=outputs, **steps) as stepped:
        result = stepped.predict(volume)
    first: npt.NDArray[Any] = result["seg"].probabilities[:1]
    np.testing.assert_allclose(result["half"].probabilities, first + 2, rtol=0, atol=1e-5)


def test_a_run_prints_the_heads_and_writes_each_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = workspace_of(tmp_path)
    chunkq.run(workspace.job_file, queue="inprocess://")
    group = zarr.open_group(workspace.output, mode="r")
    assert {name: group[f"{name}/0"].dtype for name in OUTPUTS} == {
        "tissue": np.uint8, "edge": np.float32, "distance": np.float16, "parts": np.uint8,
    }  # fmt: skip
