"""Dask and Ray inside one SLURM allocation, with no server but what the job itself starts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.slurm_site import Site
from tests.integration.support import Place, calm_place, materials
from tests.own_network import OwnNetwork
from tests.slurm_cluster import GPUS, NODES, SlurmCluster, slurm_cluster
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def slurm_of_module() -> Iterator[tuple[OwnNetwork, SlurmCluster]]:
    network = OwnNetwork()
    with network.inside(), slurm_cluster() as cluster:
        yield network, cluster
    network.close()


@pytest.fixture
def slurm(slurm_of_module: tuple[OwnNetwork, SlurmCluster]) -> Iterator[SlurmCluster]:
    """A SLURM without jobs, in a network of its own, since Ray listens on all interfaces."""
    network, cluster = slurm_of_module
    with network.inside():
        yield cluster
        cluster.empty()


@pytest.fixture
def site(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Site:
    # An emulated GPU is no CUDA device.
    keys = {"cluster": "slurm", "model": {"device": "cpu"}}
    return Site(slurm, Place(materials(tmp_path_factory.mktemp), tmp_path, keys))


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The job done by one worker to which nothing happened, on the embedded queue."""
    return calm_place(tmp_path_factory.mktemp)


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_one_allocation_is_a_cluster_of_its_own(engine: str, site: Site, calm: Place) -> None:
    job = site.submit(
        f"{engine}.sbatch",
        str(site.place.job_file),
        options=f"--nodes={len(NODES)} --gres=gpu:{GPUS}",
        NET_SLEEP="0.2",
    )
    (ended,) = site.slurm.succeeded(job)
    assert ended.log.count("complete: ") == 1
    assert site.place.stored() == calm.stored()
    assert set(site.place.computed().values()) == {1}
    assert site.computing_nodes() == set(NODES)
    site.slurm.empty()
    wait_until(lambda: not site.slurm.job_processes(), "nothing of it is left")


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_a_cancelled_allocation_is_continued_by_the_next_one(
    engine: str, site: Site, calm: Place
) -> None:
    place, arguments = site.place, (f"{engine}.sbatch", str(site.place.job_file))
    options = f"--nodes={len(NODES)} --gres=gpu:{GPUS}"
    job = site.submit(*arguments, options=options, NET_HOLD="forward", NET_AFTER="5")
    place.held()
    site.slurm.ask("scancel", job)
    (ended,) = site.slurm.wait(job)
    assert ended.state == "CANCELLED"
    site.slurm.empty()
    wait_until(lambda: not site.slurm.job_processes(), "nothing of it is left")
    stopped_at = place.done()
    assert 5 <= len(stopped_at) < len(calm.done())

    again = site.submit(*arguments, options=options)
    site.slurm.succeeded(again)
    assert {name: place.done()[name] for name in stopped_at} == stopped_at
    assert place.stored() == calm.stored()
    computed, patches = place.computed(), place.patches()
    assert {computed[patch] for name in stopped_at for patch in patches[name]} == {1}
