"""Scripts in deploy/slurm on a real SLURM with two nodes on this host, two emulated GPUs each."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from chunkq.errors import ErrorCode
from tests.harness.servers.redis import RedisServer, free_port, redis_server
from tests.harness.servers.slurm import GPUS, NODES, JobState, SlurmCluster, slurm_cluster
from tests.harness.slurm_workspace import SCRIPTS, SlurmWorkspace
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

EVERY_GPU = sorted((node, str(gpu)) for node in NODES for gpu in range(GPUS))


@pytest.fixture(scope="module")
def slurm_of_module() -> Iterator[SlurmCluster]:
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_of_module: SlurmCluster) -> Iterator[SlurmCluster]:
    """Yield a SLURM cluster without jobs."""
    yield slurm_of_module
    slurm_of_module.cancel_all()


@pytest.fixture(scope="module")
def redis_with_password() -> Iterator[RedisServer]:
    """Yield a Redis server with a password, as on a login node."""
    with redis_server(password="test-slurm-secret") as server:
        yield server


@pytest.fixture
def site(
    slurm: SlurmCluster, redis_with_password: RedisServer, standard_job: StandardJob, tmp_path: Path
) -> SlurmWorkspace:
    with redis_with_password.client as client:
        client.flushall()
    # Emulated GPUs are not CUDA devices.
    keys = {"model": {"device": "cpu"}}
    return SlurmWorkspace(
        slurm, standard_job.workspace(tmp_path, keys, url=redis_with_password.url)
    )


def command_lines() -> str:
    """Return the command lines of all processes, which every user can read."""
    return "\n".join(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


def time_of(state: JobState, name: str) -> datetime:
    return datetime.fromisoformat(state.values[name])


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_shellcheck_accepts(script: Path) -> None:
    program = shutil.which("shellcheck")
    if program is None and not os.environ.get("CI"):
        pytest.skip("shellcheck is missing; run apt-get install shellcheck")
    assert program is not None, "shellcheck is missing; run apt-get install shellcheck"
    result = subprocess.run(
        [program, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout + result.stderr == ""
    assert "set -euo pipefail" in script.read_text()


def test_workers_use_the_granted_gpus_and_read_the_queue_url_from_a_file(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    workspace.produce()
    job = site.submit(
        "workers.sbatch",
        options=f"--gres=gpu:{GPUS}",
        CHUNKQ_QUEUE_FILE=str(site.address),
        NET_HOLD="forward",
    )
    workspace.wait_until_stopped()
    wait_until(lambda: len(site.pins()) == len(EVERY_GPU), "every worker process has started")
    assert sorted(site.pins().values()) == EVERY_GPU
    assert "chunkq work --burst" in command_lines()
    assert "test-slurm-secret" not in command_lines()
    assert "test-slurm-secret" not in site.slurm.check_output("scontrol", "show", "job", job)
    workspace.open_gate()
    (slurm_job,) = site.slurm.wait_for_success(job)
    assert "2 worker processes on GPUs 0, 1" in slurm_job.log
    assert "test-slurm-secret" not in slurm_job.log

    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}
    assert site.computing() <= site.pins().keys()
    workers = {workspace.record(name)["worker"] for name in workspace.done()}
    assert {worker.rsplit(":", 2)[1] for worker in workers} <= {"0", "1"}


def test_a_job_can_start_its_own_redis_and_leaves_only_the_output(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    port, before = free_port(), set(site.temporary.glob("*"))
    # chunkq does not treat this local address as loopback, so the server has a password.
    job = site.submit(
        "workers.sbatch",
        str(site.workspace.job_file),
        str(site.workspace.output),
        options="--gres=gpu:1",
        REDIS_BIND="127.0.0.2",
        REDIS_PORT=str(port),
    )
    (slurm_job,) = site.slurm.wait_for_success(job)
    assert f"Redis on 127.0.0.2, port {port}" in slurm_job.log
    assert "complete: " in slurm_job.log
    assert "redis://:***@127.0.0.2" in slurm_job.log
    assert site.workspace.stored() == undisturbed.stored()
    assert set(site.workspace.computed().values()) == {1}
    assert sorted(site.pins().values()) == [("n1", "0"), ("n2", "0")]
    assert set(site.temporary.iterdir()) == before
    assert f":{port}" not in command_lines()


def test_each_task_of_an_array_uses_its_own_gpu(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    workspace.produce()
    job = site.submit(
        "array.sbatch",
        str(workspace.output),
        options="--array=0-3",
        CHUNKQ_QUEUE_FILE=str(site.address),
        NET_SLEEP="0.1",
    )
    slurm_jobs = site.slurm.wait_for_success(job)
    assert [slurm_job.restarts for slurm_job in slurm_jobs] == [0, 0, 0, 0]
    assert sorted(site.pins().values()) == EVERY_GPU
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


@pytest.mark.proof("slurm")
def test_a_job_at_its_time_limit_requeues_itself_and_computes_nothing_twice(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    workspace.produce()
    # SLURM checks every 30 s, so the signal arrives 25 to 55 s after the start. A slow machine
    # needs the rest of the two minutes to receive it and to finish its chunks.
    job = site.submit(
        "array.sbatch",
        str(workspace.output),
        options="--array=7 --time=2 --signal=B:TERM@65",
        CHUNKQ_QUEUE_FILE=str(site.address),
        NET_HOLD="forward",
        NET_AFTER="5",
    )
    workspace.wait_until_stopped()
    (max_time,) = re.findall(r"--max-time (\d+)", command_lines())
    assert 80 < int(max_time) <= 100
    stopping = "stopping"
    wait_until(lambda: stopping in site.slurm.states(job)[0].log, "the time limit is near")
    assert site.slurm.states(job)[0].state == "RUNNING"
    before = workspace.done()
    workspace.open_gate()
    state = site.slurm.states(job)[0]
    wait_until(lambda: "(restart 1)" in state.log, "the job requeues itself")
    done_at_stop = workspace.done()
    assert 5 <= len(before) < len(done_at_stop) < len(workspace.patches())

    (slurm_job,) = site.slurm.wait_for_success(job)
    assert slurm_job.restarts >= 1
    assert {name: workspace.done()[name] for name in done_at_stop} == done_at_stop
    assert workspace.counts().failed == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_a_job_that_receives_sigterm_requeues_itself_and_computes_nothing_twice(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    workspace.produce()
    job = site.submit(
        "array.sbatch",
        str(workspace.output),
        options="--array=7",
        CHUNKQ_QUEUE_FILE=str(site.address),
        NET_HOLD="forward",
        NET_AFTER="5",
    )
    workspace.wait_until_stopped()
    site.slurm.check_output("scancel", "--signal=TERM", "--batch", job)
    stopping = "stopping"
    wait_until(lambda: stopping in site.slurm.states(job)[0].log, "the worker is stopping")
    before = workspace.done()
    workspace.open_gate()
    restart = "(restart 1)"
    wait_until(lambda: restart in site.slurm.states(job)[0].log, "the job requeues itself")
    wait_until(lambda: site.slurm.states(job)[0].state == "PENDING", "the job is pending")
    done_at_stop = workspace.done()
    assert len(before) < len(done_at_stop) < len(workspace.patches())

    # Do not set StartTime=now: within cred_expire a node refuses the old credential of the job.
    (slurm_job,) = site.slurm.wait_for_success(job)
    assert slurm_job.restarts == 1
    assert {name: workspace.done()[name] for name in done_at_stop} == done_at_stop
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_the_next_job_continues_a_cancelled_one(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    workspace.produce()
    arguments = ("workers.sbatch",)
    options = "--gres=gpu:1"
    environment = {
        "CHUNKQ_QUEUE_FILE": str(site.address),
        "CHUNKQ_WORKER_SETTINGS": '{"lease": 3}',
    }
    job = site.submit(*arguments, options=options, **environment, NET_HOLD="forward", NET_AFTER="5")
    workspace.wait_until_stopped()
    site.slurm.check_output("scancel", job)
    (slurm_job,) = site.slurm.wait(job)
    assert slurm_job.state == "CANCELLED"
    wait_until(lambda: not site.alive(), "all processes of the job have ended")
    done_at_stop = workspace.done()
    assert 5 <= len(done_at_stop) < len(workspace.patches())

    # The chunks of the killed process are reserved until their lease expires.
    next_job = site.submit(*arguments, options=options, **environment)
    site.slurm.wait_for_success(next_job)
    assert {name: workspace.done()[name] for name in done_at_stop} == done_at_stop
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    computed, patches = workspace.computed(), workspace.patches()
    assert {computed[patch] for name in done_at_stop for patch in patches[name]} == {1}


@pytest.mark.proof("slurm")
def test_a_cancelled_array_does_not_requeue_itself(site: SlurmWorkspace) -> None:
    workspace = site.workspace
    workspace.produce()
    job = site.submit(
        "array.sbatch",
        str(workspace.output),
        options="--array=0",
        CHUNKQ_QUEUE_FILE=str(site.address),
        NET_HOLD="forward",
        NET_AFTER="5",
    )
    workspace.wait_until_stopped()
    site.slurm.check_output("scancel", job)
    workspace.open_gate()
    (slurm_job,) = site.slurm.wait(job)
    assert (slurm_job.state, slurm_job.restarts) == ("CANCELLED", 0)
    wait_until(lambda: not site.slurm.job_processes(), "all processes of the job have ended")
    assert site.slurm.states(job)[0].state == "CANCELLED"
    assert workspace.counts().queued > 0


def test_the_pipeline_runs_produce_work_and_finalize_in_this_order(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    result = _pipeline(
        site, str(site.workspace.job_file), str(site.workspace.output), "--array=0-1"
    )
    assert result.returncode == 0, result.stderr
    produce, work, finalize = result.stdout.split()
    (finalize_job,) = site.slurm.wait_for_success(finalize)
    (produce_job,), work_jobs = (
        site.slurm.wait_for_success(produce),
        site.slurm.wait_for_success(work),
    )
    assert "24 newly queued" in produce_job.log
    assert "complete: " in finalize_job.log
    produced = time_of(produce_job, "EndTime")
    assert all(time_of(work_job, "StartTime") >= produced for work_job in work_jobs)
    finalized = time_of(finalize_job, "StartTime")
    assert all(finalized >= time_of(work_job, "EndTime") for work_job in work_jobs)
    assert site.workspace.stored() == undisturbed.stored()
    assert set(site.workspace.computed().values()) == {1}


def test_the_pipeline_stops_after_produce_if_the_job_file_is_invalid(site: SlurmWorkspace) -> None:
    job_file = site.workspace.folder / "invalid.yaml"
    job_file.write_text("input: nothing.zarr\n")
    result = _pipeline(site, str(job_file), str(site.workspace.output))
    assert result.returncode == 0, result.stderr
    produce, work, finalize = result.stdout.split()
    (produce_job,) = site.slurm.wait(produce)
    assert (produce_job.state, produce_job.exit_code) == ("FAILED", 2)
    assert f"[{ErrorCode.JOB_INVALID}]" in produce_job.log
    for job in (work, finalize):
        assert {slurm_job.state for slurm_job in site.slurm.wait(job)} == {"CANCELLED"}


def _pipeline(site: SlurmWorkspace, *arguments: str) -> subprocess.CompletedProcess[str]:
    return site.slurm.run(
        str(SCRIPTS / "pipeline.sh"),
        *arguments,
        cwd=site.workspace.folder,
        **site.environment | {"CHUNKQ_QUEUE_FILE": str(site.address)},
    )


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("workers.sbatch", (), "CHUNKQ_QUEUE_FILE"),
        ("workers.sbatch", ("job.yaml",), "usage: sbatch workers.sbatch [JOB OUT]"),
        ("array.sbatch", (), "usage: sbatch array.sbatch OUT"),
        ("array.sbatch", ("out.zarr",), "CHUNKQ_QUEUE_FILE"),
        ("dask.sbatch", (), "usage: sbatch dask.sbatch JOB"),
        ("ray.sbatch", (), "usage: sbatch ray.sbatch JOB"),
        ("produce.sbatch", ("job.yaml",), "usage: sbatch produce.sbatch JOB OUT"),
        ("produce.sbatch", ("job.yaml", "out.zarr"), "CHUNKQ_QUEUE_FILE"),
        ("finalize.sbatch", (), "usage: sbatch finalize.sbatch OUT"),
        ("pipeline.sh", ("job.yaml",), "usage: pipeline.sh JOB OUT [sbatch options]"),
        ("pipeline.sh", ("none.yaml", "out.zarr"), "none.yaml: "),
        ("pipeline.sh", ("job.yaml", "out.zarr"), "CHUNKQ_QUEUE_FILE"),
    ],
)
def test_a_script_reports_a_missing_argument_or_file(
    script: str, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").touch()
    result = subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SLURM_CPUS_PER_TASK": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode in (1, 2)
    assert message in result.stderr.splitlines()[-1]
