"""Fixtures that many integration tests share."""

from pathlib import Path

import pytest

from tests.harness.standard_job import StandardJob, StandardWorkspace


@pytest.fixture(scope="session")
def standard_job(tmp_path_factory: pytest.TempPathFactory) -> StandardJob:
    """The files of the standard job."""
    return StandardJob.create(tmp_path_factory.mktemp("standard-job"))


@pytest.fixture(scope="session")
def undisturbed(
    standard_job: StandardJob, tmp_path_factory: pytest.TempPathFactory
) -> StandardWorkspace:
    """The standard job, run by one worker on the embedded queue."""
    return standard_job.run_undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def workspace(standard_job: StandardJob, tmp_path: Path) -> StandardWorkspace:
    """The standard job in a folder of its own, nothing produced yet."""
    return standard_job.workspace(tmp_path)
