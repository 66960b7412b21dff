"""What a worker fetches of an input is what the plan says, and is in the report."""

import json
from collections import Counter
from pathlib import Path

import pytest

from chunkq.access import DEFAULT_ACCESS
from chunkq.geometry.box import Box
from chunkq.storage.chunk_cache import FetchCounter, Fetched
from chunkq.storage.formats.file_ranges import Range, open_binary, read_ranges
from chunkq.storage.formats.single_file import SingleFile
from chunkq.storage.images import find_source
from tests.harness.networks import toy_model
from tests.harness.servers.strict_s3 import KEY, SECRET, Bucket, strict_s3
from tests.harness.servers.web import web_server
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace

EDGE, STORAGE, BLOCK, PATCH = 48, 8, 16, 8
CHUNK_BYTES = 4 * STORAGE**3
FOR_ROWS = 80 * CHUNK_BYTES
"""Enough for the storage chunks of a row of blocks, 54, and not for those of a layer, 108."""


@pytest.mark.parametrize("size", [FOR_ROWS, 1 << 30])
def test_each_storage_chunk_is_fetched_as_often_as_planned(tmp_path: Path, size: int) -> None:
    served, folder = tmp_path / "served", tmp_path / "job"
    served.mkdir()
    folder.mkdir()
    write_zarr(
        served / "in.zarr", random_volume((EDGE,) * 3, "float32"), (STORAGE,) * 3, compressors=None
    )
    values = {
        "input": "s3://lab/in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4, 4],
        "chunksize": [BLOCK] * 3,
        "threads": 1,
        "model_config": toy_model(folder, (PATCH,) * 3, kind="pointwise"),
    }
    bucket = Bucket(served, can_list=True)
    with strict_s3(bucket) as url:
        workspace = Workspace(folder, values)
        workspace.write_job()
        environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "CHUNKQ_CACHE_BYTES": str(size),
        }
        planned = json.loads(workspace.run("plan", "job.json", "--json", **environment).ok().out)
        workspace.run("produce", "job.json", **environment).ok()
        bucket.sent.clear()
        workspace.run(
            "work", "--burst", "--gpus", "none", "--quiet", "--depth", "1", **environment
        ).ok()
        sent = Counter(key for key in bucket.sent if "/c/" in key)
        workspace.run("finalize", "out.zarr", **environment).ok()
    assert planned["storage_chunks_read"] == len(sent) == (EDGE // STORAGE) ** 3
    average = planned["fetches_per_storage_chunk"]
    assert average == pytest.approx({FOR_ROWS: 8 / 6, 1 << 30: 1}[size])
    # The cache is a little larger than what the average is planned for.
    assert 0.9 * average * len(sent) <= sum(sent.values()) <= average * len(sent)
    assert max(sent.values()) <= 2
    report = workspace.report()
    fetching = report["fetching"]
    assert fetching["storage_chunks"] == len(sent)
    documents = fetching["requests"] - sum(sent.values())
    assert 0 <= documents < 10
    assert fetching["bytes"] >= sum(sent.values()) * CHUNK_BYTES


def test_bytes_from_a_web_server_are_counted_however_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(bytes(100_000))
    counter = FetchCounter()
    with web_server(tmp_path) as url:
        file = SingleFile(f"{url}/in.bin", DEFAULT_ACCESS)
        counter.take()
        read_ranges(file, [Range(0, 10_000), Range(90_000, 95_000)])
        assert counter.take() == Fetched(2, 15_000)
        with file.stream() as stream:
            assert len(stream.read(30_000)) <= 30_000
        assert 0 < counter.take().bytes <= 30_000
        with open_binary(file, 1 << 14) as blocks:  # one byte shows that parts are sent
            blocks.seek(50_000)
            blocks.read(1)
        assert counter.take().bytes == (1 << 14) + 1


@pytest.mark.parametrize("has_storage_chunks", [True, False])
def test_what_is_read_of_outputs_only_is_not_counted(
    tmp_path: Path, has_storage_chunks: bool
) -> None:
    path = write_zarr(tmp_path / "out.zarr", random_volume((8, 8)))
    counter = FetchCounter()
    counter.take()
    find_source(str(path)).open().read(Box.of_shape((8, 8)))
    fetched = counter.take(has_storage_chunks=has_storage_chunks)
    assert (fetched.requests > 0, fetched.bytes > 0) == (has_storage_chunks,) * 2
