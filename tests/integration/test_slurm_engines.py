"""Dask and Ray clusters that a job starts inside one SLURM allocation."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.network_namespace import NetworkNamespace
from tests.harness.servers.slurm import GPUS, NODES, SlurmCluster, slurm_cluster
from tests.harness.slurm_workspace import SlurmWorkspace
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

LONG = 300.0


@pytest.fixture(scope="module")
def slurm_of_module() -> Iterator[tuple[NetworkNamespace, SlurmCluster]]:
    network = NetworkNamespace()
    with network.inside(), slurm_cluster() as cluster:
        yield network, cluster
    network.close()


@pytest.fixture
def slurm(slurm_of_module: tuple[NetworkNamespace, SlurmCluster]) -> Iterator[SlurmCluster]:
    """Yield a SLURM cluster without jobs in a network namespace: Ray listens on all interfaces."""
    network, cluster = slurm_of_module
    with network.inside():
        yield cluster
        cluster.cancel_all()


@pytest.fixture
def site(slurm: SlurmCluster, standard_job: StandardJob, tmp_path: Path) -> SlurmWorkspace:
    # Emulated GPUs are not CUDA devices.
    keys = {"cluster": "slurm", "model": {"device": "cpu"}}
    return SlurmWorkspace(slurm, standard_job.workspace(tmp_path, keys))


@pytest.mark.parametrize("engine", ["dask", pytest.param("ray", marks=pytest.mark.proof("slurm"))])
def test_a_job_starts_its_own_cluster_in_one_allocation(
    engine: str, site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    job = site.submit(
        f"{engine}.sbatch",
        str(site.workspace.job_file),
        options=f"--nodes={len(NODES)} --gres=gpu:{GPUS}",
        NET_SLEEP="0.2" if engine == "dask" else "1",  # a second node of Ray is slow to start
    )
    (slurm_job,) = site.slurm.wait_for_success(job)
    assert slurm_job.log.count("complete: ") == 1
    assert site.workspace.stored() == undisturbed.stored()
    assert set(site.workspace.computed().values()) == {1}
    assert site.computing_nodes() == set(NODES)
    site.slurm.cancel_all()
    wait_until(lambda: not site.slurm.job_processes(), "all processes of the job have ended")


@pytest.mark.proof("slurm")
@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_the_next_allocation_continues_a_cancelled_one(
    engine: str, site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace, arguments = site.workspace, (f"{engine}.sbatch", str(site.workspace.job_file))
    options = f"--nodes={len(NODES)} --gres=gpu:{GPUS}"
    job = site.submit(*arguments, options=options, NET_HOLD="forward", NET_AFTER="5")
    workspace.wait_until_stopped()
    site.slurm.check_output("scancel", job)
    (slurm_job,) = site.slurm.wait(job)
    assert slurm_job.state == "CANCELLED"
    site.slurm.cancel_all()
    wait_until(lambda: not site.slurm.job_processes(), "all processes of the job have ended")
    done_at_cancel = workspace.done()
    assert 5 <= len(done_at_cancel) < len(undisturbed.done())

    next_job = site.submit(*arguments, options=options)
    site.slurm.wait_for_success(next_job, LONG)
    assert {name: workspace.done()[name] for name in done_at_cancel} == done_at_cancel
    assert workspace.stored() == undisturbed.stored()
    computed, patches = workspace.computed(), workspace.patches()
    assert {computed[patch] for name in done_at_cancel for patch in patches[name]} == {1}
