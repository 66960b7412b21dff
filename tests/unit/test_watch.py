"""A status rests on a few listings and a sample of records, and still tells the truth."""

import os
from pathlib import Path

import pytest
from chunkq_producer.watch import job_status

from chunkq import ledger
from chunkq.ledger import Commit, JobFolder, Newest
from tests.strategies import plan_for

CHUNKS = 48


def folder_with_commits(path: Path) -> JobFolder:
    """One commit a second by one worker whose device computes half of the time."""
    folder = JobFolder(str(path / "out.zarr.chunkq"))
    for n in range(CHUNKS):
        seconds = {"read": 0.5, "compute": 0.5}
        folder.commit(Commit("infer", (n,), 1, "host-1", float(n), n + 1.0, seconds))
        os.utime(path / "out.zarr.chunkq" / "done" / "infer" / str(n), (n + 1.0, n + 1.0))
    return folder


def test_of_few_records_the_newest_are_found(tmp_path: Path) -> None:
    newest = folder_with_commits(tmp_path).newest("infer", 3)
    assert (newest.total, newest.step) == (CHUNKS, 1)
    assert [record.chunk for record in newest.records] == [(47,), (46,), (45,)]


def test_of_many_records_all_are_counted_and_only_a_sample_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "SAMPLE", 16)
    newest = folder_with_commits(tmp_path).newest("infer", 64)
    assert (newest.total, newest.step, len(newest.records)) == (CHUNKS, 4, 12)
    moments = [record.finished for record in newest.records]
    assert moments == sorted(moments, reverse=True)


def test_nothing_done_yet_is_no_speed(tmp_path: Path) -> None:
    assert JobFolder(str(tmp_path / "out.zarr.chunkq")).newest("infer", 3) == Newest(0, 1, ())


@pytest.mark.parametrize("step", [1, 4])
def test_speed_and_waiting_do_not_depend_on_how_many_records_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    folder = folder_with_commits(tmp_path)
    # Which records a sample holds is up to the file system; here it is every step-th in time.
    records = tuple(folder.commits("infer", [(n,) for n in range(0, CHUNKS, step)]))
    monkeypatch.setattr(folder, "newest", lambda kind, count: Newest(CHUNKS, step, records))
    plan = plan_for((10 * (CHUNKS + 10),), (10,), chunksize=[10])
    status = job_status(folder, plan, None)
    assert (status.chunks, status.done) == (CHUNKS + 10, CHUNKS)
    assert status.voxels_per_second == pytest.approx(10, rel=0.1)  # ten voxels, one second a chunk
    (worker,) = status.workers
    assert worker.device_wait_share == pytest.approx(0.5, abs=0.05)
