"""Interrupted jobs continue from the job folder and write the same bytes."""

import json
import shutil
import threading
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from chunkq_worker.run_task import run_task

from chunkq.errors import ErrorCode, IncompleteError, MissingJobError
from chunkq.finalize import finalize_job
from chunkq.job.job_handle import open_job
from chunkq.job.ledger import ItemLedger
from chunkq.job.output_handle import OutputHandle
from chunkq.job.tasks import Task
from chunkq.queue.backends.sqlite import SqliteExecutor
from chunkq.queue.contract.executor import Attempt, TaskResult, WorkerOptions
from tests.harness.files import everything_below, files_below
from tests.harness.small_job import CHUNKS, SHAPE, small_workspace
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Run the job without interruption."""
    workspace = small_workspace(tmp_path_factory.mktemp("reference"))
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    workspace.call("finalize", "out.zarr").ok()
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return small_workspace(tmp_path)


def voxels(workspace: Workspace) -> dict[str, bytes]:
    """Return every file of the output array. The group is left out: it has the job's digest."""
    return files_below(workspace.array)


def state(workspace: Workspace) -> str:
    return str(zarr.open_group(workspace.output, mode="r").attrs["chunkq"]["state"])


def produce(workspace: Workspace, *options: str) -> str:
    return workspace.call("produce", "job.json", *options).ok().out


def assert_complete(workspace: Workspace, reference: Workspace) -> None:
    """Finalize the job and compare the output with that of the uninterrupted job."""
    workspace.call("finalize", "out.zarr").ok()
    assert voxels(workspace) == voxels(reference)
    assert state(workspace) == "complete"
    assert not (workspace.pieces_folder()).exists()
    assert json.loads((workspace.epoch_folder / "report.json").read_text())["missing"] == []


def queued(workspace: Workspace) -> set[tuple[int, ...]]:
    """Remove all tasks from the queue and return their chunks."""
    queue = SqliteExecutor(f"sqlite://{workspace.queue_file}")
    options, chunks = WorkerOptions("test"), set()
    while lease := queue.reserve(options):
        chunks.add(lease.task.chunk)
    queue.cancel(workspace.job.id)
    queue.close()
    return chunks


def test_producing_a_job_again_queues_no_chunk_twice(workspace: Workspace) -> None:
    assert produce(workspace).startswith("6 chunks, 0 done, 6 newly queued")
    assert produce(workspace).startswith("6 chunks, 0 done, 0 newly queued")
    assert produce(workspace, "--resume").startswith("6 chunks, 0 done, 0 newly queued")
    assert queued(workspace) == CHUNKS


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_after_the_queue_is_lost_only_the_uncommitted_chunks_are_queued(
    workspace: Workspace, reference: Workspace, options: tuple[str, ...]
) -> None:
    produce(workspace)
    done = {(0, 0), (2, 1), (1, 0)}
    workspace.compute_inline(only=done.__contains__)
    for file in workspace.folder.glob("queue.db*"):
        file.unlink()
    assert produce(workspace, *options).startswith("6 chunks, 3 done, 3 newly queued")
    assert queued(workspace) == CHUNKS - done
    before = {c.chunk: c for c in workspace.commits()}
    workspace.compute_inline()
    after = {c.chunk: c for c in workspace.commits()}
    assert {index: after[index] for index in done} == before
    assert_complete(workspace, reference)


def test_resume_without_a_job_is_rejected(workspace: Workspace) -> None:
    before = everything_below(workspace.folder)
    workspace.call("produce", "job.json", "--resume").refused(
        2, f"output: {workspace.output} ", "--resume"
    )
    assert everything_below(workspace.folder) == before


def test_producing_a_finished_job_again_changes_nothing(reference: Workspace) -> None:
    before = files_below(reference.folder)
    text = produce(reference)
    assert text.startswith("6 chunks, 6 done, 0 newly queued")
    assert "chunkq finalize" in text
    after = files_below(reference.folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name for name in changed if not name.startswith("queue.db")} == set()


def test_finalizing_an_unfinished_job_lists_the_missing_chunks_and_changes_nothing(
    workspace: Workspace,
) -> None:
    produce(workspace)
    workspace.compute_inline(only={(0, 0), (1, 1)}.__contains__)
    before = files_below(workspace.folder)
    answer = workspace.call("finalize", "out.zarr", "--json")
    answer.refused(3, ErrorCode.JOB_INCOMPLETE, "4 chunks", ": 0.1, 1.0, 2.0, 2.1;")
    document = json.loads(answer.out)
    assert document["missing"] == ["0.1", "1.0", "2.0", "2.1"]
    assert document["error"]["code"] == ErrorCode.JOB_INCOMPLETE
    workspace.call("finalize", "out.zarr").refused(3, ErrorCode.JOB_INCOMPLETE, "4 chunks")
    assert files_below(workspace.folder) == before
    assert state(workspace) == "incomplete"


def test_finalizing_a_job_twice_changes_no_byte(workspace: Workspace, reference: Workspace) -> None:
    produce(workspace)
    workspace.compute_inline()
    assert_complete(workspace, reference)
    before = files_below(workspace.folder)
    workspace.call("finalize", "out.zarr").ok()
    assert files_below(workspace.folder) == before


def test_computing_a_chunk_again_after_the_end_changes_no_byte(
    workspace: Workspace, reference: Workspace
) -> None:
    """Compute chunks like a worker that was suspended and has lost its leases."""
    produce(workspace)
    workspace.compute_inline()
    assert_complete(workspace, reference)
    before = files_below(workspace.folder)
    for index in CHUNKS:
        run_task(Task("infer", *workspace.job.id, 0, index), Attempt(2, "late"))
    assert files_below(workspace.folder) == before


def test_overwrite_replaces_the_output_and_the_ledger(workspace: Workspace) -> None:
    produce(workspace)
    workspace.compute_inline()
    workspace.call("finalize", "out.zarr").ok()
    old = voxels(workspace)
    (workspace.output / "0" / "stray").write_text("left over")
    workspace.write_job(combine="soft")
    assert produce(workspace, "--overwrite").startswith("6 chunks, 0 done, 6 newly queued")
    assert workspace.commits() == []
    assert list(voxels(workspace)) == ["zarr.json"]
    assert not (workspace.epoch_folder / "report.json").exists()
    assert queued(workspace) == CHUNKS
    workspace.compute_inline()
    workspace.call("finalize", "out.zarr").ok()
    assert voxels(workspace) != old
    assert read_output(workspace.output).dtype == np.uint8


def test_overwrite_is_rejected_while_chunks_are_running(workspace: Workspace) -> None:
    produce(workspace)
    queue = SqliteExecutor(f"sqlite://{workspace.queue_file}")
    assert queue.reserve(WorkerOptions("busy-worker")) is not None
    before = files_below(workspace.output) | files_below(workspace.job_folder)
    workspace.call("produce", "job.json", "--overwrite").refused(
        2, f"output: {workspace.output} ", "busy-worker", "--overwrite"
    )
    assert files_below(workspace.output) | files_below(workspace.job_folder) == before
    queue.release("busy-worker")
    queue.close()
    produce(workspace, "--overwrite")


@pytest.mark.parametrize("name", ["thesis.txt", "sub/zarr.json.bak"])
def test_overwrite_does_not_delete_a_folder_that_is_not_a_store(
    workspace: Workspace, name: str
) -> None:
    (workspace.output / name).parent.mkdir(parents=True)
    (workspace.output / name).write_text("years of work")
    before = files_below(workspace.folder)
    for options in (("--overwrite",), ()):
        workspace.call("produce", "job.json", *options).refused(2, f"output: {workspace.output} ")
    assert files_below(workspace.folder) == before


def test_an_output_of_another_program_is_replaced_only_with_overwrite(
    workspace: Workspace,
) -> None:
    write_zarr(workspace.output, random_volume((4, 4)))
    before = files_below(workspace.folder)
    workspace.call("produce", "job.json").refused(2, f"output: {workspace.output} ", "--overwrite")
    assert files_below(workspace.folder) == before
    produce(workspace, "--overwrite")
    assert zarr.open(workspace.array, mode="r").shape == (3, *SHAPE)


def change_network(workspace: Workspace) -> dict[str, Any]:
    (workspace.folder / "network.py").write_text(
        (workspace.folder / "network.py").read_text().replace("0.5) / channels", "0.4) / channels")
    )
    return {}


def replace_input(workspace: Workspace) -> dict[str, Any]:
    shutil.rmtree(workspace.folder / "in.zarr")
    write_zarr(workspace.folder / "in.zarr", random_volume(SHAPE, "uint16"))
    return {}


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"strides": [3, 4]}, ": strides)"),
        ({"combine": "soft", "chunksize": [16, 16]}, ": chunksize, combine)"),
        ({"model": {"max_batch_size": 2}}, ": model_config.max_batch_size)"),
        ({"activation": "sigmoid"}, ": activation)"),
        (change_network, "model_config.class_file)"),
        ({"input": "other.zarr"}, ": input, the input volume)"),
        (replace_input, ": the input volume)"),
    ],
)
def test_the_error_for_a_changed_job_on_an_existing_output_has_the_changed_keys(
    workspace: Workspace, change: Any, keys: str
) -> None:
    write_zarr(workspace.folder / "other.zarr", random_volume(SHAPE, "uint16"))
    produce(workspace)
    workspace.write_job(**(change(workspace) if callable(change) else change))
    before = files_below(workspace.folder)
    for options in ((), ("--resume",)):
        workspace.call("produce", "job.json", *options).refused(
            2, ErrorCode.OUTPUT_OF_OTHER_JOB, keys
        )
    assert files_below(workspace.folder) == before


def test_keys_that_do_not_affect_the_result_do_not_change_the_job(workspace: Workspace) -> None:
    produce(workspace)
    workspace.write_job(hardware="cpu_only", queue=f"sqlite://{workspace.folder}/other.db")
    assert produce(workspace).startswith("6 chunks, 0 done, 0 newly queued")


def test_an_incomplete_output_without_a_job_folder_is_rejected(workspace: Workspace) -> None:
    produce(workspace)
    workspace.compute_inline(only={(0, 0)}.__contains__)
    shutil.rmtree(workspace.job_folder)
    before = files_below(workspace.output)
    workspace.call("produce", "job.json").refused(2, f"output: {workspace.output} ", "--overwrite")
    workspace.call("finalize", "out.zarr").refused(
        2, ErrorCode.JOB_MISSING, f"{workspace.output}: "
    )
    assert files_below(workspace.output) == before
    produce(workspace, "--overwrite")
    assert workspace.commits() == []


def test_after_produce_is_killed_before_it_creates_the_output_it_can_run_again(
    workspace: Workspace, reference: Workspace
) -> None:
    produce(workspace)
    shutil.rmtree(workspace.output)
    assert produce(workspace).startswith("6 chunks, 0 done, 0 newly queued")
    workspace.compute_inline()
    assert_complete(workspace, reference)


def test_a_missing_output_with_committed_chunks_is_reported(
    workspace: Workspace,
) -> None:
    produce(workspace)
    workspace.compute_inline(only={(0, 0)}.__contains__)
    (workspace.array / "zarr.json").unlink()
    name = workspace.array.name
    workspace.call("produce", "job.json").refused(
        2, ErrorCode.OUTPUT_CHANGED, f"{workspace.output}/{name}/zarr.json "
    )


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "deleted": Path.unlink,
    "flipped bit": flip_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "four zero bytes": lambda path: path.write_bytes(b"\0" * 4),
    "all zero bytes": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
}


@pytest.mark.parametrize(("piece", "chunk"), [("own", "1.1"), ("10", "0.1"), ("11", "0.0")])
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_chunk_of_a_missing_or_damaged_piece_is_computed_again(
    workspace: Workspace, reference: Workspace, damage: str, piece: str, chunk: str
) -> None:
    produce(workspace)
    workspace.compute_inline()
    DAMAGE[damage](workspace.pieces_folder() / "1.1" / piece)
    workspace.call("finalize", "out.zarr").refused(
        3,
        ErrorCode.RESULTS_LOST,
        f"pieces/0/1.1/{piece} ",
        f"chunk {chunk} must be computed again",
        "chunkq produce --resume",
    )
    assert state(workspace) == "incomplete"
    for file in workspace.folder.glob("queue.db*"):
        file.unlink()
    assert produce(workspace, "--resume").startswith("6 chunks, 5 done, 1 newly queued")
    workspace.compute_inline()
    assert_complete(workspace, reference)


def test_an_output_finalized_with_missing_chunks_is_incomplete_and_can_be_completed(
    workspace: Workspace, reference: Workspace
) -> None:
    produce(workspace)
    missing = {(1, 0)}
    workspace.compute_inline(only=lambda index: index not in missing)
    assert "1 chunk" in workspace.call("finalize", "out.zarr", "--allow-missing").ok().out
    assert state(workspace) == "incomplete"
    report = json.loads((workspace.epoch_folder / "report.json").read_text())
    assert report["missing"] == ["1.0"]
    assert report["chunks"] == 5
    partial, full = read_output(workspace.output), read_output(reference.output)
    is_unaffected = np.ones(SHAPE, bool)
    is_unaffected[12:, :] = False  # the blocks to which chunk 1.0 contributes
    np.testing.assert_array_equal(partial[:, is_unaffected], full[:, is_unaffected])
    assert not partial[:, 12:24, :12].any()
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert status["done"] == 5
    workspace.call("finalize", "out.zarr").refused(3, ErrorCode.JOB_INCOMPLETE, ": 1.0;")
    assert produce(workspace).startswith("6 chunks, 5 done")
    assert not (workspace.epoch_folder / "report.json").exists()
    workspace.compute_inline()
    assert_complete(workspace, reference)


def test_an_output_can_be_finalized_without_any_chunk_and_completed_later(
    workspace: Workspace, reference: Workspace
) -> None:
    produce(workspace)
    assert "6 chunk" in workspace.call("finalize", "out.zarr", "--allow-missing").ok().out
    report = json.loads((workspace.epoch_folder / "report.json").read_text())
    assert len(report["missing"]) == 6
    assert not read_output(workspace.output).any()
    workspace.compute_inline()
    assert_complete(workspace, reference)


class Killed(BaseException):
    """Simulates a killed process. No code of chunkq may catch it."""


@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_finalizing_continues_after_a_finalizer_is_killed_at_any_point(
    workspace: Workspace,
    reference: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    blocks: int,
    moment: str,
) -> None:
    produce(workspace)
    workspace.compute_inline()
    job, lock, count = open_job(str(workspace.job_folder)), threading.Lock(), [0]
    name = "commit" if moment == "before the commit" else "delete_pieces"
    original = getattr(ItemLedger, name)

    def kill_or_run(ledger: ItemLedger, *args: Any) -> None:
        with lock:
            count[0] += 1
            if count[0] > blocks:
                raise Killed
        original(ledger, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ItemLedger, name, kill_or_run)
        with pytest.raises(Killed):
            finalize_job(job, worker="killed")
    assert state(workspace) == "incomplete"
    assert not (workspace.epoch_folder / "report.json").exists()
    assert_complete(workspace, reference)


def test_a_finalizer_completes_the_other_blocks_if_a_piece_is_missing(
    workspace: Workspace, reference: Workspace
) -> None:
    produce(workspace)
    workspace.compute_inline()
    (workspace.pieces_folder() / "2.1" / "10").unlink()
    job = open_job(str(workspace.job_folder))
    with pytest.raises(IncompleteError) as error:
        finalize_job(job, worker="one")
    assert (error.value.code, error.value.missing) == (ErrorCode.RESULTS_LOST, ("1.1",))
    for file in workspace.folder.glob("queue.db*"):
        file.unlink()
    produce(workspace, "--resume")
    workspace.compute_inline()
    assert_complete(workspace, reference)


def test_partial_files_of_a_killed_writer_in_the_ledger_are_ignored(
    workspace: Workspace, reference: Workspace
) -> None:
    produce(workspace)
    workspace.compute_inline(only={(0, 0)}.__contains__)
    done = workspace.done_folder()
    (done / ".partial-1234-1.1").write_bytes(b'{"kind"')
    failed = workspace.epoch_folder / "failed" / "infer" / "0"
    failed.mkdir(parents=True)
    (failed / ".partial-1234-1.1.json").write_bytes(b"{")
    assert produce(workspace).startswith("6 chunks, 1 done, 0 newly queued")
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (status["done"], status["failures"]) == (1, [])
    workspace.compute_inline()
    assert_complete(workspace, reference)


# ------------------------------------------------------------------------ the task of a chunk


def run_chunk(workspace: Workspace, index: tuple[int, ...]) -> TaskResult:
    return run_task(Task("infer", *workspace.job.id, 0, index), Attempt(1, "worker"))


@pytest.mark.parametrize(("owner", "name"), [(OutputHandle, "write"), (ItemLedger, "put_piece")])
def test_a_worker_killed_while_it_writes_commits_nothing(
    workspace: Workspace,
    reference: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
) -> None:
    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    produce(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        with pytest.raises(Killed):
            run_chunk(workspace, (1, 1))
    assert workspace.commits() == []
    workspace.compute_inline()
    assert_complete(workspace, reference)


def test_a_failed_chunk_is_recorded_and_queued_again_after_the_queue_is_lost(
    workspace: Workspace, reference: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    produce(workspace)
    workspace.compute_inline(only={(0, 0)}.__contains__)
    with monkeypatch.context() as patch:
        patch.setattr(ItemLedger, "put_piece", raise_disk_full)
        with pytest.raises(OSError, match="no space left"):
            run_chunk(workspace, (1, 1))
    [failure] = workspace.failures()
    assert (failure.chunk, failure.error) == ((1, 1), "OSError")
    assert "no space left" in failure.message
    for file in workspace.folder.glob("queue.db*"):
        file.unlink()
    assert produce(workspace, "--resume").startswith("6 chunks, 1 done, 5 newly queued")
    assert queued(workspace) == CHUNKS - {(0, 0)}
    workspace.compute_inline()
    assert workspace.failures() == []
    assert_complete(workspace, reference)


def test_a_chunk_records_its_contribution_to_every_block(workspace: Workspace) -> None:
    produce(workspace)
    recorded: dict[tuple[int, ...], set[tuple[int, int]]] = {}
    for index in CHUNKS:
        for task, number, total in run_chunk(workspace, index).contributions:
            assert task == workspace.item.task("finalize", task.chunk)
            recorded.setdefault(task.chunk, set()).add((number, total))
    plan = open_job(str(workspace.job_folder)).items[0].plan
    expected = {block: len(plan.contributors(block)) for block in plan.to_finalize()}
    assert max(expected.values()) == 4
    assert recorded == {
        block: {(number, total) for number in range(total)} for block, total in expected.items()
    }


def test_a_worker_of_a_replaced_job_raises_before_it_writes(workspace: Workspace) -> None:
    produce(workspace)
    old = open_job(str(workspace.job_folder))
    workspace.values["strides"] = [6, 6]
    workspace.write_job()
    produce(workspace, "--overwrite")
    with pytest.raises(MissingJobError) as error:
        old.check_unchanged()
    assert error.value.code is ErrorCode.JOB_REPLACED
    assert workspace.item.plan.grid.strides == (6, 6)


@pytest.mark.parametrize("checks_before", [1, 2], ids=["while-it-computes", "while-it-writes"])
def test_a_worker_whose_chunk_another_worker_commits_keeps_the_pieces_of_unfinished_blocks(
    workspace: Workspace, reference: Workspace, monkeypatch: pytest.MonkeyPatch, checks_before: int
) -> None:
    produce(workspace)
    workspace.compute_inline()
    commits, pieces = workspace.commits(), workspace.pieces()
    original, checks = ItemLedger.is_committed, count()

    def is_committed_later(*args: Any) -> bool:
        return next(checks) >= checks_before and original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ItemLedger, "is_committed", is_committed_later)
        run_chunk(workspace, (1, 1))
    assert next(checks) > checks_before
    assert workspace.commits() == commits
    assert workspace.pieces() == pieces != []
    assert_complete(workspace, reference)


def test_padding_is_not_counted_as_input_bytes(workspace: Workspace) -> None:
    workspace.write_job(pad_width=[3, 2])
    produce(workspace)
    workspace.compute_inline()
    plan = workspace.item.plan
    assert plan.chunk((0, 0)).halo.start == (-3, -2)
    read = sum(commit.moved["input"] for commit in workspace.commits())
    assert read == plan.costs.input_bytes
