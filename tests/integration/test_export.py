"""`chunkq export` writes an ONNX or .pt2 file that computes the same, or reports one error."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from chunkq_producer.check_model import complete_job
from chunkq_worker.export import torch as export_torch
from chunkq_worker.export.export import export_notes
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.steps import Steps

from chunkq.errors import ErrorCode
from chunkq.install_hint import install_command
from chunkq.job.job_reading import load_job
from chunkq.job.model_config import ModelConfig
from tests.harness.files import everything_below
from tests.harness.photos import SIZE, write_photos
from tests.harness.processes import CommandResult
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace, run_inline

NETWORKS = '''\
import torch


class Net(torch.nn.Module):
    def __init__(self, channels=1):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.last = torch.nn.Conv2d(4, 3, 1)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.last(torch.relu(self.norm(self.conv(x)))))


class Loop(Net):
    """Loops over the items of a batch in Python."""

    def forward(self, x):
        items = []
        for item in x:
            items.append(self.last(self.conv(item[None]))[0])
        return torch.stack(items)


class SingleItem(Net):
    """Computes something else for a batch of one item."""

    def forward(self, x):
        y = self.last(self.conv(x))
        return y if x.shape[0] > 1 else y * 2


class FixedBatch(Net):
    def forward(self, x):
        return self.last(self.conv(x)).reshape(4, 3, 8, 8)


class Branching(Net):
    def forward(self, x):
        return self.last(self.conv(x)) if x.mean() > 0.5 else self.last(self.conv(-x))


class Random(Net):
    def forward(self, x):
        y = self.last(self.conv(x))
        return y + torch.rand_like(y)


class Stateful(Net):
    """Returns other values with every call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.last(self.conv(x)) * (1 + self.calls)


class TwoOutputs(Net):
    def forward(self, x):
        return self.conv(x), self.last(self.conv(x))


class NanOutput(Net):
    def forward(self, x):
        return self.last(self.conv(x)) * float("nan")


class Sum(torch.nn.Module):
    """Computes with integers and has no weights."""

    def forward(self, x):
        return torch.cat([x, x + 1, x * 2], 1)
'''
HEADS = """

class Heads(Net):
    def forward(self, x):
        y = torch.relu(self.conv(x))
        return {"scores": self.last(y), "input": y[:, :1], "skipped": y, "loss": 0.5}


class Numbered(Net):
    def forward(self, x):
        y = torch.relu(self.conv(x))
        return [self.last(y), y[..., ::2, ::2], y[:, :1]]
"""
CLASSIFIER = """

class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.last = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.relu(self.conv(x)).mean((2, 3)))
"""
PATCH = (8, 8)


def namespace(text: str = NETWORKS) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "user"}
    exec(text, names)
    return names


def trained(name: str = "Net", **kwargs: Any) -> torch.nn.Module:
    """Return a network whose running statistics differ from their initial values."""
    torch.manual_seed(3)
    module: torch.nn.Module = namespace()[name](**kwargs)
    for _ in range(3 if name == "Net" else 0):
        module(torch.rand(4, kwargs.get("channels", 1), *PATCH))
    return module.eval()


def make_workspace(folder: Path, **model: Any) -> Workspace:
    (folder / "networks.py").write_text(NETWORKS)
    torch.save(trained().state_dict(), folder / "weights.pt")
    values = {
        "model_config": {
            "runtime": "torch",
            "type": "class",
            "class_file": "networks.py",
            "class_name": "Net",
            "checkpoint": "weights.pt",
            "model_input_shape": [1, *PATCH],
            "model_output_shape": [3, *PATCH],
            "max_batch_size": 4,
            **model,
        }
    }
    return Workspace(folder, values)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path)


def export(workspace: Workspace, name: str, *more: str) -> CommandResult:
    """Run the command; assert that it creates no file but its output."""
    before = everything_below(workspace.folder)
    answer = workspace.call("export", "job.json", "-o", name, *more)
    created = set(everything_below(workspace.folder)) - set(before)
    assert created <= {name}
    assert (name in created or name in before) == (answer.code == 0 or name in before)
    return answer


def exported(workspace: Workspace, name: str, *more: str) -> dict[str, Any]:
    answer = export(workspace, name, "--json", *more).ok()
    assert answer.err == ""
    values: dict[str, Any] = json.loads(answer.out)
    assert values["file"] == str(workspace.folder / name)
    assert values["bytes"] == (workspace.folder / name).stat().st_size
    assert values["relative_difference"] <= values["allowed_difference"]
    return values


def assert_error(
    workspace: Workspace,
    name: str,
    exit_code: int,
    code: ErrorCode,
    *fragments: str,
    options: tuple[str, ...] = (),
) -> str:
    """Run the command; assert one error line and no file, and return the line."""
    answer = export(workspace, name, *options)
    answer.refused(exit_code, code, *fragments)
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1, answer.err
    return answer.err


def predict(
    model_config: dict[str, Any], count: int = 4, dtype: str = "float32"
) -> npt.NDArray[Any]:
    """Return the output of the network of a `model_config` for a fixed random batch."""
    values = model_config | {"max_batch_size": max(count, model_config["max_batch_size"])}
    runtime = load_runtime(ModelConfig.model_validate(values), Steps(), 1)
    shape = (count, *model_config["model_input_shape"])
    batch = (np.random.default_rng(5).random(shape) * 100).astype(dtype)
    return np.asarray(runtime(batch)[0])


def expected(module: torch.nn.Module, count: int = 4) -> npt.NDArray[Any]:
    """Return the output of the module for the same batch."""
    with torch.inference_mode():
        batch = np.random.default_rng(5).random((count, 1, *PATCH)) * 100
        return module(torch.from_numpy(batch.astype(np.float32))).numpy()


def test_a_job_writes_the_same_output_with_the_exported_file(tmp_path: Path) -> None:
    """Overlapping chunks, for both kinds of file."""
    workspace = make_workspace(tmp_path)
    write_zarr(tmp_path / "in.zarr", random_volume((32, 24)), (8, 8))
    workspace.values.update(
        input=str(tmp_path / "in.zarr"),
        inference_type="sliding_window",
        strides=[4, 4],
        chunksize=[16, 12],
        storage_chunks=[4, 4],
        activation="softmax",
        threads=1,
    )
    workspace.write_job(output="torch.zarr")
    outputs = {}
    for name in ("torch", "net.onnx", "net.pt2"):
        config = workspace.values["model_config"]
        if name != "torch":
            config = exported(workspace, name)["model_config"]
        else:
            config = config | {
                key: str(tmp_path / config[key]) for key in ("class_file", "checkpoint")
            }
        output = tmp_path / f"{name}.zarr"
        run_inline({**workspace.values, "output": str(output), "model_config": config})
        outputs[name] = read_output(output)
    assert np.ptp(outputs["torch"]) > 0.1
    np.testing.assert_allclose(outputs["net.pt2"], outputs["torch"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(outputs["net.onnx"], outputs["torch"], rtol=0, atol=1e-4)


def test_a_job_over_images_writes_the_same_table_with_the_exported_file(tmp_path: Path) -> None:
    (tmp_path / "networks.py").write_text(NETWORKS + CLASSIFIER)
    write_photos(tmp_path, 4)
    config = {
        "runtime": "torch",
        "type": "class",
        "class_file": str(tmp_path / "networks.py"),
        "class_name": "Classifier",
        "max_batch_size": 3,
    }
    image = {"resize": SIZE, "crop": SIZE, "scale": 255}
    folders = [str(tmp_path / "photos" / color) for color in ("red", "green")]
    keys = {"input": folders, "inference_type": "image", "image": image, "keep": "logits"}
    workspace = Workspace(tmp_path, keys | {"output": "torch.parquet", "model_config": config})
    workspace.write_job()
    file = exported(workspace, "net.pt2")
    tables = []
    for model in (config, file["model_config"]):
        output = tmp_path / f"{model['type']}.parquet"
        run_inline(keys | {"output": str(output), "model_config": model, "threads": 1})
        tables.append(pq.read_table(output))
    for column in ("path", "prediction", "top_labels"):
        assert tables[0].column(column).equals(tables[1].column(column))
    logits = [np.stack(table.column("logits").to_pylist()) for table in tables]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)


def test_the_file_of_a_network_for_images_of_any_size_takes_one_size(tmp_path: Path) -> None:
    model = {"runtime": "torch", "type": "torchscript", "ts_file": "/net.ts"}
    keys = {"input": "/photos", "output": "/out.csv", "inference_type": "image"}
    shape = {"model_input_shape": [3, SIZE, SIZE]}
    varied = load_job(keys | {"model_config": model | shape})
    equal = load_job(keys | {"model_config": model, "image": {"crop": SIZE}})
    notes = [export_notes(job, Steps(), tmp_path / "net.onnx") for job in (varied, equal)]
    assert str([3, SIZE, SIZE]) in notes[0][0]
    assert notes[1] == []


HEAD_OUTPUTS: dict[str, dict[str, Any]] = {
    "Heads": {"tissue": {"head": "scores", "combine": "soft"}, "edge": {"head": "input"}},
    "Numbered": {"tissue": {"head": 0, "combine": "soft"}, "edge": {"head": 2}},
}


@pytest.mark.parametrize("name", HEAD_OUTPUTS)
def test_the_heads_that_outputs_name_keep_their_names_in_the_file(
    tmp_path: Path, name: str
) -> None:
    workspace = make_workspace(tmp_path, class_name=name, model_output_shape=None)
    (tmp_path / "networks.py").write_text(NETWORKS + HEADS)
    write_zarr(tmp_path / "in.zarr", random_volume((16, 20)), (8, 8))
    keys = {"input": str(tmp_path / "in.zarr"), "threads": 1, "outputs": HEAD_OUTPUTS[name]}
    workspace.values.update(keys)
    workspace.write_job(output="torch.zarr")
    arrays = {}
    for kind in ("torch", "net.onnx", "net.pt2"):
        output = tmp_path / f"{kind}.zarr"
        job = workspace.write_job("run.json", output=str(output))
        if kind != "torch":
            config = exported(workspace, kind)["model_config"]
            values = {**json.loads(job.read_text()), "model_config": config}
            job.write_text(json.dumps(values))
        run_inline(complete_job(load_job(job)).as_dict())
        job.unlink()
        group = zarr.open_group(output, mode="r")
        arrays[kind] = {key: np.asarray(group[f"{key}/0"]) for key in keys["outputs"]}
    for kind in ("net.onnx", "net.pt2"):
        np.testing.assert_array_equal(arrays[kind]["tissue"], arrays["torch"]["tissue"])
        np.testing.assert_allclose(arrays[kind]["edge"], arrays["torch"]["edge"], atol=1e-4)
    assert np.ptp(arrays["torch"]["edge"]) > 1


def test_heads_by_name_and_by_number_cannot_be_exported_together(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, class_name="Heads", model_output_shape=None)
    (tmp_path / "networks.py").write_text(
        NETWORKS + HEADS.replace('"skipped": y', "0: y").replace('"loss": 0.5', '"loss": None')
    )
    workspace.values["outputs"] = {"a": {"head": "scores"}, "b": {"head": 0}}
    workspace.write_job()
    assert_error(workspace, "net.pt2", 1, ErrorCode.MODEL_UNUSABLE, "by name and by number")


def test_a_head_whose_values_differ_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace(tmp_path, class_name="Heads", model_output_shape=None)
    (tmp_path / "networks.py").write_text(NETWORKS + HEADS)
    workspace.values["outputs"] = HEAD_OUTPUTS["Heads"]
    workspace.write_job()

    def swapped(module: Any, example: Any, file: Path, heads: Any, **options: Any) -> None:
        write_file(BrokenHead(module), example, file, heads, **options)

    write_file = export_torch.write_file
    monkeypatch.setattr(export_torch, "write_file", swapped)
    assert_error(workspace, "net.pt2", 1, ErrorCode.EXPORT_DIFFERS, "head 'input'")


class BrokenHead(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module.eval()
        self.eval()

    def forward(self, batch: torch.Tensor) -> Any:
        heads = self.module(batch)
        return heads | {"input": heads["input"] + 0.5}


def test_the_command_prints_the_file_its_difference_and_its_model_config(
    workspace: Workspace,
) -> None:
    workspace.write_job()
    first, second, _, *config = export(workspace, "net.pt2").ok().out.splitlines()
    size = (workspace.folder / "net.pt2").stat().st_size
    assert first.startswith(f"wrote {workspace.folder}/net.pt2: {size:,} bytes")
    assert "any size" in first
    assert second.endswith(" 2, 1, 3, 4")
    assert config == [
        "model_config:",
        "  runtime: torch",
        "  type: exported",
        f"  model_file: {workspace.folder}/net.pt2",
        "  model_input_shape: [1, 8, 8]",
        "  model_output_shape: [3, 8, 8]",
        "  dtype: float32",
        "  max_batch_size: 4",
        "  device: cpu",
    ]


def test_the_command_prints_only_json_with_json(workspace: Workspace) -> None:
    workspace.write_job()
    answer = workspace.run("export", "job.json", "-o", "net.onnx", "--json").ok()
    assert answer.err == ""
    values = json.loads(answer.out)
    assert values["batch"] == "dynamic"
    assert values["tried"] == [2, 1, 3, 4]
    assert 0 <= values["relative_difference"] <= 1e-4 == values["allowed_difference"]
    outputs = [predict(values["model_config"], count) for count in (1, 4, 7)]
    for count, output in zip((1, 4, 7), outputs, strict=True):
        np.testing.assert_allclose(output, expected(trained(), count), rtol=0, atol=1e-3)


def write_torchscript(method: str, name: str = "Net") -> Callable[[Path], dict[str, Any]]:
    """Return a function that writes a TorchScript file and returns its `model_config` keys."""

    def write(folder: Path) -> dict[str, Any]:
        (folder / "of_script.py").write_text(NETWORKS)  # torch.jit.script reads the source
        names: dict[str, Any] = {"__name__": "of_script"}
        exec(compile(NETWORKS, str(folder / "of_script.py"), "exec"), names)
        module = names[name]().eval()
        module.load_state_dict(trained().state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if method == "traced":
                script: Any = torch.jit.trace(module, torch.rand(2, 1, *PATCH))
            else:
                script = torch.jit.script(module)
            if method == "frozen":
                script = torch.jit.freeze(script)
            script.save(str(folder / "net.ts"))
        (folder / "of_script.py").unlink()
        return {"type": "torchscript", "ts_file": "net.ts"} | no_class()

    return write


def no_class() -> dict[str, None]:
    return {"class_file": None, "class_name": None, "checkpoint": None}


@pytest.mark.parametrize("method", ["scripted", "traced", "frozen"])
@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_torchscript_is_exported_for_batches_of_any_size(
    workspace: Workspace, method: str, name: str
) -> None:
    workspace.write_job(model=write_torchscript(method)(workspace.folder))
    values = exported(workspace, name)
    assert values["batch"] == "dynamic"
    for count in (1, 5):
        output = predict(values["model_config"], count)
        np.testing.assert_allclose(output, expected(trained(), count), rtol=0, atol=1e-3)


def test_torchscript_with_a_loop_is_exported_to_onnx_but_not_to_pt2(workspace: Workspace) -> None:
    workspace.write_job(model=write_torchscript("scripted", "Loop")(workspace.folder))
    config = exported(workspace, "net.onnx")["model_config"]
    module = trained("Loop")
    module.load_state_dict(trained().state_dict())
    np.testing.assert_allclose(predict(config, 3), expected(module, 3), rtol=0, atol=1e-3)
    assert_error(workspace, "net.pt2", 1, ErrorCode.MODEL_UNUSABLE, "TorchScript", "write .onnx")


def test_a_pickled_module_is_exported(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(workspace.folder)
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    import networks  # type: ignore[import-not-found]

    module = networks.Net()
    module.load_state_dict(trained().state_dict())
    torch.save(module, workspace.folder / "module.pt")
    model = {"type": "file", "model_file": "module.pt", "trusted": True} | no_class()
    workspace.write_job(model=model)
    config = exported(workspace, "net.onnx")["model_config"]
    assert "trusted" not in config
    np.testing.assert_allclose(predict(config), expected(trained()), rtol=0, atol=1e-3)
    monkeypatch.delitem(sys.modules, "networks")


def test_a_pt2_file_is_exported_to_onnx_but_not_to_another_pt2(workspace: Workspace) -> None:
    workspace.write_job()
    config = exported(workspace, "first.pt2")["model_config"]
    workspace.write_job(model=config | no_class())
    config = exported(workspace, "net.onnx")["model_config"]
    np.testing.assert_allclose(predict(config), expected(trained()), rtol=0, atol=1e-3)
    assert_error(
        workspace, "second.pt2", 2, ErrorCode.JOB_INVALID, "model_config.type: ", "first.pt2"
    )


# The number of items in a batch.


def test_a_file_with_a_fixed_batch_size_accepts_only_that_size(workspace: Workspace) -> None:
    workspace.write_job()
    values = exported(workspace, "net.onnx", "--batch", "3")
    assert (values["batch"], values["tried"]) == (3, [3, 3, 3])
    assert values["model_config"]["max_batch_size"] == 3
    session = onnxruntime.InferenceSession(values["file"])
    assert session.get_inputs()[0].shape == [3, 1, *PATCH]
    np.testing.assert_allclose(
        predict(values["model_config"], 3), expected(trained(), 3), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("Loop", ErrorCode.MODEL_UNUSABLE, "its code fixes the number of items in a batch"),
        ("SingleItem", ErrorCode.EXPORT_DIFFERS, "differs from the network"),
        ("FixedBatch", ErrorCode.MODEL_UNUSABLE, "RuntimeError on a batch of [2, 1, 8, 8]"),
    ],
)
def test_a_network_that_supports_one_batch_size_is_exported_with_the_jobs_size(
    workspace: Workspace, name: str, code: ErrorCode, reason: str
) -> None:
    workspace.write_job(model={"class_name": name})
    values = exported(workspace, "net.pt2")
    assert values["batch"] == values["model_config"]["max_batch_size"] == 4
    [note] = values["notes"]
    assert "fixed at 4: " in note
    assert reason in note
    assert_error(
        workspace, "other.pt2", 1, code, reason, "--batch N", options=("--batch", "dynamic")
    )


def test_a_note_about_a_fixed_batch_size_is_printed(workspace: Workspace) -> None:
    workspace.write_job(model={"class_name": "Loop"})
    output = export(workspace, "net.pt2").ok().out
    assert "batches of 4 items\n" in output
    [note] = [line for line in output.splitlines() if line.startswith("note: ")]
    assert "fixed at 4: " in note


@pytest.mark.parametrize("value", ["0", "-1", "many", "2.5", ""])
def test_an_invalid_batch_size_is_an_error(workspace: Workspace, value: str) -> None:
    workspace.write_job()
    assert_error(
        workspace,
        "net.pt2",
        2,
        ErrorCode.JOB_INVALID,
        "--batch: ",
        repr(value),
        options=(f"--batch={value}",),
    )


# Files whose outputs differ.


@pytest.mark.parametrize(
    ("name", "file"), [("Random", "net.pt2"), ("Stateful", "net.pt2"), ("Stateful", "net.onnx")]
)
def test_an_export_whose_outputs_differ_is_an_error_and_leaves_no_file(
    workspace: Workspace, name: str, file: str
) -> None:
    workspace.write_job(model={"class_name": name})
    fragments = (f"{workspace.folder}/{file} ", "at most 0.0001")
    assert_error(workspace, file, 1, ErrorCode.EXPORT_DIFFERS, *fragments, options=("--batch", "2"))


def test_a_file_with_slightly_different_weights_is_an_error(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs differ by 1e-3 of their range, which is more than rounding."""
    write = export_torch.write_file

    def write_changed(module: Any, *args: Any, **more: Any) -> None:
        with torch.no_grad():
            module.last.weight *= 1.002
        write(module, *args, **more)

    workspace.write_job()
    monkeypatch.setattr(export_torch, "write_file", write_changed)
    assert_error(
        workspace, "net.pt2", 1, ErrorCode.EXPORT_DIFFERS, "net.pt2 ", options=("--batch", "2")
    )
    with torch.no_grad():
        monkeypatch.setattr(
            export_torch,
            "write_file",
            lambda m, *a, **k: (m.last.weight.mul_(1.000001), write(m, *a, **k)),
        )
        assert exported(workspace, "net.pt2", "--batch", "2")["largest_difference"] > 0


@pytest.mark.parametrize(
    ("name", "fragment"),
    [("Branching", "torch.where"), ("TwoOutputs", "tuple"), ("NanOutput", "no finite")],
)
def test_a_network_that_cannot_be_exported_is_an_error_of_one_line(
    workspace: Workspace, name: str, fragment: str
) -> None:
    workspace.write_job(model={"class_name": name})
    assert_error(workspace, "net.pt2", 1, ErrorCode.MODEL_UNUSABLE, fragment)


def test_a_network_that_cannot_be_loaded_is_an_error_of_one_line(workspace: Workspace) -> None:
    workspace.write_job(model={"class_name": "Unet"})
    assert_error(workspace, "net.onnx", 1, ErrorCode.MODEL_UNUSABLE, "'Unet'")
    workspace.write_job(model={"type": "file", "model_file": "weights.pt"} | no_class())
    assert_error(workspace, "net.onnx", 1, ErrorCode.MODEL_UNTRUSTED, "model_config.trusted: ")


# Dtypes, steps, several inputs.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_floating_dtype_is_exported_to_pt2(workspace: Workspace, dtype: str) -> None:
    workspace.write_job(model={"dtype": dtype})
    config = exported(workspace, "net.pt2")["model_config"]
    assert config["dtype"] == dtype
    scale = {"float16": 0.3, "bfloat16": 3.0}.get(dtype, 1e-3)
    np.testing.assert_allclose(predict(config), expected(trained()), rtol=0, atol=scale)


def test_float16_is_exported_to_onnx_within_its_own_rounding(workspace: Workspace) -> None:
    workspace.write_job(model={"dtype": "float16"})
    values = exported(workspace, "net.onnx")
    assert 1e-3 < values["allowed_difference"] < 1e-2
    np.testing.assert_allclose(
        predict(values["model_config"]), expected(trained()), rtol=0, atol=0.5
    )


@pytest.mark.parametrize(
    ("dtype", "file"), [("int8", "net.pt2"), ("int64", "net.pt2"), ("int32", "net.onnx")]
)
def test_networks_with_integer_dtypes_are_exported(
    workspace: Workspace, dtype: str, file: str
) -> None:
    workspace.write_job(model={"class_name": "Sum", "checkpoint": None, "dtype": dtype})
    values = exported(workspace, file)
    assert values["largest_difference"] == 0
    batch = predict(values["model_config"] | {"max_batch_size": 4}, dtype="int8")
    np.testing.assert_array_equal(batch[:, 1], batch[:, 0] + 1)
    assert batch.max() > 90


def test_a_dtype_that_onnx_does_not_support_is_an_error(workspace: Workspace) -> None:
    workspace.write_job(model={"dtype": "bfloat16"})
    assert_error(
        workspace, "net.onnx", 2, ErrorCode.JOB_INVALID, "model_config.dtype: bfloat16", "float32"
    )
    workspace.write_job(model={"dtype": "float64"})
    fragments = ("Conv(11)", f"{workspace.folder}/net.onnx")
    assert_error(workspace, "net.onnx", 1, ErrorCode.MODEL_UNUSABLE, *fragments)


def test_a_network_is_exported_for_the_shape_after_the_steps_before_it(
    workspace: Workspace,
) -> None:
    (workspace.folder / "steps.py").write_text(
        "import numpy as np\nimport torch\n"
        "def preprocessing(batch):\n    return np.concatenate([batch, batch / 2], 1)\n"
        "def preprocessing_protected(batch):\n    return torch.cat([batch, batch[:, :1]], 1)\n"
        "def postprocessing(batch):\n    raise ArithmeticError\n"
    )
    torch.save(trained(channels=3).state_dict(), workspace.folder / "weights.pt")
    (workspace.folder / "kwargs.py").write_text("kwargs = {'channels': 3}\n")
    workspace.write_job(model={"processing_steps": "steps.py", "kwargs_file": "kwargs.py"})
    values = exported(workspace, "net.onnx")
    session = onnxruntime.InferenceSession(values["file"])
    assert session.get_inputs()[0].shape[1:] == [3, *PATCH]
    assert values["model_config"]["processing_steps"] == str(workspace.folder / "steps.py")
    assert values["model_config"]["model_input_shape"] == [1, *PATCH]
    [note] = values["notes"]
    assert note.startswith(str(workspace.folder / "steps.py"))
    assert "protected steps" in note
    assert exported(workspace, "net.pt2")["notes"] == []


def test_a_step_that_fails_is_an_error_of_one_line(workspace: Workspace) -> None:
    (workspace.folder / "steps.py").write_text(
        "def preprocessing(batch):\n    return batch.nowhere\n"
    )
    workspace.write_job(model={"processing_steps": "steps.py"})
    fragments = ("model_config.processing_steps: ", "AttributeError")
    assert_error(workspace, "net.pt2", 1, ErrorCode.MODEL_UNUSABLE, *fragments)


def test_inputs_with_join_dim_are_exported_as_channels(workspace: Workspace) -> None:
    torch.save(trained(channels=2).state_dict(), workspace.folder / "weights.pt")
    (workspace.folder / "kwargs.py").write_text("kwargs = {'channels': 2}\n")
    model = {"kwargs_file": "kwargs.py", "join_dim": 1}
    workspace.write_job(model=model, input=["a.zarr", "b.zarr"])
    values = exported(workspace, "net.onnx")
    assert onnxruntime.InferenceSession(values["file"]).get_inputs()[0].shape[1] == 2
    assert values["model_config"]["join_dim"] == 1
    workspace.write_job(model=model)
    assert_error(workspace, "other.onnx", 2, ErrorCode.JOB_INVALID, "input: missing", "join_dim")


# The job file, the output file, installed packages.


def test_a_job_for_a_gpu_is_exported_on_a_machine_without_one(workspace: Workspace) -> None:
    workspace.write_job(model={"device": "cuda", "channels_last": True, "precision": "bfloat16"})
    values = exported(workspace, "net.pt2")
    assert values["model_config"]["device"] == "cuda"
    assert [note.split()[0] for note in values["notes"]] == ["precision", "channels_last"]


def test_a_class_without_a_checkpoint_is_noted(workspace: Workspace) -> None:
    workspace.write_job(model={"checkpoint": None})
    [note] = exported(workspace, "net.pt2")["notes"]
    assert "checkpoint" in note


def test_other_mistakes_in_the_job_file_are_errors(workspace: Workspace) -> None:
    workspace.write_job(model={"dtype": "float31"}, chunksize=[0, 8])
    answer = export(workspace, "net.onnx")
    answer.refused(2, ErrorCode.JOB_INVALID, "model_config.dtype: ", "'float31'", "chunksize.0: ")
    assert "missing" not in answer.err
    workspace.call("export", "nowhere.json", "-o", "net.onnx").refused(2, "nowhere.json")


@pytest.mark.parametrize(
    "model",
    [
        {"runtime": "onnx", "type": "file", "model_file": "net.onnx"},
        {"runtime": "tensorflow", "type": "file", "model_file": "net.keras"},
    ],
    ids=["onnx", "tensorflow"],
)
def test_only_networks_of_runtime_torch_are_exported(
    workspace: Workspace, model: dict[str, Any]
) -> None:
    workspace.write_job(model=model | no_class())
    fragments = ("model_config.runtime: ", f" {model['runtime']};")
    assert_error(workspace, "net.onnx", 2, ErrorCode.JOB_INVALID, *fragments)


@pytest.mark.parametrize(
    ("output", "fragment"),
    [
        ("net.pth", "net.pth has suffix '.pth'"),
        ("net", "net has suffix ''"),
        ("nowhere/net.onnx", "/nowhere is missing"),
        ("s3://bucket/net.onnx", "URL"),
    ],
)
def test_a_path_that_cannot_be_written_is_an_error(
    workspace: Workspace, output: str, fragment: str
) -> None:
    workspace.write_job()
    assert_error(workspace, output, 2, ErrorCode.JOB_INVALID, "-o: ", fragment)


def test_an_existing_file_is_only_replaced_with_overwrite(workspace: Workspace) -> None:
    workspace.write_job(model={"class_name": "Missing"})
    file = workspace.folder / "net.pt2"
    file.write_bytes(b"existing")
    assert_error(workspace, "net.pt2", 2, ErrorCode.OUTPUT_EXISTS, "net.pt2 ", "--overwrite")
    assert file.read_bytes() == b"existing"
    workspace.write_job()
    config = exported(workspace, "net.pt2", "--overwrite")["model_config"]
    np.testing.assert_allclose(predict(config), expected(trained()), rtol=0, atol=1e-3)


def test_a_failed_export_does_not_change_an_existing_file(workspace: Workspace) -> None:
    workspace.write_job(model={"class_name": "Random"})
    file = workspace.folder / "net.pt2"
    file.write_bytes(b"existing")
    options = ("--overwrite",)
    assert_error(workspace, "net.pt2", 1, ErrorCode.EXPORT_DIFFERS, "net.pt2 ", options=options)
    assert file.read_bytes() == b"existing"


def test_a_file_created_during_the_export_is_not_replaced(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, file = export_torch.write_file, workspace.folder / "net.pt2"

    def write_late(*args: Any, **more: Any) -> None:
        write(*args, **more)
        file.write_bytes(b"existing")

    workspace.write_job()
    monkeypatch.setattr(export_torch, "write_file", write_late)
    workspace.call("export", "job.json", "-o", "net.pt2").refused(
        2, ErrorCode.OUTPUT_EXISTS, "net.pt2 "
    )
    assert file.read_bytes() == b"existing"


def test_a_network_too_large_for_one_onnx_file_is_an_error(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_torch, "ONNX_LIMIT", 200)
    workspace.write_job()
    assert_error(workspace, "net.onnx", 1, ErrorCode.MODEL_UNUSABLE, " GB", "write .pt2")
    exported(workspace, "net.pt2")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_an_error_that_names_the_extra(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find = export_torch.find_spec
    monkeypatch.setattr(export_torch, "find_spec", lambda n: None if n == name else find(n))
    workspace.write_job()
    fragments = (f": {name};", install_command("export"))
    assert_error(workspace, "net.onnx", 1, ErrorCode.PACKAGE_MISSING, *fragments)
    exported(workspace, "net.pt2")


def test_a_missing_torch_is_an_error_that_names_the_extra(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("chunkq_worker.") and n != "chunkq_worker"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    workspace.write_job()
    fragments = ("torch", install_command("export"))
    assert_error(workspace, "net.onnx", 1, ErrorCode.PACKAGE_MISSING, *fragments)
