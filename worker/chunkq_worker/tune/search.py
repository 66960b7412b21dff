"""Search for the fastest settings of a job: which to measure next, and which to choose. No I/O."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, Literal

from chunkq.plan.footprint import Footprint

Shape = tuple[int, ...]
Stage = Literal["network", "pipeline"]
TrialStatus = Literal["ok", "too large", "failed", "no time", "changes results"]

TIE = 0.03
"""Settings whose times differ by less than this fraction count as equally fast."""
NETWORK_SHARE = 0.6
"""Fraction of the time for stage `network`; the rest is for stage `pipeline`, ..."""
LARGE_NETWORK_SHARE = 0.8
"""... which needs less if the search varies neither depth nor chunk size."""
MAX_STEPS_WITHOUT_GAIN = 2
"""Consecutive larger batches without a gain after which the search for a batch size stops."""
MAX_DEPTH = 6
"""Largest number of chunks in flight that is measured."""
MAX_CANDIDATES = 3
"""Number of settings from stage `network` that are tried in stage `pipeline` until one fits."""
ALLOWED_CHANGE = 1e-4
"""Largest difference to the network in float32, per range of the outputs, of a setting that was not
requested."""
LARGEST_FLOAT = sys.float_info.max
"""Largest difference of a requested setting: no output may overflow where float32 does not."""
ALLOWED_FACTOR = 2
"""A setting in the job's own precision may also differ so many times as much as the job does."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a job. None for `patch`, `chunk` or `precision` keeps the job's value.

    `precision` is a key of `model_config` and its value, such as ("precision", "bfloat16").
    `compile`, `channels_last` and `cuda_graph` are keys of `model_config`.
    """

    batch: int
    depth: int
    compile: bool = False
    channels_last: bool = False
    cuda_graph: bool = False
    precision: tuple[str, str] | None = None
    patch: Shape | None = None
    chunk: Shape | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """The costs of the whole job with a setting, computed from its plan.

    `footprint` is that of the largest chunks, `chunk_patches` the number of patches of a chunk in
    the middle of the volume.
    """

    chunks: int
    patches: int
    piece_bytes: int
    footprint: Footprint
    chunk_patches: int
    chunksize: Shape


@dataclass(frozen=True, slots=True)
class Measurement:
    """The result of running a setting; `rate` is in patches per second, memory in bytes.

    `ratios` are speeds divided by the reference's, one per round. `difference` is the largest
    difference of an output value to the network in float32, as a fraction of the outputs' range.
    `agreement` is the share of voxels with the same label. Both are None if they were not or
    cannot be compared.
    """

    status: TrialStatus
    rate: float = 0.0
    load_seconds: float = 0.0
    peak_bytes: int = 0
    device_bytes: int | None = None
    ratios: tuple[float, ...] = ()
    difference: float | None = None
    agreement: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: a setting, the stage it ran in, and its measurement."""

    setting: Setting
    stage: Stage
    cost: Cost
    measurement: Measurement

    @property
    def seconds(self) -> float:
        """Return the predicted seconds of the job with one worker; infinite if unusable."""
        if self.measurement.status != "ok" or self.measurement.rate <= 0:
            return inf
        return self.measurement.load_seconds + self.work_seconds

    @property
    def work_seconds(self) -> float:
        """Return `seconds` without loading the network; settings are compared by this."""
        if self.measurement.status != "ok" or self.measurement.rate <= 0:
            return inf
        return self.cost.patches / self.measurement.rate

    @property
    def memory(self) -> int:
        """Return the bytes that decide a tie: on the device if it has memory, else on the host."""
        peak, device = self.measurement.peak_bytes, self.measurement.device_bytes
        return peak if device is None else device


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in bytes of memory (None: no limit) and in seconds of the whole search."""

    memory: int | None
    device_memory: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Options:
    """The settings that the search may vary.

    `switches` are the boolean fields of `Setting` that can be set. `precisions` can be chosen;
    `shown_precisions` only if they change no value by more than ALLOWED_CHANGE. `chunks` are chunk
    shapes from small to large; None is the job's own shape.
    """

    batches: bool = True
    depths: bool = True
    switches: Sequence[str] = ()
    precisions: Sequence[tuple[str, str]] = ()
    shown_precisions: Sequence[tuple[str, str]] = ()
    patches: Sequence[Shape] = ()
    chunks: Sequence[Shape | None] = (None,)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The table, the chosen row, and the row of the job's own settings in the same stage.

    `best` is None if no setting fits, or if the job's own settings failed or took too long.
    """

    rows: tuple[Row, ...]
    best: Row | None
    baseline: Row | None


Measure = Callable[[Setting, Stage, float], Measurement]
"""Runs a setting in a stage for at most that many seconds."""
CostOf = Callable[[Setting], Cost | None]
"""Returns the costs of the job with a setting; None if the setting is invalid for the job."""


class Search:
    """Measure settings one after the other until the best is found or the time is over.

    Stage `network` measures the network alone: the job's batch size doubled and halved, for each
    requested patch size, then each requested precision, then the best with each switch set, and
    with each precision that was not requested. Stage `pipeline` measures entire chunks, read,
    computed and written: the best settings of stage `network` with several depths and chunk sizes.
    `measure` is called with at most the remaining seconds.
    """

    def __init__(
        self,
        start: Setting,
        options: Options,
        cost: CostOf,
        measure: Measure,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self._start, self._options, self._limits = start, options, limits
        self._cost, self._measure, self._clock = cost, measure, clock
        self._start_time = clock()
        self._until = limits.seconds
        self._deciding_stage: Stage = "network"
        self.rows: list[Row] = []

    def run(self) -> SearchResult:
        """Measure settings and choose one; stop at once if the job's own settings do not run."""
        first = self._run_or_get(self._start, "network")
        if first is None or first.measurement.status in ("failed", "no time"):
            return self._result()
        has_steps = self._options.depths or len(self._options.chunks) > 1
        share = NETWORK_SHARE if has_steps else LARGE_NETWORK_SHARE
        self._until = share * self._limits.seconds
        for patch in (None, *self._options.patches):
            self._search_batch_size(replace(self._start, patch=patch))
        if best := self._best("network"):
            for precision in self._options.precisions:
                self._search_batch_size(replace(best.setting, precision=precision))
        quick = [name for name in self._options.switches if name != "compile"]
        for switch in quick:
            self._try_on_best(**{switch: True})
        for precision in self._options.shown_precisions:
            self._try_on_best(precision=precision)
        if "compile" in self._options.switches:  # takes longest
            self._try_on_best(compile=True)
        self._until = self._limits.seconds
        self._search_pipeline()
        return self._result()

    def _try_on_best(self, **changes: Any) -> None:
        """Run the best setting of stage `network` with changes."""
        if best := self._best("network"):
            self._run_or_get(replace(best.setting, **changes), "network")

    def _search_batch_size(self, first: Setting) -> None:
        """Double the batch size while that is faster, then halve it while that is not slower."""
        row = self._run_or_get(first, "network")
        if row is None or not self._options.batches:
            return
        best, larger, failed_steps = row, row, 0
        while (
            larger.measurement.status == "ok"
            and larger.setting.batch < larger.cost.chunk_patches
            and failed_steps < MAX_STEPS_WITHOUT_GAIN
        ):
            next_row = self._run_or_get(replace(first, batch=2 * larger.setting.batch), "network")
            if next_row is None:
                break
            larger = next_row
            gained = larger.work_seconds < (1 - TIE) * best.work_seconds
            failed_steps = 0 if gained else failed_steps + 1
            best = larger if larger.work_seconds < best.work_seconds else best
        while row.setting.batch > 1 and row.measurement.status in ("ok", "too large"):
            smaller = self._run_or_get(replace(first, batch=row.setting.batch // 2), "network")
            if smaller is None:
                break
            slower = smaller.work_seconds > best.work_seconds * (1 + TIE)
            if slower and smaller.measurement.status != "too large":
                break
            row = smaller
            best = row if row.work_seconds < best.work_seconds else best

    def _search_pipeline(self) -> None:
        """Run entire chunks with the job's settings, then with the best ones, then vary those."""
        baseline = self._run_or_get(self._start, "pipeline")
        best = self._best("network")
        if baseline is None or baseline.measurement.status in ("no time", "failed") or best is None:
            return
        fastest_first = sorted(self._usable("network"), key=lambda row: row.work_seconds)
        for row in [best, *(row for row in fastest_first if row is not best)][:MAX_CANDIDATES]:
            succeeds = self._can_run_pipeline(row.setting)
            if succeeds is None:
                return
            if succeeds and self._best("pipeline") is not baseline:
                break
        self._deciding_stage = "pipeline"
        for step in (1, -1) if self._options.depths else ():
            self._step_while_faster(partial(_with_depth, step=step))
        for step in (1, -1):
            self._step_while_faster(partial(_with_chunk, ladder=self._options.chunks, step=step))

    def _can_run_pipeline(self, setting: Setting) -> bool | None:
        """Return whether a setting can run entire chunks, with its depth or with one in flight.

        Return None if the remaining time is too short.
        """
        for depth in sorted({setting.depth, 1}, reverse=True):
            row = self._run_or_get(replace(setting, depth=depth), "pipeline")
            if row is None or row.measurement.status == "no time":
                return None
            if row.measurement.status == "ok":
                return True
        return False

    def _step_while_faster(self, step: Callable[[Setting], Setting | None]) -> None:
        """Change the best setting step by step while each step is better."""
        while best := self._best("pipeline"):
            next_setting = step(best.setting)
            if next_setting is None or self._get_row(next_setting, "pipeline"):
                return
            row = self._run_or_get(next_setting, "pipeline")
            if row is None or self._best("pipeline") is not row:
                return

    def _run_or_get(self, setting: Setting, stage: Stage) -> Row | None:
        """Return the row of a setting; run the setting unless that is done.

        Return None if the setting is invalid for the job or no time remains.
        """
        if row := self._get_row(setting, stage):
            return row
        cost, remaining = self._cost(setting), self._until - (self._clock() - self._start_time)
        if cost is None or remaining <= 0:
            return None
        measurement = self._predict_failure(setting, stage, cost, remaining)
        if measurement is None:
            measurement = self._apply_limits(setting, self._measure(setting, stage, remaining))
        row = Row(setting, stage, cost, measurement)
        self.rows.append(row)
        return row

    def _predict_failure(
        self, setting: Setting, stage: Stage, cost: Cost, remaining: float
    ) -> Measurement | None:
        """Return a measurement of a setting that would fail; None if it has to be run."""
        if stage == "network":
            return None
        limit, needed = self._limits.memory, cost.footprint.peak_bytes(setting.depth)
        if limit is not None and self._uses_host_memory() and needed > limit:
            return Measurement("too large", note="the arrays of the chunks in flight")
        network_row = self._get_row(
            replace(setting, depth=self._start.depth, chunk=None), "network"
        )
        if network_row is not None and network_row.measurement.status == "too large":
            return Measurement("too large", note="in stage network")
        rates = [
            row.measurement.rate
            for row in self._usable("network")
            if _same_network_settings(row.setting, setting)
        ]
        if rates and (needed_seconds := cost.chunk_patches * 2 / max(rates)) > remaining:
            return Measurement("no time", note=f"two chunks take {needed_seconds:.0f} s")
        return None

    def _apply_limits(self, setting: Setting, measurement: Measurement) -> Measurement:
        """Set the status of a measurement that exceeds a limit."""
        if measurement.status != "ok":
            return measurement
        limits = self._limits
        if limits.memory is not None and measurement.peak_bytes > limits.memory:
            return replace(measurement, status="too large")
        device = measurement.device_bytes
        if limits.device_memory is not None and (device or 0) > limits.device_memory:
            return replace(measurement, status="too large")
        difference = measurement.difference
        if difference is not None and not difference <= self._allowed_difference(setting):
            return replace(measurement, status="changes results", note="")
        return measurement

    def _allowed_difference(self, setting: Setting) -> float:
        """Return the largest difference to float32 with which a setting can be chosen."""
        if setting.patch is not None or setting.precision in self._options.precisions:
            return LARGEST_FLOAT
        if setting.precision is not None:
            return ALLOWED_CHANGE
        own = (
            difference
            for row in self.rows
            if _is_like(row.setting, self._start)
            and (difference := row.measurement.difference) is not None
        )
        # The first such setting is the job's own, or its largest batch that fits.
        return max(ALLOWED_CHANGE, ALLOWED_FACTOR * next(own, inf))

    def _uses_host_memory(self) -> bool:
        return all(row.measurement.device_bytes is None for row in self.rows)

    def _get_row(self, setting: Setting, stage: Stage) -> Row | None:
        rows = (row for row in self.rows if row.setting == setting and row.stage == stage)
        return next(rows, None)

    def _usable(self, stage: Stage) -> Iterator[Row]:
        return (r for r in self.rows if r.stage == stage and r.work_seconds < inf)

    def _best(self, stage: Stage) -> Row | None:
        return choose([row for row in self.rows if row.stage == stage], self._start)

    def _result(self) -> SearchResult:
        """Choose among the rows of the deciding stage."""
        stage, rows = self._deciding_stage, tuple(self.rows)
        if stage == "network":  # exclude settings that were too large in stage `pipeline`
            too_large = [row.setting for row in rows if row.measurement.status == "too large"]
            candidates = [r for r in rows if r.stage == stage and r.setting not in too_large]
        else:
            candidates = [r for r in rows if r.stage == stage]
        best = choose(candidates, self._start)
        return SearchResult(rows, best, self._get_row(self._start, stage))


def choose(rows: Sequence[Row], start: Setting) -> Row | None:
    """Return the best usable row; None if there is none.

    Compiled networks count only if they are faster including the time to compile. Of the rows
    within TIE of the fastest, take those within TIE of the smallest memory; of these, return the
    one with the fewest changes to `start`, and of these the fastest.
    """
    usable = [row for row in rows if row.work_seconds < inf]
    if not usable:
        return None
    plain = [row.seconds for row in usable if row.setting.compile == start.compile]
    usable = [
        row
        for row in usable
        if row.setting.compile == start.compile or row.seconds < min(plain, default=inf)
    ]
    fastest = min(row.work_seconds for row in usable)
    tied = [row for row in usable if row.work_seconds <= fastest * (1 + TIE)]
    smallest = min(row.memory for row in tied)
    small = [row for row in tied if row.memory <= smallest * (1 + TIE)]
    return min(small, key=lambda row: (_count_changes(row.setting, start), row.work_seconds))


def _count_changes(setting: Setting, start: Setting) -> int:
    fields = Setting.__dataclass_fields__
    return sum(getattr(setting, name) != getattr(start, name) for name in fields)


def _same_network_settings(one: Setting, other: Setting) -> bool:
    """Return whether two settings are equal in stage `network`."""
    return replace(one, depth=1, chunk=None) == replace(other, depth=1, chunk=None)


def _is_like(setting: Setting, start: Setting) -> bool:
    """Return whether only the batch size, the depth and the chunk shape may differ."""
    return replace(setting, batch=start.batch, depth=start.depth, chunk=start.chunk) == start


def _with_depth(setting: Setting, *, step: int) -> Setting | None:
    depth = setting.depth + step
    return replace(setting, depth=depth) if 1 <= depth <= MAX_DEPTH else None


def _with_chunk(setting: Setting, *, ladder: Sequence[Shape | None], step: int) -> Setting | None:
    index = list(ladder).index(setting.chunk) + step
    return replace(setting, chunk=ladder[index]) if 0 <= index < len(ladder) else None
