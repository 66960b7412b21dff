"""`chunkq plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from chunkq.errors import ModelError
from chunkq.executors.base import DEPTH_ON_CPU, DEPTH_ON_GPU, default_depth
from chunkq.footprint import footprint
from chunkq.job import load_job
from chunkq.plan import Costs, Plan
from chunkq_producer import submit
from chunkq_producer.cluster import is_cpu_only
from chunkq_producer.commands.options import input_option, job_argument, json_option, output_option
from chunkq_producer.finalizer_memory import measure_finalizer_memory
from chunkq_producer.job_status import duration
from chunkq_producer.model_check import ModelCheck, check_model, warnings

MUCH_TO_FINALIZE = 0.9
"""Share of the output written by finalizing from which the plan warns."""


@click.command()
@job_argument
@input_option
@output_option
@click.option(
    "--check-model",
    "with_model_check",
    is_flag=True,
    help="Try the network on real patches, and the memory with real chunks.",
)
@click.option(
    "--depth", type=click.IntRange(1),
    help=f"Chunks in flight per process; default {DEPTH_ON_GPU} on a GPU, else {DEPTH_ON_CPU}.",
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
    """Check JOB and say what it will cost; nothing is written."""
    prepared = submit.prepare(load_job(job, input=input_, output=output))
    tried = None
    if depth is None:
        depth = default_depth(gpu=not is_cpu_only(prepared.record.job))
    if with_model_check:
        tried = check_model(prepared.record, depth=depth)
        if tried.error is not None:
            raise ModelError(tried.error)
        tried.finalizer_bytes = None
        if prepared.plan.costs.finalized_blocks:
            tried.finalizer_bytes = measure_finalizer_memory(prepared.record)
    if as_json:
        click.echo(json.dumps(_values(prepared.plan, depth, tried), indent=1))
    else:
        for label, value in _rows(prepared.plan, depth, tried):
            click.echo(f"{label:<20}{value}")


def _values(plan: Plan, depth: int, tried: ModelCheck | None) -> dict[str, Any]:
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
        "depth": depth,
        "array_bytes": footprint(plan).peak_bytes(depth),
    }
    if tried is not None:
        values["model_check"] = {**vars(tried), "warnings": warnings(tried)}
    return values


def _rows(plan: Plan, depth: int, tried: ModelCheck | None) -> list[tuple[str, str]]:
    costs = plan.costs
    per_voxel = costs.patches * _volume(plan.output_patch) / _volume(plan.volume.shape)
    share = costs.finalized_voxels / _volume(plan.volume.shape)
    rows = [
        ("input", f"{_shape(plan.volume.shape)} {plan.volume.dtype}"),
        (
            "output",
            f"{_shape(plan.output_shape)} {plan.output_dtype}, "
            f"storage chunks {_shape(plan.storage_chunks)}",
        ),
        ("chunks", f"{costs.chunks} ({_shape(plan.blocks)}) of {_shape(plan.chunksize)}"),
        ("patches", f"{costs.patches}, each computed once; {per_voxel:.1f} per voxel on average"),
        ("to finalize", f"{costs.finalized_blocks} blocks, {share:.0%} of the voxels"),
        ("read", f"{size(costs.input_bytes)} of input"),
        ("write", f"{size(costs.output_bytes)} of output"),
        ("pieces", f"{size(costs.piece_bytes)} written, read once and deleted"),
        (
            "memory",
            f"arrays alone: at most {size(footprint(plan).peak_bytes(depth))} in a worker process "
            f"with {depth} chunks in flight; libraries and network come on top"
            + ("" if tried else " (--check-model measures all)"),
        ),
    ]
    if tried is not None:
        rows += _tried_rows(costs, tried)
    if share > MUCH_TO_FINALIZE:
        rows.append(
            (
                "note",
                "nearly all of it goes through pieces; larger chunks or smaller storage_chunks "
                "lower that",
            )
        )
    return rows


def _tried_rows(costs: Costs, tried: ModelCheck) -> list[tuple[str, str]]:
    each = tried.batch_seconds / tried.batch
    rows = [
        ("network", f"on {tried.device}, loaded in {tried.load_seconds:.3g} s; its shapes fit"),
        ("one patch", f"{each:.3g} s, in batches of {tried.batch}"),
        (
            "network alone",
            f"{duration(max(1, costs.patches * each))} for all patches on one such device",
        ),
        ("peak memory", peak_memory(tried, finalizes=costs.finalized_blocks > 0)),
        ("output range", f"{tried.lowest:.4g} to {tried.highest:.4g}, before any activation"),
    ]
    return rows + [("warning", line) for line in warnings(tried)]


def peak_memory(tried: ModelCheck, *, finalizes: bool) -> str:
    """Return what a worker and the finalizer need, each with all that is in the process."""
    if tried.worker_bytes is None:
        found = [f"of a worker: unknown, chunks could not be tried ({tried.memory_error})"]
    else:
        found = [
            f"{size(tried.worker_bytes)} in all of a worker process with {tried.depth} chunks in "
            f"flight ({size(tried.loaded_bytes)} of it libraries and network), "
            f"tried on {tried.chunks} chunks"
        ]
    if tried.finalizer_bytes is not None:
        found.append(f"{size(tried.finalizer_bytes)} in all of one that finalizes blocks")
    elif finalizes:
        found.append("of finalizing: unknown, blocks could not be tried")
    if tried.device_bytes is not None:
        found.append(f"{size(tried.device_bytes)} on the device")
    return "; ".join(found)


def _volume(shape: tuple[int, ...]) -> float:
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
