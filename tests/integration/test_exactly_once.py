"""Each patch is computed once and each byte moved once, by several independent counts."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from chunkq_worker.run_task import run_task

from chunkq import seams
from chunkq.finalize import finalize_job
from chunkq.job.ledger import CRC_BYTES, ItemLedger
from chunkq.job.tasks import Task, chunk_name
from chunkq.plan.chunk import Index
from chunkq.plan.costs import Costs
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.finalize import FinalizeStage
from tests.harness.files import files_below
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import TIMEOUT

SHAPE = (48, 44, 48)
STEP = 4
"""The stride and the edge of the input's storage chunks, so that halos are aligned to them."""
KEYS = {
    "strides": [STEP, STEP, STEP],
    "chunksize": [24, 24, 24],
    "storage_chunks": [8, 8, 8],
    "model": {"max_batch_size": 32},
}


@dataclass
class Traffic:
    """Bytes that tensorstore has read from and written to files in this process."""

    read: int
    written: int

    @classmethod
    def so_far(cls) -> "Traffic":
        prefix = "/tensorstore/kvstore/file/"
        metrics = tensorstore.experimental_collect_matching_metrics(prefix)
        totals = {m["name"]: sum(v["value"] for v in m["values"] if "value" in v) for m in metrics}
        # tensorstore does not list counters that are 0.
        return cls(totals.get(prefix + "bytes_read", 0), totals.get(prefix + "bytes_written", 0))

    def since(self, before: "Traffic") -> "Traffic":
        return Traffic(self.read - before.read, self.written - before.written)


@dataclass(frozen=True)
class MeasuredJob:
    """A job that was run in this process, with the traffic and the files that were observed."""

    workspace: StandardWorkspace
    costs: Costs
    plan_command: dict[str, Any]
    inferring: Traffic
    finalizing: Traffic
    pieces: dict[str, bytes]
    output: dict[str, bytes]


def infer_all(workspace: StandardWorkspace, attempt: int = 1) -> None:
    for index in workspace.item.plan.active_indices():
        run_task(Task("infer", *workspace.job.id, 0, index), Attempt(attempt, "worker"))


def pieces_of(workspace: StandardWorkspace) -> dict[str, bytes]:
    return files_below(workspace.pieces_folder())


def without_epoch(pieces: dict[str, bytes], epoch: str) -> dict[str, bytes]:
    """Return pieces without the epoch in their first line and without the checksum over it."""
    return {
        name: content[:-CRC_BYTES].replace(epoch.encode(), b"", 1)
        for name, content in pieces.items()
    }


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def measured(
    standard_job: StandardJob,
    tmp_path_factory: pytest.TempPathFactory,
    environment: pytest.MonkeyPatch,
) -> MeasuredJob:
    folder = tmp_path_factory.mktemp("measured")
    chunks = (STEP,) * 3
    array = zarr.create_array(
        folder / "raw.zarr", shape=SHAPE, chunks=chunks, dtype="uint8", compressors=None
    )
    array[:] = np.random.default_rng(3).integers(1, 200, SHAPE, dtype=np.uint8)
    keys = {**KEYS, "input": str(folder / "raw.zarr")}
    workspace = standard_job.workspace(folder, keys)
    # The finalizer also reads borders of blocks, as many of a small volume as of a large one.
    environment.setattr(seams, "MAX_BORDERS", 0)
    environment.setenv("NET_TRACE", str(folder / "trace"))
    plan_command = json.loads(workspace.call("plan", str(workspace.job_file), "--json").out)
    workspace.produce()

    before = Traffic.so_far()
    infer_all(workspace)
    inferring = Traffic.so_far().since(before)
    pieces = pieces_of(workspace)
    before = Traffic.so_far()
    workspace.finalize().ok()
    finalizing = Traffic.so_far().since(before)
    costs = workspace.item.plan.costs
    return MeasuredJob(
        workspace, costs, plan_command, inferring, finalizing, pieces, workspace.stored()
    )


def test_the_network_computes_every_patch_exactly_once(measured: MeasuredJob) -> None:
    computed = measured.workspace.computed()
    per_axis = [(size - 8) // STEP + 1 for size in SHAPE]
    assert measured.costs.patches == np.prod(per_axis)
    assert len(computed) == computed.total() == measured.costs.patches
    records = [measured.workspace.record(name) for name in measured.workspace.done()]
    assert sum(record["patches"] for record in records) == measured.costs.patches
    assert measured.workspace.report()["patches"] == measured.costs.patches
    assert measured.plan_command["patches"] == measured.costs.patches
    assert measured.plan_command["recompute_factor"] == 1.0


def test_the_bytes_in_the_records_equal_those_of_the_plan(measured: MeasuredJob) -> None:
    moved, planned = measured.workspace.report()["bytes"], measured.plan_command
    expected = {
        "input": planned["input_bytes"],
        "output": planned["output_bytes"],
        "pieces_written": planned["piece_bytes"],
        "pieces_read": planned["piece_bytes"],
        "levels": 0,
        "level_below": 0,
    }
    assert moved.keys() == expected.keys()
    for key, number in expected.items():
        assert number <= moved[key] <= 1.1 * number, key
    assert moved["output"] == np.prod(SHAPE) * 2 * 4


def test_moved_bytes_are_at_most_input_with_halos_output_and_twice_the_pieces(
    measured: MeasuredJob,
) -> None:
    # Counted by tensorstore and by file sizes, not by chunkq.
    costs, output_bytes = measured.costs, sum(map(len, measured.output.values()))
    piece_bytes = sum(map(len, measured.pieces.values()))
    # The cache of storage chunks holds the volume, so each is read once in place of each halo.
    stored = sum(map(len, files_below(Path(measured.workspace.values["input"]) / "c").values()))
    assert stored <= measured.inferring.read <= 1.1 * stored
    assert stored < costs.input_bytes
    assert measured.finalizing.read < 0.1 * costs.input_bytes
    assert costs.piece_bytes <= piece_bytes <= 1.1 * costs.piece_bytes
    written = measured.inferring.written + measured.finalizing.written
    # Each output object is written once: no more bytes are written than are stored at the end.
    assert written <= output_bytes <= 1.1 * costs.output_bytes
    moved = measured.inferring.read + measured.finalizing.read + written + 2 * piece_bytes
    assert moved <= 1.1 * costs.store_bytes


def test_every_piece_has_one_writer_and_one_reader(measured: MeasuredJob) -> None:
    plan = measured.workspace.item.plan
    chunks = [plan.chunk(index) for index in plan.indices()]
    outgoing = [
        f"{chunk_name(p.target)}/{p.name}" for chunk in chunks for p in plan.outgoing_pieces(chunk)
    ]
    own_blocks = [f"{chunk_name(c.index)}/own" for c in chunks if c.is_active and c.has_band]
    incoming = [f"{chunk_name(c.index)}/{p.name}" for c in chunks for p in plan.incoming_pieces(c)]
    assert len(set(outgoing)) == len(outgoing)
    assert sorted(outgoing) == sorted(incoming)
    assert sorted(measured.pieces) == sorted(outgoing + own_blocks)
    assert pieces_of(measured.workspace) == {}


def test_a_committed_chunk_run_again_is_not_computed_read_or_written(measured: MeasuredJob) -> None:
    workspace = measured.workspace
    records, computed, before = workspace.done(), workspace.computed(), Traffic.so_far()
    infer_all(workspace, attempt=2)
    assert workspace.done() == records
    assert workspace.computed() == computed
    assert Traffic.so_far().since(before) == Traffic(0, 0)
    assert pieces_of(workspace) == {}


def test_a_zombie_that_recomputes_every_chunk_of_a_sealed_job_changes_no_output_byte(
    measured: MeasuredJob,
) -> None:
    workspace = measured.workspace
    for name in workspace.done():
        (workspace.done_folder() / name).unlink()
    computed = workspace.computed()
    infer_all(workspace, attempt=2)
    assert workspace.computed() == computed + computed
    # It wrote the same bytes to the path that the array had before it was sealed.
    unsealed = f"{workspace.job.record.array}/"
    stored = workspace.stored()
    late = {name: stored.pop(name) for name in list(stored) if name.startswith(unsealed)}
    assert stored == measured.output
    assert late
    for name, content in late.items():
        assert content == measured.output[f"0/{name.removeprefix(unsealed)}"]
    # Its pieces equal those of the first run.
    assert pieces_of(workspace).items() <= measured.pieces.items()
    workspace.finalize().ok()
    assert pieces_of(workspace) == {}
    assert workspace.stored() == measured.output


@pytest.mark.parametrize("stage", ["computes", "writes"])
@pytest.mark.parametrize("index", [(0, 0, 0), (0, 1, 0), (1, 1, 1)], ids=chunk_name)
def test_a_zombie_overtaken_while_it_computes_or_writes_deletes_its_pieces(
    measured: MeasuredJob, monkeypatch: pytest.MonkeyPatch, index: Index, stage: str
) -> None:
    committed_at_check = {"computes": 2, "writes": 3}[stage]
    workspace, checks = measured.workspace, 0
    records, computed = workspace.done(), workspace.computed()
    is_committed = ItemLedger.is_committed

    def is_committed_later(ledger: ItemLedger, kind: str, chunk: Index) -> bool:
        nonlocal checks
        if kind == "infer" and chunk == index:
            checks += 1
            if checks < committed_at_check:
                return False
        return is_committed(ledger, kind, chunk)

    monkeypatch.setattr(ItemLedger, "is_committed", is_committed_later)
    run_task(Task("infer", *workspace.job.id, 0, index), Attempt(2, "zombie"))
    assert checks == committed_at_check
    assert workspace.computed().total() > computed.total()
    assert workspace.done() == records
    assert pieces_of(workspace) == {}
    if stage == "writes":
        workspace.finalize().ok()  # deletes what it wrote to the path of the unsealed array
    assert workspace.stored() == measured.output


@pytest.fixture(scope="module")
def inferred(measured: MeasuredJob, tmp_path_factory: pytest.TempPathFactory) -> StandardWorkspace:
    """The same job with all chunks computed and no block finalized."""
    folder = tmp_path_factory.mktemp("inferred")
    workspace = replace(measured.workspace, folder=folder)
    workspace.produce()
    infer_all(workspace)
    return workspace


def test_a_zombie_that_recomputes_every_chunk_before_finalizing_writes_the_same_pieces(
    measured: MeasuredJob, inferred: StandardWorkspace
) -> None:
    pieces = pieces_of(inferred)
    epochs = inferred.job.record.epoch, measured.workspace.job.record.epoch
    assert without_epoch(pieces, epochs[0]) == without_epoch(measured.pieces, epochs[1])
    for name in inferred.done():
        (inferred.done_folder() / name).unlink()
    infer_all(inferred, attempt=2)
    assert pieces_of(inferred) == pieces


class Killed(BaseException):
    """Simulates the end of the process."""


def raise_killed(*_: object) -> None:
    raise Killed


def test_killed_and_concurrent_finalizers_produce_the_same_bytes(
    measured: MeasuredJob, inferred: StandardWorkspace
) -> None:
    pieces = pieces_of(inferred)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ItemLedger, "delete_pieces", raise_killed)
        with pytest.raises(Killed):
            finalize_job(inferred.job, worker="killed", threads=1)
    assert inferred.done("finalize")
    assert pieces_of(inferred) == pieces != {}
    reports: list[dict[str, Any]] = []
    finalizers = [
        threading.Thread(target=lambda: reports.append(finalize_job(inferred.job, worker="thread")))
        for _ in range(2)
    ]
    for thread in finalizers:
        thread.start()
    for thread in finalizers:
        thread.join(TIMEOUT)
    assert [report["missing"] for report in reports] == [[], []]
    assert pieces_of(inferred) == {}
    assert inferred.stored() == measured.output


def test_a_finalizer_that_runs_again_changes_no_record_and_no_output_byte(
    measured: MeasuredJob,
) -> None:
    workspace = measured.workspace
    records, blocks = workspace.done(), workspace.done("finalize")
    for index in workspace.item.plan.to_finalize():
        FinalizeStage().run(workspace.item, index, Attempt(2, "late"))
    assert (workspace.done(), workspace.done("finalize")) == (records, blocks)
    assert workspace.stored() == measured.output
