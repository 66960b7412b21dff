"""Files of torch networks: which are accepted, and the errors for the others."""

import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chunkq_worker.batching import Batcher
from chunkq_worker.steps import Steps

from chunkq.errors import ErrorCode, ModelError
from tests.harness.assertions import assert_contains
from tests.harness.torch_networks import (
    CLASS,
    PATCH,
    TrainedNet,
    as_file,
    as_program,
    conv,
    create_plan,
    exhaust_cpu_memory,
    load,
    load_error,
    predictions,
    program,
    scripted,
    trained,
)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "network"])
def test_weights_under_the_usual_keys_of_training_scripts_are_loaded(
    tmp_path: Path, key: str
) -> None:
    module = trained()
    bare, nested = tmp_path / "bare.pt", tmp_path / "nested.pt"
    torch.save(module.state_dict(), bare)
    torch.save({"epoch": 3, key: module.state_dict(), "optimizer": {"lr": 0.1}}, nested)
    first = predictions(create_plan(tmp_path, model={"checkpoint": str(bare)}))
    second = predictions(create_plan(tmp_path, model={"checkpoint": str(nested)}))
    np.testing.assert_array_equal(first, second)


def test_the_prefix_of_data_parallel_training_is_removed(tmp_path: Path) -> None:
    module = trained()
    state = OrderedDict((f"module.{k}", v) for k, v in module.state_dict().items())
    torch.save(module.state_dict(), tmp_path / "bare.pt")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pt")
    first = predictions(create_plan(tmp_path, model={"checkpoint": str(tmp_path / "bare.pt")}))
    second = predictions(create_plan(tmp_path, model={"checkpoint": str(tmp_path / "wrapped.pt")}))
    np.testing.assert_array_equal(first, second)


def test_a_class_with_its_checkpoint_and_its_torchscript_predict_the_same(tmp_path: Path) -> None:
    module = trained()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    path = scripted(module, tmp_path / "net.ts")
    by_class = predictions(
        create_plan(tmp_path, model={"checkpoint": str(tmp_path / "weights.pt")})
    )
    script = {"type": "torchscript", "ts_file": str(path)}
    by_script = predictions(create_plan(tmp_path, model=script))
    assert by_class.shape == (4, 3, *PATCH)
    np.testing.assert_allclose(by_class, by_script, rtol=0, atol=1e-6)


def test_a_network_in_training_mode_is_set_to_inference_mode(tmp_path: Path) -> None:
    plan = create_plan(tmp_path)
    with_dropout = CLASS.replace(
        "return self.layer(x)", "return torch.dropout(self.layer(x), 0.5, self.training)"
    )
    (tmp_path / "net.py").write_text(
        with_dropout.replace("super().__init__()", "super().__init__(); torch.manual_seed(0)")
    )
    np.testing.assert_array_equal(predictions(plan), predictions(plan))


# -------------------------------------------------------------------------- pickled modules


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"epoch": 3, "model": m}])
def test_a_pickled_module_is_used_if_it_is_trusted(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(conv()), tmp_path / "pickled.pt")
    outputs = predictions(create_plan(tmp_path, model=as_file(tmp_path / "pickled.pt")))
    torch.save(conv()[0].state_dict(), tmp_path / "weights.pt")
    (tmp_path / "conv.py").write_text("from torch.nn import Conv2d\n")
    (tmp_path / "conv_kwargs.py").write_text(
        "kwargs = {'in_channels': 1, 'out_channels': 3, 'kernel_size': 3, 'padding': 1}\n"
    )
    model = {
        "class_file": str(tmp_path / "conv.py"),
        "class_name": "Conv2d",
        "kwargs_file": str(tmp_path / "conv_kwargs.py"),
        "checkpoint": str(tmp_path / "weights.pt"),
    }
    np.testing.assert_array_equal(outputs, predictions(create_plan(tmp_path, model=model)))


class FileCreator:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self._path, "w"))


def test_a_pickle_is_not_loaded_without_trust(tmp_path: Path) -> None:
    torch.save(FileCreator(tmp_path / "created"), tmp_path / "pickled.pt")
    model = as_file(tmp_path / "pickled.pt", trusted=False)
    line = load_error(tmp_path, ErrorCode.MODEL_UNTRUSTED, **model)
    assert line.startswith("model_config.trusted: missing; ")
    assert_contains(line, "trusted: true", "torch.jit.script(network).save")
    assert not (tmp_path / "created").exists()


def test_the_error_for_a_missing_pickled_class_names_it(tmp_path: Path) -> None:
    torch.save(conv(), tmp_path / "pickled.pt")
    content = (tmp_path / "pickled.pt").read_bytes()
    for old, new in ((b"conv\n", b"cnov\n"), (b"Conv2d", b"Cnov2d")):
        with zipfile.ZipFile(io.BytesIO(content)) as old_zip:
            members = {name: old_zip.read(name) for name in old_zip.namelist()}
        with zipfile.ZipFile(tmp_path / "changed.pt", "w") as new_zip:
            for name, member in members.items():
                new_zip.writestr(name, member.replace(old, new) if "pkl" in name else member)
        line = load_error(tmp_path, **as_file(tmp_path / "changed.pt"))
        assert line.startswith("model_config.model_file: ")
        assert_contains(line, new.decode().strip(), "same folder", "type: class")


def test_the_error_for_weights_as_model_file_names_the_type_to_use(tmp_path: Path) -> None:
    torch.save({"state_dict": conv().state_dict()}, tmp_path / "weights.pt")
    line = load_error(tmp_path, **as_file(tmp_path / "weights.pt"))
    assert line.startswith("model_config.model_file: ")
    assert_contains(line, "dict", "torch.nn.Module", "type: class", "class_file", "class_name")


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (SimpleNamespace(lr=1), "types.SimpleNamespace"),
        (Path("runs"), "pathlib.PosixPath"),
        (np.random.default_rng(0), "numpy.random._pickle"),
    ],
    ids=["settings", "a path", "a random generator"],
)
def test_the_error_for_a_checkpoint_with_more_than_weights_names_the_class_and_the_fix(
    tmp_path: Path, extra: Any, name: str
) -> None:
    torch.save({"state_dict": trained().state_dict(), "more": extra}, tmp_path / "full.pt")
    checkpoint = str(tmp_path / "full.pt")
    line = load_error(tmp_path, ErrorCode.MODEL_UNTRUSTED, checkpoint=checkpoint)
    assert line.startswith(f"model_config.checkpoint: {checkpoint} ")
    assert_contains(line, name, "weights_only=False", "type: file", "trusted: true")


def test_the_advice_for_such_a_checkpoint_works(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": trained().state_dict(), "args": SimpleNamespace()}, tmp_path / "full.pt"
    )
    checkpoint = str(tmp_path / "full.pt")
    line = load_error(tmp_path, ErrorCode.MODEL_UNTRUSTED, checkpoint=checkpoint)
    advice = line[line.index("torch.save(") : line.index(", or, if")]
    exec(advice.replace("'weights.pt'", repr(str(tmp_path / "weights.pt"))), {"torch": torch})
    torch.save(trained().state_dict(), tmp_path / "bare.pt")
    np.testing.assert_array_equal(
        predictions(create_plan(tmp_path, model={"checkpoint": str(tmp_path / "weights.pt")})),
        predictions(create_plan(tmp_path, model={"checkpoint": str(tmp_path / "bare.pt")})),
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed_but_not_those_of_the_network(
    tmp_path: Path, prefix: str
) -> None:
    wrapped = CLASS.replace("self.layer", "self.module")
    state = {k.replace("layer", "module"): v for k, v in trained().state_dict().items()}
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    torch.save({prefix + k: v for k, v in trained().state_dict().items()}, first / "weights.pt")
    torch.save(state, second / "weights.pt")
    plans = [create_plan(f, model={"checkpoint": str(f / "weights.pt")}) for f in (first, second)]
    (second / "net.py").write_text(wrapped)
    np.testing.assert_array_equal(predictions(plans[0]), predictions(plans[1]))


# -------------------------------------------------------------------- torch.export programs


@pytest.mark.parametrize(
    ("shape", "limits", "supported", "size"),
    [
        ((2, 1, 8, 8), {}, "exactly 2", 2),
        ((3, 1, 8, 8), {"max": 3}, "at most 3", 3),
        ((8, 1, 8, 8), {"min": 6, "max": 9}, "6 to 9", 9),
        ((8, 1, 8, 8), {"min": 6}, "6 or more", 6),
    ],
)
def test_the_error_for_an_unsupported_batch_size_names_the_size_to_set(
    tmp_path: Path, shape: tuple[int, ...], limits: dict[str, int], supported: str, size: int
) -> None:
    path = program(tmp_path / "net.pt2", shape=shape, **limits)
    line = load_error(tmp_path, **as_program(path))
    assert line.startswith(f"model_config.max_batch_size: {path} ")
    assert_contains(line, supported, "found 4", f"set it to {size}", "dynamic_shapes")
    plan = create_plan(tmp_path, model=as_program(path, max_batch_size=size))
    np.testing.assert_allclose(
        predictions(plan), predictions(plan, TrainedNet()), rtol=0, atol=1e-6
    )


def test_a_fixed_batch_that_does_not_fit_in_memory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = create_plan(tmp_path, model=as_program(program(tmp_path / "net.pt2")))
    runtime: Any = load(plan)
    run = runtime._run

    def run_with_limited_memory(batch: Any) -> Any:
        if len(batch) > 2:
            exhaust_cpu_memory()
        return run(batch)

    monkeypatch.setattr(runtime, "_run", run_with_limited_memory)
    with pytest.raises(ModelError) as caught:
        Batcher(plan, plan.job.model, runtime, Steps()).warm_up()
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    line = str(caught.value)
    assert line.startswith("model_config.max_batch_size: ")
    assert_contains(line, "exactly 4", "found 2", "memory", "dynamic_shapes")


def test_the_error_for_another_patch_shape_names_both_shapes(tmp_path: Path) -> None:
    path = program(tmp_path / "net.pt2", shape=(4, 1, 16, 8))
    line = load_error(tmp_path, **as_program(path))
    assert line.startswith("model_config.model_input_shape: ")
    assert_contains(line, "[4, 1, 16, 8]", "[4, 1, 8, 8]")


def test_the_error_for_a_program_with_two_inputs_lists_them(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    zeros = torch.zeros(2, 2)
    torch.export.save(torch.export.export(Two(), (zeros, zeros)), tmp_path / "two.pt2")
    line = load_error(tmp_path, **as_program(tmp_path / "two.pt2"))
    assert_contains(line, "model_config.model_file: ", "2 inputs (x, y)")


def rewrite_zip(path: Path, change: Callable[[str, bytes], bytes], **extra: bytes) -> Path:
    """Copy a zip file with changed and additional members."""
    copy = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in extra.items():
            new.writestr(name, content)
    return copy


def test_a_damaged_program_is_reported_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = rewrite_zip(
        program(tmp_path / "net.pt2"), lambda name, c: c[:99] if name.endswith("model.json") else c
    )
    line = load_error(tmp_path, **as_program(path))
    assert line.startswith(f"model_config.model_file: {path} ")
    assert_contains(line, f"torch {torch.__version__}", "export the network again")
    assert capfd.readouterr().err == ""


def test_a_program_with_a_pickle_is_not_loaded_without_trust(tmp_path: Path) -> None:
    """torch.export.load would unpickle all of these."""
    path, pickled = program(tmp_path / "net.pt2"), io.BytesIO()
    torch.save((FileCreator(tmp_path / "created"),), pickled)

    def replace_sample_inputs(name: str, content: bytes) -> bytes:
        return pickled.getvalue() if "sample_inputs" in name else content

    def pickle_weights(name: str, content: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return content
        return content.replace(b'"use_pickle": false', b'"use_pickle": true')

    def keep(name: str, content: bytes) -> bytes:
        return content

    opaque = {"archive/data/constants/opaque_obj_0": b"x"}
    for change, extra in ((replace_sample_inputs, {}), (pickle_weights, {}), (keep, opaque)):
        model = as_program(rewrite_zip(path, change, **extra))
        line = load_error(tmp_path, ErrorCode.MODEL_UNTRUSTED, **model)
        assert line.startswith("model_config.trusted: missing; ")
        assert not (tmp_path / "created").exists()
    assert load(create_plan(tmp_path, model=as_program(rewrite_zip(path, keep)))).device == "cpu"


def test_the_error_for_another_dtype_names_the_dtype_to_set(tmp_path: Path) -> None:
    class Cast(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().repeat(1, 3, 1, 1)

    example = torch.zeros((4, 1, *PATCH), dtype=torch.int16)
    torch.export.save(torch.export.export(Cast(), (example,)), tmp_path / "int16.pt2")
    line = load_error(tmp_path, **as_program(tmp_path / "int16.pt2"))
    assert line.startswith("model_config.dtype: ")
    assert_contains(line, "float32", "dtype: int16")
    plan = create_plan(tmp_path, model=as_program(tmp_path / "int16.pt2", dtype="int16"))
    Batcher(plan, plan.job.model, load(plan), Steps()).warm_up()
