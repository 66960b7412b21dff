"""The ledger is the truth: jobs go on after every kind of loss, and end in the same bytes."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from chunkq_worker.run import run_task

from chunkq.errors import MissingJobError, PieceError
from chunkq.executors.base import Attempt, Outcome, Shift
from chunkq.executors.sqlite import SqliteExecutor
from chunkq.finalize import finalize_job
from chunkq.ledger import JobFolder
from chunkq.opened import OpenJob, open_job
from chunkq.tasks import Task
from tests.integration.bench import (
    Bench,
    everything_below,
    random_volume,
    read_output,
    toy_model,
    write_zarr,
)
from tests.integration.support import files_below

SHAPE = (30, 22)
CHUNKS = {(i, j) for i in range(3) for j in range(2)}


def make_bench(folder: Path) -> Bench:
    """A job of six chunks with bands along both axes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4],
        "weight_function": ["weight_gaussian"],
        "chunksize": [12, 12],
        "storage_chunks": [4, 4],
        "threads": 1,
        "model_config": toy_model(folder, (8, 8), scale=100.0),
    }
    bench = Bench(folder, values)
    bench.write_job()
    return bench


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The job done without a hitch."""
    bench = make_bench(tmp_path_factory.mktemp("whole"))
    bench.here("produce", "job.json").ok()
    bench.work_here()
    bench.here("finalize", "out.zarr").ok()
    return bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path)


def voxels(bench: Bench) -> dict[str, bytes]:
    """Every object of the output array; the group above it names the job's own paths."""
    return files_below(bench.output / "0")


def state(bench: Bench) -> str:
    return str(zarr.open_group(bench.output, mode="r").attrs["chunkq"]["state"])


def produce(bench: Bench, *options: str) -> str:
    return bench.here("produce", "job.json", *options).ok().out


def is_complete(bench: Bench, whole: Bench) -> None:
    """Finalize and compare with the job done without a hitch."""
    bench.here("finalize", "out.zarr").ok()
    assert voxels(bench) == voxels(whole)
    assert state(bench) == "complete"
    assert not (bench.job_folder / "pieces").exists()
    assert json.loads((bench.job_folder / "report.json").read_text())["missing"] == []


def queued(bench: Bench) -> set[tuple[int, ...]]:
    """What is on the queue, taken off it."""
    queue, shift, found = SqliteExecutor(f"sqlite://{bench.queue}"), Shift("test"), set()
    while begun := queue.take(shift):
        found.add(begun.task.chunk)
    queue.cancel(str(bench.job_folder))
    queue.close()
    return found


def test_produce_again_queues_nothing_anew(bench: Bench) -> None:
    assert produce(bench).startswith("6 chunks, 0 done, 6 newly queued")
    assert produce(bench).startswith("6 chunks, 0 done, 0 newly queued")
    assert produce(bench, "--resume").startswith("6 chunks, 0 done, 0 newly queued")
    assert queued(bench) == CHUNKS


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_after_the_queue_is_lost_exactly_the_uncommitted_chunks_are_queued(
    bench: Bench, whole: Bench, options: tuple[str, ...]
) -> None:
    produce(bench)
    done = {(0, 0), (2, 1), (1, 0)}
    bench.work_here(only=done.__contains__)
    for file in bench.folder.glob("queue.db*"):
        file.unlink()
    assert produce(bench, *options).startswith("6 chunks, 3 done, 3 newly queued")
    assert queued(bench) == CHUNKS - done
    before = {c.chunk: c for c in bench.commits()}
    bench.work_here()
    after = {c.chunk: c for c in bench.commits()}
    assert {index: after[index] for index in done} == before
    is_complete(bench, whole)


def test_resume_where_there_is_no_job_is_refused(bench: Bench) -> None:
    before = everything_below(bench.folder)
    bench.here("produce", "job.json", "--resume").refused(2, "has no job to resume")
    assert everything_below(bench.folder) == before


def test_produce_after_the_end_says_that_there_is_nothing_to_do(whole: Bench) -> None:
    before = files_below(whole.folder)
    said = produce(whole)
    assert said.startswith("6 chunks, 6 done, 0 newly queued")
    assert "next: chunkq finalize" in said
    after = files_below(whole.folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name for name in changed if not name.startswith("queue.db")} == set()


def test_finalize_before_the_end_lists_what_is_missing_and_changes_nothing(bench: Bench) -> None:
    produce(bench)
    bench.work_here(only={(0, 0), (1, 1)}.__contains__)
    before = files_below(bench.folder)
    answer = bench.here("finalize", "out.zarr", "--json")
    answer.refused(3, "4 chunks are not computed yet: 0.1, 1.0, 2.0, 2.1")
    assert json.loads(answer.out) == {"missing": ["0.1", "1.0", "2.0", "2.1"]}
    bench.here("finalize", "out.zarr").refused(3, "4 chunks are not computed yet")
    assert files_below(bench.folder) == before
    assert state(bench) == "incomplete"


def test_finalize_twice_changes_no_byte(bench: Bench, whole: Bench) -> None:
    produce(bench)
    bench.work_here()
    is_complete(bench, whole)
    before = files_below(bench.folder)
    bench.here("finalize", "out.zarr").ok()
    assert files_below(bench.folder) == before


def test_a_chunk_computed_again_after_the_end_changes_no_byte(bench: Bench, whole: Bench) -> None:
    """As a worker does whose lease went to another while it slept."""
    produce(bench)
    bench.work_here()
    is_complete(bench, whole)
    before = files_below(bench.folder)
    for index in CHUNKS:
        run_task(Task("infer", str(bench.job_folder), index), Attempt(2, "late"))
    assert files_below(bench.folder) == before


def test_overwrite_replaces_the_output_and_its_ledger(bench: Bench) -> None:
    produce(bench)
    bench.work_here()
    bench.here("finalize", "out.zarr").ok()
    old = voxels(bench)
    (bench.output / "0" / "stray").write_text("left over")
    bench.write_job(combine="soft")
    assert produce(bench, "--overwrite").startswith("6 chunks, 0 done, 6 newly queued")
    assert bench.commits() == []
    assert list(voxels(bench)) == ["zarr.json"]
    assert not (bench.job_folder / "report.json").exists()
    assert queued(bench) == CHUNKS
    bench.work_here()
    bench.here("finalize", "out.zarr").ok()
    assert voxels(bench) != old
    assert read_output(bench.output).dtype == np.uint8


def test_overwrite_is_refused_while_chunks_are_running(bench: Bench) -> None:
    produce(bench)
    queue = SqliteExecutor(f"sqlite://{bench.queue}")
    assert queue.take(Shift("busy-worker")) is not None
    before = files_below(bench.output) | files_below(bench.job_folder)
    bench.here("produce", "job.json", "--overwrite").refused(
        2, "is being worked on by busy-worker; stop the workers before --overwrite"
    )
    assert files_below(bench.output) | files_below(bench.job_folder) == before
    queue.release("busy-worker")
    queue.close()
    produce(bench, "--overwrite")


@pytest.mark.parametrize("name", ["thesis.txt", "sub/zarr.json.bak"])
def test_overwrite_never_deletes_a_folder_that_is_no_store(bench: Bench, name: str) -> None:
    (bench.output / name).parent.mkdir(parents=True)
    (bench.output / name).write_text("years of work")
    before = files_below(bench.folder)
    bench.here("produce", "job.json", "--overwrite").refused(
        2, "is no Zarr store, so --overwrite leaves it alone"
    )
    bench.here("produce", "job.json").refused(2, "exists and is not of this job")
    assert files_below(bench.folder) == before


def test_an_output_of_something_else_is_refused_and_replaced_only_on_demand(bench: Bench) -> None:
    write_zarr(bench.output, random_volume((4, 4)))
    before = files_below(bench.folder)
    bench.here("produce", "job.json").refused(2, "exists and is not of this job", "--overwrite")
    assert files_below(bench.folder) == before
    produce(bench, "--overwrite")
    assert zarr.open(bench.output / "0", mode="r").shape == (3, *SHAPE)


def set_network(bench: Bench) -> dict[str, Any]:
    (bench.folder / "network.py").write_text(
        (bench.folder / "network.py").read_text().replace("0.5) / channels", "0.4) / channels")
    )
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
    ],
)
def test_a_changed_job_onto_an_old_output_is_refused_with_what_differs(
    bench: Bench, change: Any, named: str
) -> None:
    write_zarr(bench.folder / "other.zarr", random_volume(SHAPE, "uint16"))
    produce(bench)
    bench.write_job(**(change(bench) if callable(change) else change))
    before = files_below(bench.folder)
    for options in ((), ("--resume",)):
        bench.here("produce", "job.json", *options).refused(2, "a different job", named)
    assert files_below(bench.folder) == before


def test_keys_that_only_say_where_a_job_runs_do_not_make_it_another(bench: Bench) -> None:
    produce(bench)
    bench.write_job(hardware="cpu_only", queue=f"sqlite://{bench.folder}/other.db")
    assert produce(bench).startswith("6 chunks, 0 done, 0 newly queued")


def test_a_half_written_output_of_an_older_job_is_refused(bench: Bench) -> None:
    """Metadata without a job folder: its remains say nothing of what is done."""
    produce(bench)
    bench.work_here(only={(0, 0)}.__contains__)
    shutil.rmtree(bench.job_folder)
    before = files_below(bench.output)
    bench.here("produce", "job.json").refused(2, "exists and is not of this job")
    bench.here("finalize", "out.zarr").refused(2, "no job was produced here")
    assert files_below(bench.output) == before
    produce(bench, "--overwrite")
    assert bench.commits() == []


def test_a_producer_killed_between_ledger_and_output_is_simply_run_again(
    bench: Bench, whole: Bench
) -> None:
    produce(bench)
    shutil.rmtree(bench.output)
    assert produce(bench).startswith("6 chunks, 0 done, 0 newly queued")
    bench.work_here()
    is_complete(bench, whole)


def test_an_output_that_vanished_under_committed_chunks_is_said_to_be_damaged(bench: Bench) -> None:
    produce(bench)
    bench.work_here(only={(0, 0)}.__contains__)
    (bench.output / "0" / "zarr.json").unlink()
    bench.here("produce", "job.json").refused(2, "is damaged: it has no 0/zarr.json")


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
    bench: Bench, whole: Bench, damage: str, piece: str, chunk: str
) -> None:
    produce(bench)
    bench.work_here()
    DAMAGE[damage](bench.job_folder / "pieces" / "1.1" / piece)
    bench.here("finalize", "out.zarr").refused(
        1, f"pieces/1.1/{piece}", f"chunk {chunk} must be computed again", "produce --resume"
    )
    assert state(bench) == "incomplete"
    for file in bench.folder.glob("queue.db*"):
        file.unlink()
    assert produce(bench, "--resume").startswith("6 chunks, 5 done, 1 newly queued")
    bench.work_here()
    is_complete(bench, whole)


def test_with_missing_chunks_allowed_the_output_says_so_and_is_completed_later(
    bench: Bench, whole: Bench
) -> None:
    produce(bench)
    missing = {(1, 0)}
    bench.work_here(only=lambda index: index not in missing)
    said = bench.here("finalize", "out.zarr", "--allow-missing").ok().out
    assert "sealed WITHOUT 1 chunks" in said
    assert state(bench) == "incomplete"
    report = json.loads((bench.job_folder / "report.json").read_text())
    assert report["missing"] == ["1.0"]
    assert report["chunks"] == 5
    partial, full = read_output(bench.output), read_output(whole.output)
    untouched = np.ones(SHAPE, bool)
    untouched[12:, :] = False  # the blocks that chunk 1.0 reaches lie here
    np.testing.assert_array_equal(partial[:, untouched], full[:, untouched])
    assert not partial[:, 12:24, :12].any()
    status = json.loads(bench.here("status", "out.zarr", "--json").ok().out)
    assert status["done"] == 5
    bench.here("finalize", "out.zarr").refused(3, "1 chunks are not computed yet: 1.0")
    bench.work_here()
    is_complete(bench, whole)


def test_nothing_at_all_may_be_missing_too(bench: Bench, whole: Bench) -> None:
    produce(bench)
    assert "WITHOUT 6 chunks" in bench.here("finalize", "out.zarr", "--allow-missing").ok().out
    assert not read_output(bench.output).any()
    bench.work_here()
    is_complete(bench, whole)


class Killed(BaseException):
    """Stands for a kill: nothing in chunkq may catch it."""


@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_a_finalizer_killed_at_any_point_is_continued(
    bench: Bench, whole: Bench, monkeypatch: pytest.MonkeyPatch, blocks: int, moment: str
) -> None:
    produce(bench)
    bench.work_here()
    job, lock, count = open_job(str(bench.job_folder)), threading.Lock(), [0]
    name = "commit" if moment == "before the commit" else "delete_pieces"
    real = getattr(job.folder, name)

    def dying(*args: Any) -> None:
        with lock:
            count[0] += 1
            if count[0] > blocks:
                raise Killed
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(type(job.folder), name, lambda self, *args: dying(*args))
        with pytest.raises(Killed):
            finalize_job(job, worker="killed")
    assert state(bench) == "incomplete"
    assert not (bench.job_folder / "report.json").exists()
    is_complete(bench, whole)


def test_a_finalizer_that_finds_a_piece_gone_leaves_the_other_blocks_right(
    bench: Bench, whole: Bench
) -> None:
    produce(bench)
    bench.work_here()
    (bench.job_folder / "pieces" / "2.1" / "10").unlink()
    job = open_job(str(bench.job_folder))
    with pytest.raises(PieceError, match=r"chunk 1\.1 must be computed again"):
        finalize_job(job, worker="one")
    for file in bench.folder.glob("queue.db*"):
        file.unlink()
    produce(bench, "--resume")
    bench.work_here()
    is_complete(bench, whole)


def test_partial_files_of_a_killed_writer_in_the_ledger_hurt_nothing(
    bench: Bench, whole: Bench
) -> None:
    produce(bench)
    bench.work_here(only={(0, 0)}.__contains__)
    done = bench.job_folder / "done" / "infer"
    (done / ".partial-1234-1.1").write_bytes(b'{"kind"')
    os.makedirs(bench.job_folder / "failed", exist_ok=True)
    (bench.job_folder / "failed" / ".partial-1234-1.1.json").write_bytes(b"{")
    assert produce(bench).startswith("6 chunks, 1 done, 0 newly queued")
    status = json.loads(bench.here("status", "out.zarr", "--json").ok().out)
    assert (status["done"], status["failures"]) == (1, [])
    bench.work_here()
    is_complete(bench, whole)


# ------------------------------------------------------------------------ one chunk's task


def run_chunk(bench: Bench, index: tuple[int, ...]) -> Outcome:
    return run_task(Task("infer", str(bench.job_folder), index), Attempt(1, "worker"))


@pytest.mark.parametrize(("owner", "name"), [(OpenJob, "write"), (JobFolder, "put_piece")])
def test_a_worker_killed_while_it_writes_has_committed_nothing(
    bench: Bench, whole: Bench, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    def dying(*_: Any, **__: Any) -> None:
        raise Killed

    produce(bench)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            run_chunk(bench, (1, 1))
    assert bench.commits() == []
    bench.work_here()
    is_complete(bench, whole)


def test_a_chunk_that_failed_is_recorded_and_queued_again_after_the_queue_is_lost(
    bench: Bench, whole: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    produce(bench)
    bench.work_here(only={(0, 0)}.__contains__)
    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "put_piece", full)
        with pytest.raises(OSError, match="no space left"):
            run_chunk(bench, (1, 1))
    [failure] = bench.ledger.failures()
    assert (failure.chunk, failure.error) == ((1, 1), "OSError")
    assert "no space left" in failure.message
    for file in bench.folder.glob("queue.db*"):
        file.unlink()
    assert produce(bench, "--resume").startswith("6 chunks, 1 done, 5 newly queued")
    assert queued(bench) == CHUNKS - {(0, 0)}
    bench.work_here()
    assert bench.ledger.failures() == []
    is_complete(bench, whole)


def test_a_chunk_marks_itself_in_every_block_that_it_contributes_to(bench: Bench) -> None:
    produce(bench)
    marked: dict[tuple[int, ...], set[tuple[int, int]]] = {}
    for index in CHUNKS:
        for block, member, of in run_chunk(bench, index).marks:
            marked.setdefault(block, set()).add((member, of))
    plan = open_job(str(bench.job_folder)).plan
    expected = {block: len(plan.contributors(block)) for block in plan.to_finalize()}
    assert max(expected.values()) == 4
    assert marked == {block: {(n, of) for n in range(of)} for block, of in expected.items()}


def test_a_worker_of_a_replaced_job_writes_nothing_into_the_new_one(bench: Bench) -> None:
    produce(bench)
    old = open_job(str(bench.job_folder))
    bench.values["strides"] = [6, 6]
    bench.write_job()
    produce(bench, "--overwrite")
    with pytest.raises(MissingJobError, match="was replaced meanwhile"):
        old.check_unchanged()
    assert open_job(str(bench.job_folder)).plan.job.strides == (6, 6)
