"""Preemption, the end of the walltime, a signal to a step and a lost node, on a real SLURM."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.network_namespace import NetworkNamespace
from tests.harness.servers.redis import RedisServer, redis_server
from tests.harness.servers.slurm import NODES, SlurmCluster, slurm_cluster
from tests.harness.slurm_workspace import SlurmWorkspace
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.proof("slurm")
every_engine = pytest.mark.parametrize("engine", ["redis", "dask", "ray"])
LONG = 300.0


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[NetworkNamespace, SlurmCluster, RedisServer]]:
    """Yield a SLURM and a Redis in a network namespace: Ray listens on all interfaces."""
    network = NetworkNamespace()
    with network.inside(), slurm_cluster() as cluster, redis_server("secret") as redis:
        yield network, cluster, redis
    network.close()


@dataclass(frozen=True)
class Site:
    """The standard job on SLURM, with one of the engines."""

    engine: str
    files: SlurmWorkspace

    @property
    def slurm(self) -> SlurmCluster:
        return self.files.slurm

    @property
    def workspace(self) -> StandardWorkspace:
        return self.files.workspace

    def submit(self, options: str, **environment: str) -> str:
        """Submit the script of the engine, the first time with a new job; return the job's id."""
        if self.engine != "redis":
            script, arguments = f"{self.engine}.sbatch", [str(self.workspace.job_file)]
        else:
            script, arguments = "workers.sbatch", []
            environment["CHUNKQ_QUEUE_FILE"] = str(self.files.address)
            environment["CHUNKQ_WORKER_SETTINGS"] = '{"lease": 3}'
            if not self.workspace.job_folder.exists():
                self.workspace.produce()
        return self.files.submit(script, *arguments, options=options, **environment)

    def finish(self, undisturbed: StandardWorkspace) -> None:
        """Finalize the job if its engine does not; compare its bytes with those of a quiet run."""
        if self.engine == "redis":
            self.workspace.finalize().ok()
        assert self.workspace.stored() == undisturbed.stored()

    def assert_computed_once(self) -> None:
        assert set(self.workspace.computed().values()) == {1}

    def assert_not_repeated(self, committed: set[str]) -> None:
        """Assert that no patch of chunks that were committed ran twice."""
        computed, patches = self.workspace.computed(), self.workspace.patches()
        assert {computed[patch] for name in committed for patch in patches[name]} == {1}


@pytest.fixture
def site(
    engine: str,
    servers: tuple[NetworkNamespace, SlurmCluster, RedisServer],
    standard_job: StandardJob,
    tmp_path: Path,
) -> Iterator[Site]:
    network, slurm, redis = servers
    keys = {"model": {"device": "cpu"}}  # emulated GPUs are not CUDA devices
    if engine != "redis":
        keys |= {"cluster": "slurm"}
    url = redis.url if engine == "redis" else None
    with network.inside():
        with redis.client as client:
            client.flushall()
        yield Site(engine, SlurmWorkspace(slurm, standard_job.workspace(tmp_path, keys, url=url)))
        slurm.cancel_all()
        wait_until(lambda: not slurm.job_processes(), "all processes of the job have ended")


@every_engine
def test_a_preempted_job_finishes_its_chunks_and_continues_after_the_other_job(
    site: Site, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    job = site.submit(
        "--partition=spare --requeue --nodes=1 --gres=gpu:1", NET_HOLD="forward", NET_AFTER="5"
    )
    workspace.wait_until_stopped()
    before = set(workspace.done())
    other = workspace.folder / "other.sh"
    other.write_text("#!/bin/sh\nsleep 1\n")
    urgent = site.slurm.sbatch(
        other, options=["--partition=main", "--exclusive", f"--nodes={len(NODES)}"]
    )
    wait_until(lambda: site.slurm.states(job)[0].state != "RUNNING", "the job is preempted")
    workspace.open_gate()
    site.slurm.wait_for_success(urgent)
    finished = set(workspace.done())
    assert before < finished < set(undisturbed.done())
    [state] = site.slurm.wait_for_success(job, LONG)
    assert state.restarts == 1
    site.finish(undisturbed)
    site.assert_computed_once()


@every_engine
def test_chunks_in_flight_are_finished_before_the_walltime(
    site: Site, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    # SLURM may send the signal up to a minute earlier, and Ray takes half a minute to start. All
    # chunks take more than two minutes, those in flight less than one; Ray runs two workers.
    options = "--nodes=1 --gres=gpu:1 --time=3 --signal=TERM@60"
    job = site.submit(options, NET_SLEEP="4" if site.engine == "ray" else "2")
    [state] = site.slurm.wait(job, LONG)
    assert state.state != "TIMEOUT", state.log
    done = workspace.done()
    assert 0 < len(done) < len(undisturbed.done())
    site.assert_computed_once()
    site.slurm.wait_for_success(site.submit("--nodes=1 --gres=gpu:1"), LONG)
    site.finish(undisturbed)
    site.assert_computed_once()
    assert {name: workspace.done()[name] for name in done} == done


@every_engine
def test_a_signal_to_a_step_lets_its_chunks_be_finished(
    site: Site, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    job = site.submit("--nodes=1 --gres=gpu:1", NET_HOLD="forward", NET_AFTER="5")
    workspace.wait_until_stopped()
    before = set(workspace.done())
    site.slurm.check_output("scancel", "--signal=TERM", f"{job}.0")
    if site.engine != "ray":  # whose workers have no supervisor that reports it
        wait_until(lambda: "stopping" in site.slurm.states(job)[0].log, "the workers are stopping")
    workspace.open_gate()
    site.slurm.wait(job, LONG)
    assert before < set(workspace.done()) < set(undisturbed.done())
    site.slurm.wait_for_success(site.submit("--nodes=1 --gres=gpu:1"), LONG)
    site.finish(undisturbed)
    site.assert_computed_once()


@every_engine
def test_a_job_continues_after_its_node_is_set_to_down(
    site: Site, undisturbed: StandardWorkspace
) -> None:
    workspace = site.workspace
    job = site.submit(
        f"--requeue --nodes={len(NODES)} --gres=gpu:1", NET_HOLD="forward", NET_AFTER="5"
    )
    workspace.wait_until_stopped()
    committed = set(workspace.done())
    site.slurm.check_output("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    wait_until(lambda: site.slurm.states(job)[0].restarts == 1, "the job is queued again")
    wait_until(lambda: not site.slurm.job_processes(), "all processes of the job have ended")
    committed |= set(workspace.done())
    workspace.open_gate()
    # It may have returned by itself, which makes this command fail.
    site.slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    site.slurm.wait_for_success(job, LONG)
    site.finish(undisturbed)
    site.assert_not_repeated(committed)
