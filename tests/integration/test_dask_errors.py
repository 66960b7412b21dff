"""Dask queues that cannot be used are errors of one line."""

import json
from pathlib import Path

import pytest

from chunkq.errors import ErrorCode
from chunkq.install_hint import install_command
from tests.harness.processes import MISSING_PACKAGES, startup_hook
from tests.harness.servers.dask import HOST, SHORT_TIMEOUT, assert_refused
from tests.harness.servers.redis import free_port
from tests.harness.standard_job import StandardJob, run_all

ON_CPU = ("--gpus", "none")


def test_an_unreachable_scheduler_is_an_error_of_one_line(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    url = f"dask://{HOST}:{free_port()}"
    workspace = standard_job.workspace(tmp_path, url=url)
    produce, run, work = run_all(
        workspace,
        ("produce", "job.yaml"),
        ("run", str(workspace.job_file)),
        ("work", *ON_CPU, "--burst"),
        PYTHONPATH=startup_hook(tmp_path, SHORT_TIMEOUT),
    )
    for result in (produce, run, work):
        assert_refused(result, 1, ErrorCode.QUEUE_UNAVAILABLE, url, "`dask scheduler`")
    assert not workspace.job_folder.exists()
    standard_job.workspace(tmp_path).produce()
    status, distribute, finalize = run_all(
        workspace,
        ("status", str(workspace.output), "--json"),
        ("finalize", str(workspace.output), "--distribute"),
        ("finalize", str(workspace.output)),
        PYTHONPATH=startup_hook(tmp_path, SHORT_TIMEOUT),
    )
    assert status.code == 0
    assert url in json.loads(status.err)["queue_problem"]
    assert_refused(distribute, 1, ErrorCode.QUEUE_UNAVAILABLE, url)
    finalize.refused(3, ErrorCode.JOB_INCOMPLETE)
    assert url not in finalize.err


@pytest.mark.parametrize(
    ("url", "fragments"),
    [
        ("dask://", ("dask:// ", "`chunkq run`")),
        ("dask://host:port", ("dask://host:port: ",)),
        ("dask://host:8786/0", ("dask://host:8786/0: ",)),
        ("dask://host?a=b", ("dask://host?a=b: ",)),
        ("dask://host?protocol=ws", ("dask://host?protocol=ws: ", "tcp, tls, ucx")),
        ("dask://u:geheim@host", ("dask://***@host: ",)),
    ],
)
def test_an_invalid_address_is_an_error_of_one_line(
    standard_job: StandardJob, tmp_path: Path, url: str, fragments: tuple[str, ...]
) -> None:
    workspace = standard_job.workspace(tmp_path)
    for command in (("produce", str(workspace.job_file)), ("work",)):
        result = workspace.call(*command, "--queue", url)
        assert_refused(result, 2, ErrorCode.QUEUE_ADDRESS_INVALID, "dask://HOST:8786", *fragments)
        assert "geheim" not in result.err
    assert not workspace.job_folder.exists()


def test_an_unsupported_protocol_is_an_error_of_one_line(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, {"dask_config": {"protocol": "ucx"}})
    job = str(workspace.job_file)
    for command in (
        ("work", "--queue", "dask://host?protocol=ucx"),
        ("run", job, "--queue", "dask://"),
    ):
        result = workspace.call(*command)
        assert_refused(result, 1, ErrorCode.PACKAGE_MISSING, "protocol=ucx", "distributed-ucxx")


def test_a_running_cluster_needs_an_address(standard_job: StandardJob, tmp_path: Path) -> None:
    workspace = standard_job.workspace(tmp_path, {"cluster": "running"}, url="dask://")
    result = workspace.call("run", str(workspace.job_file), "-e", "dask")
    result.refused(2, ErrorCode.JOB_INVALID, "cluster: ", "dask_config.address", "--queue dask://")


def test_the_error_for_a_missing_package_names_the_extra(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, url="dask://")
    job = str(workspace.job_file)
    for result in run_all(
        workspace,
        ("produce", job, "--queue", f"dask://{HOST}"),
        ("work", "--queue", f"dask://{HOST}"),
        ("run", job, "-e", "dask"),
        PYTHONPATH=startup_hook(tmp_path, MISSING_PACKAGES.format(names={"distributed", "dask"})),
    ):
        assert_refused(result, 1, ErrorCode.PACKAGE_MISSING, "dask://", install_command("dask"))
