"""Each patch once, each byte once: what was computed and moved, by several independent counts."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from chunkq_worker.run import run_task

from chunkq.executors.base import Attempt
from chunkq.finalize import complete_block, finalize_job
from chunkq.ledger import JobFolder
from chunkq.plan import Costs, Index
from chunkq.tasks import Task, chunk_name
from tests.integration.support import Place, files_below, materials
from tests.waiting import PATIENCE

SHAPE = (48, 44, 48)
STEP = 4
"""The stride, and the input's storage chunk: halos begin and end on storage chunks."""
KEYS = {
    "strides": [STEP, STEP, STEP],
    "chunksize": [24, 24, 24],
    "storage_chunks": [8, 8, 8],
    "model": {"max_batch_size": 32},
}


@dataclass
class Traffic:
    """Bytes that tensorstore has read from and written to files so far, in this process."""

    read: int
    written: int

    @classmethod
    def so_far(cls) -> "Traffic":
        prefix = "/tensorstore/kvstore/file/"
        found = tensorstore.experimental_collect_matching_metrics(prefix)
        totals = {m["name"]: sum(v["value"] for v in m["values"] if "value" in v) for m in found}
        # A counter that never counted is not listed.
        return cls(totals.get(prefix + "bytes_read", 0), totals.get(prefix + "bytes_written", 0))

    def since(self, before: "Traffic") -> "Traffic":
        return Traffic(self.read - before.read, self.written - before.written)


@dataclass(frozen=True)
class Measured:
    """A job done in this process, and what was seen from outside while it went on."""

    place: Place
    costs: Costs
    plan_command: dict[str, Any]
    inferring: Traffic
    finalizing: Traffic
    pieces: dict[str, bytes]
    output: dict[str, bytes]


def infer_all(place: Place, attempt: int = 1) -> None:
    for index in place.job.plan.indices():
        run_task(Task("infer", place.job.folder.path, index), Attempt(attempt, "here"))


def pieces_of(place: Place) -> dict[str, bytes]:
    return files_below(place.job_folder / "pieces")


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, environment: pytest.MonkeyPatch) -> Measured:
    folder = tmp_path_factory.mktemp("measured")
    chunks = (STEP,) * 3
    array = zarr.create_array(
        folder / "raw.zarr", shape=SHAPE, chunks=chunks, dtype="uint8", compressors=None
    )
    array[:] = np.random.default_rng(3).integers(1, 200, SHAPE, dtype=np.uint8)
    keys = {**KEYS, "input": str(folder / "raw.zarr")}
    place = Place(materials(tmp_path_factory.mktemp), folder, keys)
    environment.setenv("NET_TRACE", str(folder / "trace"))
    plan_command = json.loads(place.command("plan", str(place.job_file), "--json").out)
    place.produce()

    before = Traffic.so_far()
    infer_all(place)
    inferring = Traffic.so_far().since(before)
    pieces = pieces_of(place)
    before = Traffic.so_far()
    place.finish()
    finalizing = Traffic.so_far().since(before)
    costs = place.job.plan.costs
    return Measured(place, costs, plan_command, inferring, finalizing, pieces, place.stored())


def test_the_network_sees_every_patch_exactly_once(measured: Measured) -> None:
    seen = measured.place.computed()
    per_axis = [(size - 8) // STEP + 1 for size in SHAPE]
    assert measured.costs.patches == np.prod(per_axis)
    assert len(seen) == seen.total() == measured.costs.patches
    records = [measured.place.record(name) for name in measured.place.done()]
    assert sum(record["patches"] for record in records) == measured.costs.patches
    assert measured.place.report()["patches"] == measured.costs.patches
    assert measured.plan_command["patches"] == measured.costs.patches
    assert measured.plan_command["recompute_factor"] == 1.0


def test_the_bytes_in_the_records_are_those_that_the_plan_predicts(measured: Measured) -> None:
    moved, planned = measured.place.report()["bytes"], measured.plan_command
    expected = {
        "input": planned["input_bytes"],
        "output": planned["output_bytes"],
        "pieces_written": planned["piece_bytes"],
        "pieces_read": planned["piece_bytes"],
    }
    assert moved.keys() == expected.keys()
    for key, number in expected.items():
        assert number <= moved[key] <= 1.1 * number, key
    assert moved["output"] == np.prod(SHAPE) * 2 * 4


def test_no_more_bytes_move_than_input_with_halos_output_and_two_times_the_pieces(
    measured: Measured,
) -> None:
    """Counted by tensorstore and by file sizes, not by chunkq."""
    costs, output_on_disk = measured.costs, sum(map(len, measured.output.values()))
    piece_bytes = sum(map(len, measured.pieces.values()))
    assert costs.input_bytes <= measured.inferring.read <= 1.1 * costs.input_bytes
    assert measured.finalizing.read < 0.1 * costs.input_bytes
    assert costs.piece_bytes <= piece_bytes <= 1.1 * costs.piece_bytes
    written = measured.inferring.written + measured.finalizing.written
    # Each output object is written once: no more bytes go out than lie there at the end.
    assert written <= output_on_disk <= 1.1 * costs.output_bytes
    moved = measured.inferring.read + measured.finalizing.read + written + 2 * piece_bytes
    assert moved <= 1.1 * costs.store_bytes


def test_every_piece_has_one_writer_and_one_reader(measured: Measured) -> None:
    plan = measured.place.job.plan
    chunks = [plan.chunk(index) for index in plan.indices()]
    left = [f"{chunk_name(p.target)}/{p.name}" for chunk in chunks for p in plan.leaves(chunk)]
    own = [f"{chunk_name(c.index)}/own" for c in chunks if c.active and c.has_band]
    awaited = [f"{chunk_name(c.index)}/{p.name}" for c in chunks for p in plan.awaits(c)]
    assert len(set(left)) == len(left)
    assert sorted(left) == sorted(awaited)
    assert sorted(measured.pieces) == sorted(left + own)
    assert pieces_of(measured.place) == {}


def test_a_committed_chunk_run_again_is_not_computed_read_or_written(measured: Measured) -> None:
    place = measured.place
    records, computed, before = place.done(), place.computed(), Traffic.so_far()
    infer_all(place, attempt=2)
    assert place.done() == records
    assert place.computed() == computed
    assert Traffic.so_far().since(before) == Traffic(0, 0)
    assert pieces_of(place) == {}


def test_a_zombie_that_recomputes_every_chunk_after_all_is_sealed_changes_no_byte(
    measured: Measured,
) -> None:
    place = measured.place
    for name in place.done():
        (place.job_folder / "done" / "infer" / name).unlink()
    computed = place.computed()
    infer_all(place, attempt=2)
    assert place.computed() == computed + computed
    assert place.stored() == measured.output
    # What it left for blocks that are long complete is what had been there before.
    assert pieces_of(place).items() <= measured.pieces.items()
    place.finish()
    assert pieces_of(place) == {}
    assert place.stored() == measured.output


@pytest.mark.parametrize("index", [(0, 0, 0), (0, 1, 0), (1, 1, 1)], ids=chunk_name)
def test_a_zombie_overtaken_while_it_computes_tidies_up_after_itself(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, index: Index
) -> None:
    place, looks = measured.place, 0
    records, computed = place.done(), place.computed()
    is_committed = JobFolder.is_committed

    def not_at_first(folder: JobFolder, kind: str, chunk: Index) -> bool:
        nonlocal looks
        if kind == "infer" and chunk == index:
            looks += 1
            if looks == 1:
                return False
        return is_committed(folder, kind, chunk)

    monkeypatch.setattr(JobFolder, "is_committed", not_at_first)
    run_task(Task("infer", place.job.folder.path, index), Attempt(2, "zombie"))
    assert looks > 1
    assert place.computed().total() > computed.total()
    assert place.done() == records
    assert pieces_of(place) == {}
    assert place.stored() == measured.output


@pytest.fixture(scope="module")
def inferred(measured: Measured, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same job, all computed and nothing finalized."""
    folder = tmp_path_factory.mktemp("inferred")
    place = Place(measured.place.materials, folder, measured.place.keys)
    place.produce()
    infer_all(place)
    return place


def test_a_zombie_that_rewrites_pieces_before_finalizing_writes_the_same_bytes(
    measured: Measured, inferred: Place
) -> None:
    assert pieces_of(inferred) == measured.pieces
    for name in inferred.done():
        (inferred.job_folder / "done" / "infer" / name).unlink()
    infer_all(inferred, attempt=2)
    assert pieces_of(inferred) == measured.pieces


class Killed(BaseException):
    """Stands for the end of the process."""


def killed(*_: object) -> None:
    raise Killed


def test_finalizers_that_die_or_work_at_the_same_time_end_with_the_same_bytes(
    measured: Measured, inferred: Place
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobFolder, "delete_pieces", killed)
        with pytest.raises(Killed):
            finalize_job(inferred.job, worker="killed", threads=1)
    assert inferred.done("finalize")
    assert pieces_of(inferred) == measured.pieces
    reports: list[dict[str, Any]] = []
    twins = [
        threading.Thread(target=lambda: reports.append(finalize_job(inferred.job, worker="twin")))
        for _ in range(2)
    ]
    for twin in twins:
        twin.start()
    for twin in twins:
        twin.join(PATIENCE)
    assert [report["missing"] for report in reports] == [[], []]
    assert pieces_of(inferred) == {}
    assert inferred.stored() == measured.output


def test_a_finalizer_that_comes_late_takes_no_chunk_back(measured: Measured) -> None:
    place = measured.place
    records, blocks = place.done(), place.done("finalize")
    for index in place.job.plan.to_finalize():
        complete_block(place.job, index, Attempt(2, "late"))
    assert (place.done(), place.done("finalize")) == (records, blocks)
    assert place.stored() == measured.output
