"""The search of `chunkq tune` on simulated machines: what it measures and what it chooses."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

import pytest
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

from chunkq.plan.footprint import Footprint
from chunkq.system.available_memory import available_memory

START = Setting(batch=4, depth=2)
CHUNKS = ((8,), None, (32,))
LENGTHS = {(8,): 8, None: 16, (32,): 32}


@dataclass
class SimulatedMachine:
    """Return rates and memory from formulas, with its own clock; record the requests.

    `rate` (patches/s), `memory` (bytes), `statuses` and `difference` are by batch size. A
    measurement needs one of `seconds_needed`, in turns; `pipeline_memory` is per chunk in flight.
    """

    rate: dict[int, float] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    pipeline_memory: int = 0
    seconds_needed: Sequence[float] = (1.0,)
    statuses: dict[int, TrialStatus] = field(default_factory=dict)
    compiled: float = 1.0
    compile_seconds: float = 0.0
    difference: dict[int, float] = field(default_factory=dict)
    by_depth: dict[int, float] = field(default_factory=dict)
    by_chunk: dict[tuple[int, ...] | None, float] = field(default_factory=dict)
    patches: int = 64
    invalid_chunks: tuple[tuple[int, ...] | None, ...] = ()
    now: float = 0.0
    requests: list[tuple[Setting, Stage, float]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def cost(self, setting: Setting) -> Cost | None:
        if setting.chunk in self.invalid_chunks:
            return None
        length = LENGTHS[setting.chunk]
        arrays = Footprint(0, length, length, 0)
        return Cost(256 // length, 1000, 10 * length, arrays, self.patches, (length,))

    def measure(self, setting: Setting, stage: Stage, seconds: float) -> Measurement:
        needed = self.seconds_needed[len(self.requests) % len(self.seconds_needed)]
        self.requests.append((setting, stage, seconds))
        self.now += min(needed, seconds)
        if needed > seconds:
            return Measurement("no time")
        status = self.statuses.get(setting.batch, "ok")
        if status != "ok":
            return Measurement(status)
        rate = self.rate.get(setting.batch, 10.0) * (self.compiled if setting.compile else 1)
        memory = self.memory.get(setting.batch, 10)
        if stage == "pipeline":
            rate *= self.by_depth.get(setting.depth, 1.0) * self.by_chunk.get(setting.chunk, 1.0)
            memory += self.pipeline_memory * setting.depth
        difference = self.difference.get(setting.batch, 0.0)
        load_seconds = self._load_seconds(setting)
        return Measurement("ok", rate, load_seconds, memory, None, difference=difference)

    def _load_seconds(self, setting: Setting) -> float:
        return 0.5 + (self.compile_seconds if setting.compile else 0)

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


def chosen(result: SearchResult) -> Setting:
    assert result.best is not None
    return result.best.setting


def settings_of(machine: SimulatedMachine, stage: Stage) -> list[Setting]:
    return [setting for setting, s, _ in machine.requests if s == stage]


RATES = st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.floats(0.1, 1000))
MACHINES = st.builds(
    SimulatedMachine,
    rate=RATES,
    memory=st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.integers(1, 100)),
    pipeline_memory=st.integers(0, 50),
    seconds_needed=st.lists(st.floats(0.1, 40), min_size=1, max_size=5),
    statuses=st.dictionaries(
        st.sampled_from([1, 2, 8, 16, 32]), st.sampled_from(["failed", "too large", "no time"])
    ),
    compiled=st.floats(0.5, 2),
    difference=st.dictionaries(st.sampled_from([1, 8, 16]), st.sampled_from([1e-7, 1.0])),
    by_depth=st.dictionaries(st.integers(1, 6), st.floats(0.5, 2)),
    by_chunk=st.dictionaries(st.sampled_from(CHUNKS), st.floats(0.5, 2)),
    patches=st.sampled_from([1, 3, 8, 64]),
    invalid_chunks=st.sampled_from([(), ((8,),), ((32,),)]),
)
OPTIONS = st.builds(
    Options,
    batches=st.booleans(),
    depths=st.booleans(),
    switches=st.sampled_from([(), ("compile",), ("channels_last", "cuda_graph", "compile")]),
    shown_precisions=st.sampled_from([(), (("precision", "float16"),)]),
    precisions=st.sampled_from([(), (("precision", "bfloat16"),)]),
    patches=st.sampled_from([(), ((16,),), ((16,), (32,))]),
    chunks=st.just(CHUNKS),
)


@given(MACHINES, OPTIONS, st.integers(1, 120), st.floats(1, 400))
def test_the_chosen_setting_was_measured_within_the_memory_limit(
    machine: SimulatedMachine, options: Options, memory: int, seconds: float
) -> None:
    result = machine.search(options, memory, seconds)
    if result.best is None:
        return
    assert result.best in result.rows
    assert result.best.measurement.status == "ok"
    assert result.best.measurement.peak_bytes <= memory
    assert (result.best.setting, result.best.stage) in [request[:2] for request in machine.requests]
    for row in result.rows:
        if row.measurement.status == "ok":
            assert row.measurement.peak_bytes <= memory
        if row.stage == "pipeline" and row.measurement.status == "too large":
            assert row.setting != result.best.setting


@given(MACHINES, OPTIONS, st.floats(1, 400))
def test_the_search_ends_in_time_and_measures_no_setting_twice(
    machine: SimulatedMachine, options: Options, seconds: float
) -> None:
    machine.search(options, None, seconds)
    assert machine.now <= seconds * (1 + 1e-9)
    assert all(0 < limit <= seconds for _, _, limit in machine.requests)
    runs = [(setting, stage) for setting, stage, _ in machine.requests]
    assert len(set(runs)) == len(runs)


@given(MACHINES, OPTIONS, st.floats(1, 400))
def test_no_setting_of_the_same_stage_is_faster_than_the_chosen_one(
    machine: SimulatedMachine, options: Options, seconds: float
) -> None:
    result = machine.search(options, None, seconds)
    if result.best is None:
        return
    best, stage = result.best, result.best.stage
    too_large = {row.setting for row in result.rows if row.measurement.status == "too large"}
    for row in result.rows:
        if row.stage == stage and row.setting not in too_large and not row.setting.compile:
            assert best.work_seconds <= row.work_seconds * (1 + TIE)


@given(MACHINES, OPTIONS, st.floats(1, 400))
def test_only_requested_options_may_change_results(
    machine: SimulatedMachine, options: Options, seconds: float
) -> None:
    result = machine.search(options, None, seconds)
    for setting, _, _ in machine.requests:
        for switch in ("compile", "channels_last", "cuda_graph"):
            assert switch in options.switches or not getattr(setting, switch)
        assert options.batches or setting.batch == START.batch
        assert options.depths or setting.depth in (START.depth, 1)
        shown = options.shown_precisions
        assert setting.precision in (None, *options.precisions, *shown)
        assert setting.patch is None or setting.patch in options.patches
        assert setting.chunk not in machine.invalid_chunks
    best = result.best
    if best is not None and best.setting.precision is None and best.setting.patch is None:
        assert (best.measurement.difference or 0) < 1e-3


def row(rate: float, memory: int, setting: Setting = START, patches: int = 100) -> Row:
    cost = Cost(1, patches, 0, Footprint(0, 1, 1, 0), 1, (1,))
    return Row(setting, "network", cost, Measurement("ok", rate, 0.0, memory))


@given(st.lists(st.builds(row, st.floats(0.1, 100), st.integers(1, 1000)), min_size=1))
def test_the_fastest_row_is_chosen_and_ties_go_to_less_memory(rows: list[Row]) -> None:
    best = choose(rows, START)
    assert best is not None
    fastest = min(r.work_seconds for r in rows)
    assert best.work_seconds <= fastest * (1 + TIE)
    tied = [r for r in rows if r.work_seconds <= fastest * (1 + TIE)]
    assert best.memory <= min(r.memory for r in tied) * (1 + TIE)


def test_in_a_tie_of_time_and_memory_the_job_is_not_changed() -> None:
    other = replace(START, batch=8)
    assert choose([row(101, 100, other), row(100, 101)], START) == row(100, 101)
    assert choose([row(101, 50, other), row(100, 101)], START) == row(101, 50, other)
    assert choose([row(110, 500, other), row(100, 1)], START) == row(110, 500, other)
    assert choose([], START) is None


def test_patch_sizes_are_compared_by_the_time_of_the_job() -> None:
    small, large = row(100, 1, patches=1000), row(20, 1, replace(START, patch=(9,)), patches=100)
    assert choose([small, large], START) is large


def test_the_batch_size_doubles_until_that_is_no_longer_faster() -> None:
    machine = SimulatedMachine(rate={1: 1, 2: 2, 4: 4, 8: 8, 16: 8, 32: 8, 64: 99})
    result = machine.search()
    assert [s.batch for s in settings_of(machine, "network")] == [4, 8, 16, 32, 2]
    assert chosen(result).batch == 8


def test_a_batch_is_not_larger_than_needed_for_the_patches_of_a_chunk() -> None:
    machine = SimulatedMachine(rate={n: float(n) for n in (1, 2, 4, 8, 16)}, patches=6)
    machine.search()
    assert [s.batch for s in settings_of(machine, "network")] == [4, 8, 2]


def test_smaller_batches_are_chosen_if_larger_ones_are_not_faster() -> None:
    machine = SimulatedMachine(memory={1: 10, 2: 20, 4: 40, 8: 80, 16: 160})
    assert chosen(machine.search()).batch == 1


def test_the_batch_size_of_a_job_that_is_too_large_is_halved_until_it_fits() -> None:
    machine = SimulatedMachine(statuses={4: "too large"}, memory={1: 10, 2: 200})
    result = machine.search(memory=100)
    assert [(r.setting.batch, r.measurement.status) for r in result.rows[:3]] == [
        (4, "too large"),
        (2, "too large"),
        (1, "ok"),
    ]
    assert chosen(result).batch == 1


def test_a_setting_that_is_too_large_in_stage_network_does_not_run_in_stage_pipeline() -> None:
    machine = SimulatedMachine(memory={4: 200, 2: 10, 1: 10})
    machine.search(memory=100)
    assert START not in settings_of(machine, "pipeline")


def test_the_next_best_setting_runs_if_the_best_one_is_slow_in_stage_pipeline() -> None:
    machine = SimulatedMachine(rate={4: 10, 8: 20}, compiled=1.5)

    def measure(setting: Setting, stage: Stage, seconds: float) -> Measurement:
        measurement = SimulatedMachine.measure(machine, setting, stage, seconds)
        slow = stage == "pipeline" and setting.compile
        return replace(measurement, rate=measurement.rate / 9) if slow else measurement

    limits, options = Limits(None, None, 1000.0), Options(switches=["compile"])
    result = Search(START, options, machine.cost, measure, limits, machine.clock).run()
    assert (chosen(result).batch, chosen(result).compile) == (8, False)


def test_nothing_is_chosen_if_nothing_fits() -> None:
    result = SimulatedMachine().search(memory=1)
    assert result.best is None
    assert {row.measurement.status for row in result.rows} == {"too large"}


def test_fewer_chunks_are_in_flight_if_more_do_not_fit() -> None:
    machine = SimulatedMachine(pipeline_memory=40, memory={1: 10, 2: 10, 4: 10, 8: 10})
    result = machine.search(memory=60)
    assert chosen(result).depth == 1


def test_depth_and_chunk_size_are_chosen_in_stage_pipeline() -> None:
    machine = SimulatedMachine(by_depth={3: 1.5, 4: 1.8, 5: 1.8}, by_chunk={(32,): 2.0})
    best = chosen(machine.search())
    assert (best.depth, best.chunk) == (4, (32,))


def test_an_invalid_chunk_shape_is_not_measured() -> None:
    machine = SimulatedMachine(by_chunk={(32,): 9.0}, invalid_chunks=((32,),))
    assert chosen(machine.search()).chunk is None


def test_compiling_is_chosen_only_if_the_job_is_faster_including_the_compile_time() -> None:
    options = Options(switches=["compile"])
    assert chosen(SimulatedMachine(compiled=2.0).search(options)).compile
    assert not chosen(SimulatedMachine(compiled=1.01).search(options)).compile
    assert not chosen(SimulatedMachine(compiled=2.0, compile_seconds=500.0).search(options)).compile
    assert chosen(SimulatedMachine(compiled=2.0, compile_seconds=5.0).search(options)).compile


def test_a_network_that_mixes_the_items_of_a_batch_keeps_its_batch_size() -> None:
    machine = SimulatedMachine(rate={8: 100, 16: 200}, difference={8: 0.1, 16: 0.1, 2: 0.1})
    result = machine.search()
    assert chosen(result).batch == 4
    statuses = {r.setting.batch: r.measurement.status for r in result.rows}
    assert statuses[8] == "changes results"


def test_a_setting_whose_output_differs_by_nan_is_not_chosen() -> None:
    machine = SimulatedMachine(rate={8: 100}, difference={8: inf})
    assert chosen(machine.search()).batch != 8


def test_a_requested_precision_may_change_results() -> None:
    machine = SimulatedMachine(rate={4: 10, 8: 5, 16: 5, 2: 5})
    fast = ("precision", "bfloat16")

    def measure(setting: Setting, stage: Stage, seconds: float) -> Measurement:
        measurement = SimulatedMachine.measure(machine, setting, stage, seconds)
        if setting.precision is None:
            return measurement
        return replace(measurement, rate=99, difference=0.2)

    limits = Limits(None, None, 1000.0)
    options = Options(precisions=[fast])
    result = Search(START, options, machine.cost, measure, limits, machine.clock).run()
    assert chosen(result).precision == fast


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ({None: 0.0, "float16": 0.01}, None),
        ({None: 0.0, "float16": 0.9e-4}, "float16"),  # within the bound
        # Also where the job's own settings differ as much: others need a request.
        ({None: 0.01, "float16": 0.01}, None),
        ({None: 0.0, "float16": inf}, None),
    ],
)
def test_a_precision_that_changes_results_is_chosen_only_on_request(
    differences: dict[str | None, float], expected: str | None
) -> None:
    machine = SimulatedMachine()

    def measure(setting: Setting, stage: Stage, seconds: float) -> Measurement:
        measurement = SimulatedMachine.measure(machine, setting, stage, seconds)
        name = None if setting.precision is None else setting.precision[1]
        rate = measurement.rate * (1 if name is None else 9)
        return replace(measurement, rate=rate, difference=differences[name])

    limits, half = Limits(None, None, 1000.0), ("precision", "float16")
    for options in (Options(shown_precisions=[half]), Options(precisions=[half])):
        result = Search(START, options, machine.cost, measure, limits, machine.clock).run()
        row = next(row for row in result.rows if row.setting.precision == half)
        assert row.measurement.rate > 0  # it is shown
        precision = chosen(result).precision
        if options.precisions:
            assert precision == (half if differences["float16"] < inf else None)
        else:
            assert precision == (None if expected is None else ("precision", expected))


def test_a_setting_may_differ_twice_as_much_as_the_job_itself() -> None:
    for difference, batch in ((0.0019, 8), (0.0021, 4)):
        machine = SimulatedMachine(rate={8: 20.0, 2: 1.0}, difference={4: 0.001, 8: difference})
        assert chosen(machine.search()).batch == batch


def test_the_first_batch_that_fits_stands_for_the_job() -> None:
    """With TF32 every batch size differs from float32."""
    machine = SimulatedMachine(
        statuses={4: "too large"}, rate={1: 9.0, 2: 10.0}, difference={1: 0.01, 2: 0.01}
    )
    assert chosen(machine.search()).batch == 2


def test_without_time_for_stage_pipeline_stage_network_decides() -> None:
    machine = SimulatedMachine(rate={8: 20.0}, seconds_needed=[1, 1, 1, 1, 1, 100])
    result = machine.search(seconds=20)
    assert result.best is not None
    assert (result.best.stage, result.best.setting.batch) == ("network", 8)


def test_chunks_that_would_exceed_the_remaining_time_are_not_started() -> None:
    machine = SimulatedMachine(rate=dict.fromkeys((1, 2, 4, 8, 16), 0.1))
    result = machine.search(seconds=100)
    assert settings_of(machine, "pipeline") == []
    assert result.rows[-1].measurement.status == "no time"


@pytest.mark.parametrize("status", ["failed", "no time"])
def test_a_job_that_does_not_run_with_its_own_settings_ends_the_search(status: TrialStatus) -> None:
    machine = SimulatedMachine(statuses={4: status})
    result = machine.search()
    assert result.best is None
    assert len(machine.requests) == 1


def test_available_memory_is_the_smallest_remainder_of_the_control_groups(tmp_path: Path) -> None:
    membership, root = tmp_path / "membership", tmp_path / "groups"
    group = root / "job" / "step"
    group.mkdir(parents=True)
    membership.write_text("0::/job/step\n")
    assert available_memory(root, membership) > 5000
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("7\n")
    (root / "job" / "memory.max").write_text("5000\n")
    (root / "job" / "memory.current").write_text("1000\n")
    assert available_memory(root, membership) == 4000
    group_v1 = root / "memory" / "job_7"
    group_v1.mkdir(parents=True)
    (group_v1 / "memory.limit_in_bytes").write_text("900\n")
    (group_v1 / "memory.usage_in_bytes").write_text("1000\n")
    membership.write_text("4:memory:/job_7\n0::/job/step\n")
    assert available_memory(root, membership) == 0
    assert available_memory(root, tmp_path / "nothing") > 5000
