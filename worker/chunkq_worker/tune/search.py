"""The search for a job's fastest settings: which to try next, and which to choose. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Literal

from chunkq.footprint import Footprint

Shape = tuple[int, ...]
Stage = Literal["network", "pipeline"]
TrialStatus = Literal["ok", "too large", "failed", "no time", "changes results"]

TIE = 0.03
"""Settings whose times differ by less than this share are equally fast."""
NETWORK_SHARE = 0.6
"""Of the budget, for the network alone; the rest is for whole chunks."""
MAX_FAILED_STEPS = 2
"""Larger batches tried in a row without a gain before the search gives up."""
MAX_DEPTH = 6
"""Chunks in flight, at most."""
RUNNERS_UP = 3
"""So many of the network's best settings are tried with whole chunks until one fits."""
HARMLESS = 1e-4
"""Share of the output's range by which a setting that nobody asked for may change it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a job; `patch`, `chunk` and `precision` None: as the job has it.

    `precision` is a key of `model_config` and its value, such as ("autocast", "bfloat16").
    """

    batch: int
    depth: int
    compile: bool = False
    precision: tuple[str, str] | None = None
    patch: Shape | None = None
    chunk: Shape | None = None

    @property
    def may_change_results(self) -> bool:
        """Tell whether the user asked for something that gives other numbers."""
        return self.precision is not None or self.patch is not None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a setting means for the whole job, known without running it.

    `footprint` is that of its largest chunks, `chunk_patches` what a chunk amid the volume owns.
    """

    chunks: int
    patches: int
    piece_bytes: int
    footprint: Footprint
    chunk_patches: int
    chunksize: Shape


@dataclass(frozen=True, slots=True)
class Measurement:
    """What running a setting showed; `rate` is in patches per second, memory in bytes.

    `difference` is the largest of any output value from the job's own settings, as a share of
    the outputs' range; None where it was not or cannot be compared.
    """

    verdict: TrialStatus
    rate: float = 0.0
    load_seconds: float = 0.0
    peak_bytes: int = 0
    device_bytes: int | None = None
    difference: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a setting, where it was run, and what came of it."""

    setting: Setting
    stage: Stage
    cost: Cost
    measured: Measurement

    @property
    def seconds(self) -> float:
        """Predicted seconds of the whole job by one such worker; infinite if it cannot be used."""
        if self.measured.verdict != "ok" or self.measured.rate <= 0:
            return inf
        return self.measured.load_seconds + self.work_seconds

    @property
    def work_seconds(self) -> float:
        """The same without loading the network, by which settings are compared."""
        if self.measured.verdict != "ok" or self.measured.rate <= 0:
            return inf
        return self.cost.patches / self.measured.rate

    @property
    def memory(self) -> int:
        """Bytes by which ties are decided: the device's, if it has memory of its own."""
        found = self.measured
        return found.peak_bytes if found.device_bytes is None else found.device_bytes


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory in bytes, None for no limit, and the seconds that the search may take."""

    memory: int | None
    device_memory: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Options:
    """What may be tried.

    `chunks` is a ladder of chunk shapes from small to large, in which None is the job's own.
    """

    batches: bool = True
    depths: bool = True
    compile: bool = False
    precisions: Sequence[tuple[str, str]] = ()
    patches: Sequence[Shape] = ()
    chunks: Sequence[Shape | None] = (None,)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The table, the row chosen from it, and the row of the job's own settings beside it.

    `best` is None where nothing fits or the budget did not even do for the job's own settings.
    """

    rows: tuple[Row, ...]
    best: Row | None
    before: Row | None


Measure = Callable[[Setting, Stage, float], Measurement]
"""Runs a setting for at most so many seconds."""
CostOf = Callable[[Setting], Cost | None]
"""What a setting means for the job; None where the job cannot be done with it."""


class Search:
    """Tries settings one at a time until the best is found or the budget is spent.

    First the network alone: from the job's own batch size in doubling steps up and down, for each
    patch size that was asked for, then with each precision asked for, and compiled. Then whole
    chunks, read, computed and written: the best of before with several depths and chunk sizes.
    `measure` is never asked for more seconds than are left.
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
        self._began = clock()
        self._until = limits.seconds
        self._decisive: Stage = "network"
        self.rows: list[Row] = []

    def run(self) -> SearchResult:
        """Return the table and the choice; a baseline that fails or has no time ends it at once."""
        first = self._try(self._start, "network")
        if first is None or first.measured.verdict in ("failed", "no time"):
            return self._outcome()
        self._until = NETWORK_SHARE * self._limits.seconds
        for patch in (None, *self._options.patches):
            self._climb(replace(self._start, patch=patch))
        if best := self._best("network"):
            for precision in self._options.precisions:
                self._climb(replace(best.setting, precision=precision))
        best = self._best("network")
        if best and self._options.compile:
            self._try(replace(best.setting, compile=True), "network")
        self._until = self._limits.seconds
        self._whole_chunks()
        return self._outcome()

    def _climb(self, first: Setting) -> None:
        """Double the batch while that helps, then halve it while that does no harm."""
        row = self._try(first, "network")
        if row is None or not self._options.batches:
            return
        best, larger, in_vain = row, row, 0
        while (
            larger.measured.verdict == "ok"
            and larger.setting.batch < larger.cost.chunk_patches
            and in_vain < MAX_FAILED_STEPS
        ):
            next_row = self._try(replace(first, batch=2 * larger.setting.batch), "network")
            if next_row is None:
                break
            larger = next_row
            gained = larger.work_seconds < (1 - TIE) * best.work_seconds
            in_vain = 0 if gained else in_vain + 1
            best = larger if larger.work_seconds < best.work_seconds else best
        while row.setting.batch > 1 and row.measured.verdict in ("ok", "too large"):
            smaller = self._try(replace(first, batch=row.setting.batch // 2), "network")
            if smaller is None:
                break
            slower = smaller.work_seconds > best.work_seconds * (1 + TIE)
            if slower and smaller.measured.verdict != "too large":
                break
            row = smaller
            best = row if row.work_seconds < best.work_seconds else best

    def _whole_chunks(self) -> None:
        """Run whole chunks with the job's own settings, then with the best, then vary those."""
        own = self._try(self._start, "pipeline")
        best = self._best("network")
        if own is None or own.measured.verdict in ("no time", "failed") or best is None:
            return
        others = sorted(self._usable("network"), key=lambda row: row.work_seconds)
        for row in [best, *(row for row in others if row is not best)][:RUNNERS_UP]:
            runs = self._runs_whole(row.setting)
            if runs is None:
                return
            if runs and self._best("pipeline") is not own:
                break
        self._decisive = "pipeline"
        for step in (1, -1) if self._options.depths else ():
            self._follow(partial(_with_depth, step=step))
        for step in (1, -1):
            self._follow(partial(_with_chunk, ladder=self._options.chunks, step=step))

    def _runs_whole(self, setting: Setting) -> bool | None:
        """Tell whether a setting can run whole chunks, if need be one at a time.

        None if there is no time to find out.
        """
        for depth in sorted({setting.depth, 1}, reverse=True):
            row = self._try(replace(setting, depth=depth), "pipeline")
            if row is None or row.measured.verdict == "no time":
                return None
            if row.measured.verdict == "ok":
                return True
        return False

    def _follow(self, step: Callable[[Setting], Setting | None]) -> None:
        """Go on from the best in one direction as long as each step gains."""
        while best := self._best("pipeline"):
            further = step(best.setting)
            if further is None or self._known(further, "pipeline"):
                return
            row = self._try(further, "pipeline")
            if row is None or self._best("pipeline") is not row:
                return

    def _try(self, setting: Setting, stage: Stage) -> Row | None:
        """Return a setting's row, running it unless that was done.

        None if the job cannot be done with it or no time is left.
        """
        if known := self._known(setting, stage):
            return known
        cost, left = self._cost(setting), self._until - (self._clock() - self._began)
        if cost is None or left <= 0:
            return None
        measured = self._refused(setting, stage, cost, left)
        if measured is None:
            measured = self._judged(setting, self._measure(setting, stage, left))
        row = Row(setting, stage, cost, measured)
        self.rows.append(row)
        return row

    def _refused(
        self, setting: Setting, stage: Stage, cost: Cost, left: float
    ) -> Measurement | None:
        """Return the verdict where it is known without running; else None."""
        if stage == "network":
            return None
        limit, needed = self._limits.memory, cost.footprint.peak_bytes(setting.depth)
        if limit is not None and self._memory_is_the_hosts() and needed > limit:
            return Measurement("too large", note="the chunks in flight alone")
        alone = self._known(replace(setting, depth=self._start.depth, chunk=None), "network")
        if alone is not None and alone.measured.verdict == "too large":
            return Measurement("too large", note="the network alone is")
        rates = [r.measured.rate for r in self._usable("network") if _same(r.setting, setting)]
        if rates and (least := cost.chunk_patches * 2 / max(rates)) > left:
            return Measurement("no time", note=f"two chunks take {least:.0f} s")
        return None

    def _judged(self, setting: Setting, found: Measurement) -> Measurement:
        """Hold what was measured against the limits."""
        if found.verdict != "ok":
            return found
        limits = self._limits
        if limits.memory is not None and found.peak_bytes > limits.memory:
            return replace(found, verdict="too large")
        device = found.device_bytes
        if limits.device_memory is not None and (device or 0) > limits.device_memory:
            return replace(found, verdict="too large")
        changed = found.difference is not None and not found.difference <= HARMLESS
        if changed and not setting.may_change_results:
            return replace(found, verdict="changes results")
        return found

    def _memory_is_the_hosts(self) -> bool:
        return all(row.measured.device_bytes is None for row in self.rows)

    def _known(self, setting: Setting, stage: Stage) -> Row | None:
        found = (row for row in self.rows if row.setting == setting and row.stage == stage)
        return next(found, None)

    def _usable(self, stage: Stage) -> Iterator[Row]:
        return (r for r in self.rows if r.stage == stage and r.work_seconds < inf)

    def _best(self, stage: Stage) -> Row | None:
        return choose([row for row in self.rows if row.stage == stage], self._start)

    def _outcome(self) -> SearchResult:
        """Choose by whole chunks if the best of the network was run so; else by the network."""
        stage, rows = self._decisive, tuple(self.rows)
        if stage == "network":  # whole chunks may still have shown what does not fit
            burst = [row.setting for row in rows if row.measured.verdict == "too large"]
            candidates = [r for r in rows if r.stage == stage and r.setting not in burst]
        else:
            candidates = [r for r in rows if r.stage == stage]
        best = choose(candidates, self._start)
        return SearchResult(rows, best, self._known(self._start, stage))


def choose(rows: Sequence[Row], start: Setting) -> Row | None:
    """Return the fastest row that can be used; None if there is none.

    A network is only compiled if that pays for its own time within this job. Of those within TIE
    of the fastest, one whose memory is within TIE of the smallest; of those,
    one that changes the fewest of the settings of `start`, the fastest of them.
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
    return min(small, key=lambda row: (_changes(row.setting, start), row.work_seconds))


def _changes(setting: Setting, start: Setting) -> int:
    names = Setting.__dataclass_fields__
    return sum(getattr(setting, name) != getattr(start, name) for name in names)


def _same(one: Setting, other: Setting) -> bool:
    """Tell whether two settings run the network alike."""
    return replace(one, depth=1, chunk=None) == replace(other, depth=1, chunk=None)


def _with_depth(setting: Setting, *, step: int) -> Setting | None:
    depth = setting.depth + step
    return replace(setting, depth=depth) if 1 <= depth <= MAX_DEPTH else None


def _with_chunk(setting: Setting, *, ladder: Sequence[Shape | None], step: int) -> Setting | None:
    place = list(ladder).index(setting.chunk) + step
    return replace(setting, chunk=ladder[place]) if 0 <= place < len(ladder) else None
