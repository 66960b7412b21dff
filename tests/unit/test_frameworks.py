"""One framework per worker process, and triton before TensorFlow: the rules alone."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from chunkq_worker.frameworks import FrameworkRule, framework_of
from chunkq_worker.runtimes import torch as torch_runtime
from chunkq_worker.runtimes import triton_import
from chunkq_worker.runtimes.torch_files import LoadedNetwork
from chunkq_worker.steps import Steps

from chunkq.errors import FrameworkConflictError, ModelError
from chunkq.executors.base import EXIT_RESTART, ExitStatus
from chunkq.job import ModelConfig


def model(runtime: str, **more: Any) -> ModelConfig:
    kind = "class" if runtime != "onnx" else "file"
    return ModelConfig(runtime=runtime, type=kind, model_input_shape=(8,), **more)  # type: ignore[arg-type]


TORCH, TENSORFLOW, ONNX = model("torch"), model("tensorflow"), model("onnx")
ONNX_ON_GPU = model("onnx", device="cuda")


def test_a_network_needs_the_framework_that_holds_its_arrays() -> None:
    assert framework_of(TORCH) == "torch"
    assert framework_of(TENSORFLOW) == "tensorflow"
    assert framework_of(ONNX) is None
    assert framework_of(ONNX_ON_GPU) == "torch"


@pytest.mark.parametrize(
    ("used", "refused"),
    [
        ([], []),  # a new process takes anything
        ([ONNX], []),
        ([TORCH], [TENSORFLOW]),
        ([ONNX_ON_GPU], [TENSORFLOW]),
        ([TENSORFLOW], [TORCH, ONNX_ON_GPU]),
        ([ONNX, TENSORFLOW, ONNX], [TORCH, ONNX_ON_GPU]),
    ],
)
def test_a_process_refuses_the_framework_that_it_did_not_compute_with_first(
    used: list[ModelConfig], refused: list[ModelConfig]
) -> None:
    rule = FrameworkRule(enforced=True)
    for one in used:
        rule.check(one)
        rule.record(one)
    for one in (TORCH, TENSORFLOW, ONNX, ONNX_ON_GPU):
        if one in refused:
            with pytest.raises(FrameworkConflictError, match="needs a new worker process"):
                rule.check(one)
        else:
            rule.check(one)


def test_a_process_that_nobody_replaces_refuses_nothing() -> None:
    rule = FrameworkRule()
    for one in (TORCH, TENSORFLOW, ONNX_ON_GPU):
        rule.check(one)
        rule.record(one)


def test_a_network_that_never_computed_binds_the_process_to_nothing() -> None:
    rule = FrameworkRule(enforced=True)
    rule.check(TORCH)
    rule.check(TENSORFLOW)


def test_the_conflict_has_an_exit_code_of_its_own() -> None:
    assert ExitStatus.from_error(FrameworkConflictError("another")) == ExitStatus(EXIT_RESTART)


# ---------------------------------------------------------------------------------- triton


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has imported neither TensorFlow nor triton."""
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))  # so that it is put back
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    return monkeypatch


def write_triton(folder: Path, source: str, modules: pytest.MonkeyPatch) -> None:
    (folder / "triton.py").write_text(source)
    modules.syspath_prepend(folder)


def test_triton_is_imported_first_where_it_is_installed(
    modules: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_triton(tmp_path, "import warnings\nwarnings.warn('old')\nMINE = True\n", modules)
    triton_import.import_triton_before_tensorflow()
    assert sys.modules["triton"].MINE
    triton_import.hide_triton_after_tensorflow()
    assert sys.modules["triton"].MINE
    assert not triton_import.is_triton_hidden()


def test_a_broken_triton_does_not_stop_tensorflow(
    modules: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_triton(tmp_path, "raise RuntimeError('no driver')\n", modules)
    triton_import.import_triton_before_tensorflow()
    assert "triton" not in sys.modules


def test_triton_is_not_imported_after_tensorflow_by_anyone(
    modules: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_triton(tmp_path, "", modules)
    modules.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    triton_import.import_triton_before_tensorflow()
    assert "triton" not in sys.modules
    triton_import.hide_triton_after_tensorflow()
    assert triton_import.is_triton_hidden()
    with pytest.raises(ImportError):
        import triton  # noqa: F401
    triton_import.import_triton_before_tensorflow()
    assert triton_import.is_triton_hidden()


def test_compiling_for_a_gpu_without_triton_is_refused_in_one_line(
    modules: pytest.MonkeyPatch,
) -> None:
    modules.setattr(torch.cuda, "is_available", lambda: True)
    modules.setattr(
        torch_runtime, "LOADERS", {"class": lambda model: LoadedNetwork(torch.nn.ReLU())}
    )
    modules.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    compiled = model("torch", device="cuda", compile=True)
    with pytest.raises(
        ModelError, match=r"^model_config\.compile: .*import triton before"
    ) as error:
        torch_runtime.load(compiled, Steps(), None)
    assert "\n" not in str(error.value)
