"""A job over S3: input, output and job folder on a loopback server, through the real clients."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import s3fs

from chunkq.objects import ObjectFolder
from tests.harness.files import files_below
from tests.harness.networks import toy_model
from tests.harness.processes import CommandResult
from tests.harness.servers.moto import moto_server
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"
PASSWORD = "hunter2hunter2"
SHAPE = (20, 18, 12)


def environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture(scope="module")
def bucket(endpoint: str) -> s3fs.S3FileSystem:
    filesystem = s3fs.S3FileSystem(
        endpoint_url=endpoint,
        key="AKIAIOSFODNN7EXAMPLE",
        secret=SECRET,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    filesystem.mkdir("lab")
    return filesystem


def make_bench(folder: Path, endpoint: str) -> Workspace:
    """The job of this module: four chunks with bands, labels, paths left to the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8, 8))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4, 4],
        "weight_function": ["weight_gaussian"],
        "combine": "soft",
        "chunksize": [12, 12, 12],
        "storage_chunks": [6, 6, 6],
        "threads": 1,
        "model_config": toy_model(folder, (8, 8, 8), scale=100.0, kind="pointwise"),
    }
    workspace = Workspace(folder, values, environment(endpoint))
    workspace.write_job()
    return workspace


def objects(bucket: s3fs.S3FileSystem, path: str) -> dict[str, bytes]:
    """Every object below a path, by its name inside it."""
    bucket.invalidate_cache()
    found = bucket.find(path)
    contents: dict[str, bytes] = bucket.cat(found) if found else {}
    return {name.removeprefix(f"{path}/"): content for name, content in contents.items()}


def without_digest(files: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out the two values that may differ: the digest covers the input's path."""
    pattern = re.compile(rb'(?<="digest": ")[0-9a-f]{64}(?=")|(?<="epoch": ")[0-9a-f]{8}(?=")')
    return {name: pattern.sub(b"", content) for name, content in files.items()}


def epoch_of(bucket: s3fs.S3FileSystem, output: str) -> str:
    return str(json.loads(objects(bucket, f"{output}.chunkq")["job.json"])["epoch"])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Workspace:
    return make_bench(tmp_path_factory.mktemp("s3"), endpoint)


@pytest.fixture(scope="module")
def local(workspace: Workspace) -> dict[str, bytes]:
    """What the same job gives on local disk, with a worker process of the same kind."""
    workspace.call("produce", "job.json").ok()
    workspace.run("work", "--burst", "--gpus", "none", "--quiet").ok()
    workspace.call("finalize", "out.zarr").ok()
    return files_below(workspace.output)


@pytest.fixture(scope="module")
def done(
    workspace: Workspace, bucket: s3fs.S3FileSystem, local: dict[str, bytes]
) -> list[CommandResult]:
    """The job done on S3 with real commands; returns what each said."""
    bucket.put(f"{workspace.folder}/in.zarr", "lab/in.zarr", recursive=True)
    paths = ("-i", "s3://lab/in.zarr", "-o", "s3://lab/out.zarr")
    queue = f"sqlite://{workspace.folder}/of-s3.db"
    return [
        workspace.run("produce", "job.json", *paths, "--queue", queue).ok(),
        workspace.call("status", "s3://lab/out.zarr", "--queue", queue).ok(),
        workspace.run("work", "--burst", "--gpus", "none", "--queue", queue).ok(),
        workspace.run("finalize", "s3://lab/out.zarr").ok(),
        workspace.call("status", "s3://lab/out.zarr", "--json", "--queue", queue).ok(),
    ]


def test_a_job_on_s3_gives_every_object_that_the_local_one_gives(
    bucket: s3fs.S3FileSystem, done: list[CommandResult], local: dict[str, bytes]
) -> None:
    assert done[0].out.startswith("4 chunks, 0 done, 4 newly queued -> s3://lab/out.zarr")
    assert "0/4 chunks done, 4 queued" in done[1].out
    assert done[3].out.startswith("complete: s3://lab/out.zarr (4 chunks")
    found = objects(bucket, "lab/out.zarr")
    assert set(found) == set(local)
    assert len(found) == 4 * 3 * 2 + 2
    assert without_digest(found) == without_digest(local)


def test_status_on_s3_knows_what_is_done_and_that_it_is_sealed(
    bucket: s3fs.S3FileSystem, done: list[CommandResult]
) -> None:
    status = json.loads(done[-1].out)
    assert (status["done"], status["chunks"], status["sealed"]) == (4, 4, True)
    assert status["blocks_finalized"] == status["blocks_to_finalize"]
    assert status["failures"] == []
    left = objects(bucket, "lab/out.zarr.chunkq")
    epoch = json.loads(left["job.json"])["epoch"]
    done_names = {name for name in left if name.startswith(f"{epoch}/done/")}
    assert set(left) - done_names == {"job.json", f"{epoch}/sealed.json", f"{epoch}/report.json"}
    assert json.loads(left[f"{epoch}/report.json"])["missing"] == []


def test_the_workers_log_holds_its_own_news_alone(done: list[CommandResult]) -> None:
    """Neither the clients' chatter about credentials nor the AWS library's missing files."""
    lines = done[2].err.splitlines()
    assert sum("infer chunk " in line and " done in " in line for line in lines) == 4
    assert not [line for line in lines if re.search(r"credential|\.aws|endpoint", line)]
    for answer in (done[0], done[1], done[3], done[4]):
        assert answer.err == ""


def test_no_secret_shows_in_outputs_logs_or_objects(
    workspace: Workspace, bucket: s3fs.S3FileSystem, done: list[CommandResult]
) -> None:
    queue = f"redis://:{PASSWORD}@127.0.0.1:1/0"
    job = workspace.write_job("secret.json", queue=queue)
    paths = ("-i", "s3://lab/in.zarr", "-o", "s3://lab/secret.zarr")
    said = workspace.call("produce", job, *paths, "--queue", queue)
    said.refused(1, "redis://:***@127.0.0.1:1/0")
    usual = f"sqlite://{workspace.folder}/queue.db"
    answers = [*done, said, workspace.call("produce", job, *paths, "--queue", usual).ok()]
    answers.append(workspace.call("status", "s3://lab/secret.zarr", "--json").ok())
    answers.append(workspace.call("jobs").ok())
    record = objects(bucket, "lab/secret.zarr.chunkq")["job.json"].decode()
    assert '"input"' in record
    shown = [record, *(answer.out + answer.err for answer in answers)]
    shown += [c.decode(errors="replace") for c in objects(bucket, "lab").values()]
    for text in shown:
        assert SECRET not in text
        assert PASSWORD not in text


def test_a_worker_killed_on_s3_is_gone_on_from_with_the_same_bytes(
    workspace: Workspace,
    bucket: s3fs.S3FileSystem,
    done: list[CommandResult],
    local: dict[str, bytes],
) -> None:
    output, first = "s3://lab/killed.zarr", f"sqlite://{workspace.folder}/first.db"
    paths = ("-i", "s3://lab/in.zarr", "-o", output)
    workspace.call("produce", "job.json", *paths, "--queue", first).ok()
    folder = f"lab/killed.zarr.chunkq/{epoch_of(bucket, 'lab/killed.zarr')}/done/infer/0"

    def commits() -> int:
        bucket.invalidate_cache()
        return len(bucket.ls(folder)) if bucket.exists(folder) else 0

    work = ("work", "--burst", "--gpus", "none", "--queue", first)
    with workspace.start(*work, TOY_DELAY="0.15"):
        wait_until(lambda: commits() >= 1, "a chunk is committed")
    left = 4 - commits()
    assert 0 < left < 4
    workspace.call("finalize", output).refused(3, f"{left} chunks are not computed yet")
    second = f"sqlite://{workspace.folder}/second.db"
    said = workspace.call("produce", "job.json", *paths, "--resume", "--queue", second).ok().out
    assert said.startswith(f"4 chunks, {4 - left} done, {left} newly queued")
    workspace.compute_inline(output=output)
    workspace.call("finalize", output).ok()
    assert without_digest(objects(bucket, "lab/killed.zarr")) == without_digest(local)


def test_npy_input_on_s3_gives_the_same_voxels(
    workspace: Workspace, bucket: s3fs.S3FileSystem, local: dict[str, bytes]
) -> None:
    np.save(workspace.folder / "in.npy", random_volume(SHAPE))
    bucket.put_file(f"{workspace.folder}/in.npy", "lab/in.npy")
    workspace.call("produce", "job.json", "-i", "s3://lab/in.npy", "-o", "npy.zarr").ok()
    workspace.compute_inline(output=f"{workspace.folder}/npy.zarr")
    workspace.call("finalize", "npy.zarr").ok()
    found = files_below(workspace.folder / "npy.zarr")
    assert without_digest(found) == without_digest(local)


def test_overwrite_on_s3_really_deletes_what_was_there(
    workspace: Workspace, bucket: s3fs.S3FileSystem, done: list[CommandResult]
) -> None:
    options = ("-i", "s3://lab/in.zarr", "-o", "s3://lab/again.zarr")
    workspace.call("produce", "job.json", *options).ok()
    before = epoch_of(bucket, "lab/again.zarr")
    bucket.pipe_file("lab/again.zarr/0/c/0/0/0", b"old")
    bucket.pipe_file(f"lab/again.zarr.chunkq/{before}/done/infer/0/0.0.0", b"{}")
    job = workspace.write_job("other.json", combine="hard")
    workspace.call("produce", job, *options).refused(2, "different: combine")
    assert (
        "4 chunks, 0 done, 4 newly"
        in workspace.call("produce", job, *options, "--overwrite").ok().out
    )
    epoch = epoch_of(bucket, "lab/again.zarr")
    assert epoch != before
    assert set(objects(bucket, "lab/again.zarr")) == {"zarr.json", f"0.{epoch}/zarr.json"}
    assert set(objects(bucket, "lab/again.zarr.chunkq")) == {"job.json"}
    bucket.pipe_file("lab/precious/thesis.txt", b"years of work")
    options = ("-i", "s3://lab/in.zarr", "-o", "s3://lab/precious")
    workspace.call("produce", job, *options, "--overwrite").refused(2, "[output_exists]")
    assert set(objects(bucket, "lab/precious")) == {"thesis.txt"}


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("plan", "job.json", "-i", "s3://none/in.zarr"), 2, "s3://none/in.zarr is not there"),
        (("plan", "job.json", "-i", "s3://lab/none.zarr"), 2, "s3://lab/none.zarr is not there"),
        (("plan", "job.json", "-i", "s3://lab/none.npy"), 2, "no file s3://lab/none.npy"),
        (("produce", "job.json", "-o", "s3://none/out.zarr"), 2, "s3://none/out.zarr"),
        (("status", "s3://none/out.zarr"), 2, "no job was produced here"),
        (("finalize", "s3://lab/none.zarr"), 2, "no job was produced here"),
    ],
)
def test_a_missing_bucket_or_key_is_one_clear_line(
    workspace: Workspace, bucket: s3fs.S3FileSystem, command: tuple[str, ...], code: int, words: str
) -> None:
    workspace.call(*command).refused(code, words)


def test_a_server_that_is_away_is_one_clear_line_from_every_command(workspace: Workspace) -> None:
    """Side by side, as each of the clients tries again for some seconds."""
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    commands: dict[int, list[tuple[str, ...]]] = {
        2: [("plan", "job.json", "-i", "s3://lab/in.zarr")],
        1: [
            ("status", "s3://lab/out.zarr"),
            ("finalize", "s3://lab/out.zarr"),
            ("produce", "job.json", "-o", "s3://lab/fresh.zarr"),
        ],
    }
    with contextlib.ExitStack() as stack:
        started = [
            (code, stack.enter_context(workspace.start(*command, **away)))
            for code, several in commands.items()
            for command in several
        ]
        for code, cli in started:
            answer = cli.wait(60)
            answer.refused(code, "Could not connect to the endpoint URL")
            assert len(answer.err.splitlines()) == 1
            assert SECRET not in answer.err


def test_a_writer_that_saw_no_object_does_not_replace_the_one_that_came_meanwhile(
    workspace: Workspace, bucket: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mock.patch.dict(os.environ, workspace.env, clear=True):
        folder = ObjectFolder("s3://lab/exclusive")
        monkeypatch.setattr(ObjectFolder, "exists", lambda self, name: False)
        assert folder.put_new("job.json", b"first")
        assert not folder.put_new("job.json", b"second")
        with folder.claim("job.json", b"first") as has_claim:
            assert has_claim
            with folder.claim("job.json", b"first") as other_has_claim:
                assert not other_has_claim
    assert objects(bucket, "lab/exclusive") == {"job.json": b"first"}


def test_a_job_that_replaces_another_in_a_bucket_has_an_array_of_its_own(
    workspace: Workspace, bucket: s3fs.S3FileSystem, tmp_path: Path
) -> None:
    paths = ("-i", "s3://lab/in.zarr", "-o", "s3://lab/replaced.zarr")
    queue = f"sqlite://{tmp_path}/queue.db"
    bucket.put(f"{workspace.folder}/in.zarr", "lab/in.zarr", recursive=True)
    workspace.call("produce", "job.json", *paths, "--queue", queue).ok()
    assert "0/zarr.json" in objects(bucket, "lab/replaced.zarr")
    bucket.pipe_file("lab/replaced.zarr/0/c/0/0/0", b"of a process of the first job")
    workspace.call("produce", "job.json", *paths, "--queue", queue, "--overwrite").ok()
    record = json.loads(objects(bucket, "lab/replaced.zarr.chunkq")["job.json"])
    names = {name.partition("/")[0] for name in objects(bucket, "lab/replaced.zarr")}
    assert names == {"zarr.json", f"0.{record['epoch']}"}
