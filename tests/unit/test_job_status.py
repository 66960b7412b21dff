"""`job_status` reads a few listings and a sample of the commit records."""

import os
from pathlib import Path

import pytest
from chunkq_producer.job_status import job_status

from chunkq.geometry.axes import plain_axes
from chunkq.job import ledger as ledger_module
from chunkq.job.items import Image
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_handle import JobHandle
from chunkq.job.ledger import ItemLedger, Ledger
from chunkq.job.record import JobRecord
from chunkq.job.task_records import Commit, RecentCommits
from chunkq.storage.images import ImageSource
from tests.strategies import plan_for

CHUNKS, EPOCH = 48, "0a1b2c3d"


def ledger_in(path: Path) -> ItemLedger:
    return Ledger(str(path / "out.zarr.chunkq"), EPOCH).item(0)


def ledger_with_commits(path: Path) -> ItemLedger:
    """Return a ledger with one commit per second of a worker whose device is busy half the time."""
    ledger = ledger_in(path)
    for n in range(CHUNKS):
        seconds = {"read": 0.5, "compute": 0.5}
        ledger.commit(Commit("infer", 0, (n,), 1, "host-1", float(n), n + 1.0, seconds))
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
    source = ImageSource("zarr", "/in.zarr", plain_axes(plan.volume.shape), plan.volume.dtype)
    record = JobRecord(plan.job, (Image(0, "", (source,)),), {}, epoch=EPOCH)
    job = JobHandle(JobFolder(str(tmp_path / "out.zarr.chunkq")), record)
    # The file system decides which records are sampled, so sample every step-th one explicitly.
    records = tuple(job.items[0].ledger.commits("infer", [(n,) for n in range(0, CHUNKS, step)]))
    assert len(records) == CHUNKS // step
    monkeypatch.setattr(
        job.items[0].ledger,
        "recent_commits",
        lambda kind, count: RecentCommits(CHUNKS, step, records),
    )
    status = job_status(job, None)
    assert (status.chunks, status.done) == (CHUNKS + 10, CHUNKS)
    assert status.voxels_per_second == pytest.approx(
        10, rel=0.1
    )  # one chunk of ten voxels per second
    (worker,) = status.workers
    assert worker.device_wait_share == pytest.approx(0.5, abs=0.05)
