"""`job_status` reads a few listings and a sample of the commit records."""

import os
from pathlib import Path

import pytest
from chunkq_producer.job_status import job_status, status_line, status_screen
from rich.console import Console

from chunkq.geometry.axes import plain_axes
from chunkq.job import ledger as ledger_module
from chunkq.job.items import Image
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_handle import JobHandle
from chunkq.job.ledger import ItemLedger, Ledger
from chunkq.job.record import JobRecord
from chunkq.job.task_records import Commit, RecentCommits
from chunkq.storage.images import ImageSource
from tests.strategies import JobPlan, plan_for

CHUNKS, EPOCH = 48, "0a1b2c3d"


def ledger_in(path: Path) -> ItemLedger:
    return Ledger(str(path / "out.zarr.chunkq"), EPOCH).item(0)


def job_of(path: Path, plan: JobPlan) -> JobHandle:
    """Return the job of a plan, without files."""
    source = ImageSource("zarr", "/in.zarr", plain_axes(plan.volume.shape), plan.volume.dtype)
    record = JobRecord(plan.job, (Image(0, "", (source,)),), {}, epoch=EPOCH)
    return JobHandle(JobFolder(str(path / "out.zarr.chunkq")), record)


def ledger_with_commits(path: Path) -> ItemLedger:
    """Return a ledger with one commit per second of a worker whose device is busy half the time."""
    ledger = ledger_in(path)
    for n in range(CHUNKS):
        seconds = {"read": 0.5, "compute": 0.5}
        commit = Commit("infer", 0, (n,), 1, "host-1", float(n), n + 1.0, seconds, patches=1)
        ledger.commit(commit)
        os.utime(Path(ledger.objects.path, "done", "infer", "0", str(n)), (n + 1.0, n + 1.0))
    return ledger


def test_recent_commits_of_few_records_are_the_newest_ones(tmp_path: Path) -> None:
    recent = ledger_with_commits(tmp_path).recent_commits("infer", 3)
    assert (recent.total, recent.step) == (CHUNKS, 1)
    assert [record.chunk for record in recent.records] == [(47,), (46,), (45,)]


def test_recent_commits_of_many_records_count_all_and_read_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "SAMPLE_SIZE", 16)
    recent = ledger_with_commits(tmp_path).recent_commits("infer", 64)
    assert (recent.total, recent.step, len(recent.records)) == (CHUNKS, 4, 12)
    times = [record.finished for record in recent.records]
    assert times == sorted(times, reverse=True)


def test_a_ledger_without_commits_has_no_recent_commits(tmp_path: Path) -> None:
    assert ledger_in(tmp_path).recent_commits("infer", 3) == RecentCommits(0, 1, ())


@pytest.mark.parametrize("step", [1, 4])
def test_speed_and_wait_share_do_not_depend_on_the_size_of_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    ledger_with_commits(tmp_path)
    plan = plan_for((10 * (CHUNKS + 10),), (10,), chunksize=[10])
    job = job_of(tmp_path, plan)
    # The file system decides which records are sampled, so sample every step-th one explicitly.
    sample = tuple((n,) for n in range(0, CHUNKS, step))
    records = tuple(job.items[0].ledger.commits("infer", sample))
    assert len(records) == CHUNKS // step
    monkeypatch.setattr(
        job.items[0].ledger,
        "recent_commits",
        lambda kind, count: RecentCommits(CHUNKS, step, records, sample),
    )
    status = job_status(job, None)
    assert (status.chunks, status.done) == (CHUNKS + 10, CHUNKS)
    assert (status.patches, status.patches_done) == (CHUNKS + 10, CHUNKS)
    # One chunk of one patch and ten voxels per second.
    assert status.patches_per_second == pytest.approx(1, rel=0.1)
    assert status.voxels_per_second == pytest.approx(10, rel=0.1)
    assert status.seconds_left == pytest.approx(10, rel=0.1)
    (worker,) = status.workers
    assert worker.device_wait_share == pytest.approx(0.5, abs=0.05)


def uneven_job(path: Path, volume: int) -> JobHandle:
    """Return a job of chunks of up to four patches, of which the first three are finished.

    One worker has computed them, at one patch per second.
    """
    keys = {"inference_type": "sliding_window", "strides": [5], "chunksize": [20]}
    plan = plan_for((volume,), (10,), **keys)
    job = job_of(path, plan)
    for n in range(3):
        job.items[0].ledger.commit(
            Commit("infer", 0, (n,), 1, "host-1", 4.0 * n, 4.0 * n + 4, patches=4)
        )
    return job


def test_the_remaining_time_is_that_of_the_remaining_patches(tmp_path: Path) -> None:
    # The chunks own 4, 4, 4 and 2 patches.
    status = job_status(uneven_job(tmp_path, 74), None)
    assert (status.done, status.chunks) == (3, 4)
    assert (status.patches_done, status.patches) == (12, 14)
    assert status.patches_per_second == pytest.approx(1)
    assert status.seconds_left == pytest.approx(2)
    assert status_line(status) == "3/4 chunks done, 12/14 patches, 1 patches/s, 2 s left"


def test_a_block_without_patches_is_no_chunk_of_the_status(tmp_path: Path) -> None:
    # The chunks own 4, 4 and 4 patches; the last of four blocks owns none.
    status = job_status(uneven_job(tmp_path, 62), None)
    assert (status.done, status.chunks) == (3, 3)
    assert (status.patches_done, status.patches) == (12, 12)
    assert status.seconds_left is None
    assert status.blocks_to_finalize == 3
    assert status_line(status) == "3/3 chunks done"


def test_patches_of_many_records_are_estimated_from_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "SAMPLE_SIZE", 2)
    status = job_status(uneven_job(tmp_path, 70), None)
    assert (status.done, status.patches_done) == (3, 12)


@pytest.mark.parametrize("with_next_step", [True, False])
def test_a_run_shows_the_status_without_the_step_that_it_takes_next(
    tmp_path: Path, with_next_step: bool
) -> None:
    job = uneven_job(tmp_path, 62)  # all chunks are done, and the output is not sealed
    console = Console(width=200)
    with console.capture() as capture:
        screen = status_screen(job_status(job, None), 200, with_next_step=with_next_step)
        console.print(screen)
    assert ("chunkq finalize" in capture.get()) == with_next_step
    assert "3/3 chunks done" in capture.get()
