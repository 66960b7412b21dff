"""The ledger is the truth: jobs go on after every kind of loss, and end in the same bytes."""

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
from chunkq.executors.base import Attempt, TaskResult, WorkerOptions
from chunkq.executors.sqlite import SqliteExecutor
from chunkq.finalize import finalize_job
from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import ITEM, Ledger
from chunkq.tasks import Task
from tests.harness.files import everything_below, files_below
from tests.harness.small_job import CHUNKS, SHAPE, small_workspace
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The job done without a hitch."""
    workspace = small_workspace(tmp_path_factory.mktemp("whole"))
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    workspace.call("finalize", "out.zarr").ok()
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return small_workspace(tmp_path)


def voxels(workspace: Workspace) -> dict[str, bytes]:
    """Every object of the output array; the group above it names the job's own paths."""
    return files_below(workspace.array)


def state(workspace: Workspace) -> str:
    return str(zarr.open_group(workspace.output, mode="r").attrs["chunkq"]["state"])


def produce(workspace: Workspace, *options: str) -> str:
    return workspace.call("produce", "job.json", *options).ok().out


def is_complete(workspace: Workspace, whole: Workspace) -> None:
    """Finalize and compare with the job done without a hitch."""
    workspace.call("finalize", "out.zarr").ok()
    assert voxels(workspace) == voxels(whole)
    assert state(workspace) == "complete"
    assert not (workspace.pieces_folder()).exists()
    assert json.loads((workspace.epoch_folder / "report.json").read_text())["missing"] == []


def queued(workspace: Workspace) -> set[tuple[int, ...]]:
    """What is on the queue, taken off it."""
    queue, options, found = (
        SqliteExecutor(f"sqlite://{workspace.queue_file}"),
        WorkerOptions("test"),
        set(),
    )
    while begun := queue.reserve(options):
        found.add(begun.task.chunk)
    queue.cancel(str(workspace.job_folder))
    queue.close()
    return found


def test_produce_again_queues_nothing_anew(workspace: Workspace) -> None:
    assert produce(workspace).startswith("6 chunks, 0 done, 6 newly queued")
    assert produce(workspace).startswith("6 chunks, 0 done, 0 newly queued")
    assert produce(workspace, "--resume").startswith("6 chunks, 0 done, 0 newly queued")
    assert queued(workspace) == CHUNKS


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_after_the_queue_is_lost_exactly_the_uncommitted_chunks_are_queued(
    workspace: Workspace, whole: Workspace, options: tuple[str, ...]
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
    is_complete(workspace, whole)


def test_resume_where_there_is_no_job_is_refused(workspace: Workspace) -> None:
    before = everything_below(workspace.folder)
    workspace.call("produce", "job.json", "--resume").refused(2, "has no job to resume")
    assert everything_below(workspace.folder) == before


def test_produce_after_the_end_says_that_there_is_nothing_to_do(whole: Workspace) -> None:
    before = files_below(whole.folder)
    said = produce(whole)
    assert said.startswith("6 chunks, 6 done, 0 newly queued")
    assert "next: chunkq finalize" in said
    after = files_below(whole.folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name for name in changed if not name.startswith("queue.db")} == set()


def test_finalize_before_the_end_lists_what_is_missing_and_changes_nothing(
    workspace: Workspace,
) -> None:
    produce(workspace)
    workspace.compute_inline(only={(0, 0), (1, 1)}.__contains__)
    before = files_below(workspace.folder)
    answer = workspace.call("finalize", "out.zarr", "--json")
    answer.refused(3, "4 chunks are not computed yet: 0.1, 1.0, 2.0, 2.1")
    assert json.loads(answer.out) == {"missing": ["0.1", "1.0", "2.0", "2.1"]}
    workspace.call("finalize", "out.zarr").refused(3, "4 chunks are not computed yet")
    assert files_below(workspace.folder) == before
    assert state(workspace) == "incomplete"


def test_finalize_twice_changes_no_byte(workspace: Workspace, whole: Workspace) -> None:
    produce(workspace)
    workspace.compute_inline()
    is_complete(workspace, whole)
    before = files_below(workspace.folder)
    workspace.call("finalize", "out.zarr").ok()
    assert files_below(workspace.folder) == before


def test_a_chunk_computed_again_after_the_end_changes_no_byte(
    workspace: Workspace, whole: Workspace
) -> None:
    """As a worker does whose lease went to another while it slept."""
    produce(workspace)
    workspace.compute_inline()
    is_complete(workspace, whole)
    before = files_below(workspace.folder)
    for index in CHUNKS:
        run_task(Task("infer", str(workspace.job_folder), index), Attempt(2, "late"))
    assert files_below(workspace.folder) == before


def test_overwrite_replaces_the_output_and_its_ledger(workspace: Workspace) -> None:
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


def test_overwrite_is_refused_while_chunks_are_running(workspace: Workspace) -> None:
    produce(workspace)
    queue = SqliteExecutor(f"sqlite://{workspace.queue_file}")
    assert queue.reserve(WorkerOptions("busy-worker")) is not None
    before = files_below(workspace.output) | files_below(workspace.job_folder)
    workspace.call("produce", "job.json", "--overwrite").refused(
        2, ErrorCode.OUTPUT_IN_USE, "output: ", "busy-worker", "--overwrite"
    )
    assert files_below(workspace.output) | files_below(workspace.job_folder) == before
    queue.release("busy-worker")
    queue.close()
    produce(workspace, "--overwrite")


@pytest.mark.parametrize("name", ["thesis.txt", "sub/zarr.json.bak"])
def test_overwrite_never_deletes_a_folder_that_is_no_store(workspace: Workspace, name: str) -> None:
    (workspace.output / name).parent.mkdir(parents=True)
    (workspace.output / name).write_text("years of work")
    before = files_below(workspace.folder)
    workspace.call("produce", "job.json", "--overwrite").refused(
        2, ErrorCode.OUTPUT_EXISTS, "not a Zarr store"
    )
    workspace.call("produce", "job.json").refused(2, ErrorCode.OUTPUT_EXISTS, "--overwrite")
    assert files_below(workspace.folder) == before


def test_an_output_of_something_else_is_refused_and_replaced_only_on_demand(
    workspace: Workspace,
) -> None:
    write_zarr(workspace.output, random_volume((4, 4)))
    before = files_below(workspace.folder)
    workspace.call("produce", "job.json").refused(2, ErrorCode.OUTPUT_EXISTS, "--overwrite")
    assert files_below(workspace.folder) == before
    produce(workspace, "--overwrite")
    assert zarr.open(workspace.array, mode="r").shape == (3, *SHAPE)


def set_network(workspace: Workspace) -> dict[str, Any]:
    (workspace.folder / "network.py").write_text(
        (workspace.folder / "network.py").read_text().replace("0.5) / channels", "0.4) / channels")
    )
    return {}


def replace_input(workspace: Workspace) -> dict[str, Any]:
    shutil.rmtree(workspace.folder / "in.zarr")
    write_zarr(workspace.folder / "in.zarr", random_volume(SHAPE, "uint16"))
    return {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"strides": [3, 4]}, "different: strides)"),
        ({"combine": "soft", "chunksize": [16, 16]}, "different: chunksize, combine)"),
        ({"model": {"max_batch_size": 2}}, "different: model_config.max_batch_size)"),
        ({"activation": "softmax"}, "different: activation)"),
        (set_network, "different: content of model_config.class_file)"),
        ({"input": "other.zarr"}, "different: input, the input volume)"),
        (replace_input, "different: the input volume)"),
    ],
)
def test_a_changed_job_onto_an_old_output_is_refused_with_what_differs(
    workspace: Workspace, change: Any, named: str
) -> None:
    write_zarr(workspace.folder / "other.zarr", random_volume(SHAPE, "uint16"))
    produce(workspace)
    workspace.write_job(**(change(workspace) if callable(change) else change))
    before = files_below(workspace.folder)
    for options in ((), ("--resume",)):
        workspace.call("produce", "job.json", *options).refused(2, "a different job", named)
    assert files_below(workspace.folder) == before


def test_keys_that_only_say_where_a_job_runs_do_not_make_it_another(workspace: Workspace) -> None:
    produce(workspace)
    workspace.write_job(hardware="cpu_only", queue=f"sqlite://{workspace.folder}/other.db")
    assert produce(workspace).startswith("6 chunks, 0 done, 0 newly queued")


def test_a_half_written_output_of_an_older_job_is_refused(workspace: Workspace) -> None:
    """Metadata without a job folder: its remains say nothing of what is done."""
    produce(workspace)
    workspace.compute_inline(only={(0, 0)}.__contains__)
    shutil.rmtree(workspace.job_folder)
    before = files_below(workspace.output)
    workspace.call("produce", "job.json").refused(2, ErrorCode.OUTPUT_EXISTS, "--overwrite")
    workspace.call("finalize", "out.zarr").refused(2, "no job was produced here")
    assert files_below(workspace.output) == before
    produce(workspace, "--overwrite")
    assert workspace.commits() == []


def test_a_producer_killed_between_ledger_and_output_is_simply_run_again(
    workspace: Workspace, whole: Workspace
) -> None:
    produce(workspace)
    shutil.rmtree(workspace.output)
    assert produce(workspace).startswith("6 chunks, 0 done, 0 newly queued")
    workspace.compute_inline()
    is_complete(workspace, whole)


def test_an_output_that_vanished_under_committed_chunks_is_said_to_be_damaged(
    workspace: Workspace,
) -> None:
    produce(workspace)
    workspace.compute_inline(only={(0, 0)}.__contains__)
    (workspace.array / "zarr.json").unlink()
    name = workspace.array.name
    workspace.call("produce", "job.json").refused(2, f"is damaged: it has no {name}/zarr.json")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "deleted": Path.unlink,
    "one bit flipped": flipped,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "emptied": lambda path: path.write_bytes(b""),
    "four zero bytes": lambda path: path.write_bytes(b"\0" * 4),
    "all zero bytes": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
}


@pytest.mark.parametrize(("piece", "chunk"), [("own", "1.1"), ("10", "0.1"), ("11", "0.0")])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_piece_that_is_unfit_names_the_chunk_to_compute_again_and_then_heals(
    workspace: Workspace, whole: Workspace, damage: str, piece: str, chunk: str
) -> None:
    produce(workspace)
    workspace.compute_inline()
    DAMAGE[damage](workspace.pieces_folder() / "1.1" / piece)
    workspace.call("finalize", "out.zarr").refused(
        3, f"pieces/0/1.1/{piece}", f"chunk {chunk} must be computed again", "produce --resume"
    )
    assert state(workspace) == "incomplete"
    for file in workspace.folder.glob("queue.db*"):
        file.unlink()
    assert produce(workspace, "--resume").startswith("6 chunks, 5 done, 1 newly queued")
    workspace.compute_inline()
    is_complete(workspace, whole)


def test_with_missing_chunks_allowed_the_output_says_so_and_is_completed_later(
    workspace: Workspace, whole: Workspace
) -> None:
    produce(workspace)
    missing = {(1, 0)}
    workspace.compute_inline(only=lambda index: index not in missing)
    said = workspace.call("finalize", "out.zarr", "--allow-missing").ok().out
    assert "sealed WITHOUT 1 chunks" in said
    assert state(workspace) == "incomplete"
    report = json.loads((workspace.epoch_folder / "report.json").read_text())
    assert report["missing"] == ["1.0"]
    assert report["chunks"] == 5
    partial, full = read_output(workspace.output), read_output(whole.output)
    untouched = np.ones(SHAPE, bool)
    untouched[12:, :] = False  # the blocks that chunk 1.0 reaches lie here
    np.testing.assert_array_equal(partial[:, untouched], full[:, untouched])
    assert not partial[:, 12:24, :12].any()
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert status["done"] == 5
    workspace.call("finalize", "out.zarr").refused(3, "1 chunks are not computed yet: 1.0")
    assert produce(workspace).startswith("6 chunks, 5 done")
    assert not (workspace.epoch_folder / "report.json").exists()
    workspace.compute_inline()
    is_complete(workspace, whole)


def test_nothing_at_all_may_be_missing_too(workspace: Workspace, whole: Workspace) -> None:
    produce(workspace)
    assert "WITHOUT 6 chunks" in workspace.call("finalize", "out.zarr", "--allow-missing").ok().out
    assert not read_output(workspace.output).any()
    workspace.compute_inline()
    is_complete(workspace, whole)


class Killed(BaseException):
    """Stands for a kill: nothing in chunkq may catch it."""


@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_a_finalizer_killed_at_any_point_is_continued(
    workspace: Workspace,
    whole: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    blocks: int,
    moment: str,
) -> None:
    produce(workspace)
    workspace.compute_inline()
    job, lock, count = open_job(str(workspace.job_folder)), threading.Lock(), [0]
    name = "commit" if moment == "before the commit" else "delete_pieces"
    real = getattr(job.ledger, name)

    def dying(*args: Any) -> None:
        with lock:
            count[0] += 1
            if count[0] > blocks:
                raise Killed
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, name, lambda self, *args: dying(*args))
        with pytest.raises(Killed):
            finalize_job(job, worker="killed")
    assert state(workspace) == "incomplete"
    assert not (workspace.epoch_folder / "report.json").exists()
    is_complete(workspace, whole)


def test_a_finalizer_that_finds_a_piece_gone_leaves_the_other_blocks_right(
    workspace: Workspace, whole: Workspace
) -> None:
    produce(workspace)
    workspace.compute_inline()
    (workspace.pieces_folder() / "2.1" / "10").unlink()
    job = open_job(str(workspace.job_folder))
    with pytest.raises(IncompleteError) as caught:
        finalize_job(job, worker="one")
    assert (caught.value.code, caught.value.missing) == (ErrorCode.RESULTS_LOST, ((1, 1),))
    for file in workspace.folder.glob("queue.db*"):
        file.unlink()
    produce(workspace, "--resume")
    workspace.compute_inline()
    is_complete(workspace, whole)


def test_partial_files_of_a_killed_writer_in_the_ledger_hurt_nothing(
    workspace: Workspace, whole: Workspace
) -> None:
    produce(workspace)
    workspace.compute_inline(only={(0, 0)}.__contains__)
    done = workspace.done_folder()
    (done / ".partial-1234-1.1").write_bytes(b'{"kind"')
    failed = workspace.epoch_folder / "failed" / "infer" / ITEM
    failed.mkdir(parents=True)
    (failed / ".partial-1234-1.1.json").write_bytes(b"{")
    assert produce(workspace).startswith("6 chunks, 1 done, 0 newly queued")
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (status["done"], status["failures"]) == (1, [])
    workspace.compute_inline()
    is_complete(workspace, whole)


# ------------------------------------------------------------------------ one chunk's task


def run_chunk(workspace: Workspace, index: tuple[int, ...]) -> TaskResult:
    return run_task(Task("infer", str(workspace.job_folder), index), Attempt(1, "worker"))


@pytest.mark.parametrize(("owner", "name"), [(JobHandle, "write"), (Ledger, "put_piece")])
def test_a_worker_killed_while_it_writes_has_committed_nothing(
    workspace: Workspace, whole: Workspace, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    def dying(*_: Any, **__: Any) -> None:
        raise Killed

    produce(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            run_chunk(workspace, (1, 1))
    assert workspace.commits() == []
    workspace.compute_inline()
    is_complete(workspace, whole)


def test_a_chunk_that_failed_is_recorded_and_queued_again_after_the_queue_is_lost(
    workspace: Workspace, whole: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    produce(workspace)
    workspace.compute_inline(only={(0, 0)}.__contains__)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "put_piece", full)
        with pytest.raises(OSError, match="no space left"):
            run_chunk(workspace, (1, 1))
    [failure] = workspace.ledger.failures()
    assert (failure.chunk, failure.error) == ((1, 1), "OSError")
    assert "no space left" in failure.message
    for file in workspace.folder.glob("queue.db*"):
        file.unlink()
    assert produce(workspace, "--resume").startswith("6 chunks, 1 done, 5 newly queued")
    assert queued(workspace) == CHUNKS - {(0, 0)}
    workspace.compute_inline()
    assert workspace.ledger.failures() == []
    is_complete(workspace, whole)


def test_a_chunk_marks_itself_in_every_block_that_it_contributes_to(workspace: Workspace) -> None:
    produce(workspace)
    marked: dict[tuple[int, ...], set[tuple[int, int]]] = {}
    for index in CHUNKS:
        for block, member, of in run_chunk(workspace, index).contributions:
            marked.setdefault(block, set()).add((member, of))
    plan = open_job(str(workspace.job_folder)).plan
    expected = {block: len(plan.contributors(block)) for block in plan.to_finalize()}
    assert max(expected.values()) == 4
    assert marked == {block: {(n, of) for n in range(of)} for block, of in expected.items()}


def test_a_worker_of_a_replaced_job_writes_nothing_into_the_new_one(workspace: Workspace) -> None:
    produce(workspace)
    old = open_job(str(workspace.job_folder))
    workspace.values["strides"] = [6, 6]
    workspace.write_job()
    produce(workspace, "--overwrite")
    with pytest.raises(MissingJobError, match="was replaced meanwhile"):
        old.check_unchanged()
    assert open_job(str(workspace.job_folder)).plan.job.strides == (6, 6)


@pytest.mark.parametrize("looks_before", [1, 2], ids=["while-it-computes", "while-it-writes"])
def test_a_worker_overtaken_before_its_blocks_are_complete_leaves_their_pieces(
    workspace: Workspace, whole: Workspace, monkeypatch: pytest.MonkeyPatch, looks_before: int
) -> None:
    produce(workspace)
    workspace.compute_inline()
    commits, pieces = workspace.commits(), workspace.pieces()
    real, looks = Ledger.is_committed, count()

    def not_at_first(*args: Any) -> bool:
        return next(looks) >= looks_before and real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "is_committed", not_at_first)
        run_chunk(workspace, (1, 1))
    assert next(looks) > looks_before
    assert workspace.commits() == commits
    assert workspace.pieces() == pieces != []
    is_complete(workspace, whole)


def test_padding_does_not_count_as_input_that_was_read(workspace: Workspace) -> None:
    workspace.write_job(pad_width=[3, 2])
    produce(workspace)
    workspace.compute_inline()
    plan = workspace.job.plan
    assert plan.chunk((0, 0)).halo.start == (-3, -2)
    read = sum(commit.moved["input"] for commit in workspace.commits())
    assert read == plan.costs.input_bytes
