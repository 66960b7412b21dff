"""Write a torch module to an ONNX or .pt2 file with torch's exporters."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from chunkq.errors import ErrorCode, ModelError
from chunkq.install_hint import install_command
from chunkq.plan.outputs import HeadName
from chunkq.units import si
from chunkq_worker.runtimes.returned_values import HeadReader
from chunkq_worker.runtimes.torch_reading import reason
from chunkq_worker.runtimes.triton_import import hide_triton_after_tensorflow

REQUIRED_PACKAGES = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}
"""File suffix -> packages besides torch that are needed to write and test the file."""
INPUT, OUTPUT = "input", "output"
ONNX_LIMIT = 2_000_000_000
"""Largest size in bytes of one ONNX file; protobuf files are limited to 2 GiB."""


def check_packages(suffix: str) -> None:
    """Raise ModelError if a package that files with this suffix need is missing."""
    missing = [name for name in REQUIRED_PACKAGES[suffix] if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"-o: {suffix} files need missing packages: {', '.join(missing)}; run "
            f"`{install_command('export')}`",
            code=ErrorCode.PACKAGE_MISSING,
        )


def write_file(
    module: Any,
    example: torch.Tensor,
    file: Path,
    heads: Sequence[HeadName] = (None,),
    *,
    any_batch: bool,
) -> None:
    """Write a module in inference mode to a .onnx or .pt2 file; its input is like `example`.

    The file returns the `heads`, by the same names or numbers. With `any_batch` it takes batches of
    any size, and `example` needs two items or more. Raise ModelError in one line if the module
    cannot be exported.
    """
    hide_triton_after_tensorflow()  # torch.export imports triton
    scripted = isinstance(module, torch.jit.ScriptModule)
    if file.suffix == ".onnx":
        _check_size(module)
    try:
        with _suppress_output():
            if scripted and file.suffix == ".onnx":
                _check_one_array(heads)
                _write_scripted(module, example, file, any_batch)
                return
            eager = _eager(module, example) if scripted else module
            written = written_heads(heads)
            if written != (None,):
                eager = Heads(eager, written)
            program = _program(eager, example, any_batch)
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
                    input_names=[INPUT if INPUT not in written else f"{INPUT} of the network"],
                    output_names=[OUTPUT if head is None else str(head) for head in written],
                )
    except ModelError:
        raise
    except Exception as error:
        batches = " for batches of any size" if any_batch else ""
        raise ModelError(f"the network cannot be exported{batches}: {_explain(error)}") from error


def written_heads(heads: Sequence[HeadName]) -> tuple[HeadName, ...]:
    """Return the heads of a file in which `heads` keep their names, or their numbers.

    Numbers are positions, so all before the largest one are written too. Raise ModelError if there
    are names and numbers.
    """
    numbers = [head for head in heads if isinstance(head, int)]
    if numbers and len(numbers) < len(heads):
        raise ModelError(
            "the outputs name heads by name and by number, which a file cannot keep; use names only"
        )
    return tuple(range(max(numbers) + 1)) if numbers else tuple(heads)


def _check_one_array(heads: Sequence[HeadName]) -> None:
    if tuple(heads) != (None,):
        raise ModelError(
            "a TorchScript file with several heads cannot be written as .onnx; write .pt2, or "
            "export the class that it was made from"
        )


class Heads(torch.nn.Module):
    """A module that returns heads of another one: a dict of names, or a tuple of numbers."""

    def __init__(self, module: Any, heads: Sequence[HeadName]) -> None:
        super().__init__()
        self.module, self._heads = module, tuple(heads)
        self.train(module.training)

    def forward(self, batch: torch.Tensor) -> Any:
        """Return the heads of a batch."""
        reader = HeadReader(self._heads, torch.is_tensor, "tensor", has_step=False)
        arrays = reader.arrays(self.module(batch))
        if isinstance(self._heads[0], int):
            return arrays
        return dict(zip(self._heads, arrays, strict=True))


def _program(module: Any, example: torch.Tensor, any_batch: bool) -> Any:
    axes = ({0: torch.export.Dim("batch", min=1)},) if any_batch else None
    return torch.export.export(module, (example,), dynamic_shapes=axes)


def _eager(module: Any, example: torch.Tensor) -> Any:
    """Convert a TorchScript module to plain operators, which torch.export supports."""
    try:
        from torch._export.converter import TS2EPConverter

        return TS2EPConverter(module, (example,)).convert().module()
    except Exception as error:
        raise ModelError(
            f"torch {torch.__version__} cannot convert this TorchScript to a torch.export program "
            f"({reason(error)}); write .onnx instead, or export the class that it was made from"
        ) from error


def _write_scripted(module: Any, example: torch.Tensor, file: Path, any_batch: bool) -> None:
    """Write TorchScript as ONNX with the older exporter; the newer one does not support it."""
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


def _check_size(module: Any) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > ONNX_LIMIT:
        raise ModelError(
            f"the network's weights have {si(size, 'B')}, an ONNX file at most 2 GB; write .pt2"
        )


def _explain(error: Exception) -> str:
    text = str(error)
    if "specialized" in text and "dynamic" in text:
        return "its code fixes the number of items in a batch"
    if "data-dependent" in text:
        return (
            "its code branches on the values of a batch; use torch.where, or export the result of "
            "torch.jit.script as .onnx"
        )
    return f"{type(error).__name__}: {reason(error)}"


@contextlib.contextmanager
def _suppress_output() -> Iterator[None]:
    """Suppress the graphs and advice that the exporters print; errors are raised."""
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
