"""The files a torch network comes in: what is taken, and what is refused and how."""

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

from chunkq.errors import ModelError
from tests.harness.torch_networks import (
    CLASS,
    PATCH,
    TrainedNet,
    as_file,
    as_program,
    conv,
    load,
    of_cpu,
    plan_of,
    predictions,
    program,
    refused,
    scripted,
    trained,
)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "network"])
def test_weights_are_found_where_training_scripts_put_them(tmp_path: Path, key: str) -> None:
    module = trained()
    bare, nested = tmp_path / "bare.pt", tmp_path / "nested.pt"
    torch.save(module.state_dict(), bare)
    torch.save({"epoch": 3, key: module.state_dict(), "optimizer": {"lr": 0.1}}, nested)
    first = predictions(plan_of(tmp_path, model={"checkpoint": str(bare)}))
    second = predictions(plan_of(tmp_path, model={"checkpoint": str(nested)}))
    np.testing.assert_array_equal(first, second)


def test_the_prefix_that_data_parallel_training_leaves_is_taken_off(tmp_path: Path) -> None:
    module = trained()
    state = OrderedDict((f"module.{k}", v) for k, v in module.state_dict().items())
    torch.save(module.state_dict(), tmp_path / "bare.pt")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pt")
    first = predictions(plan_of(tmp_path, model={"checkpoint": str(tmp_path / "bare.pt")}))
    second = predictions(plan_of(tmp_path, model={"checkpoint": str(tmp_path / "wrapped.pt")}))
    np.testing.assert_array_equal(first, second)


def test_a_class_with_its_checkpoint_and_its_torchscript_predict_the_same(tmp_path: Path) -> None:
    module = trained()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    path = scripted(module, tmp_path / "net.ts")
    by_class = predictions(plan_of(tmp_path, model={"checkpoint": str(tmp_path / "weights.pt")}))
    script = {"type": "torchscript", "ts_file": str(path)}
    by_script = predictions(plan_of(tmp_path, model=script))
    assert by_class.shape == (4, 3, *PATCH)
    np.testing.assert_allclose(by_class, by_script, rtol=0, atol=1e-6)


def test_a_network_in_training_mode_is_put_into_inference_mode(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    dropping = CLASS.replace(
        "return self.layer(x)", "return torch.dropout(self.layer(x), 0.5, self.training)"
    )
    (tmp_path / "net.py").write_text(
        dropping.replace("super().__init__()", "super().__init__(); torch.manual_seed(0)")
    )
    np.testing.assert_array_equal(predictions(plan), predictions(plan))


# ---------------------------------------------------------------------------- whole modules


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"epoch": 3, "model": m}])
def test_a_whole_pickled_module_is_used_if_it_is_trusted(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(conv()), tmp_path / "whole.pt")
    found = predictions(plan_of(tmp_path, model=as_file(tmp_path / "whole.pt")))
    torch.save(conv()[0].state_dict(), tmp_path / "weights.pt")
    (tmp_path / "conv.py").write_text("from torch.nn import Conv2d\n")
    (tmp_path / "of_conv.py").write_text(
        "kwargs = {'in_channels': 1, 'out_channels': 3, 'kernel_size': 3, 'padding': 1}\n"
    )
    model = {
        "class_file": str(tmp_path / "conv.py"),
        "class_name": "Conv2d",
        "kwargs_file": str(tmp_path / "of_conv.py"),
        "checkpoint": str(tmp_path / "weights.pt"),
    }
    np.testing.assert_array_equal(found, predictions(plan_of(tmp_path, model=model)))


class Owner:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self._path, "w"))


def test_a_pickle_is_not_opened_without_trust(tmp_path: Path) -> None:
    torch.save(Owner(tmp_path / "owned"), tmp_path / "whole.pt")
    line = refused(tmp_path, **as_file(tmp_path / "whole.pt", trusted=False))
    assert line.startswith("model_config.trusted: missing; ")
    assert "set trusted: true" in line
    assert "torch.jit.script(network).save" in line
    assert not (tmp_path / "owned").exists()


def test_a_pickled_class_that_is_not_here_is_named(tmp_path: Path) -> None:
    torch.save(conv(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for old, new in ((b"conv\n", b"cnov\n"), (b"Conv2d", b"Cnov2d")):
        with zipfile.ZipFile(io.BytesIO(content)) as old_zip:
            members = {name: old_zip.read(name) for name in old_zip.namelist()}
        with zipfile.ZipFile(tmp_path / "changed.pt", "w") as new_zip:
            for name, member in members.items():
                new_zip.writestr(name, member.replace(old, new) if "pkl" in name else member)
        line = refused(tmp_path, **as_file(tmp_path / "changed.pt"))
        assert line.startswith("model_config.model_file: ")
        assert new.decode().strip() in line
        assert "put the file that it was imported from beside it" in line


def test_weights_given_as_a_network_are_recognised(tmp_path: Path) -> None:
    torch.save({"state_dict": conv().state_dict()}, tmp_path / "weights.pt")
    line = refused(tmp_path, **as_file(tmp_path / "weights.pt"))
    assert "holds dict, not a network; if these are weights, use type: class" in line


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (np.float64(0.3), "numpy._core.multiarray.scalar"),
        (np.zeros(3), "numpy._core.multiarray._reconstruct"),
        (SimpleNamespace(lr=1), "types.SimpleNamespace"),
    ],
    ids=["a numpy scalar", "a numpy array", "settings"],
)
def test_a_checkpoint_with_more_than_weights_names_it_and_what_to_do(
    tmp_path: Path, extra: Any, name: str
) -> None:
    torch.save({"state_dict": trained().state_dict(), "more": extra}, tmp_path / "full.pt")
    line = refused(tmp_path, checkpoint=str(tmp_path / "full.pt"))
    assert line.startswith(f"model_config.checkpoint: {tmp_path}/full.pt holds more than weights")
    for words in (name, "weights_only=False", "type: file", "trusted: true"):
        assert words in line


def test_the_advice_for_such_a_checkpoint_works(tmp_path: Path) -> None:
    torch.save({"state_dict": trained().state_dict(), "loss": np.float64(1)}, tmp_path / "full.pt")
    line = refused(tmp_path, checkpoint=str(tmp_path / "full.pt"))
    advice = line[line.index("torch.save(") : line.index(", or, if")]
    exec(advice.replace("'weights.pt'", repr(str(tmp_path / "weights.pt"))), {"torch": torch})
    torch.save(trained().state_dict(), tmp_path / "bare.pt")
    np.testing.assert_array_equal(
        predictions(plan_of(tmp_path, model={"checkpoint": str(tmp_path / "weights.pt")})),
        predictions(plan_of(tmp_path, model={"checkpoint": str(tmp_path / "bare.pt")})),
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off_but_not_the_networks_own(
    tmp_path: Path, prefix: str
) -> None:
    wrapped = CLASS.replace("self.layer", "self.module")
    state = {k.replace("layer", "module"): v for k, v in trained().state_dict().items()}
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    torch.save({prefix + k: v for k, v in trained().state_dict().items()}, first / "weights.pt")
    torch.save(state, second / "weights.pt")
    plans = [plan_of(f, model={"checkpoint": str(f / "weights.pt")}) for f in (first, second)]
    (second / "net.py").write_text(wrapped)
    np.testing.assert_array_equal(predictions(plans[0]), predictions(plans[1]))


# ----------------------------------------------------------------- programs of torch.export


@pytest.mark.parametrize(
    ("shape", "limits", "words"),
    [
        ((2, 1, 8, 8), {}, "batches of exactly 2 items, not 4; set it to 2"),
        ((3, 1, 8, 8), {"max": 3}, "batches of at most 3 items, not 4; set it to 3"),
        ((8, 1, 8, 8), {"min": 6, "max": 9}, "batches of 6 to 9 items, not 4; set it to 9"),
        ((8, 1, 8, 8), {"min": 6}, "batches of 6 or more items, not 4; set it to 6"),
    ],
)
def test_a_program_for_other_batches_is_one_line_with_the_size_to_set(
    tmp_path: Path, shape: tuple[int, ...], limits: dict[str, int], words: str
) -> None:
    path = program(tmp_path / "net.pt2", shape=shape, **limits)
    line = refused(tmp_path, **as_program(path))
    assert line.startswith(f"model_config.max_batch_size: {path} was exported for {words}")
    assert "export it for any size with dynamic_shapes" in line
    size = int(words.rpartition(" ")[2])
    plan = plan_of(tmp_path, model=as_program(path, max_batch_size=size))
    np.testing.assert_allclose(
        predictions(plan), predictions(plan, TrainedNet()), rtol=0, atol=1e-6
    )


def test_a_fixed_batch_that_does_not_fit_in_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, model=as_program(program(tmp_path / "net.pt2")))
    runtime: Any = load(plan)
    real = runtime._run

    def tight(given: Any) -> Any:
        if len(given) > 2:
            of_cpu()
        return real(given)

    monkeypatch.setattr(runtime, "_run", tight)
    with pytest.raises(ModelError, match="exactly 4 items, not 2; more do not fit in memory"):
        Batcher(plan, runtime, Steps()).warm_up()


def test_a_program_for_another_patch_is_one_line(tmp_path: Path) -> None:
    path = program(tmp_path / "net.pt2", shape=(4, 1, 16, 8))
    line = refused(tmp_path, **as_program(path))
    assert line.startswith("model_config.model_input_shape: ")
    assert "exported for batches of [4, 1, 16, 8], not [4, 1, 8, 8]" in line


def test_a_program_that_takes_more_than_a_batch_is_one_line(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    zeros = torch.zeros(2, 2)
    torch.export.save(torch.export.export(Two(), (zeros, zeros)), tmp_path / "two.pt2")
    assert "takes 2 inputs (x, y)" in refused(tmp_path, **as_program(tmp_path / "two.pt2"))


def rewritten(path: Path, change: Callable[[str, bytes], bytes], **extra: bytes) -> Path:
    """Copy a zip with its members changed, and some more beside them."""
    copy = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in extra.items():
            new.writestr(name, content)
    return copy


def test_a_damaged_program_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = rewritten(
        program(tmp_path / "net.pt2"), lambda name, c: c[:99] if name.endswith("model.json") else c
    )
    line = refused(tmp_path, **as_program(path))
    assert "cannot be loaded by torch" in line
    assert line.endswith("export the network again")
    assert capfd.readouterr().err == ""


def test_a_program_that_carries_a_pickle_is_not_opened_without_trust(tmp_path: Path) -> None:
    """torch.export.load would unpickle all of these."""
    path, saved = program(tmp_path / "net.pt2"), io.BytesIO()
    torch.save((Owner(tmp_path / "owned"),), saved)

    def sample(name: str, content: bytes) -> bytes:
        return saved.getvalue() if "sample_inputs" in name else content

    def weights(name: str, content: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return content
        return content.replace(b'"use_pickle": false', b'"use_pickle": true')

    def same(name: str, content: bytes) -> bytes:
        return content

    opaque = {"archive/data/constants/opaque_obj_0": b"x"}
    for change, extra in ((sample, {}), (weights, {}), (same, opaque)):
        line = refused(tmp_path, **as_program(rewritten(path, change, **extra)))
        assert line.startswith("model_config.trusted: missing; ")
        assert not (tmp_path / "owned").exists()
    assert load(plan_of(tmp_path, model=as_program(rewritten(path, same)))).device == "cpu"


def test_a_program_that_takes_another_dtype_is_one_line(tmp_path: Path) -> None:
    class Cast(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().repeat(1, 3, 1, 1)

    example = torch.zeros((4, 1, *PATCH), dtype=torch.int16)
    torch.export.save(torch.export.export(Cast(), (example,)), tmp_path / "int16.pt2")
    line = refused(tmp_path, **as_program(tmp_path / "int16.pt2"))
    assert line.startswith("model_config.dtype: ")
    assert "was exported for int16, not float32; set dtype: int16" in line
    plan = plan_of(tmp_path, model=as_program(tmp_path / "int16.pt2", dtype="int16"))
    Batcher(plan, load(plan), Steps()).warm_up()
