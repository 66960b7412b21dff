"""Export the network of a torch job as ONNX or .pt2, and compare the file with the network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from chunkq.errors import ErrorCode, JobError, ModelError
from chunkq.job.job_file import Job
from chunkq.job.job_reading import load_job
from chunkq.job.model_config import HALF_PRECISIONS, ModelConfig
from chunkq_worker.export import torch as export_torch
from chunkq_worker.export.compare import Network, difference
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.torch_reading import reason
from chunkq_worker.steps import Steps

TOLERANCE = 1e-4
"""Allowed difference as a fraction of the range of a batch's outputs."""
ROUNDINGS = 4
"""Allowed difference in machine epsilons of the dtype; for 16 bits it exceeds TOLERANCE."""
RUNTIMES = {".onnx": ("onnx", "file"), ".pt2": ("torch", "exported")}
"""File suffix -> runtime and type of a job that uses the file."""
MAX_BATCH_TESTED = 8
"""Items in the largest batch that a file with a dynamic batch size is tested with."""
UNSUPPORTED_KEYS = ("compile", "channels_last", "cuda_graph")
"""Keys of `model_config` that do not apply to the file."""
REPLACED_KEYS = frozenset(ModelConfig.model_fields) & {
    *("class_file", "class_name", "kwargs_file", "checkpoint"),
    *("ts_file", "json_file", "model_file", "trusted"),
}
BatchSize = int | Literal["dynamic"] | None
"""Items in every batch; "dynamic": any number; None: any number if the network supports it."""


@dataclass(frozen=True)
class Exported:
    """A written file and its difference from the network.

    `size` is in bytes. `batch` is None if the file takes batches of any size. `difference` is the
    largest absolute difference of an output over batches of `batch_sizes` items; `relative` is the
    largest difference divided by the range of its batch's outputs, and at most `allowed`.
    `model_config` is that of a job that uses the file.
    """

    file: Path
    size: int
    batch: int | None
    batch_sizes: tuple[int, ...]
    difference: float
    relative: float
    allowed: float
    model_config: dict[str, Any]
    notes: tuple[str, ...]


def load_network_job(path: Path) -> Job:
    """Read a job of which only `model_config` is used: `input` and `output` may be missing.

    Raise JobError with one line per mistake.
    """
    try:
        return load_job(path)
    except JobError as error:
        problems = error.problems
    missing = [key for key in ("input", "output") if _is_missing(key, problems)]
    others = [line for line in problems if not any(_is_missing(key, [line]) for key in missing)]
    if others:
        raise JobError(others)
    job = load_job(path, **dict.fromkeys(missing, "/not-needed"))
    if "input" in missing and job.model.join_dim is not None:
        raise JobError("input: missing; list the inputs, join_dim makes each of them a channel")
    return job


def _is_missing(key: str, problems: Sequence[str]) -> bool:
    return any(line.startswith(f"{key}: missing") for line in problems)


def export_network(
    job: Job, file: Path, batch: BatchSize = None, *, overwrite: bool = False
) -> Exported:
    """Write a job's network to a .onnx or .pt2 file that computes the same.

    Raise JobError if the job or the path cannot be used, and ModelError if the network cannot be
    exported or the results of the file differ. Then nothing is written.
    """
    _check_request(job.model, file, overwrite=overwrite)
    export_torch.check_packages(file.suffix)
    network = Network(job)
    notes = export_notes(job, network.steps, file)
    choices = [batch if isinstance(batch, int) else None]
    if batch is None:
        choices.append(job.model.max_batch_size)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        partial = Path(folder) / file.name
        while True:
            size = choices.pop(0)
            try:
                comparison = _write(network, partial, size)
                break
            except ModelError as error:
                line = str(error).replace(str(partial), str(file))
                if not choices:
                    hint = "; use --batch N for a fixed size" if batch == "dynamic" else ""
                    raise ModelError(line + hint, code=error.code) from error
                notes.append(f"the batch size is fixed at {choices[0]}: {line}")
        _publish(partial, file, overwrite=overwrite)
    batch_sizes, difference, relative, allowed = comparison
    return Exported(
        file=file,
        size=file.stat().st_size,
        batch=size,
        batch_sizes=batch_sizes,
        difference=difference,
        relative=relative,
        allowed=allowed,
        model_config=_model_config(job.model, file, size),
        notes=tuple(notes),
    )


def _write(
    network: Network, file: Path, size: int | None
) -> tuple[tuple[int, ...], float, float, float]:
    """Write the file for batches of `size` items (None: of any size) and compare its outputs.

    Return `batch_sizes`, `difference`, `relative` and `allowed`, see `Exported`.
    """
    sizes = (size,) * 3 if size else _sizes(network.model.max_batch_size)
    batches = [network.batch(n) for n in sizes]
    expected = [network(batch) for batch in batches]  # before an exporter touches the network
    heads = network.heads
    export_torch.write_file(network.module, batches[0], file, heads, any_batch=size is None)
    model = _check_file(network.model, batches[0], file, size)
    shapes = ItemShapes.of(model, heads=heads, are_known=False)
    runtime = load_runtime(model, Steps().for_heads(heads), None, shapes)
    outputs = []
    for batch in batches:
        host_batch = (
            batch.float() if batch.dtype == torch.bfloat16 else batch
        )  # NumPy has no such type
        try:
            returned = runtime(host_batch.numpy())
            outputs.append(tuple(np.asarray(output, dtype=np.float64) for output in returned))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{file} cannot run a batch of {list(batch.shape)}: {reason(error)}"
            ) from error
    runtime.close()
    step = torch.finfo(batches[0].dtype).eps if batches[0].dtype.is_floating_point else 0.0
    allowed = max(TOLERANCE, ROUNDINGS * step)
    return sizes, *difference(file, heads, expected, outputs, allowed), allowed


def _sizes(max_batch_size: int) -> tuple[int, ...]:
    """Return batch sizes to test, 2 first: torch.export takes a batch of 1 item as fixed."""
    return tuple(dict.fromkeys((2, 1, 3, min(max_batch_size, MAX_BATCH_TESTED))))


def _check_file(
    model: ModelConfig, batch: torch.Tensor, file: Path, size: int | None
) -> ModelConfig:
    """Return the `model_config` of the file without processing steps."""
    runtime, kind = RUNTIMES[file.suffix]
    return ModelConfig(
        runtime=runtime,  # type: ignore[arg-type]
        type=kind,  # type: ignore[arg-type]
        model_file=str(file),
        model_input_shape=tuple(batch.shape[1:]),
        dtype=str(batch.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        max_batch_size=size or model.max_batch_size,
    )


def _check_request(model: ModelConfig, file: Path, *, overwrite: bool) -> None:
    """Raise JobError for mistakes that are detectable without loading the network."""
    if model.runtime != "torch":
        raise JobError(
            f"model_config.runtime: unsupported value {model.runtime}; only torch can be exported"
        )
    if file.suffix not in RUNTIMES:
        raise JobError(f"-o: {file} has suffix {file.suffix!r}, expected .onnx or .pt2")
    if file.suffix == ".pt2" and model.type == "exported":
        raise JobError(
            f"model_config.type: exported; {model.model_file} is a .pt2 file already; use it, or "
            "write .onnx"
        )
    if file.suffix == ".onnx" and model.dtype == "bfloat16":
        raise JobError(
            "model_config.dtype: bfloat16 is unsupported by runtime onnx; set dtype: float32"
        )
    if not file.parent.is_dir():
        raise JobError(f"-o: the folder {file.parent} is missing; create it")
    if file.exists() and not overwrite:
        raise _exists(file)


def _exists(file: Path) -> JobError:
    return JobError(
        f"-o: {file} exists already; use --overwrite to replace it", code=ErrorCode.OUTPUT_EXISTS
    )


def _publish(partial: Path, file: Path, *, overwrite: bool) -> None:
    """Move a complete file to its path; raise JobError if a file exists there.

    With `overwrite`, replace that file. The file appears atomically.
    """
    if overwrite:
        os.replace(partial, file)
        return
    try:
        os.link(partial, file)
    except FileExistsError:
        raise _exists(file) from None
    except OSError:  # a file system without links
        if file.exists():
            raise _exists(file) from None
        os.replace(partial, file)


def _model_config(model: ModelConfig, file: Path, batch: int | None) -> dict[str, Any]:
    """Return the job's `model_config` with the keys of the network's files replaced."""
    runtime, kind = RUNTIMES[file.suffix]
    values = {"runtime": runtime, "type": kind, "model_file": str(file)}
    omitted = {*values, *REPLACED_KEYS, *UNSUPPORTED_KEYS, *_omitted_keys(model)}
    if not model.stochastic:
        omitted.add("stochastic")
    for key, value in model.model_dump(mode="json", exclude_none=True).items():
        if key not in omitted:
            values[key] = value
    return values if batch is None else {**values, "max_batch_size": batch}


def _omitted_keys(model: ModelConfig) -> list[str]:
    """Return the keys that the job sets and that a job with the file does not have."""
    uses_autocast = model.precision in HALF_PRECISIONS
    keys = [key for key in UNSUPPORTED_KEYS if getattr(model, key)]
    return ["precision", *keys] if uses_autocast else keys


def export_notes(job: Job, steps: Steps, file: Path) -> list[str]:
    """Return a line for each property of a job's network that its file does not have."""
    model = job.model
    notes = [f"{key} is omitted" for key in _omitted_keys(model)]
    if model.type == "class" and model.checkpoint is None:
        notes.append("the job names no checkpoint: the file has the initial weights of the class")
    if job.is_image and job.image_spec.size is None:
        shape = list(model.model_input_shape)
        notes.append(f"the file takes images of shape {shape} only; others have no result")
    protected = (steps.preprocessing_protected, steps.postprocessing_protected)
    if file.suffix == ".onnx" and any(step is not None for step in protected):
        notes.append(
            f"{model.processing_steps}: on device cpu, runtime onnx calls protected steps with "
            "NumPy arrays, not tensors"
        )
    return notes
