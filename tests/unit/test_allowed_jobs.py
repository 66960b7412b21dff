"""Which job folders a worker accepts."""

from pathlib import Path

import pytest
from chunkq_worker.run import ALLOW_VARIABLE, run_task

from chunkq.errors import JobError, MissingJobError
from chunkq.executors.base import Attempt
from chunkq.tasks import Task


def run(folder: Path) -> None:
    run_task(Task("infer", f"{folder}/out.zarr.chunkq", (0,)), Attempt(1, "worker"))


@pytest.mark.parametrize("allowed", ["team", "team/"])
def test_only_jobs_below_the_allowed_folders_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    monkeypatch.setenv(ALLOW_VARIABLE, f"{tmp_path}/scratch\n{tmp_path}/{allowed}")
    for folder in ("team", "team/brain", "scratch"):
        with pytest.raises(MissingJobError):  # accepted, but there is no job
            run(tmp_path / folder)
    (tmp_path / "team").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "team" / "link").symlink_to(tmp_path / "other")
    for folder in ("team2", "other", "team/../other", "team/link"):
        with pytest.raises(JobError, match="this worker only accepts jobs below"):
            run(tmp_path / folder)
