"""`chunkq export`: a torch network as ONNX or .pt2 that computes the same, or one clear refusal."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from chunkq_worker import export_torch
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.steps import Steps

from chunkq.job import ModelConfig
from tests.harness.files import everything_below
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
    """Takes a batch apart in Python."""

    def forward(self, x):
        items = []
        for item in x:
            items.append(self.last(self.conv(item[None]))[0])
        return torch.stack(items)


class Alone(Net):
    """Treats a batch of one item in another way."""

    def forward(self, x):
        y = self.last(self.conv(x))
        return y if x.shape[0] > 1 else y * 2


class Fixed(Net):
    def forward(self, x):
        return self.last(self.conv(x)).reshape(4, 3, 8, 8)


class Deciding(Net):
    def forward(self, x):
        return self.last(self.conv(x)) if x.mean() > 0.5 else self.last(self.conv(-x))


class Noisy(Net):
    def forward(self, x):
        y = self.last(self.conv(x))
        return y + torch.rand_like(y)


class Counting(Net):
    """Changes a little with every call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.last(self.conv(x)) * (1 + self.calls)


class Several(Net):
    def forward(self, x):
        return self.conv(x), self.last(self.conv(x))


class Lost(Net):
    def forward(self, x):
        return self.last(self.conv(x)) * float("nan")


class Sum(torch.nn.Module):
    """Of whole numbers, without a weight."""

    def forward(self, x):
        return torch.cat([x, x + 1, x * 2], 1)
'''
PATCH = (8, 8)


def namespace(text: str = NETWORKS) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "user"}
    exec(text, names)
    return names


def trained(name: str = "Net", **kwargs: Any) -> torch.nn.Module:
    """A network whose running statistics are not those it started with."""
    torch.manual_seed(3)
    module: torch.nn.Module = namespace()[name](**kwargs)
    for _ in range(3 if name == "Net" else 0):
        module(torch.rand(4, kwargs.get("channels", 1), *PATCH))
    return module.eval()


def make_bench(folder: Path, **model: Any) -> Workspace:
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
    return make_bench(tmp_path)


def export(workspace: Workspace, name: str, *more: str) -> CommandResult:
    """Run the command, which must leave nothing but its file behind."""
    before = everything_below(workspace.folder)
    answer = workspace.call("export", "job.json", "-o", name, *more)
    left = set(everything_below(workspace.folder)) - set(before)
    assert left <= {name}
    assert (name in left or name in before) == (answer.code == 0 or name in before)
    return answer


def exported(workspace: Workspace, name: str, *more: str) -> dict[str, Any]:
    answer = export(workspace, name, "--json", *more).ok()
    assert answer.err == ""
    values: dict[str, Any] = json.loads(answer.out)
    assert values["file"] == str(workspace.folder / name)
    assert values["bytes"] == (workspace.folder / name).stat().st_size
    assert values["relative_difference"] <= values["allowed_difference"]
    return values


def refused(
    workspace: Workspace, name: str, code: int, *fragments: str, more: tuple[str, ...] = ()
) -> str:
    """Run the command, which must say one line and leave no file."""
    answer = export(workspace, name, *more)
    answer.refused(code, *fragments)
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1, answer.err
    return answer.err


def predict(
    model_config: dict[str, Any], count: int = 4, dtype: str = "float32"
) -> npt.NDArray[Any]:
    """What the network of a `model_config` gives for a fixed random batch."""
    values = model_config | {"max_batch_size": max(count, model_config["max_batch_size"])}
    runtime = load_runtime(ModelConfig.model_validate(values), Steps(), 1)
    shape = (count, *model_config["model_input_shape"])
    batch = (np.random.default_rng(5).random(shape) * 100).astype(dtype)
    return np.asarray(runtime(batch))


def expected(module: torch.nn.Module, count: int = 4) -> npt.NDArray[Any]:
    """What the module itself gives for that batch."""
    with torch.inference_mode():
        batch = np.random.default_rng(5).random((count, 1, *PATCH)) * 100
        return module(torch.from_numpy(batch.astype(np.float32))).numpy()


def test_a_job_runs_the_same_with_the_exported_file_in_its_place(tmp_path: Path) -> None:
    """Through the whole pipeline, with bands, for both kinds of file."""
    workspace = make_bench(tmp_path)
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
    found = {}
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
        found[name] = read_output(output)
    assert np.ptp(found["torch"]) > 0.1
    np.testing.assert_allclose(found["net.pt2"], found["torch"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["net.onnx"], found["torch"], rtol=0, atol=1e-4)


def test_what_is_written_and_how_to_use_it_is_said(workspace: Workspace) -> None:
    workspace.write_job()
    said = export(workspace, "net.pt2").ok().out
    first, second, third, *config = said.splitlines()
    size = (workspace.folder / "net.pt2").stat().st_size
    assert first == f"wrote {workspace.folder}/net.pt2: {size:,} bytes, for batches of any size"
    assert second.startswith("largest difference from the network: ")
    assert second.endswith(" of the outputs' range, over random batches of 2, 1, 3, 4")
    assert third == "use it with these lines in the job file:"
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


def test_a_process_of_its_own_prints_json_and_nothing_else(workspace: Workspace) -> None:
    workspace.write_job()
    answer = workspace.run("export", "job.json", "-o", "net.onnx", "--json").ok()
    assert answer.err == ""
    values = json.loads(answer.out)
    assert values["batch"] == "dynamic"
    assert values["tried"] == [2, 1, 3, 4]
    assert 0 <= values["relative_difference"] <= 1e-4 == values["allowed_difference"]
    found = [predict(values["model_config"], count) for count in (1, 4, 7)]
    for count, one in zip((1, 4, 7), found, strict=True):
        np.testing.assert_allclose(one, expected(trained(), count), rtol=0, atol=1e-3)


def scripted(how: str, name: str = "Net") -> Callable[[Path], dict[str, Any]]:
    """Make a TorchScript file of a network, and the `model_config` keys that name it."""

    def make(folder: Path) -> dict[str, Any]:
        (folder / "of_script.py").write_text(NETWORKS)  # torch.jit.script reads the source
        names: dict[str, Any] = {"__name__": "of_script"}
        exec(compile(NETWORKS, str(folder / "of_script.py"), "exec"), names)
        module = names[name]().eval()
        module.load_state_dict(trained().state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if how == "traced":
                made: Any = torch.jit.trace(module, torch.rand(2, 1, *PATCH))
            else:
                made = torch.jit.script(module)
            if how == "frozen":
                made = torch.jit.freeze(made)
            made.save(str(folder / "net.ts"))
        (folder / "of_script.py").unlink()
        return {"type": "torchscript", "ts_file": "net.ts"} | no_class()

    return make


def no_class() -> dict[str, None]:
    return {"class_file": None, "class_name": None, "checkpoint": None}


@pytest.mark.parametrize("how", ["scripted", "traced", "frozen"])
@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_torchscript_is_exported_for_batches_of_any_size(
    workspace: Workspace, how: str, name: str
) -> None:
    workspace.write_job(model=scripted(how)(workspace.folder))
    values = exported(workspace, name)
    assert values["batch"] == "dynamic"
    for count in (1, 5):
        found = predict(values["model_config"], count)
        np.testing.assert_allclose(found, expected(trained(), count), rtol=0, atol=1e-3)


def test_torchscript_with_a_loop_becomes_onnx_but_not_pt2(workspace: Workspace) -> None:
    workspace.write_job(model=scripted("scripted", "Loop")(workspace.folder))
    config = exported(workspace, "net.onnx")["model_config"]
    module = trained("Loop")
    module.load_state_dict(trained().state_dict())
    np.testing.assert_allclose(predict(config, 3), expected(module, 3), rtol=0, atol=1e-3)
    words = "cannot turn this TorchScript into a torch.export program"
    refused(workspace, "net.pt2", 1, words, "write .onnx instead, or export the class")


def test_a_module_saved_whole_is_exported(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(workspace.folder)
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    import networks  # type: ignore[import-not-found]

    module = networks.Net()
    module.load_state_dict(trained().state_dict())
    torch.save(module, workspace.folder / "whole.pt")
    model = {"type": "file", "model_file": "whole.pt", "trusted": True} | no_class()
    workspace.write_job(model=model)
    config = exported(workspace, "net.onnx")["model_config"]
    assert "trusted" not in config
    np.testing.assert_allclose(predict(config), expected(trained()), rtol=0, atol=1e-3)
    monkeypatch.delitem(sys.modules, "networks")


def test_a_pt2_file_becomes_onnx_and_needs_no_other_pt2(workspace: Workspace) -> None:
    workspace.write_job()
    config = exported(workspace, "first.pt2")["model_config"]
    workspace.write_job(model=config | no_class())
    again = exported(workspace, "net.onnx")["model_config"]
    np.testing.assert_allclose(predict(again), expected(trained()), rtol=0, atol=1e-3)
    refused(workspace, "second.pt2", 2, "model_config.type: exported; ", "first.pt2 is a .pt2 file")


# The number of items in a batch.


def test_a_batch_of_a_given_size_is_fixed_in_the_file(workspace: Workspace) -> None:
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
    ("name", "reason"),
    [
        ("Loop", "its code fixes the number of items in a batch"),
        ("Alone", " would differ from the network by up to "),
        ("Fixed", "the network raised RuntimeError on a batch of [2, 1, 8, 8]"),
    ],
)
def test_a_network_that_allows_one_size_only_gets_the_jobs(
    workspace: Workspace, name: str, reason: str
) -> None:
    workspace.write_job(model={"class_name": name})
    values = exported(workspace, "net.pt2")
    assert values["batch"] == values["model_config"]["max_batch_size"] == 4
    [note] = values["notes"]
    assert note.startswith("batches are fixed at 4: ")
    assert reason in note
    line = refused(workspace, "other.pt2", 1, reason, more=("--batch", "dynamic"))
    assert line.endswith("; --batch N fixes their size\n")


def test_a_note_about_the_batch_is_shown(workspace: Workspace) -> None:
    workspace.write_job(model={"class_name": "Loop"})
    said = export(workspace, "net.pt2").ok().out
    assert "for batches of 4\n" in said
    assert "\nnote: batches are fixed at 4: the network cannot be exported for batches of" in said


@pytest.mark.parametrize("given", ["0", "-1", "many", "2.5", ""])
def test_a_batch_that_is_no_number_is_refused(workspace: Workspace, given: str) -> None:
    workspace.write_job()
    words = f"--batch: {given!r} is neither a number above 0 nor dynamic"
    refused(workspace, "net.pt2", 2, words, more=(f"--batch={given}",))


# What does not compute the same.


@pytest.mark.parametrize(
    ("name", "file"), [("Noisy", "net.pt2"), ("Counting", "net.pt2"), ("Counting", "net.onnx")]
)
def test_a_network_that_the_file_does_not_reproduce_is_refused_and_no_file_left(
    workspace: Workspace, name: str, file: str
) -> None:
    workspace.write_job(model={"class_name": name})
    words = (f"{workspace.folder}/{file} would differ from the network by up to ", "0.0001 is let")
    refused(workspace, file, 1, *words, more=("--batch", "2"))


def test_a_file_whose_weights_are_slightly_off_is_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference of 1e-3 of the range: more than rounding, less than anyone sees."""
    write = export_torch.write

    def spoilt(module: Any, *args: Any, **more: Any) -> None:
        with torch.no_grad():
            module.last.weight *= 1.002
        write(module, *args, **more)

    workspace.write_job()
    monkeypatch.setattr(export_torch, "write", spoilt)
    refused(workspace, "net.pt2", 1, "would differ from the network", more=("--batch", "2"))
    with torch.no_grad():
        monkeypatch.setattr(
            export_torch,
            "write",
            lambda m, *a, **k: (m.last.weight.mul_(1.000001), write(m, *a, **k)),
        )
        assert exported(workspace, "net.pt2", "--batch", "2")["largest_difference"] > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Deciding", "its code decides by the values of a batch; use torch.where"),
        ("Several", "the network returned tuple, expected one tensor"),
        ("Lost", "the network gives no finite number for random input to compare"),
    ],
)
def test_a_network_that_cannot_be_exported_is_one_line(
    workspace: Workspace, name: str, words: str
) -> None:
    workspace.write_job(model={"class_name": name})
    refused(workspace, "net.pt2", 1, words)


def test_a_network_that_cannot_be_loaded_is_one_line(workspace: Workspace) -> None:
    workspace.write_job(model={"class_name": "Unet"})
    refused(workspace, "net.onnx", 1, "has no 'Unet'; it defines")
    workspace.write_job(model={"type": "file", "model_file": "weights.pt"} | no_class())
    refused(workspace, "net.onnx", 1, "model_config.trusted: missing")


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
def test_networks_of_whole_numbers_are_exported(
    workspace: Workspace, dtype: str, file: str
) -> None:
    workspace.write_job(model={"class_name": "Sum", "checkpoint": None, "dtype": dtype})
    values = exported(workspace, file)
    assert values["largest_difference"] == 0
    batch = predict(values["model_config"] | {"max_batch_size": 4}, dtype="int8")
    np.testing.assert_array_equal(batch[:, 1], batch[:, 0] + 1)
    assert batch.max() > 90


def test_a_dtype_that_onnx_lacks_is_refused(workspace: Workspace) -> None:
    workspace.write_job(model={"dtype": "bfloat16"})
    refused(workspace, "net.onnx", 2, "model_config.dtype: bfloat16, which runtime onnx lacks")
    workspace.write_job(model={"dtype": "float64"})
    line = refused(workspace, "net.onnx", 1, "uses Conv(11) with a dtype that onnxruntime ")
    assert f"{workspace.folder}/net.onnx " in line


def test_steps_before_the_network_shape_what_it_is_exported_for(workspace: Workspace) -> None:
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
    assert "runtime onnx gives protected steps NumPy arrays, not tensors" in note
    assert exported(workspace, "net.pt2")["notes"] == []


def test_a_step_that_fails_is_one_line(workspace: Workspace) -> None:
    (workspace.folder / "steps.py").write_text(
        "def preprocessing(batch):\n    return batch.nowhere\n"
    )
    workspace.write_job(model={"processing_steps": "steps.py"})
    refused(workspace, "net.pt2", 1, "model_config.processing_steps: raised AttributeError")


def test_several_inputs_are_as_many_channels(workspace: Workspace) -> None:
    torch.save(trained(channels=2).state_dict(), workspace.folder / "weights.pt")
    (workspace.folder / "kwargs.py").write_text("kwargs = {'channels': 2}\n")
    model = {"kwargs_file": "kwargs.py", "join_dim": 1}
    workspace.write_job(model=model, input=["a.zarr", "b.zarr"])
    values = exported(workspace, "net.onnx")
    assert onnxruntime.InferenceSession(values["file"]).get_inputs()[0].shape[1] == 2
    assert values["model_config"]["join_dim"] == 1
    workspace.write_job(model=model)
    refused(workspace, "other.onnx", 2, "input: missing; with join_dim")


# The job file, the output file, what is installed.


def test_a_job_for_a_gpu_is_exported_on_a_machine_without_one(workspace: Workspace) -> None:
    workspace.write_job(model={"device": "cuda", "channels_last": True, "autocast": "bfloat16"})
    values = exported(workspace, "net.pt2")
    assert values["model_config"]["device"] == "cuda"
    assert values["notes"] == ["autocast is left out", "channels_last is left out"]


def test_a_class_without_a_checkpoint_is_pointed_out(workspace: Workspace) -> None:
    workspace.write_job(model={"checkpoint": None})
    [note] = exported(workspace, "net.pt2")["notes"]
    assert note.startswith("the job names no checkpoint")


def test_other_mistakes_in_the_job_file_are_still_refused(workspace: Workspace) -> None:
    workspace.write_job(model={"dtype": "float31"}, chunksize=[0, 8])
    answer = export(workspace, "net.onnx")
    answer.refused(2, "model_config.dtype: ", "'float31'", "chunksize.0: ")
    assert "missing" not in answer.err
    workspace.call("export", "nowhere.json", "-o", "net.onnx").refused(2, "no such job file")


@pytest.mark.parametrize(
    "model",
    [
        {"runtime": "onnx", "type": "file", "model_file": "net.onnx"},
        {"runtime": "tensorflow", "type": "file", "model_file": "net.keras"},
    ],
    ids=["onnx", "tensorflow"],
)
def test_only_networks_of_torch_are_exported(workspace: Workspace, model: dict[str, Any]) -> None:
    workspace.write_job(model=model | no_class())
    words = f"model_config.runtime: {model['runtime']}; only torch networks are exported"
    refused(workspace, "net.onnx", 2, words)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("net.pth", "net.pth ends in neither .onnx nor .pt2"),
        ("net", "ends in neither .onnx nor .pt2"),
        ("nowhere/net.onnx", "-o: no folder "),
        ("s3://bucket/net.onnx", "-o: name a local file"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(
    workspace: Workspace, output: str, words: str
) -> None:
    workspace.write_job()
    refused(workspace, output, 2, words)


def test_a_file_that_is_there_is_only_replaced_when_asked(workspace: Workspace) -> None:
    workspace.write_job(model={"class_name": "NotThere"})
    file = workspace.folder / "net.pt2"
    file.write_bytes(b"precious")
    refused(workspace, "net.pt2", 2, "net.pt2 is there already; --overwrite replaces it")
    assert file.read_bytes() == b"precious"
    workspace.write_job()
    config = exported(workspace, "net.pt2", "--overwrite")["model_config"]
    np.testing.assert_allclose(predict(config), expected(trained()), rtol=0, atol=1e-3)


def test_a_failed_export_leaves_the_file_that_was_there(workspace: Workspace) -> None:
    workspace.write_job(model={"class_name": "Noisy"})
    file = workspace.folder / "net.pt2"
    file.write_bytes(b"precious")
    refused(workspace, "net.pt2", 1, "would differ", more=("--overwrite",))
    assert file.read_bytes() == b"precious"


def test_a_file_that_appears_meanwhile_is_not_replaced(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, file = export_torch.write, workspace.folder / "net.pt2"

    def slow(*args: Any, **more: Any) -> None:
        write(*args, **more)
        file.write_bytes(b"precious")

    workspace.write_job()
    monkeypatch.setattr(export_torch, "write", slow)
    workspace.call("export", "job.json", "-o", "net.pt2").refused(2, "is there already")
    assert file.read_bytes() == b"precious"


def test_a_network_too_large_for_one_onnx_file_is_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_torch, "ONNX_LIMIT", 200)
    workspace.write_job()
    refused(workspace, "net.onnx", 1, "and one ONNX file holds 2; write .pt2")
    exported(workspace, "net.pt2")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find = export_torch.find_spec
    monkeypatch.setattr(export_torch, "find_spec", lambda n: None if n == name else find(n))
    workspace.write_job()
    line = refused(
        workspace, "net.onnx", 1, f"writing .onnx takes {name}; pip install 'chunkq[export]'"
    )
    assert line.count("\n") == 1
    exported(workspace, "net.pt2")


def test_a_missing_torch_names_the_extra(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("chunkq_worker.") and n != "chunkq_worker"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    workspace.write_job()
    refused(workspace, "net.onnx", 1, "chunkq export needs torch", "pip install 'chunkq[export]'")
