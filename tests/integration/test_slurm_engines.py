"""Dask and Ray inside one SLURM allocation, with no server but what the job itself starts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.network_namespace import NetworkNamespace
from tests.harness.servers.slurm import GPUS, NODES, SlurmCluster, slurm_cluster
from tests.harness.slurm_workspace import SlurmWorkspace
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until


@pytest.fixture(scope="module")
def slurm_of_module() -> Iterator[tuple[NetworkNamespace, SlurmCluster]]:
    network = NetworkNamespace()
    with network.inside(), slurm_cluster() as cluster:
        yield network, cluster
    network.close()


@pytest.fixture
def slurm(slurm_of_module: tuple[NetworkNamespace, SlurmCluster]) -> Iterator[SlurmCluster]:
    """A SLURM without jobs, in a network of its own, since Ray listens on all interfaces."""
    network, cluster = slurm_of_module
    with network.inside():
        yield cluster
        cluster.empty()


@pytest.fixture
def site(slurm: SlurmCluster, standard_job: StandardJob, tmp_path: Path) -> SlurmWorkspace:
    # An emulated GPU is no CUDA device.
    keys = {"cluster": "slurm", "model": {"device": "cpu"}}
    return SlurmWorkspace(slurm, standard_job.workspace(tmp_path, keys))


@pytest.mark.parametrize("engine", ["dask", pytest.param("ray", marks=pytest.mark.proof("slurm"))])
def test_one_allocation_is_a_cluster_of_its_own(
    engine: str, site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    job = site.submit(
        f"{engine}.sbatch",
        str(site.workspace.job_file),
        options=f"--nodes={len(NODES)} --gres=gpu:{GPUS}",
        NET_SLEEP="0.2",
    )
    (ended,) = site.slurm.succeeded(job)
    assert ended.log.count("complete: ") == 1
    assert site.workspace.stored() == undisturbed.stored()
    assert set(site.workspace.computed().values()) == {1}
    assert site.computing_nodes() == set(NODES)
    site.slurm.empty()
    wait_until(lambda: not site.slurm.job_processes(), "nothing of it is left")


@pytest.mark.proof("slurm")
@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_a_cancelled_allocation_is_continued_by_the_next_one(
    engine: str, site: SlurmWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace, arguments = site.workspace, (f"{engine}.sbatch", str(site.workspace.job_file))
    options = f"--nodes={len(NODES)} --gres=gpu:{GPUS}"
    job = site.submit(*arguments, options=options, NET_HOLD="forward", NET_AFTER="5")
    workspace.wait_until_stopped()
    site.slurm.ask("scancel", job)
    (ended,) = site.slurm.wait(job)
    assert ended.state == "CANCELLED"
    site.slurm.empty()
    wait_until(lambda: not site.slurm.job_processes(), "nothing of it is left")
    stopped_at = workspace.done()
    assert 5 <= len(stopped_at) < len(undisturbed.done())

    again = site.submit(*arguments, options=options)
    site.slurm.succeeded(again)
    assert {name: workspace.done()[name] for name in stopped_at} == stopped_at
    assert workspace.stored() == undisturbed.stored()
    computed, patches = workspace.computed(), workspace.patches()
    assert {computed[patch] for name in stopped_at for patch in patches[name]} == {1}
