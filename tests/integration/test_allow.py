"""`chunkq work --allow` as a process, and jobs on the queue that are named in other ways."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chunkq.executors import open_executor
from chunkq.executors.base import Counts
from chunkq.tasks import Task
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """Folders `allowed`, with a job of two chunks, and `other`; the code of each leaves a mark."""
    models = {}
    for name in ("allowed", "other"):
        folder = tmp_path / name
        folder.mkdir()
        models[name] = toy_model(folder, (4,), channels=1)
        with (folder / "network.py").open("a") as file:
            file.write(f"\nopen({str(tmp_path / f'ran-{name}')!r}, 'w').close()\n")
    write_zarr(tmp_path / "other" / "in.zarr", random_volume((8,)))
    values: dict[str, Any] = {"input": "../other/in.zarr", "output": "out.zarr", "chunksize": [4]}
    values |= {"model_config": models["allowed"]}
    return Workspace(tmp_path / "allowed", values, url=f"sqlite://{tmp_path}/queue.db")


def test_a_worker_with_allow_computes_what_is_allowed_and_runs_no_other_code(
    place: Workspace,
) -> None:
    top, allowed, other = place.folder.parent, place.folder, place.folder.parent / "other"
    place.produce()
    code = {"class_file": str(other / "network.py")}
    for name, output in (("far", other / "far.zarr"), ("code", "code.zarr")):
        job = place.write_job(f"{name}.json", output=str(output), model=code)
        place.call("produce", job).ok()
    forged = f"file://{allowed}/../other/far.zarr.chunkq"
    with place.queue() as queue:
        queue.submit([Task("infer", forged, (0,)), Task("finalize", forged, (1,))])
    for marker in top.glob("ran-*"):
        marker.unlink()  # of trying the network, if anything did
    ended = place.work("--allow", ".")
    assert [path.name for path in top.glob("ran-*")] == ["ran-allowed"]
    assert len(place.done()) == 2
    with place.queue() as queue:
        counts = queue.jobs()
    refused = {
        str(other / "far.zarr.chunkq"): Counts(queued=2),
        str(allowed / "code.zarr.chunkq"): Counts(queued=2),
        forged: Counts(queued=2),
    }
    assert counts == refused
    assert ended.code == 1
    assert "Traceback" not in ended.err
    for named in (f"job folder {other}/far", f"model_config.class_file {other}/network", forged):
        assert any(named in line for line in ended.err.splitlines()), ended.err


@pytest.mark.parametrize("prefix", ["", "s3://", "s3://bucket/../other", "dir::file:///x"])
def test_work_refuses_a_path_to_allow_that_it_cannot_compare(place: Workspace, prefix: str) -> None:
    place.call("work", "--burst", "--gpus", "none", "--allow", prefix).refused(2, "--allow: ")


def test_every_spelling_of_an_output_means_the_same_job(place: Workspace) -> None:
    place.produce()
    for spelling in (
        "out.zarr/",
        "../allowed/./out.zarr",
        f"FILE://{place.output}",
        f"/{place.output}",
        f"local://{place.folder}/x/../out.zarr",
    ):
        assert '"queued": 2' in place.call("status", spelling, "--json").ok().out
    place.call("produce", place.job_file, "-o", f"file://{place.output}/").ok()
    with place.queue() as queue:
        assert queue.jobs() == {str(place.job_folder): Counts(queued=2)}
    place.call("cancel", f"FILE:///{place.output}").ok()
    assert place.counts() == Counts()


def test_jobs_that_workers_refuse_are_listed_in_one_line_each_and_can_be_cancelled(
    place: Workspace,
) -> None:
    forged = ["/x/\x1b[2J\nall good", "nosuch://x", "s3://bucket/../x", f"file://{place.output}"]
    with closing(open_executor(place.queue_url)) as queue:
        queue.submit([Task("infer", f"{output}.chunkq", (0,)) for output in forged])
    listed = place.call("jobs").ok().out.splitlines()
    assert len(listed) == len(forged)
    assert all(
        line.isprintable() and line.endswith("1 queued, 0 running, 0 failed") for line in listed
    )
    for output in forged:
        place.call("cancel", output).ok()
    with place.queue() as queue:
        assert queue.jobs() == {}
