"""The scripts in deploy/slurm on a real SLURM: two nodes on this host, two emulated GPUs each."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest

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
    """A SLURM without jobs."""
    yield slurm_of_module
    slurm_of_module.empty()


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    """A Redis with a password, as on a login node."""
    with redis_server(password="wordless-secret") as server:
        yield server


@pytest.fixture
def site(
    slurm: SlurmCluster, guarded: RedisServer, standard_job: StandardJob, tmp_path: Path
) -> SlurmWorkspace:
    with guarded.client as client:
        client.flushall()
    # An emulated GPU is no CUDA device.
    keys = {"model": {"device": "cpu"}}
    return SlurmWorkspace(slurm, standard_job.workspace(tmp_path, keys, url=guarded.url))


def command_lines() -> str:
    """The command lines of all processes, as everyone on the machine can read them."""
    return "\n".join(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


def time_of(state: JobState, name: str) -> datetime:
    return datetime.fromisoformat(state.values[name])


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in(script: Path) -> None:
    program = shutil.which("shellcheck")
    if program is None and not os.environ.get("CI"):
        pytest.skip("no shellcheck on this machine: apt-get install shellcheck")
    assert program is not None, "no shellcheck on this machine: apt-get install shellcheck"
    ended = subprocess.run(
        [program, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout + ended.stderr == ""
    assert "set -euo pipefail" in script.read_text()


def test_workers_run_on_the_gpus_that_slurm_grants_with_the_address_in_a_file_alone(
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
    wait_until(lambda: len(site.pins()) == len(EVERY_GPU), "every worker process is there")
    assert sorted(site.pins().values()) == EVERY_GPU
    assert "chunkq work --burst" in command_lines()
    assert "wordless-secret" not in command_lines()
    assert "wordless-secret" not in site.slurm.ask("scontrol", "show", "job", job)
    workspace.open_gate()
    (ended,) = site.slurm.succeeded(job)
    assert "2 worker processes on GPUs 0, 1" in ended.log
    assert "wordless-secret" not in ended.log

    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}
    assert site.computing() <= site.pins().keys()
    devices = {one.decode().rsplit(":", 2)[1] for one in _workers(workspace)}
    assert devices <= {"0", "1"}


def _workers(workspace: StandardWorkspace) -> set[bytes]:
    return {workspace.record(name)["worker"].encode() for name in workspace.done()}


def test_one_job_brings_its_own_redis_and_leaves_nothing_but_the_output(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    port, before = free_port(), set(site.temporary.glob("*"))
    # An address of this host that is not plain loopback to chunkq, so that there is a password.
    job = site.submit(
        "workers.sbatch",
        str(site.workspace.job_file),
        str(site.workspace.output),
        options="--gres=gpu:1",
        REDIS_BIND="127.0.0.2",
        REDIS_PORT=str(port),
    )
    (ended,) = site.slurm.succeeded(job)
    assert f"Redis on 127.0.0.2, port {port}" in ended.log
    assert "complete: " in ended.log
    assert "redis://:***@127.0.0.2" in ended.log
    assert site.workspace.stored() == undisturbed.stored()
    assert set(site.workspace.computed().values()) == {1}
    assert sorted(site.pins().values()) == [("n1", "0"), ("n2", "0")]
    assert set(site.temporary.iterdir()) == before
    assert f":{port}" not in command_lines()


def test_each_job_of_an_array_gets_its_own_gpu(
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
    ended = site.slurm.succeeded(job)
    assert [one.restarts for one in ended] == [0, 0, 0, 0]
    assert sorted(site.pins().values()) == EVERY_GPU
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


@pytest.mark.proof("slurm")
def test_a_job_whose_walltime_ends_is_continued_by_itself_and_computes_nothing_twice(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    workspace.produce()
    # SLURM looks every 30 s, so the signal comes 25 to 55 s after the start of these two minutes;
    # a slow machine needs the rest of them to see it and to finish its chunk.
    job = site.submit(
        "array.sbatch",
        str(workspace.output),
        options="--array=7 --time=2 --signal=B:TERM@65",
        CHUNKQ_QUEUE_FILE=str(site.address),
        NET_HOLD="forward",
        NET_AFTER="5",
    )
    workspace.wait_until_stopped()
    (found,) = re.findall(r"--max-time (\d+)", command_lines())
    assert 80 < int(found) <= 100
    stopping = "stopping: chunks in flight are finished first"
    wait_until(lambda: stopping in site.slurm.states(job)[0].log, "the walltime is near")
    assert site.slurm.states(job)[0].state == "RUNNING"
    before = workspace.done()
    workspace.open_gate()
    log = site.slurm.states(job)[0]
    wait_until(lambda: "requeueing this job (restart 1)" in log.log, "it wants to come back")
    stopped_at = workspace.done()
    assert 5 <= len(before) < len(stopped_at) < len(workspace.patches())

    (ended,) = site.slurm.succeeded(job)
    assert ended.restarts >= 1
    assert {name: workspace.done()[name] for name in stopped_at} == stopped_at
    assert workspace.counts().failed == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_a_job_that_is_told_to_stop_comes_back_and_computes_nothing_twice(
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
    site.slurm.ask("scancel", "--signal=TERM", "--batch", job)
    stopping = "stopping: chunks in flight are finished first"
    wait_until(lambda: stopping in site.slurm.states(job)[0].log, "the worker stops")
    before = workspace.done()
    workspace.open_gate()
    comes_back = "requeueing this job (restart 1)"
    wait_until(lambda: comes_back in site.slurm.states(job)[0].log, "it is queued again")
    wait_until(lambda: site.slurm.states(job)[0].state == "PENDING", "it waits for its turn")
    stopped_at = workspace.done()
    assert len(before) < len(stopped_at) < len(workspace.patches())

    # Not hurried with StartTime=now: within cred_expire a node refuses the job's old credential.
    (ended,) = site.slurm.succeeded(job)
    assert ended.restarts == 1
    assert {name: workspace.done()[name] for name in stopped_at} == stopped_at
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_a_cancelled_job_is_continued_by_the_next_one(
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
    site.slurm.ask("scancel", job)
    (ended,) = site.slurm.wait(job)
    assert ended.state == "CANCELLED"
    wait_until(lambda: not site.alive(), "all its processes are gone")
    stopped_at = workspace.done()
    assert 5 <= len(stopped_at) < len(workspace.patches())

    # The chunks of the killed process wait until their lease has run out.
    again = site.submit(*arguments, options=options, **environment)
    site.slurm.succeeded(again)
    assert {name: workspace.done()[name] for name in stopped_at} == stopped_at
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()
    computed, patches = workspace.computed(), workspace.patches()
    assert {computed[patch] for name in stopped_at for patch in patches[name]} == {1}


@pytest.mark.proof("slurm")
def test_a_cancelled_array_does_not_come_back(site: SlurmWorkspace) -> None:
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
    site.slurm.ask("scancel", job)
    workspace.open_gate()
    (ended,) = site.slurm.wait(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    wait_until(lambda: not site.slurm.job_processes(), "all its processes are gone")
    assert site.slurm.states(job)[0].state == "CANCELLED"
    assert workspace.counts().queued > 0


def test_a_chain_of_jobs_produces_works_and_finalizes_in_that_order(
    site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    ended = _pipeline(site, str(site.workspace.job_file), str(site.workspace.output), "--array=0-1")
    assert ended.returncode == 0, ended.stderr
    produce, work, finalize = ended.stdout.split()
    (sealed,) = site.slurm.succeeded(finalize)
    (produced,), worked = site.slurm.succeeded(produce), site.slurm.succeeded(work)
    assert "24 newly queued" in produced.log
    assert "complete: " in sealed.log
    assert all(time_of(one, "StartTime") >= time_of(produced, "EndTime") for one in worked)
    assert all(time_of(sealed, "StartTime") >= time_of(one, "EndTime") for one in worked)
    assert site.workspace.stored() == undisturbed.stored()
    assert set(site.workspace.computed().values()) == {1}


def test_a_chain_whose_job_file_is_refused_ends_with_its_first_link(site: SlurmWorkspace) -> None:
    wrong = site.workspace.folder / "wrong.yaml"
    wrong.write_text("input: nothing.zarr\n")
    ended = _pipeline(site, str(wrong), str(site.workspace.output))
    assert ended.returncode == 0, ended.stderr
    produce, work, finalize = ended.stdout.split()
    (refused,) = site.slurm.wait(produce)
    assert (refused.state, refused.exit_code) == ("FAILED", 2)
    assert "chunkq: " in refused.log
    for later in (work, finalize):
        assert {one.state for one in site.slurm.wait(later)} == {"CANCELLED"}


def _pipeline(site: SlurmWorkspace, *arguments: str) -> subprocess.CompletedProcess[str]:
    return site.slurm.run(
        str(SCRIPTS / "pipeline.sh"),
        *arguments,
        cwd=site.workspace.folder,
        **site.environment | {"CHUNKQ_QUEUE_FILE": str(site.address)},
    )


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("workers.sbatch", (), "url; start chunkq redis"),
        ("workers.sbatch", ("job.yaml",), "usage: sbatch workers.sbatch [JOB OUT]"),
        ("array.sbatch", (), "usage: sbatch array.sbatch OUT"),
        ("array.sbatch", ("out.zarr",), "url; start chunkq redis"),
        ("dask.sbatch", (), "usage: sbatch dask.sbatch JOB"),
        ("ray.sbatch", (), "usage: sbatch ray.sbatch JOB"),
        ("produce.sbatch", ("job.yaml",), "usage: sbatch produce.sbatch JOB OUT"),
        ("produce.sbatch", ("job.yaml", "out.zarr"), "url; start chunkq redis"),
        ("finalize.sbatch", (), "usage: sbatch finalize.sbatch OUT"),
        ("pipeline.sh", ("job.yaml",), "usage: pipeline.sh JOB OUT [sbatch options]"),
        ("pipeline.sh", ("none.yaml", "out.zarr"), "none.yaml: missing job file"),
        ("pipeline.sh", ("job.yaml", "out.zarr"), "url; start chunkq redis"),
    ],
)
def test_a_script_says_what_it_lacks(
    script: str, arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").touch()
    ended = subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SLURM_CPUS_PER_TASK": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode in (1, 2)
    assert said in ended.stderr.splitlines()[-1]
