"""The search of `chunkq tune` over made-up machines: what it may try, and what it must choose."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

import pytest
from chunkq_worker.tune.memory import offered
from chunkq_worker.tune.search import (
    TIE,
    Cost,
    Limits,
    Measurement,
    Options,
    Row,
    Search,
    SearchResult,
    Setting,
    Stage,
    TrialStatus,
    choose,
)
from hypothesis import given
from hypothesis import strategies as st

from chunkq.footprint import Footprint

START = Setting(batch=4, depth=2)
CHUNKS = ((8,), None, (32,))
LENGTHS = {(8,): 8, None: 16, (32,): 32}


@dataclass
class Machine:
    """Rates and memory by formula, seconds by a clock of its own; notes what it was asked."""

    rate: dict[int, float] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    whole_memory: int = 0
    takes: Sequence[float] = (1.0,)
    verdicts: dict[int, TrialStatus] = field(default_factory=dict)
    compiled: float = 1.0
    compiling: float = 0.0
    difference: dict[int, float] = field(default_factory=dict)
    by_depth: dict[int, float] = field(default_factory=dict)
    by_chunk: dict[tuple[int, ...] | None, float] = field(default_factory=dict)
    patches: int = 64
    forbidden: tuple[tuple[int, ...] | None, ...] = ()
    now: float = 0.0
    asked: list[tuple[Setting, Stage, float]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def cost(self, setting: Setting) -> Cost | None:
        if setting.chunk in self.forbidden:
            return None
        length = LENGTHS[setting.chunk]
        arrays = Footprint(0, length, length, 0)
        return Cost(256 // length, 1000, 10 * length, arrays, self.patches, (length,))

    def measure(self, setting: Setting, stage: Stage, seconds: float) -> Measurement:
        wanted = self.takes[len(self.asked) % len(self.takes)]
        self.asked.append((setting, stage, seconds))
        self.now += min(wanted, seconds)
        if wanted > seconds:
            return Measurement("no time")
        verdict = self.verdicts.get(setting.batch, "ok")
        if verdict != "ok":
            return Measurement(verdict)
        rate = self.rate.get(setting.batch, 10.0) * (self.compiled if setting.compile else 1)
        memory = self.memory.get(setting.batch, 10)
        if stage == "pipeline":
            rate *= self.by_depth.get(setting.depth, 1.0) * self.by_chunk.get(setting.chunk, 1.0)
            memory += self.whole_memory * setting.depth
        difference = self.difference.get(setting.batch, 0.0)
        return Measurement("ok", rate, self._load(setting), memory, None, difference)

    def _load(self, setting: Setting) -> float:
        return 0.5 + (self.compiling if setting.compile else 0)

    def search(
        self,
        options: Options | None = None,
        memory: int | None = None,
        seconds: float = 1000.0,
        start: Setting = START,
    ) -> SearchResult:
        limits = Limits(memory, None, seconds)
        options = options or Options(chunks=CHUNKS)
        return Search(start, options, self.cost, self.measure, limits, self.clock).run()


def chosen(outcome: SearchResult) -> Setting:
    assert outcome.best is not None
    return outcome.best.setting


def tried(machine: Machine, stage: Stage) -> list[Setting]:
    return [setting for setting, where, _ in machine.asked if where == stage]


RATES = st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.floats(0.1, 1000))
MACHINES = st.builds(
    Machine,
    rate=RATES,
    memory=st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.integers(1, 100)),
    whole_memory=st.integers(0, 50),
    takes=st.lists(st.floats(0.1, 40), min_size=1, max_size=5),
    verdicts=st.dictionaries(
        st.sampled_from([1, 2, 8, 16, 32]), st.sampled_from(["failed", "too large", "no time"])
    ),
    compiled=st.floats(0.5, 2),
    difference=st.dictionaries(st.sampled_from([1, 8, 16]), st.sampled_from([1e-7, 1.0])),
    by_depth=st.dictionaries(st.integers(1, 6), st.floats(0.5, 2)),
    by_chunk=st.dictionaries(st.sampled_from(CHUNKS), st.floats(0.5, 2)),
    patches=st.sampled_from([1, 3, 8, 64]),
    forbidden=st.sampled_from([(), ((8,),), ((32,),)]),
)
OPTIONS = st.builds(
    Options,
    batches=st.booleans(),
    depths=st.booleans(),
    compile=st.booleans(),
    precisions=st.sampled_from([(), (("autocast", "bfloat16"),)]),
    patches=st.sampled_from([(), ((16,),), ((16,), (32,))]),
    chunks=st.just(CHUNKS),
)


@given(MACHINES, OPTIONS, st.integers(1, 120), st.floats(1, 400))
def test_what_is_chosen_was_run_and_never_took_more_than_the_memory_allowed(
    machine: Machine, options: Options, memory: int, seconds: float
) -> None:
    outcome = machine.search(options, memory, seconds)
    if outcome.best is None:
        return
    found = outcome.best.measured
    assert outcome.best in outcome.rows
    assert found.verdict == "ok"
    assert found.peak_bytes <= memory
    assert (outcome.best.setting, outcome.best.stage) in [(s, w) for s, w, _ in machine.asked]
    for row in outcome.rows:
        if row.measured.verdict == "ok":
            assert row.measured.peak_bytes <= memory
        if row.stage == "pipeline" and row.measured.verdict == "too large":
            assert row.setting != outcome.best.setting


@given(MACHINES, OPTIONS, st.floats(1, 400))
def test_it_ends_within_the_budget_and_asks_for_nothing_twice(
    machine: Machine, options: Options, seconds: float
) -> None:
    machine.search(options, None, seconds)
    assert machine.now <= seconds * (1 + 1e-9)
    assert all(0 < most <= seconds for _, _, most in machine.asked)
    what = [(setting, stage) for setting, stage, _ in machine.asked]
    assert len(set(what)) == len(what)


@given(MACHINES, OPTIONS, st.floats(1, 400))
def test_no_setting_that_was_run_alike_is_faster_than_the_one_chosen(
    machine: Machine, options: Options, seconds: float
) -> None:
    outcome = machine.search(options, None, seconds)
    if outcome.best is None:
        return
    best, stage = outcome.best, outcome.best.stage
    burst = {row.setting for row in outcome.rows if row.measured.verdict == "too large"}
    for row in outcome.rows:
        if row.stage == stage and row.setting not in burst and not row.setting.compile:
            assert best.work_seconds <= row.work_seconds * (1 + TIE)


@given(MACHINES, OPTIONS, st.floats(1, 400))
def test_only_what_was_asked_for_may_change_results(
    machine: Machine, options: Options, seconds: float
) -> None:
    outcome = machine.search(options, None, seconds)
    for setting, _, _ in machine.asked:
        assert options.compile or not setting.compile
        assert options.batches or setting.batch == START.batch
        assert options.depths or setting.depth in (START.depth, 1)
        assert setting.precision is None or setting.precision in options.precisions
        assert setting.patch is None or setting.patch in options.patches
        assert setting.chunk not in machine.forbidden
    best = outcome.best
    if best is not None and not best.setting.may_change_results:
        assert (best.measured.difference or 0) < 1e-3


def row(rate: float, memory: int, setting: Setting = START, patches: int = 100) -> Row:
    cost = Cost(1, patches, 0, Footprint(0, 1, 1, 0), 1, (1,))
    return Row(setting, "network", cost, Measurement("ok", rate, 0.0, memory))


@given(st.lists(st.builds(row, st.floats(0.1, 100), st.integers(1, 1000)), min_size=1))
def test_the_best_of_any_table_is_chosen_and_ties_go_to_less_memory(rows: list[Row]) -> None:
    best = choose(rows, START)
    assert best is not None
    fastest = min(r.work_seconds for r in rows)
    assert best.work_seconds <= fastest * (1 + TIE)
    tied = [r for r in rows if r.work_seconds <= fastest * (1 + TIE)]
    assert best.memory <= min(r.memory for r in tied) * (1 + TIE)


def test_in_a_tie_of_time_and_memory_the_job_stays_as_it_is() -> None:
    other = replace(START, batch=8)
    assert choose([row(101, 100, other), row(100, 101)], START) == row(100, 101)
    assert choose([row(101, 50, other), row(100, 101)], START) == row(101, 50, other)
    assert choose([row(110, 500, other), row(100, 1)], START) == row(110, 500, other)
    assert choose([], START) is None


def test_of_patches_of_different_sizes_the_whole_job_counts() -> None:
    small, large = row(100, 1, patches=1000), row(20, 1, replace(START, patch=(9,)), patches=100)
    assert choose([small, large], START) is large


def test_batches_double_until_that_no_longer_helps() -> None:
    machine = Machine(rate={1: 1, 2: 2, 4: 4, 8: 8, 16: 8, 32: 8, 64: 99})
    outcome = machine.search()
    assert [s.batch for s in tried(machine, "network")] == [4, 8, 16, 32, 2]
    assert chosen(outcome).batch == 8


def test_batches_are_never_larger_than_what_a_chunk_fills() -> None:
    machine = Machine(rate={n: float(n) for n in (1, 2, 4, 8, 16)}, patches=6)
    machine.search()
    assert [s.batch for s in tried(machine, "network")] == [4, 8, 2]


def test_smaller_batches_win_where_larger_ones_are_no_faster() -> None:
    machine = Machine(memory={1: 10, 2: 20, 4: 40, 8: 80, 16: 160})
    assert chosen(machine.search()).batch == 1


def test_a_job_that_is_too_large_for_memory_comes_down_to_what_fits() -> None:
    machine = Machine(verdicts={4: "too large"}, memory={1: 10, 2: 200})
    outcome = machine.search(memory=100)
    assert [(r.setting.batch, r.measured.verdict) for r in outcome.rows[:3]] == [
        (4, "too large"),
        (2, "too large"),
        (1, "ok"),
    ]
    assert chosen(outcome).batch == 1


def test_what_is_too_large_by_itself_is_not_run_with_whole_chunks() -> None:
    machine = Machine(memory={4: 200, 2: 10, 1: 10})
    machine.search(memory=100)
    assert START not in tried(machine, "pipeline")


def test_a_runner_up_is_run_where_the_best_of_the_network_disappoints() -> None:
    machine = Machine(rate={4: 10, 8: 20}, compiled=1.5)

    def measure(setting: Setting, stage: Stage, seconds: float) -> Measurement:
        found = Machine.measure(machine, setting, stage, seconds)
        slow = stage == "pipeline" and setting.compile
        return replace(found, rate=found.rate / 9) if slow else found

    limits, options = Limits(None, None, 1000.0), Options(compile=True)
    outcome = Search(START, options, machine.cost, measure, limits, machine.clock).run()
    assert (chosen(outcome).batch, chosen(outcome).compile) == (8, False)


def test_where_nothing_fits_nothing_is_chosen() -> None:
    outcome = Machine().search(memory=1)
    assert outcome.best is None
    assert {row.measured.verdict for row in outcome.rows} == {"too large"}


def test_whole_chunks_that_do_not_fit_give_way_to_fewer_in_flight() -> None:
    machine = Machine(whole_memory=40, memory={1: 10, 2: 10, 4: 10, 8: 10})
    outcome = machine.search(memory=60)
    assert chosen(outcome).depth == 1


def test_depth_and_chunk_size_follow_what_whole_chunks_show() -> None:
    machine = Machine(by_depth={3: 1.5, 4: 1.8, 5: 1.8}, by_chunk={(32,): 2.0})
    best = chosen(machine.search())
    assert (best.depth, best.chunk) == (4, (32,))


def test_a_job_that_cannot_be_cut_that_way_is_never_run() -> None:
    machine = Machine(by_chunk={(32,): 9.0}, forbidden=((32,),))
    assert chosen(machine.search()).chunk is None


def test_compiling_is_chosen_only_if_it_pays() -> None:
    options = Options(compile=True)
    assert chosen(Machine(compiled=2.0).search(options)).compile
    assert not chosen(Machine(compiled=1.01).search(options)).compile
    assert not chosen(Machine(compiled=2.0, compiling=500.0).search(options)).compile
    assert chosen(Machine(compiled=2.0, compiling=5.0).search(options)).compile


def test_a_network_that_mixes_the_items_of_a_batch_keeps_its_batch_size() -> None:
    machine = Machine(rate={8: 100, 16: 200}, difference={8: 0.1, 16: 0.1, 2: 0.1})
    outcome = machine.search()
    assert chosen(outcome).batch == 4
    verdicts = {r.setting.batch: r.measured.verdict for r in outcome.rows}
    assert verdicts[8] == "changes results"


def test_what_differs_by_nan_is_not_chosen() -> None:
    machine = Machine(rate={8: 100}, difference={8: inf})
    assert chosen(machine.search()).batch != 8


def test_a_precision_that_was_asked_for_may_differ() -> None:
    machine = Machine(rate={4: 10, 8: 5, 16: 5, 2: 5})
    fast = ("autocast", "bfloat16")

    def measure(setting: Setting, stage: Stage, seconds: float) -> Measurement:
        found = Machine.measure(machine, setting, stage, seconds)
        return replace(found, rate=99, difference=0.2) if setting.precision else found

    limits = Limits(None, None, 1000.0)
    options = Options(precisions=[fast])
    outcome = Search(START, options, machine.cost, measure, limits, machine.clock).run()
    assert chosen(outcome).precision == fast


def test_without_time_for_whole_chunks_the_network_decides() -> None:
    machine = Machine(rate={8: 20.0}, takes=[1, 1, 1, 1, 1, 100])
    outcome = machine.search(seconds=20)
    assert outcome.best is not None
    assert (outcome.best.stage, outcome.best.setting.batch) == ("network", 8)


def test_chunks_that_would_take_longer_than_what_is_left_are_not_begun() -> None:
    machine = Machine(rate=dict.fromkeys((1, 2, 4, 8, 16), 0.1))
    outcome = machine.search(seconds=100)
    assert tried(machine, "pipeline") == []
    assert outcome.rows[-1].measured.verdict == "no time"


@pytest.mark.parametrize("verdict", ["failed", "no time"])
def test_a_job_that_does_not_run_as_it_is_ends_the_search(verdict: TrialStatus) -> None:
    machine = Machine(verdicts={4: verdict})
    outcome = machine.search()
    assert outcome.best is None
    assert len(machine.asked) == 1


def test_memory_is_what_the_narrowest_group_around_this_process_leaves(tmp_path: Path) -> None:
    own, groups = tmp_path / "own", tmp_path / "groups"
    inner = groups / "job" / "step"
    inner.mkdir(parents=True)
    own.write_text("0::/job/step\n")
    whole = offered(groups, own)
    assert whole > 5000
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("7\n")
    (groups / "job" / "memory.max").write_text("5000\n")
    (groups / "job" / "memory.current").write_text("1000\n")
    assert offered(groups, own) == 4000
    first = groups / "memory" / "job_7"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("900\n")
    (first / "memory.usage_in_bytes").write_text("1000\n")
    own.write_text("4:memory:/job_7\n0::/job/step\n")
    assert offered(groups, own) == 0
    assert offered(groups, tmp_path / "nothing") > 5000
