"""Networks as people save and write them: checkpoints of trainers, and what networks return."""

import gzip
import json
import struct
import warnings
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes.returned_values import prediction_in
from chunkq_worker.runtimes.torch_checkpoint import PLACEHOLDERS
from chunkq_worker.runtimes.torch_weights import NetworkNames, assemble_parts
from chunkq_worker.steps import Steps
from safetensors.torch import save as to_safetensors

from chunkq.errors import ErrorCode, ModelError
from tests.harness.assertions import assert_contains
from tests.harness.torch_networks import (
    CLASS,
    PATCH,
    as_file,
    as_program,
    as_script,
    conv,
    create_plan,
    load,
    load_error,
    predictions,
    program,
    trained,
)

State = dict[str, Any]


def prefixed(prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in trained().state_dict().items()}


def others(prefix: str = "") -> State:
    """Return values of the right names and shapes that are not the trained ones."""
    return {name: torch.zeros_like(value) for name, value in prefixed(prefix).items()}


def wrapped_part() -> State:
    return {name.replace("layer.", "layer._orig_mod."): v for name, v in prefixed("").items()}


FORMS: Mapping[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "plain": (lambda: prefixed(""), ()),
    "nnU-Net": (
        lambda: {
            "network_weights": prefixed(""),
            "optimizer_state": {"state": {0: {"step": torch.zeros(1)}}},
            "logging": {"ema": [np.float64(0.5), np.float32(1)]},
            "epoch": 3,
        },
        ("under 'network_weights'",),
    ),
    "Lightning": (
        lambda: {
            "state_dict": {**prefixed("model."), "criterion.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 0.1},
            "optimizer_states": [{"state": {}}],
        },
        ("'state_dict'", "prefix 'model.'", "criterion.weight"),
    ),
    "any prefix of all names": (lambda: {"state_dict": prefixed("unet.")}, ("prefix 'unet.'",)),
    "compile around DDP": (lambda: prefixed("_orig_mod.module."), ("'_orig_mod.'", "'module.'")),
    "DDP in Lightning": (lambda: {"state_dict": prefixed("net.module.")}, ("'net.'", "'module.'")),
    "FSDP": (lambda: prefixed("_fsdp_wrapped_module."), ("'_fsdp_wrapped_module.'",)),
    "averaged": (lambda: {"n_averaged": torch.tensor(4), **prefixed("module.")}, ("'module.'",)),
    "compiled part": (wrapped_part, ("'_orig_mod.'",)),
    "average beside": (
        lambda: {"state_dict": prefixed(""), "ema_state_dict": others()},
        ("under 'state_dict'", "under 'ema_state_dict' also fit"),
    ),
    "average only": (lambda: {"ema_state_dict": prefixed("")}, ("under 'ema_state_dict'",)),
    "of two networks": (
        lambda: {"generator": prefixed(""), "discriminator": {"a": torch.ones(1)}},
        ("under 'generator'",),
    ),
    "half precision": (
        lambda: {name: value.bfloat16().float() for name, value in prefixed("").items()},
        (),
    ),
    "a step further": (
        lambda: {"checkpoint": {"model": prefixed("")}},
        ("under checkpoint.model",),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_that_fit_the_class_are_loaded_and_named(tmp_path: Path, form: str) -> None:
    content, named = FORMS[form]
    torch.save(content(), tmp_path / "w.pt")
    runtime: Any = load(create_plan(tmp_path, model={"checkpoint": str(tmp_path / "w.pt")}))
    for name, value in runtime._module.state_dict().items():
        expected = trained().state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
    assert len(runtime.notes()) == bool(named)
    assert_contains("".join(runtime.notes()), *named)
    assert not runtime.created_values()


def test_weights_in_one_part_per_submodule_are_put_together() -> None:
    parts = {"encoder": torch.nn.Conv2d(1, 2, 3), "decoder": torch.nn.Conv2d(2, 1, 3)}
    module = torch.nn.ModuleDict(parts)
    names = NetworkNames.of(module)
    states = {key: part.state_dict() for key, part in parts.items()}
    content = {"epoch": 3, "encoder_state": states["encoder"], "net": {"dec": states["decoder"]}}
    assembled = assemble_parts(content, names)
    assert assembled is not None
    state, line = assembled
    assert {name: id(value) for name, value in state.items()} == {
        f"{key}.{name}": id(value) for key, part in states.items() for name, value in part.items()
    }
    assert_contains(line, "encoder_state", "net.dec", "encoder", "decoder")
    assert assemble_parts({"encoder_state": states["encoder"]}, names) is None
    twins = torch.nn.ModuleDict({"left": parts["encoder"], "right": torch.nn.Conv2d(1, 2, 3)})
    both = NetworkNames.of(twins)
    assert assemble_parts({"weights": states["encoder"]}, both) is None
    assert assemble_parts({"a": states["encoder"], "b": states["encoder"]}, both) is None


def test_weights_in_half_precision_are_loaded(tmp_path: Path) -> None:
    half = {name: value.half() for name, value in prefixed("").items()}
    torch.save(half, tmp_path / "w.pt")
    runtime: Any = load(create_plan(tmp_path, model={"checkpoint": str(tmp_path / "w.pt")}))
    for name, value in runtime._module.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, half[name].float(), rtol=0, atol=0)


REFUSED: Mapping[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "two parts": (lambda: {"params": prefixed(""), "params_ema": others()}, ("params_ema",)),
    "two prefixes": (lambda: {**prefixed("model."), **others("net.")}, ("'model.'", "'net.'")),
    "two unknown prefixes": (lambda: {**prefixed("a."), **others("b.")}, ("layer.weight",)),
    "a part of a larger network": (
        lambda: {**prefixed("encoder."), "decoder.weight": torch.ones(1)},
        ("layer.weight", "decoder.weight"),
    ),
    "a missing value": (
        lambda: {"layer.weight": prefixed("")["layer.weight"]},
        ("layer.bias",),
    ),
    "a value too many": (lambda: {**prefixed(""), "head.weight": torch.ones(1)}, ("head.weight",)),
    "another shape": (lambda: {**prefixed(""), "layer.bias": torch.ones(4)}, ("layer.bias",)),
    "no weights": (lambda: {"state_dict": {}, "epoch": 3}, ("layer.weight",)),
    "numpy arrays": (
        lambda: {name: value.numpy() for name, value in prefixed("").items()},
        ("layer.weight",),
    ),
    "no dict": (lambda: [1, 2], ("list", "state_dict")),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_checkpoint_that_does_not_fit_or_is_ambiguous_is_refused(
    tmp_path: Path, form: str
) -> None:
    content, named = REFUSED[form]
    torch.save(content(), tmp_path / "w.pt")
    line = load_error(tmp_path, checkpoint=str(tmp_path / "w.pt"))
    assert line.startswith(f"model_config.checkpoint: {tmp_path}/w.pt ")
    assert_contains(line, *named)


def test_numpy_values_of_a_checkpoint_run_no_code_of_numpy(tmp_path: Path) -> None:
    torch.save({"model": prefixed(""), "best": np.float64(1)}, tmp_path / "w.pt")
    load(create_plan(tmp_path, model={"checkpoint": f"{tmp_path}/w.pt"}))
    assert not {*PLACEHOLDERS} & {*torch.serialization.get_safe_globals()}
    for placeholder in PLACEHOLDERS:
        value: Any = placeholder("U8", False, True)
        value.__setstate__((3, "<", None))
        assert not vars(value)
        assert placeholder.__module__.partition(".")[0] == "numpy"


PARTS = """\
import torch


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 3, 3, padding=1)
        self.again = self.layer
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.again(x))


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.Conv2d(1, 3, 3, padding=1)
        self.layer = torch.nn.utils.parametrizations.weight_norm(layer)

    def forward(self, x):
        return self.layer(x)


class Random(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 3, 3, padding=1)
        self.register_buffer("noise", torch.rand(3, 1, 1), persistent=False)

    def forward(self, x):
        return self.layer(x) + self.noise
"""


def of_parts(folder: Path, name: str) -> dict[str, Any]:
    (folder / "parts.py").write_text(PARTS)
    return {"class_file": f"{folder}/parts.py", "class_name": name, "kwargs_file": None}


def network_of_parts(name: str) -> torch.nn.Module:
    names: dict[str, Any] = {"__name__": "parts"}
    exec(PARTS, names)
    torch.manual_seed(4)
    module: torch.nn.Module = names[name]()
    return module


def test_safetensors_with_one_copy_of_tied_weights_and_without_counters_are_read(
    tmp_path: Path,
) -> None:
    network = network_of_parts("Tied")
    kept = {
        name: value
        for name, value in network.state_dict().items()
        if not name.startswith("again") and not name.endswith("num_batches_tracked")
    }
    (tmp_path / "w.bin").write_bytes(to_safetensors(kept))
    model = of_parts(tmp_path, "Tied") | {"checkpoint": str(tmp_path / "w.bin")}
    runtime: Any = load(create_plan(tmp_path, model=model))
    for name, value in runtime._module.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=0, atol=0)


def test_older_names_that_hooks_of_the_network_convert_are_loaded(tmp_path: Path) -> None:
    network = network_of_parts("Normed")
    old = {"g": "original0", "v": "original1"}
    state = {
        f"module.layer.weight_{short}": network.state_dict()[f"layer.parametrizations.weight.{new}"]
        for short, new in old.items()
    }
    torch.save(state | {"module.layer.bias": network.state_dict()["layer.bias"]}, tmp_path / "w.pt")
    model = of_parts(tmp_path, "Normed") | {"checkpoint": str(tmp_path / "w.pt")}
    runtime: Any = load(create_plan(tmp_path, model=model))
    for name, value in runtime._module.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=0, atol=0)


def test_values_that_the_chosen_weights_lack_are_still_listed_as_created(tmp_path: Path) -> None:
    state = {"state_dict": prefixed("model.")}
    torch.save(state, tmp_path / "w.pt")
    model = of_parts(tmp_path, "Random") | {"checkpoint": str(tmp_path / "w.pt")}
    runtime = load(create_plan(tmp_path, model=model))
    assert [name for name, _ in runtime.created_values()] == ["noise"]


# ------------------------------------------------------------------ files of another kind

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
STAND_INS: Mapping[str, tuple[bytes, str]] = {
    "LFS pointer": (LFS, "git lfs pull"),
    "git-annex pointer": (b"/annex/objects/SHA256E-s5--00.pt\n", "git annex get"),
    "web page": (b"\n<!-- x -->\n<!DOCTYPE html>\n<html></html>\n", "web page"),
    "page of a bucket": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "error reply": (b'{"message": "Not Found"}', "JSON"),
    "index of shards": (
        json.dumps({"metadata": {}, "weight_map": {"a": "b.safetensors"}}).encode(),
        "several files",
    ),
}
KINDS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "class file": lambda path: {"class_file": path},
    "kwargs": lambda path: {"kwargs_file": path},
    "checkpoint": lambda path: {"checkpoint": path},
    "module": lambda path: as_file(Path(path)),
    "TorchScript": lambda path: as_script(Path(path)),
    "exported": lambda path: as_program(Path(path)),
    "ONNX": lambda path: as_file(Path(path), runtime="onnx", trusted=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", STAND_INS)
def test_a_pointer_a_page_or_an_error_reply_is_called_that_for_every_kind_of_file(
    tmp_path: Path, form: str, kind: str
) -> None:
    content, word = STAND_INS[form]
    (tmp_path / "f").write_bytes(content)
    line = load_error(tmp_path, **KINDS[kind](f"{tmp_path}/f"))
    assert_contains(line, f"{tmp_path}/f is ", word)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (gzip.compress(b"x"), "compressed"),
        (b"PK\x03\x04" + bytes(50), "incomplete zip"),
        (bytes(257) + b"ustar" + bytes(300), "archive"),
        (b"", "empty"),
        (struct.pack("<Q", 40) + b'{"a": {"dtype": "F32", "shape"', "damaged safetensors"),
    ],
    ids=["gzip", "cut off", "tar", "empty", "safetensors"],
)
def test_a_packed_or_cut_off_checkpoint_is_called_that(
    tmp_path: Path, content: bytes, word: str
) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    line = load_error(tmp_path, checkpoint=f"{tmp_path}/w.pt")
    assert_contains(line, f"model_config.checkpoint: {tmp_path}/w.pt is ", word)


def test_a_whole_network_as_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(conv(), tmp_path / "w.pt")
    line = load_error(tmp_path, ErrorCode.MODEL_UNTRUSTED, checkpoint=f"{tmp_path}/w.pt")
    assert_contains(line, "more than weights", "type: file")


# --------------------------------------------------------------------- returned values

Pair = namedtuple("Pair", ["logits", "aux"])


@dataclass
class Output:
    logits: Any
    loss: Any = None


ONE: Mapping[str, Callable[[Any], Any]] = {
    "itself": lambda x: x,
    "tuple": lambda x: (x, None),
    "list": lambda x: [x],
    "dict": lambda x: {"out": x, "name": "a", "loss": 0.5},
    "namedtuple": lambda x: Pair(None, x),
    "dataclass": Output,
    "nested": lambda x: ({"out": [x]}, ()),
}


@pytest.mark.parametrize("form", ONE)
@pytest.mark.parametrize("has_step", [False, True])
def test_the_only_tensor_in_what_a_network_returns_is_the_prediction(
    form: str, has_step: bool
) -> None:
    tensor = torch.ones(2, 3)
    returned = ONE[form](tensor)
    assert prediction_in(returned, torch.is_tensor, "tensor", has_step=has_step) is tensor


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        ((torch.ones(2, 3), torch.ones(2)), ("outputs[0] [2, 3]", "outputs[1] [2]")),
        ({"a": torch.ones(2), "b": [torch.ones(3)]}, ("outputs['a'] [2]", "outputs['b'][0] [3]")),
        (Pair(torch.ones(2), torch.ones(3)), ("outputs.logits [2]", "outputs.aux [3]")),
        (Output(torch.ones(2), torch.ones(())), ("outputs.logits [2]", "outputs.loss []")),
        ((torch.ones(2), object()), ("outputs[0] [2]", "outputs[1] object")),
    ],
    ids=["tuple", "dict", "namedtuple", "dataclass", "an unknown object"],
)
def test_several_tensors_are_refused_by_name_and_shape_unless_a_step_picks(
    returned: Any, names: tuple[str, ...]
) -> None:
    with pytest.raises(ModelError) as caught:
        prediction_in(returned, torch.is_tensor, "tensor", has_step=False)
    assert_contains(str(caught.value), *names, "postprocessing_protected")
    assert prediction_in(returned, torch.is_tensor, "tensor", has_step=True) is returned


def test_a_step_picks_one_of_several_tensors(tmp_path: Path) -> None:
    (tmp_path / "several.py").write_text(
        CLASS.replace("return self.layer(x)", "y = self.layer(x); return {'main': y, 'aux': y + 1}")
    )
    (tmp_path / "pick.py").write_text(
        "def postprocessing_protected(outputs): return outputs['aux']\n"
    )
    torch.save(trained().state_dict(), tmp_path / "w.pt")
    one = create_plan(tmp_path, model={"checkpoint": f"{tmp_path}/w.pt"})
    model = {"class_file": f"{tmp_path}/several.py", "checkpoint": f"{tmp_path}/w.pt"}
    several = create_plan(tmp_path, model=model)
    steps = Steps.load(f"{tmp_path}/pick.py")
    picked = predictions(several, load(several, steps), steps)
    np.testing.assert_array_equal(picked, predictions(one) + 1)


# ----------------------------------------------------------------- zeros and devices

FUSSY = """\
import torch


class Net(torch.nn.Module):
    def forward(self, x):
        if not x.flatten(1).any(1).all():
            raise ValueError("an item without signal")
        {then}
"""


def fussy(folder: Path, then: str) -> Any:
    (folder / "fussy.py").write_text(FUSSY.format(then=then))
    model = {"class_file": f"{folder}/fussy.py", "kwargs_file": None}
    return create_plan(folder, model=model, shape=(24, 16), chunksize=[24, 16])


@pytest.mark.parametrize("any_batch", [False, True])
def test_a_network_that_fails_for_zeros_only_is_used(tmp_path: Path, any_batch: bool) -> None:
    plan = fussy(tmp_path, "return x.repeat(1, 3, 1, 1)")
    runtime: Any = load(plan)
    runtime.any_batch = any_batch  # False: the last batch has two patches, and is padded
    batcher = Batcher(plan, plan.job.model, runtime, Steps())
    assert batcher.try_zeros() is not None
    assert not batcher.has_run
    assert len(predictions(plan, runtime)) == 6


def test_a_network_that_fails_for_zeros_and_for_patches_is_refused_for_the_patches(
    tmp_path: Path,
) -> None:
    plan = fussy(tmp_path, "raise ValueError('an odd patch')")
    with pytest.raises(ModelError) as caught:
        predictions(plan)
    assert_contains(str(caught.value), "ValueError", "an odd patch")


ON_GPU = CLASS.replace(
    "return self.layer(x)", "return self.layer(x) + torch.zeros(1, device='cuda:0')"
)
IN_INIT = CLASS.replace("super().__init__()", "super().__init__(); self.a = torch.ones(1).cuda()")
AT_IMPORT = CLASS.replace("import torch\n", "import torch\nON = torch.ones(1).to('cuda')\n", 1)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU accepts the code")


@needs_no_gpu
@pytest.mark.parametrize(
    ("code", "name"), [(ON_GPU, "cuda:0"), (IN_INIT, "cuda"), (AT_IMPORT, "cuda")]
)
def test_the_error_for_a_device_in_the_code_names_the_device_and_the_line(
    tmp_path: Path, code: str, name: str
) -> None:
    (tmp_path / "gpu.py").write_text(code)
    torch.save(trained().state_dict(), tmp_path / "w.pt")
    keys = {"class_file": f"{tmp_path}/gpu.py", "checkpoint": f"{tmp_path}/w.pt"}
    line = load_error(tmp_path, **keys)
    number = next(n for n, text in enumerate(code.splitlines(), 1) if "cuda" in text)
    assert_contains(line, f"device {name},", f"gpu.py, line {number})", "model_config.device")


def script(module: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


@needs_no_gpu
def test_the_error_for_a_device_in_torchscript_has_no_traceback(tmp_path: Path) -> None:
    class OnGpu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(1, device="cuda:0")

    script(OnGpu(), tmp_path / "net.ts")
    line = load_error(tmp_path, **as_script(tmp_path / "net.ts", trusted=False))
    assert_contains(line, "device cuda:0,", "model_config.device")
    assert "HERE" not in line
    assert "interpreter" not in line


def test_other_errors_of_torchscript_have_no_traceback(tmp_path: Path) -> None:
    path = script(torch.nn.Conv2d(2, 3, 3, padding=1), tmp_path / "net.ts")
    line = load_error(tmp_path, **as_script(path, trusted=False))
    assert_contains(line, "RuntimeError on a batch of zeros: ", "2 channels")
    assert "HERE" not in line


# ---------------------------------------------------------------- classes of packages


def of_package(name: str) -> dict[str, Any]:
    return {"class_file": None, "class_name": name}


def test_a_class_of_an_installed_package_is_used(tmp_path: Path) -> None:
    (tmp_path / "conv.py").write_text(
        "kwargs = {'in_channels': 1, 'out_channels': 3, 'kernel_size': 3, 'padding': 1}\n"
    )
    torch.save(trained().state_dict(), tmp_path / "w.pt")
    model = of_package("torch.nn.Conv2d") | {
        "kwargs_file": f"{tmp_path}/conv.py",
        "checkpoint": f"{tmp_path}/w.pt",
    }
    expected = create_plan(tmp_path, model={"checkpoint": f"{tmp_path}/w.pt"})
    plan = create_plan(tmp_path, model=model)
    np.testing.assert_array_equal(predictions(plan), predictions(expected))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package.Net", ("no_such_package", "not installed")),
        ("torch.nn.no_module.Net", ("torch has no module torch.nn.no_module",)),
        ("torch.nn.NoNetwork", ("torch.nn has no 'NoNetwork'",)),
        ("math.pi", ("float", "math.pi")),
    ],
)
def test_a_missing_class_of_a_package_is_reported(
    tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    line = load_error(tmp_path, **of_package(name))
    assert line.startswith(f"model_config.class_name: {name}")
    assert_contains(line, *words)


def test_an_exported_program_that_returns_a_tuple_is_used(tmp_path: Path) -> None:
    class InTuple(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x.repeat(1, 3, 1, 1), None

    plan = create_plan(tmp_path, model=as_program(program(tmp_path / "net.pt2", InTuple())))
    assert predictions(plan).shape == (4, 3, *PATCH)
