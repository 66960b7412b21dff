"""`chunkq plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from chunkq.errors import ModelError
from chunkq.executors.base import DEFAULT_DEPTH_CPU, DEFAULT_DEPTH_GPU, default_depth
from chunkq.footprint import footprint
from chunkq.job import load_job
from chunkq.plan import Costs, Plan
from chunkq.tasks import chunk_count
from chunkq_producer import submit
from chunkq_producer.cluster import is_cpu_only
from chunkq_producer.commands.options import input_option, job_argument, json_option, output_option
from chunkq_producer.finalizer_memory import measure_finalizer_memory
from chunkq_producer.job_status import duration
from chunkq_producer.model_check import ModelCheck, check_model, warnings

MAX_SHARE_TO_FINALIZE = 0.9
"""Share of the voxels to finalize above which the plan recommends larger chunks."""


@click.command()
@job_argument
@input_option
@output_option
@click.option(
    "--check-model",
    "with_model_check",
    is_flag=True,
    help="Load the network, run it on a few patches and chunks, and measure time and memory.",
)
@click.option(
    "--depth", type=click.IntRange(1),
    help="Chunks per process that are read, computed or written at the same time "
    f"(default: {DEFAULT_DEPTH_GPU} on a GPU, else {DEFAULT_DEPTH_CPU}).",
)  # fmt: skip
@json_option
def plan(
    job: Path,
    input_: str | None,
    output: str | None,
    with_model_check: bool,
    depth: int | None,
    as_json: bool,
) -> None:
    """Check JOB, a YAML or JSON job file, and print its cost. Nothing is written.

    Without --check-model the network is not loaded.
    """
    prepared = submit.prepare(load_job(job, input=input_, output=output))
    check = None
    if depth is None:
        depth = default_depth(gpu=not is_cpu_only(prepared.record.job))
    if with_model_check:
        check = check_model(prepared.record, depth=depth)
        if check.error is not None:
            raise ModelError(check.error)
        check.finalizer_bytes = None
        if prepared.plan.costs.finalized_blocks:
            check.finalizer_bytes = measure_finalizer_memory(prepared.record)
    if as_json:
        click.echo(json.dumps(_values(prepared.plan, depth, check), indent=1))
    else:
        for label, value in _rows(prepared.plan, depth, check):
            click.echo(f"{label:<20}{value}")


def _values(plan: Plan, depth: int, check: ModelCheck | None) -> dict[str, Any]:
    costs = plan.costs
    values: dict[str, Any] = {
        "volume": list(plan.volume.shape),
        "dtype": plan.volume.dtype,
        "output_shape": list(plan.output_shape),
        "output_dtype": str(plan.output_dtype),
        "chunksize": list(plan.chunksize),
        "storage_chunks": list(plan.storage_chunks),
        "blocks": list(plan.blocks),
        "chunks": costs.chunks,
        "blocks_to_finalize": costs.finalized_blocks,
        "patches": costs.patches,
        "recompute_factor": 1.0,
        "input_bytes": costs.input_bytes,
        "output_bytes": costs.output_bytes,
        "piece_bytes": costs.piece_bytes,
        "store_bytes": costs.store_bytes,
        "precision": plan.job.model.effective_precision,
        "depth": depth,
        "array_bytes": footprint(plan).peak_bytes(depth),
    }
    if check is not None:
        values["model_check"] = {**vars(check), "warnings": warnings(check)}
    return values


def _rows(plan: Plan, depth: int, check: ModelCheck | None) -> list[tuple[str, str]]:
    costs = plan.costs
    per_voxel = costs.patches * _voxels(plan.output_patch) / _voxels(plan.volume.shape)
    share = costs.finalized_voxels / _voxels(plan.volume.shape)
    rows = [
        ("input", f"{_shape(plan.volume.shape)} {plan.volume.dtype}"),
        (
            "output",
            f"{_shape(plan.output_shape)} {plan.output_dtype}, "
            f"storage chunks {_shape(plan.storage_chunks)}",
        ),
        ("chunks", f"{costs.chunks} ({_shape(plan.blocks)}) of {_shape(plan.chunksize)}"),
        ("precision", f"{plan.job.model.effective_precision}, on {plan.job.model.device}"),
        ("patches", f"{costs.patches}, each computed once; {per_voxel:.1f} per voxel on average"),
        (
            "to finalize",
            f"{costs.finalized_blocks} of {costs.chunks} blocks with overlaps, {share:.0%} of the "
            "voxels",
        ),
        ("read", f"{size(costs.input_bytes)} of input"),
        ("write", f"{size(costs.output_bytes)} of output"),
        ("pieces", f"{size(costs.piece_bytes)} of temporary files"),
        (
            "memory",
            f"at most {size(footprint(plan).peak_bytes(depth))} of arrays per worker process with "
            f"{depth} chunks in flight, plus libraries and network"
            + ("" if check else " (--check-model measures the total)"),
        ),
    ]
    if check is not None:
        rows += _model_check_rows(costs, check)
    if share > MAX_SHARE_TO_FINALIZE:
        rows.append(
            (
                "note",
                f"{share:.0%} of the voxels are finalized from temporary files; set a larger "
                "chunksize or smaller storage_chunks to reduce this",
            )
        )
    return rows


def _model_check_rows(costs: Costs, check: ModelCheck) -> list[tuple[str, str]]:
    seconds_per_patch = check.batch_seconds / check.batch
    rows = [
        ("network", f"on {check.device}, loaded in {check.load_seconds:.3g} s; shapes are valid"),
        ("one patch", f"{seconds_per_patch:.3g} s, in batches of {check.batch}"),
        (
            "network alone",
            f"{duration(max(1, costs.patches * seconds_per_patch))} for all patches on one device",
        ),
        ("peak memory", peak_memory(check, finalizes=costs.finalized_blocks > 0)),
        ("output range", f"{check.lowest:.4g} to {check.highest:.4g}, before any activation"),
    ]
    return rows + [("warning", line) for line in warnings(check)]


def peak_memory(check: ModelCheck, *, finalizes: bool) -> str:
    """Return the peak memory of a worker process, the finalizer and the device as text."""
    if check.worker_bytes is None:
        parts = [f"of a worker process: unknown, chunks could not be run ({check.memory_error})"]
    else:
        parts = [
            f"{size(check.worker_bytes)} in total per worker process with {check.depth} chunks in "
            f"flight ({size(check.loaded_bytes)} of it libraries and network), "
            f"measured on {chunk_count(check.chunks)}"
        ]
    if check.finalizer_bytes is not None:
        parts.append(f"{size(check.finalizer_bytes)} in total to finalize blocks")
    elif finalizes:
        parts.append("of finalizing: unknown, blocks could not be completed")
    if check.device_bytes is not None:
        parts.append(f"{size(check.device_bytes)} on the device")
    return "; ".join(parts)


def _voxels(shape: tuple[int, ...]) -> float:
    voxels = 1.0
    for length in shape:
        voxels *= length
    return voxels


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def size(number: float) -> str:
    """Return bytes as `3.2 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"
