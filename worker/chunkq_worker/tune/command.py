"""`chunkq tune`."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.filesize import decimal

from chunkq import __version__
from chunkq.allowed_paths import ALLOW_VARIABLE
from chunkq.errors import ChunkqError, JobError, ModelError, nearest
from chunkq.executors.base import default_depth
from chunkq.job import Job, load_job
from chunkq.ledger import JobFolder, folder_of
from chunkq.paths import is_url, without_secret
from chunkq.record import JobRecord
from chunkq.stores import find_source
from chunkq.user_code import load_blend_weights
from chunkq_worker.child_env import child_env
from chunkq_worker.commands import seconds_in
from chunkq_worker.devices import VISIBLE, cores, slots
from chunkq_worker.inputs import open_inputs
from chunkq_worker.tune.file import JobFile
from chunkq_worker.tune.memory import offered
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
from chunkq_worker.tune.space import SearchSpace
from chunkq_worker.tune.table import comment, duration, label, legend, table, values

LOG_WIDTH = 120
KEEPABLE = ("batch", "compile", "depth", "chunksize")
PRECISIONS = ("bfloat16", "float16")
TRIALS_WANTED = 100
"""The budget over this is how long one trial measures ..."""
LEAST_SECONDS, MOST_SECONDS = 0.2, 10.0
"""... within these."""


class InterruptedTuneError(ChunkqError):
    """The user stopped it."""

    exit_code = 130


@dataclass(frozen=True)
class TuneOptions:
    """What the user asks for: lengths of patches, names of precisions, what is kept as it is."""

    patches: tuple[tuple[int, ...], ...]
    precisions: tuple[str, ...]
    kept: frozenset[str]


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("-i", "--input", "input_", help="Volume to read, instead of the job's.")
@click.option("-o", "--output", help="Output that the job will have, instead of the job's.")
@click.option(
    "--max-time", "--seconds", "max_time", default="5m", show_default=True,
    help="Time to spend: seconds, or 90m, 2h, 1h30m.",
)  # fmt: skip
@click.option("--memory", help="Most memory of a worker, as 8GiB; by default what is free here.")
@click.option("--device-memory", help="Most memory on a GPU; by default all of it.")
@click.option(
    "--patch-sizes",
    help="Also try these patches, as 64,96 or 64x64x32,96x96x48; they can change accuracy.",
)
@click.option(
    "--precision", help="Also try bfloat16, float16 or both, with a comma; they change results.",
)  # fmt: skip
@click.option(
    "--keep", help=f"Leave these as they are: any of {', '.join(KEEPABLE)}, with commas.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only show; the job file stays as it is.")
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
    keep: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find the fastest settings for JOB on this machine, and write them into the job file.

    Tried are batch sizes, torch.compile, chunk sizes and depths, on real patches from the middle
    of the volume, each in a process of its own. The table goes into the file as a comment; the
    file as it was is kept beside it.
    """
    loaded = load_job(job, input=input_, output=output)
    limits = _limits(loaded, max_time, memory, device_memory)
    wishes = TuneOptions(_lengths(patch_sizes), _precisions(precision, loaded), _kept(keep))
    file = None if dry_run else JobFile.read(job)
    record = _record(loaded)
    space = SearchSpace(record)
    if file is not None:
        _check_rewritable(file, space)
        _check_not_begun(job, record)
    with _interruptible(job):
        outcome = _search(space, loaded, wishes, limits, quiet=as_json)
    best = _usable(outcome, limits)
    changes = space.changes(best.setting)
    backup = None
    if file is not None:
        title = f"{time.strftime('%Y-%m-%d')}, chunkq {__version__}, {_device(best.measured)}"
        lines = [*comment(outcome), *_chosen(outcome, changes)]
        backup = file.replace(file.changed(changes, title, lines))
    if as_json:
        shown = {
            "table": [values(row) for row in outcome.rows],
            "before": None if outcome.before is None else values(outcome.before),
            "choice": values(best),
            "changes": {".".join(key): value for key, value in changes.items()},
            "written": None if backup is None else str(job),
            "backup": None if backup is None else str(backup),
        }
        click.echo(json.dumps(shown, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=LOG_WIDTH)
    console.print(table(outcome, console.width))
    for line in [*legend(outcome), *_chosen(outcome, changes)]:
        click.echo(line)
    if backup is None:
        click.echo(f"{job} is as it was (--dry-run)")
    else:
        bare = " (without the table: JSON knows no comments)" if job.suffix == ".json" else ""
        click.echo(f"wrote {job}{bare}; as it was: {backup}")


def _limits(job: Job, max_time: str, memory: str | None, device_memory: str | None) -> Limits:
    seconds = seconds_in("--max-time", max_time)
    if seconds <= 0:
        raise JobError(f"--max-time: {max_time} leaves no time to measure anything; give 5m or so")
    host = _bytes("--memory", memory)
    if host is None:
        host = offered() // _workers(job)
    return Limits(host, _bytes("--device-memory", device_memory), seconds)


def _workers(job: Job) -> int:
    """Return how many workers share this machine when `chunkq work` starts them."""
    return len(slots("all" if job.model.device == "cuda" else "none", 1))


def _bytes(option: str, given: str | None) -> int | None:
    if given is None:
        return None
    try:
        found = int(TypeAdapter(ByteSize).validate_python(given))
    except ValidationError:
        raise JobError(f"{option}: {given!r} is no size; write 8GiB, 500MB or bytes") from None
    if found <= 0:
        raise JobError(f"{option}: {given} is no memory at all; write 8GiB, 500MB or bytes")
    return found


def _lengths(given: str | None) -> tuple[tuple[int, ...], ...]:
    try:
        found = tuple(
            tuple(int(n) for n in one.replace("×", "x").split("x"))
            for one in (given or "").split(",")
            if one.strip()
        )
    except ValueError:
        found = ((0,),)
    if any(n < 1 for lengths in found for n in lengths):
        raise JobError(f"--patch-sizes: {given!r} are no patches; write 64,96 or 64x64x32")
    return found


def _precisions(given: str | None, job: Job) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (given or "").split(",") if name.strip())
    for name in names:
        if name not in PRECISIONS:
            hint = nearest(name, PRECISIONS)
            raise JobError(f"--precision: {name!r} is none of {', '.join(PRECISIONS)}{hint}")
    if names and job.model.runtime != "torch":
        raise JobError(
            f"--precision: only for runtime torch, this job's is {job.model.runtime}; export the "
            "network in that precision instead"
        )
    return names


def _kept(given: str | None) -> frozenset[str]:
    names = frozenset(name.strip() for name in (given or "").split(",") if name.strip())
    for name in sorted(names - {*KEEPABLE}):
        hint = nearest(name, KEEPABLE)
        raise JobError(f"--keep: {name!r} is none of {', '.join(KEEPABLE)}{hint}")
    return names


def _record(job: Job) -> JobRecord:
    """Check a job against its volume and files, as producing it would."""
    sources = [find_source(path) for path in job.input]
    if len(sources) > 1:
        open_inputs(list(job.input))
    record = JobRecord.create(job, sources)
    load_blend_weights(record.plan())
    return record


def _check_rewritable(file: JobFile, space: SearchSpace) -> None:
    """Raise ChunkqError before anything is measured, if the file could not be changed after."""
    start = space.start(1)
    try:
        chunk = next((shape for shape in space.ladder if shape is not None), None)
        other = Setting(start.batch + 1, 1, compile=not start.compile, chunk=chunk)
        file.changed(space.changes(other), "", ())
    except ChunkqError as error:
        raise JobError(str(error).partition("; set them")[0] + "; look with --dry-run") from None


def _check_not_begun(path: Path, record: JobRecord) -> None:
    """Refuse a job of which some is done: with other settings its rest could not be continued."""
    folder = JobFolder(folder_of(record.job.output))
    before = folder.read_record()
    is_sealed = before is not None and folder.ledger(before.epoch).is_sealed()
    if before is None or before.digest != record.digest or is_sealed:
        return
    raise JobError(
        f"{path}: its output {without_secret(record.job.output)} is begun, and could not be "
        "continued with other settings; finish that, name another output with -o, or look with "
        "--dry-run"
    )


@contextmanager
def _interruptible(job: Path) -> Iterator[None]:
    """Take SIGTERM as Ctrl-C, and say in one line that nothing has happened to the job."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedTuneError(f"interrupted; {job} is as it was") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _search(
    space: SearchSpace, job: Job, wishes: TuneOptions, limits: Limits, *, quiet: bool
) -> SearchResult:
    on_gpu, model = job.model.device == "cuda", job.model
    start = space.start(default_depth(gpu=on_gpu))
    given = model.dtype, model.autocast
    options = Options(
        batches="batch" not in wishes.kept,
        depths="depth" not in wishes.kept,
        compile="compile" not in wishes.kept
        and model.runtime == "torch"
        and model.type != "torchscript"
        and not model.compile,
        precisions=[
            (key, name)
            for name in wishes.precisions
            for key in ("autocast", "dtype")
            if name not in given and not (key == "dtype" and model.autocast is not None)
        ],
        patches=[space.patch(lengths) for lengths in wishes.patches],
        chunks=(None,) if "chunksize" in wishes.kept else space.ladder,
    )
    trial_seconds = min(MOST_SECONDS, max(LEAST_SECONDS, limits.seconds / TRIALS_WANTED))
    console = Console(stderr=True, highlight=False, quiet=quiet)
    with tempfile.TemporaryDirectory(prefix=".chunkq-tune-", dir=_place(job.output)) as folder:
        trials = Trials(
            space, Path(folder), _environment(job), memory=limits.memory, seconds=trial_seconds
        )

        def measure(setting: Setting, stage: Stage, seconds: float) -> Measurement:
            cost = space.cost(setting)
            words = label(setting, stage, () if cost is None else cost.chunksize)
            with console.status(f"trying {words}"):
                found = trials(setting, stage, seconds)
            if not console.is_terminal:
                came_to = f"{found.rate:.3g} patches/s" if found.rate else found.verdict
                console.print(f"{words}: {came_to}", soft_wrap=True)
            return found

        return Search(start, options, space.cost, measure, limits, time.monotonic).run()


def _environment(job: Job) -> dict[str, str]:
    """Return the environment of a worker of this job, on the first device if it has several."""
    taken = slots("all" if job.model.device == "cuda" else "none", 1)
    environment = {**os.environ, **child_env(max(1, cores() // len(taken)))}
    environment.pop(ALLOW_VARIABLE, None)  # the temporary output is ours
    if taken[0].gpu is not None:
        environment[VISIBLE] = taken[0].gpu
    return environment


def _place(output: str) -> str | None:
    """Return the folder for temporary outputs: on the output's own file system where it can be."""
    if is_url(output):
        return None
    above = next((p for p in Path(output).parents if p.is_dir()), Path("/"))
    return str(above) if above != Path("/") and os.access(above, os.W_OK) else None


def _usable(outcome: SearchResult, limits: Limits) -> Row:
    """Return the chosen row; raises in one line what is wrong with the job if there is none."""
    first = outcome.rows[0].measured if outcome.rows else Measurement("no time")
    if first.verdict == "failed":
        raise ModelError(first.note)
    if first.verdict == "no time":
        raise ChunkqError(
            f"--max-time: {duration(limits.seconds)} is too short to load the network and run it; "
            "give more"
        )
    whole = next((row.measured for row in outcome.rows if row.stage == "pipeline"), None)
    if whole is not None and whole.verdict == "failed":
        raise ChunkqError(f"the job's own chunks cannot be computed: {whole.note}")
    if outcome.best is None:
        memory = "no limit" if limits.memory is None else decimal(limits.memory)
        raise ChunkqError(
            f"--memory: no batch size fits into {memory}, not even one patch; allow more, or use "
            "smaller patches"
        )
    return outcome.best


def _chosen(outcome: SearchResult, changes: dict[tuple[str, ...], Any]) -> list[str]:
    """Return what was chosen and what it brings."""
    best, before = outcome.best, outcome.before
    if best is None:
        return []
    words = label(best.setting, best.stage, best.cost.chunksize)
    lines = [f"chosen: {words}; {best.measured.rate:,.3g} patches/s"]
    if before is not None and best is not before and before.work_seconds < float("inf"):
        times = before.work_seconds / best.work_seconds
        lines[0] += f", the whole job {times:.2g} times as fast as now"
    if not changes:
        lines.append("the job file has these settings already")
    if best.stage == "pipeline":
        lines.append(f"run it with --depth {best.setting.depth}, which no job file holds")
    return lines


def _device(found: Measurement) -> str:
    return f"on {found.note or 'this machine'} with {cores()} cores"
