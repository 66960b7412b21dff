"""torch's exporters: a module to an ONNX or .pt2 file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from chunkq.errors import ModelError
from chunkq_worker.runtimes.torch_files import reason
from chunkq_worker.runtimes.triton_import import hide_triton_after_tensorflow

NEEDED = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}
"""What writing and trying a file of each ending takes besides torch."""
INPUT, OUTPUT = "input", "output"
ONNX_LIMIT = 2_000_000_000
"""Bytes that one file can hold, as its format (protobuf) ends at 2 GiB."""


def require(suffix: str) -> None:
    """Raise ModelError unless everything is installed that a file of this ending takes."""
    missing = [name for name in NEEDED[suffix] if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"writing {suffix} takes {', '.join(missing)}; pip install 'chunkq[export]'"
        )


def write(module: Any, example: torch.Tensor, file: Path, *, any_batch: bool) -> None:
    """Write a module in inference mode, fed with a batch like `example`, to a .onnx or .pt2 file.

    With `any_batch` the file takes batches of any size; give an example of two items or more.
    Raises ModelError in one line where the module does not allow that.
    """
    hide_triton_after_tensorflow()  # torch.export imports it
    scripted = isinstance(module, torch.jit.ScriptModule)
    if file.suffix == ".onnx":
        _refuse_large(module)
    try:
        with _quietly():
            if scripted and file.suffix == ".onnx":
                _write_scripted(module, example, file, any_batch)
                return
            program = _program(_eager(module, example) if scripted else module, example, any_batch)
            if file.suffix == ".pt2":
                torch.export.save(program, file)
            else:
                torch.onnx.export(
                    program,
                    (),
                    file,
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                )
    except ModelError:
        raise
    except Exception as error:
        what = " for batches of any size" if any_batch else ""
        raise ModelError(f"the network cannot be exported{what}: {_why(error)}") from error


def _program(module: Any, example: torch.Tensor, any_batch: bool) -> Any:
    axes = ({0: torch.export.Dim("batch", min=1)},) if any_batch else None
    return torch.export.export(module, (example,), dynamic_shapes=axes)


def _eager(module: Any, example: torch.Tensor) -> Any:
    """Return a TorchScript module as one of plain operators, which torch.export takes."""
    try:
        from torch._export.converter import TS2EPConverter

        return TS2EPConverter(module, (example,)).convert().module()
    except Exception as error:
        raise ModelError(
            f"torch {torch.__version__} cannot turn this TorchScript into a torch.export program "
            f"({reason(error)}); write .onnx instead, or export the class it was made from"
        ) from error


def _write_scripted(module: Any, example: torch.Tensor, file: Path, any_batch: bool) -> None:
    """Write TorchScript as ONNX by the older exporter; the newer refuses it."""
    names = (INPUT, OUTPUT) if any_batch else ()
    torch.onnx.export(
        module,
        (example.clone(),),
        file,
        dynamo=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_axes={name: {0: "batch"} for name in names},
    )


def _refuse_large(module: Any) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > ONNX_LIMIT:
        raise ModelError(
            f"the network's weights are {size / 1e9:.1f} GB, and one ONNX file holds 2; write .pt2"
        )


def _why(error: Exception) -> str:
    text = str(error)
    if "specialized" in text and "dynamic" in text:
        return "its code fixes the number of items in a batch"
    if "data-dependent" in text:
        return (
            "its code decides by the values of a batch; use torch.where, or torch.jit.script it "
            "and export that to .onnx"
        )
    return f"{type(error).__name__}: {reason(error)}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporters from printing graphs and advice; what goes wrong is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.disable(before)
