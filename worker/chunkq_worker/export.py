"""A torch job's network as an ONNX or torch.export file, held against the network itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from chunkq.errors import JobError, ModelError
from chunkq.job import Job, ModelConfig, load_job
from chunkq_worker import export_torch
from chunkq_worker.export_compare import Network, difference
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.runtimes.torch_files import reason
from chunkq_worker.steps import Steps

TOLERANCE = 1e-4
"""Largest difference that is let through, as a share of the range of a batch's outputs."""
ROUNDINGS = 4
"""As many of the dtype's own steps are let through anyway; in 16 bits that is more."""
RUNTIMES = {".onnx": ("onnx", "file"), ".pt2": ("torch", "exported")}
"""Ending -> runtime and type of the job that uses the file."""
MAX_BATCH_TESTED = 8
"""Items in the largest batch that a file for any size is tried with."""
LEFT_OUT = ("autocast", "compile", "channels_last", "cuda_graph")
OLD_FILES = frozenset(ModelConfig.model_fields) & {
    *("class_file", "class_name", "kwargs_file", "checkpoint"),
    *("ts_file", "json_file", "model_file", "trusted"),
}
Batch = int | Literal["dynamic"] | None
"""Items in every batch, any number, or any number where the network allows it."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how far it is from the network.

    `batch` is None where the file takes batches of any size. Of all outputs in batches of the
    sizes `tried`, `difference` is the largest; `relative` is the largest as a share of the range
    of its batch's outputs, which may be `allowed`. `model_config` is what the job file says for
    the new file.
    """

    file: Path
    size: int
    batch: int | None
    tried: tuple[int, ...]
    difference: float
    relative: float
    allowed: float
    model_config: dict[str, Any]
    notes: tuple[str, ...]


def load_network_job(path: Path) -> Job:
    """Read a job of which only the network matters: it may lack input and output."""
    try:
        return load_job(path)
    except JobError as error:
        problems = error.problems
    lacks = [key for key in ("input", "output") if _lacks(key, problems)]
    rest = [line for line in problems if not any(_lacks(key, [line]) for key in lacks)]
    if rest:
        raise JobError(rest)
    job = load_job(path, **dict.fromkeys(lacks, "/not-needed"))
    if "input" in lacks and job.model.join_dim is not None:
        raise JobError("input: missing; with join_dim, the number of inputs shapes the network")
    return job


def _lacks(key: str, problems: Sequence[str]) -> bool:
    return any(line.startswith(f"{key}: missing") for line in problems)


def export_network(
    job: Job, file: Path, batch: Batch = None, *, overwrite: bool = False
) -> Exported:
    """Write a job's network to a .onnx or .pt2 file, if the file computes the same.

    Raises JobError where it cannot be asked for, ModelError where the network does not allow it
    or the file's results differ; then nothing is written.
    """
    _refuse(job.model, file, overwrite=overwrite)
    export_torch.require(file.suffix)
    network = Network(job)
    notes = _notes(job.model, network.steps, file)
    choices = [batch if isinstance(batch, int) else None]
    if batch is None:
        choices.append(job.model.max_batch_size)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        partial = Path(folder) / file.name
        while True:
            size = choices.pop(0)
            try:
                measured = _write(network, partial, size)
                break
            except ModelError as error:
                line = str(error).replace(str(partial), str(file))
                if not choices:
                    hint = "; --batch N fixes their size" if batch == "dynamic" else ""
                    raise ModelError(line + hint) from error
                notes.append(f"batches are fixed at {choices[0]}: {line}")
        _publish(partial, file, overwrite=overwrite)
    tried, difference, relative, allowed = measured
    return Exported(
        file=file,
        size=file.stat().st_size,
        batch=size,
        tried=tried,
        difference=difference,
        relative=relative,
        allowed=allowed,
        model_config=_model_config(job.model, file, size),
        notes=tuple(notes),
    )


def _write(
    network: Network, file: Path, size: int | None
) -> tuple[tuple[int, ...], float, float, float]:
    """Write the file for batches of one size or of any; return `tried` to `allowed`."""
    sizes = (size,) * 3 if size else _sizes(network.model.max_batch_size)
    batches = [network.batch(n) for n in sizes]
    expected = [network(batch) for batch in batches]  # before an exporter touches the network
    export_torch.write(network.module, batches[0], file, any_batch=size is None)
    model = _check_file(network.model, batches[0], file, size)
    runtime = load_runtime(model, Steps(), None)
    found = []
    for batch in batches:
        wide = batch.float() if batch.dtype == torch.bfloat16 else batch  # NumPy has no such type
        try:
            found.append(np.asarray(runtime(wide.numpy()), dtype=np.float64))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{file} cannot run a batch of {list(batch.shape)}: {reason(error)}"
            ) from error
    runtime.close()
    step = torch.finfo(batches[0].dtype).eps if batches[0].dtype.is_floating_point else 0.0
    allowed = max(TOLERANCE, ROUNDINGS * step)
    return sizes, *difference(file, expected, found, allowed), allowed


def _sizes(most: int) -> tuple[int, ...]:
    """Return sizes to try, two first: an example of one item would count as never more."""
    return tuple(dict.fromkeys((2, 1, 3, min(most, MAX_BATCH_TESTED))))


def _check_file(
    model: ModelConfig, batch: torch.Tensor, file: Path, size: int | None
) -> ModelConfig:
    """Return what a job would say of the file alone, without steps around it."""
    runtime, kind = RUNTIMES[file.suffix]
    return ModelConfig(
        runtime=runtime,  # type: ignore[arg-type]
        type=kind,  # type: ignore[arg-type]
        model_file=str(file),
        model_input_shape=tuple(batch.shape[1:]),
        dtype=str(batch.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        max_batch_size=size or model.max_batch_size,
    )


def _refuse(model: ModelConfig, file: Path, *, overwrite: bool) -> None:
    """Raise JobError for what can be told without loading the network."""
    if model.runtime != "torch":
        raise JobError(f"model_config.runtime: {model.runtime}; only torch networks are exported")
    if file.suffix not in RUNTIMES:
        raise JobError(f"-o: {file} ends in neither .onnx nor .pt2")
    if file.suffix == ".pt2" and model.type == "exported":
        raise JobError(f"model_config.type: exported; {model.model_file} is a .pt2 file already")
    if file.suffix == ".onnx" and model.dtype == "bfloat16":
        raise JobError("model_config.dtype: bfloat16, which runtime onnx lacks; set dtype: float32")
    if not file.parent.is_dir():
        raise JobError(f"-o: no folder {file.parent}")
    if file.exists() and not overwrite:
        raise JobError(f"-o: {file} is there already; --overwrite replaces it")


def _publish(partial: Path, file: Path, *, overwrite: bool) -> None:
    """Let the file appear whole, and never in the place of another unasked."""
    if overwrite:
        os.replace(partial, file)
        return
    try:
        os.link(partial, file)
    except FileExistsError:
        raise JobError(f"-o: {file} is there already; --overwrite replaces it") from None
    except OSError:  # a file system without links
        if file.exists():
            raise JobError(f"-o: {file} is there already; --overwrite replaces it") from None
        os.replace(partial, file)


def _model_config(model: ModelConfig, file: Path, batch: int | None) -> dict[str, Any]:
    """Return the job's `model_config` for the new file, the job's other keys kept."""
    runtime, kind = RUNTIMES[file.suffix]
    values = {"runtime": runtime, "type": kind, "model_file": str(file)}
    for key, value in model.model_dump(mode="json", exclude_none=True).items():
        if key not in {*values, *OLD_FILES, *LEFT_OUT}:
            values[key] = value
    return values if batch is None else {**values, "max_batch_size": batch}


def _notes(model: ModelConfig, steps: Steps, file: Path) -> list[str]:
    notes = [f"{key} is left out" for key in LEFT_OUT if getattr(model, key)]
    if model.type == "class" and model.checkpoint is None:
        notes.append(
            "the job names no checkpoint: these are the weights that the class starts with"
        )
    protected = (steps.preprocessing_protected, steps.postprocessing_protected)
    if file.suffix == ".onnx" and any(step is not None for step in protected):
        notes.append(
            f"{model.processing_steps}: on device cpu, runtime onnx gives protected steps NumPy "
            "arrays, not tensors"
        )
    return notes
