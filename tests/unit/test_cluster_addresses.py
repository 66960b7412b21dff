"""Addresses of queues and clusters as users of other programs write them."""

import pytest
from chunkq_producer.engine import queue_of

from chunkq.errors import ErrorCode, JobError
from chunkq.job.job_file import Job
from chunkq.job.job_reading import load_job
from chunkq.queue.backends.hosted.queue_host import WorkerGroup
from chunkq.queue.backends.ray.launcher import room_for_workers
from chunkq.queue.backends.ray.workers import cores_per_gpu, cores_per_worker
from chunkq.queue.registry import open_executor


def job_of(engine: str, address: str) -> Job:
    """Return a job on a running cluster."""
    return load_job(
        {
            "input": "in.zarr",
            "output": "out.zarr",
            "inference_type": "patch",
            "cluster": "running",
            f"{engine}_config": {"address": address},
            "model_config": {
                "runtime": "numpy",
                "type": "class",
                "class_name": "math.Net",
                "model_input_shape": [8],
            },
        }
    )


@pytest.mark.parametrize(
    ("engine", "address", "url"),
    [
        ("dask", "host", "dask://host:8786"),
        ("dask", "host:1234", "dask://host:1234"),
        ("dask", "tcp://host:1234", "dask://host:1234"),
        ("dask", "tls://host:1234", "dask://host:1234?protocol=tls"),
        ("dask", "ucx://host", "dask://host:8786?protocol=ucx"),
        ("dask", "tls://[::1]:1234", "dask://[::1]:1234?protocol=tls"),
        ("dask", "dask://host:1234?protocol=tls", "dask://host:1234?protocol=tls"),
        ("ray", "host", "ray://auto?address=host:6379"),
        ("ray", "host:1234", "ray://auto?address=host:1234"),
        ("ray", "auto", "ray://auto"),
        ("ray", "ray://host:10001", "ray://host:10001"),
    ],
)
def test_the_address_of_a_running_cluster_can_have_the_form_of_its_engine(
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    address: str,
    url: str,
) -> None:
    monkeypatch.delenv("CHUNKQ_QUEUE", raising=False)
    assert queue_of(job_of(engine, address), None) == url


@pytest.mark.parametrize(
    ("engine", "address"),
    [
        ("dask", "http://host:8787"),
        ("dask", "ray://host:10001"),
        ("dask", "tls://"),
        ("dask", "host:port"),
        ("ray", "http://host:8265"),
        ("ray", "tcp://host:6379"),
        ("ray", ":6379"),
    ],
)
def test_another_address_of_a_running_cluster_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    address: str,
) -> None:
    monkeypatch.delenv("CHUNKQ_QUEUE", raising=False)
    with pytest.raises(JobError, match=f"{engine}_config.address: .*HOST:PORT") as caught:
        queue_of(job_of(engine, address), None)
    assert caught.value.code == ErrorCode.JOB_INVALID


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("sentinel://host:26379/mymaster", "redis://"),
        ("redis+sentinel://:geheim@host:26379/mymaster/0", "redis://"),
        ("redis+cluster://host:6379", "redis://"),
        ("valkey://host:6379", "use redis://"),
        ("valkeys://host:6379", "use rediss://"),
        ("tcp://host:8786", "dask://HOST:PORT "),
        ("tls://host:8786", "dask://HOST:PORT?protocol=tls "),
        ("ucx://host:8786", "dask://HOST:PORT?protocol=ucx "),
    ],
)
def test_the_error_for_an_address_of_another_program_has_the_one_to_use(
    url: str, advice: str
) -> None:
    with pytest.raises(JobError) as caught:
        open_executor(url)
    assert caught.value.code == ErrorCode.QUEUE_ADDRESS_INVALID
    assert advice in f"{caught.value} "
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "cores"),
    [
        ([{"CPU": 8.0, "GPU": 4.0}], 1),
        ([{"CPU": 1.0, "GPU": 4.0}], 0.25),
        ([{"CPU": 1.0, "GPU": 3.0}, {"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}], 0.3333),
        ([{"GPU": 2.0}], 0),
        ([{"CPU": 4.0}], 1),
        ([], 1),
    ],
)
def test_workers_on_gpus_share_the_cores_of_a_node_that_has_too_few(
    nodes: list[dict[str, float]], cores: float
) -> None:
    assert cores_per_gpu(nodes) == cores


@pytest.mark.parametrize(
    ("nodes", "threads", "cores", "room"),
    [
        ([{"CPU": 8.0}, {"CPU": 64.0, "GPU": 2.0}], None, 8, 9),
        ([{"CPU": 8.0}, {"CPU": 64.0}], 4, 4, 18),
        ([{"CPU": 2.0}], 4, 4, 0),
        ([{"GPU": 1.0}, {"CPU": 0.5}], None, 1, 0),
        ([], None, 1, 0),
    ],
)
def test_workers_on_cores_use_what_the_job_sets_or_the_smallest_node(
    nodes: list[dict[str, float]], threads: int | None, cores: int, room: int
) -> None:
    assert cores_per_worker(nodes, threads) == cores
    assert room_for_workers(nodes, WorkerGroup(cores=cores)) == room
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    assert room_for_workers(nodes, WorkerGroup(gpu=True)) == gpus
