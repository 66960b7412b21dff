"""The rules: one framework per worker process, and triton is imported before TensorFlow."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from chunkq_worker.frameworks import FrameworkRule, framework_of
from chunkq_worker.runtimes import torch as torch_runtime
from chunkq_worker.runtimes import triton_import
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.torch_files import LoadedNetwork
from chunkq_worker.steps import Steps

from chunkq.errors import ErrorCode, FrameworkConflictError, ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.queue.contract.executor import EXIT_RESTART, ExitStatus


def model(runtime: str, **more: Any) -> ModelConfig:
    kind = "class" if runtime != "onnx" else "file"
    return ModelConfig(runtime=runtime, type=kind, model_input_shape=(8,), **more)  # type: ignore[arg-type]


TORCH, TENSORFLOW, ONNX = model("torch"), model("tensorflow"), model("onnx")
ONNX_ON_GPU = model("onnx", device="cuda")


def test_each_runtime_and_device_needs_its_framework() -> None:
    assert framework_of(TORCH) == "torch"
    assert framework_of(TENSORFLOW) == "tensorflow"
    assert framework_of(ONNX) is None
    assert framework_of(ONNX_ON_GPU) == "torch"


@pytest.mark.parametrize(
    ("used", "refused"),
    [
        ([], []),  # a new process accepts every framework
        ([ONNX], []),
        ([TORCH], [TENSORFLOW]),
        ([ONNX_ON_GPU], [TENSORFLOW]),
        ([TENSORFLOW], [TORCH, ONNX_ON_GPU]),
        ([ONNX, TENSORFLOW, ONNX], [TORCH, ONNX_ON_GPU]),
    ],
)
def test_a_process_accepts_only_the_first_framework_that_computed_in_it(
    used: list[ModelConfig], refused: list[ModelConfig]
) -> None:
    rule = FrameworkRule(enforced=True)
    for network in used:
        rule.check(network)
        rule.record(network)
    for network in (TORCH, TENSORFLOW, ONNX, ONNX_ON_GPU):
        if network in refused:
            with pytest.raises(
                FrameworkConflictError, match=rf"^model_config\.runtime: {network.runtime} "
            ) as error:
                rule.check(network)
            assert error.value.code is ErrorCode.FRAMEWORK_CONFLICT
        else:
            rule.check(network)


def test_a_process_without_a_supervisor_accepts_every_framework() -> None:
    rule = FrameworkRule()
    for network in (TORCH, TENSORFLOW, ONNX_ON_GPU):
        rule.check(network)
        rule.record(network)


def test_a_network_that_has_not_computed_does_not_set_the_framework() -> None:
    rule = FrameworkRule(enforced=True)
    rule.check(TORCH)
    rule.check(TENSORFLOW)


def test_a_framework_conflict_has_its_own_exit_code() -> None:
    assert ExitStatus.from_error(FrameworkConflictError("another")) == ExitStatus(EXIT_RESTART)


# ---------------------------------------------------------------------------------- triton


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has imported neither TensorFlow nor triton."""
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))  # restored after the test
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    return monkeypatch


def write_triton(folder: Path, source: str, modules: pytest.MonkeyPatch) -> None:
    (folder / "triton.py").write_text(source)
    modules.syspath_prepend(folder)


def test_triton_is_imported_before_tensorflow_if_it_is_installed(
    modules: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_triton(tmp_path, "import warnings\nwarnings.warn('old')\nIS_FAKE = True\n", modules)
    triton_import.import_triton_before_tensorflow()
    assert sys.modules["triton"].IS_FAKE
    triton_import.hide_triton_after_tensorflow()
    assert sys.modules["triton"].IS_FAKE
    assert not triton_import.is_triton_hidden()


def test_an_error_while_importing_triton_is_ignored(
    modules: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_triton(tmp_path, "raise RuntimeError('no driver')\n", modules)
    triton_import.import_triton_before_tensorflow()
    assert "triton" not in sys.modules


def test_triton_cannot_be_imported_after_tensorflow(
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


def test_compiling_for_a_gpu_without_triton_is_an_error_of_one_line(
    modules: pytest.MonkeyPatch,
) -> None:
    modules.setattr(torch.cuda, "is_available", lambda: True)
    modules.setattr(
        torch_runtime, "LOADERS", {"class": lambda model: LoadedNetwork(torch.nn.ReLU())}
    )
    modules.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    compiled = model("torch", device="cuda", compile=True)
    with pytest.raises(ModelError, match=r"^model_config\.compile: .*triton") as error:
        torch_runtime.load(compiled, Steps(), None, ItemShapes.of(compiled))
    assert error.value.code is ErrorCode.MODEL_UNUSABLE
    assert "\n" not in str(error.value)
