"""The command `chunkq tune`."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from chunkq import __version__
from chunkq.errors import (
    ChunkqError,
    ErrorCode,
    InterruptedCommandError,
    JobError,
    ModelError,
    suggestion,
)
from chunkq.job.allowed_paths import ALLOW_VARIABLE
from chunkq.job.items import find_sources
from chunkq.job.job_file import Job
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_path import job_folder_of
from chunkq.job.job_reading import load_job
from chunkq.job.model_problems import precision_problems
from chunkq.job.record import JobRecord
from chunkq.job.user_code import load_blend_weights
from chunkq.paths import is_url, without_secret
from chunkq.queue.contract.executor import default_depth
from chunkq.system.available_memory import available_memory
from chunkq.system.cores import available_cores
from chunkq.system.gpus import VISIBLE
from chunkq.system.standard_output import print_line, print_text, reserve, result_stream
from chunkq.terminal import print_error
from chunkq.units import duration, si
from chunkq_worker.child_env import child_env
from chunkq_worker.commands.work import parse_duration
from chunkq_worker.devices import slots
from chunkq_worker.tune.file import UNEDITABLE, JobFile
from chunkq_worker.tune.options import SWITCHES, with_network_options
from chunkq_worker.tune.process import Trials
from chunkq_worker.tune.search import (
    Limits,
    Measurement,
    Options,
    Row,
    Search,
    SearchResult,
    Setting,
    Stage,
)
from chunkq_worker.tune.space import Changes, SearchSpace
from chunkq_worker.tune.table import (
    build_table,
    comment_lines,
    describe,
    legend_lines,
    row_as_dict,
)
from chunkq_worker.tune.turns import Turns

LOG_WIDTH = 120
TUNABLE = ("batch", "compile", "channels_last", "cuda_graph", "precision", "depth", "chunksize")
PRECISIONS = ("tf32", "bfloat16", "float16")
TARGET_TRIALS = 100
"""A trial measures for `--max-time` divided by this number, with the turns of the reference, ..."""
MIN_TRIAL_SECONDS, MAX_TRIAL_SECONDS = 0.2, 10.0
"""... but not less and not more than these seconds."""


@dataclass(frozen=True)
class TuneRequest:
    """The user's options: patch sizes and precisions to try, and settings not to change."""

    patches: tuple[tuple[int, ...], ...]
    precisions: tuple[str, ...]
    kept: frozenset[str]
    has_all_options: bool


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("-i", "--input", "input_", help="Volume to read instead of the job's input.")
@click.option("-o", "--output", help="Output of the job instead of the job file's.")
@click.option(
    "--max-time", "--seconds", "max_time", default="5m", show_default=True,
    help="Time to spend: seconds, or 90m, 2h, 1h30m.",
)  # fmt: skip
@click.option(
    "--memory", help="Memory limit of a worker, like 8GiB. Default: the free memory.",
)  # fmt: skip
@click.option("--device-memory", help="Memory limit on a GPU. Default: all of its memory.")
@click.option(
    "--patch-sizes",
    help="Also try these patch sizes, like 64,96 or 64x64x32,96x96x48; they can change accuracy.",
)
@click.option(
    "--precision",
    help="Precisions that may be chosen although they change results, comma-separated: "
    f"{', '.join(PRECISIONS)}.",
)
@click.option(
    "--all-options", is_flag=True,
    help="Try on a CPU all options of the network that are tried on a GPU.",
)  # fmt: skip
@click.option(
    "--keep", help=f"Settings not to change, comma-separated: {', '.join(TUNABLE)}.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the result without changing the job file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tune(
    job: Path,
    input_: str | None,
    output: str | None,
    max_time: str,
    memory: str | None,
    device_memory: str | None,
    patch_sizes: str | None,
    precision: str | None,
    all_options: bool,
    keep: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find the fastest settings for JOB on this machine, and write them into the job file.

    Measures batch sizes, options of the network, chunk sizes and depths on patches from the middle
    of the volume. Each setting runs in a separate process, in turns with the job's own settings,
    and its outputs are compared with those in float32. The table is added to the job file as a
    comment; the previous file is kept as a backup.
    """
    reserve()
    base_job = load_job(job, input=input_, output=output)
    if base_job.is_image:
        raise JobError(
            "inference_type: tune measures patches of volumes, found a job over images; set "
            "max_batch_size by the times of `chunkq plan --check-model`"
        )
    limits = _limits(base_job, max_time, memory, device_memory)
    request = TuneRequest(
        _parse_patch_sizes(patch_sizes),
        _parse_precisions(precision, base_job),
        _parse_keep(keep),
        all_options,
    )
    file = None if dry_run else JobFile.read(job)
    record = _record(base_job)
    space = SearchSpace(record)
    if file is not None:
        _check_editable(file, space)
        _check_not_started(job, record)
    with _interruptible(job):
        result, notes = _search(space, base_job, request, limits, quiet=as_json)
    best = _require_best(result, limits)
    changes = space.changes(best.setting)
    backup = None
    if file is not None:
        title = f"{time.strftime('%Y-%m-%d')}, chunkq {__version__}, {_machine(best.measurement)}"
        lines = [*comment_lines(result), *notes, *_summary_lines(result, changes)]
        backup = file.replace(file.changed(changes, title, lines))
    if as_json:
        values = {
            "table": [row_as_dict(row) for row in result.rows],
            "before": None if result.baseline is None else row_as_dict(result.baseline),
            "choice": row_as_dict(best),
            "notes": notes,
            "changes": {".".join(key): value for key, value in changes.items()},
            "written": None if backup is None else str(job),
            "backup": None if backup is None else str(backup),
        }
        print_line(json.dumps(values, indent=1))
        return
    console = Console(file=result_stream(), highlight=False)
    if not console.is_terminal:
        console = Console(file=result_stream(), highlight=False, width=LOG_WIDTH)
    console.print(build_table(result, console.width))
    for line in [*legend_lines(result), *notes, *_summary_lines(result, changes)]:
        print_text(line)
    if backup is None:
        print_text(f"{job} is unchanged (--dry-run)")
    else:
        note = " (without the table, JSON has no comments)" if job.suffix == ".json" else ""
        print_text(f"wrote {job}{note}; backup: {backup}")


def _limits(job: Job, max_time: str, memory: str | None, device_memory: str | None) -> Limits:
    seconds = parse_duration("--max-time", max_time)
    if seconds <= 0:
        raise JobError(f"--max-time: invalid value {max_time}; use a time above 0, like 5m")
    host = _parse_bytes("--memory", memory)
    if host is None:
        host = available_memory() // _workers(job)
    return Limits(host, _parse_bytes("--device-memory", device_memory), seconds)


def _workers(job: Job) -> int:
    """Return how many worker processes `chunkq work` starts on this machine."""
    return len(slots("all" if job.model.device == "cuda" else "none", 1))


def _parse_bytes(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise JobError(f"{option}: invalid size {text!r}; use a size like 8GiB, 500MB or bytes")
    return size


def _parse_patch_sizes(text: str | None) -> tuple[tuple[int, ...], ...]:
    try:
        sizes = tuple(
            tuple(int(n) for n in size.replace("×", "x").split("x"))
            for size in (text or "").split(",")
            if size.strip()
        )
    except ValueError:
        sizes = ((0,),)
    if any(n < 1 for lengths in sizes for n in lengths):
        raise JobError(f"--patch-sizes: invalid value {text!r}; use sizes like 64,96 or 64x64x32")
    return sizes


def _parse_names(option: str, text: str | None, allowed: Sequence[str]) -> list[str]:
    """Return the names of a comma-separated list; raise JobError for one that is not allowed."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in allowed:
            raise JobError(
                f"{option}: invalid value {name!r}; expected one of {', '.join(allowed)}"
                f"{suggestion(name, allowed)}"
            )
    return names


def _parse_precisions(text: str | None, job: Job) -> tuple[str, ...]:
    names = _parse_names("--precision", text, PRECISIONS)
    for name in names:
        model = job.model.model_copy(update={"precision": name, "dtype": "float32"})
        if problems := precision_problems(model):
            raise JobError(f"--precision: {problems[0].partition(': ')[2]}")
    return tuple(names)


def _parse_keep(text: str | None) -> frozenset[str]:
    return frozenset(_parse_names("--keep", text, TUNABLE))


def _record(job: Job) -> JobRecord:
    """Return the job's record; raise the errors that producing the job would raise."""
    record = JobRecord.create(job, find_sources(job))
    load_blend_weights(record.job.weight_function, record.plan())
    return record


def _check_editable(file: JobFile, space: SearchSpace) -> None:
    """Raise JobError if the tuned keys of the job file cannot be changed in place.

    Call this before anything is measured.
    """
    start = space.start(1)
    try:
        chunk = next((shape for shape in space.chunk_shapes if shape is not None), None)
        other = replace(start, batch=start.batch + 1, depth=1, chunk=chunk)
        # The job may not permit a switch, as a CPU does not permit cuda_graph: its key is enough.
        switches: Changes = {("model_config", key): not getattr(start, key) for key in SWITCHES}
        file.changed(space.changes(other) | switches, "", ())
    except ChunkqError as error:
        if error.code is not ErrorCode.JOB_FILE_UNEDITABLE:
            raise
        raise JobError(f"{file.path}: {UNEDITABLE}; use --dry-run", code=error.code) from None


def _check_not_started(path: Path, record: JobRecord) -> None:
    """Raise JobError if the job is produced and not finished; it needs the same settings."""
    folder = JobFolder(job_folder_of(record.job.output))
    existing = folder.read_record()
    is_sealed = existing is not None and folder.ledger(existing.epoch).is_sealed()
    if existing is None or existing.digest != record.digest or is_sealed:
        return
    raise JobError(
        f"{path}: its output {without_secret(record.job.output)} is not finished and cannot "
        "continue with other settings; finish the job, set another output with -o, or use "
        "--dry-run",
        code=ErrorCode.JOB_STARTED,
    )


@contextmanager
def _interruptible(job: Path) -> Iterator[None]:
    """Report a signal, and that the job file is unchanged."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedCommandError(f"tune: interrupted; {job} is unchanged") from None


def _search(
    space: SearchSpace, job: Job, request: TuneRequest, limits: Limits, *, quiet: bool
) -> tuple[SearchResult, list[str]]:
    """Return the result, and one line for each option that was left out."""
    depth = default_depth(gpu=job.model.device == "cuda")
    options = Options(
        batches="batch" not in request.kept,
        depths="depth" not in request.kept,
        patches=[space.patch(lengths) for lengths in request.patches],
        chunks=(None,) if "chunksize" in request.kept else space.chunk_shapes,
    )
    options, left_out = with_network_options(
        options, job.model, request.precisions, request.kept, has_all=request.has_all_options
    )
    trial_seconds = min(MAX_TRIAL_SECONDS, max(MIN_TRIAL_SECONDS, limits.seconds / TARGET_TRIALS))
    console = Console(stderr=True, highlight=False, quiet=quiet)
    parent = _temporary_root(job.output_path)
    with tempfile.TemporaryDirectory(prefix=".chunkq-tune-", dir=parent) as folder:
        trials = Trials(
            space,
            space.plain(depth),
            Path(folder),
            _worker_env(job),
            memory=limits.memory,
            show=print_error,
        )

        def measure(setting: Setting, stage: Stage, seconds: float) -> Measurement:
            cost = space.cost(setting)
            description = describe(setting, stage, () if cost is None else cost.chunksize)
            with console.status(f"measuring {description}"):
                measurement = turns(setting, stage, seconds)
            if not console.is_terminal:
                rate = measurement.rate
                summary = f"{rate:.3g} patches/s" if rate else measurement.status
                console.print(f"{description}: {summary}", soft_wrap=True)
            return measurement

        with closing(Turns(trials.load, time.monotonic, trial_seconds)) as turns:
            start = space.start(depth)
            result = Search(start, options, space.cost, measure, limits, time.monotonic).run()
    notes = list(left_out)
    precision = space.record(space.plain(depth)).job.model.effective_precision
    if precision != "float32":
        notes.append(
            f"differs and labels are relative to {precision}: the network has no precision float32"
        )
    if trials.plain_failure is not None:
        notes.append(
            "differs and labels are relative to the current settings, because the network does "
            f"not run in float32: {trials.plain_failure}"
        )
    return result, notes


def _worker_env(job: Job) -> dict[str, str]:
    """Return the environment of a worker process of this job on the first of its devices."""
    device_slots = slots("all" if job.model.device == "cuda" else "none", 1)
    env = {**os.environ, **child_env(max(1, available_cores() // len(device_slots)))}
    env.pop(ALLOW_VARIABLE, None)  # the temporary output may be outside of the allowed paths
    if device_slots[0].gpu is not None:
        env[VISIBLE] = device_slots[0].gpu
    return env


def _temporary_root(output: str) -> str | None:
    """Return a writable folder on the output's file system for temporary outputs, or None."""
    if is_url(output):
        return None
    parent = next((p for p in Path(output).parents if p.is_dir()), Path("/"))
    return str(parent) if parent != Path("/") and os.access(parent, os.W_OK) else None


def _require_best(result: SearchResult, limits: Limits) -> Row:
    """Return the chosen row; raise ModelError or ChunkqError if there is none."""
    first = result.rows[0].measurement if result.rows else Measurement("no time")
    if first.status == "failed":
        raise ModelError(first.note)
    if first.status == "no time":
        raise ChunkqError(
            f"--max-time: {duration(max(1.0, limits.seconds))} is too short to load and run the "
            "network; use a longer time",
            code=ErrorCode.LIMIT_TOO_SMALL,
        )
    chunks = next((row.measurement for row in result.rows if row.stage == "pipeline"), None)
    if chunks is not None and chunks.status == "failed":
        raise ChunkqError(f"the chunks of the job cannot be computed: {chunks.note}")
    if result.best is None:
        memory = "no limit" if limits.memory is None else si(limits.memory, "B")
        raise ChunkqError(
            f"--memory: a batch of one patch needs more than {memory}; use a higher limit or "
            "smaller patches",
            code=ErrorCode.LIMIT_TOO_SMALL,
        )
    return result.best


def _summary_lines(result: SearchResult, changes: dict[tuple[str, ...], Any]) -> list[str]:
    """Return the chosen setting, its speedup, and how to use it."""
    best, baseline = result.best, result.baseline
    if best is None:
        return []
    description = describe(best.setting, best.stage, best.cost.chunksize)
    lines = [f"chosen: {description}; {best.measurement.rate:,.3g} patches/s"]
    if baseline is not None and best is not baseline and baseline.work_seconds < float("inf"):
        speedup = baseline.work_seconds / best.work_seconds
        lines[0] += f", job time {speedup:.2g} times shorter than with the current settings"
    if not changes:
        lines.append("the job file has these settings already")
    if best.stage == "pipeline":
        lines.append(f"run the job with --depth {best.setting.depth} (not a key of the job file)")
    return lines


def _machine(measurement: Measurement) -> str:
    return f"on {measurement.note or 'this machine'} with {available_cores()} cores"
