"""Jobs on S3: input, output and job folder on a loopback server, with the real clients."""

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

from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.box import Box
from chunkq.storage.claims import hold_claim
from chunkq.storage.images import find_source
from chunkq.storage.objects import ObjectFolder
from tests.harness.files import files_below
from tests.harness.networks import toy_model
from tests.harness.processes import CommandResult
from tests.harness.servers.moto import moto_server
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace
from tests.harness.written_hdf5 import write_hdf5
from tests.harness.written_tiff import write_stack

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"
PASSWORD = "hunter2hunter2"
SHAPE = (20, 20, 12)


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


def make_workspace(folder: Path, endpoint: str) -> Workspace:
    """Create a job of four chunks with bands; the tests set its paths on the command line."""
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
    """Return every object below a path, by its relative name."""
    bucket.invalidate_cache()
    names = bucket.find(path)
    contents: dict[str, bytes] = bucket.cat(names) if names else {}
    return {name.removeprefix(f"{path}/"): content for name, content in contents.items()}


def without_digest(files: dict[str, bytes]) -> dict[str, bytes]:
    """Remove the digest, which covers the path of the input, and the epoch."""
    pattern = re.compile(rb'(?<="digest": ")[0-9a-f]{64}(?=")|(?<="epoch": ")[0-9a-f]{8}(?=")')
    return {name: pattern.sub(b"", content) for name, content in files.items()}


def epoch_of(bucket: s3fs.S3FileSystem, output: str) -> str:
    return str(json.loads(objects(bucket, f"{output}.chunkq")["job.json"])["epoch"])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("s3"), endpoint)


@pytest.fixture(scope="module")
def local(workspace: Workspace) -> dict[str, bytes]:
    """Run the same job on the local disk with a worker process; return its output."""
    workspace.call("produce", "job.json").ok()
    workspace.run("work", "--burst", "--gpus", "none", "--quiet").ok()
    workspace.call("finalize", "out.zarr").ok()
    return files_below(workspace.output)


@pytest.fixture(scope="module")
def done(
    workspace: Workspace, bucket: s3fs.S3FileSystem, local: dict[str, bytes]
) -> list[CommandResult]:
    """Run the job on S3 with commands; return their results."""
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


def test_a_job_on_s3_writes_the_same_objects_as_a_local_job(
    bucket: s3fs.S3FileSystem, done: list[CommandResult], local: dict[str, bytes]
) -> None:
    assert done[0].out.startswith("4 chunks, 0 done, 4 newly queued -> s3://lab/out.zarr")
    assert "0/4 chunks done, 4 queued" in done[1].out
    assert done[3].out.startswith("complete: s3://lab/out.zarr (4 chunks")
    remote = objects(bucket, "lab/out.zarr")
    assert set(remote) == set(local)
    assert len(remote) == 4 * 4 * 2 + 2
    assert without_digest(remote) == without_digest(local)


@pytest.mark.proof("verify")
def test_a_precomputed_volume_on_s3_has_the_objects_of_a_local_one(
    workspace: Workspace, bucket: s3fs.S3FileSystem
) -> None:
    job = workspace.write_job("volume.json", pyramid={"levels": 2})
    for output in ("precomputed://volume", "precomputed://s3://lab/volume"):
        workspace.run("run", job, "-o", output, "--queue", "inprocess://volume").ok()
    remote = without_digest(objects(bucket, "lab/volume"))
    assert remote == without_digest(files_below(workspace.folder / "volume"))
    assert {name.partition("/")[0] for name in remote} == {"1_1_1", "2_2_2", "info"}
    workspace.run("verify", "precomputed://s3://lab/volume").ok()


def test_status_of_a_finished_job_on_s3_counts_chunks_and_blocks(
    bucket: s3fs.S3FileSystem, done: list[CommandResult]
) -> None:
    status = json.loads(done[-1].out)
    assert (status["done"], status["chunks"], status["sealed"]) == (4, 4, True)
    assert status["blocks_finalized"] == status["blocks_to_finalize"]
    assert status["failures"] == []
    files = objects(bucket, "lab/out.zarr.chunkq")
    epoch = json.loads(files["job.json"])["epoch"]
    commits = {name for name in files if name.startswith(f"{epoch}/done/")}
    assert set(files) - commits == {"job.json", f"{epoch}/sealed.json", f"{epoch}/report.json"}
    assert json.loads(files[f"{epoch}/report.json"])["missing"] == []


def test_the_worker_logs_no_messages_of_the_s3_clients(done: list[CommandResult]) -> None:
    lines = done[2].err.splitlines()
    assert sum("infer chunk " in line and " done in " in line for line in lines) == 4
    assert not [line for line in lines if re.search(r"credential|\.aws|endpoint", line)]
    for answer in (done[0], done[1], done[3], done[4]):
        assert answer.err == ""


def test_no_secret_is_in_outputs_logs_or_objects(
    workspace: Workspace, bucket: s3fs.S3FileSystem, done: list[CommandResult]
) -> None:
    queue = f"redis://:{PASSWORD}@127.0.0.1:1/0"
    job = workspace.write_job("secret.json", queue=queue)
    paths = ("-i", "s3://lab/in.zarr", "-o", "s3://lab/secret.zarr")
    refusal = workspace.call("produce", job, *paths, "--queue", queue)
    refusal.refused(1, ErrorCode.QUEUE_UNAVAILABLE, "redis://:***@127.0.0.1:1/0")
    local_queue = f"sqlite://{workspace.folder}/queue.db"
    answers = [*done, refusal]
    answers.append(workspace.call("produce", job, *paths, "--queue", local_queue).ok())
    answers.append(workspace.call("status", "s3://lab/secret.zarr", "--json").ok())
    answers.append(workspace.call("jobs").ok())
    record = objects(bucket, "lab/secret.zarr.chunkq")["job.json"].decode()
    assert '"input"' in record
    texts = [record, *(answer.out + answer.err for answer in answers)]
    texts += [content.decode(errors="replace") for content in objects(bucket, "lab").values()]
    for text in texts:
        assert SECRET not in text
        assert PASSWORD not in text


def test_a_job_on_s3_continues_after_its_worker_is_killed_with_the_same_bytes(
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
    missing = 4 - commits()
    assert 0 < missing < 4
    workspace.call("finalize", output).refused(3, ErrorCode.JOB_INCOMPLETE, f"{missing} chunk")
    second = f"sqlite://{workspace.folder}/second.db"
    text = workspace.call("produce", "job.json", *paths, "--resume", "--queue", second).ok().out
    assert text.startswith(f"4 chunks, {4 - missing} done, {missing} newly queued")
    workspace.compute_inline(output=output)
    workspace.call("finalize", output).ok()
    assert without_digest(objects(bucket, "lab/killed.zarr")) == without_digest(local)


def test_the_output_of_npy_input_on_s3_is_the_same(
    workspace: Workspace, bucket: s3fs.S3FileSystem, local: dict[str, bytes]
) -> None:
    np.save(workspace.folder / "in.npy", random_volume(SHAPE))
    bucket.put_file(f"{workspace.folder}/in.npy", "lab/in.npy")
    workspace.call("produce", "job.json", "-i", "s3://lab/in.npy", "-o", "npy.zarr").ok()
    workspace.compute_inline(output=f"{workspace.folder}/npy.zarr")
    workspace.call("finalize", "npy.zarr").ok()
    files = files_below(workspace.folder / "npy.zarr")
    assert without_digest(files) == without_digest(local)


def test_overwrite_on_s3_deletes_the_earlier_job(
    workspace: Workspace, bucket: s3fs.S3FileSystem, done: list[CommandResult]
) -> None:
    options = ("-i", "s3://lab/in.zarr", "-o", "s3://lab/again.zarr")
    workspace.call("produce", "job.json", *options).ok()
    before = epoch_of(bucket, "lab/again.zarr")
    bucket.pipe_file("lab/again.zarr/0/c/0/0/0", b"old")
    bucket.pipe_file(f"lab/again.zarr.chunkq/{before}/done/infer/0/0.0.0", b"{}")
    job = workspace.write_job("other.json", combine="hard")
    workspace.call("produce", job, *options).refused(2, ErrorCode.OUTPUT_OF_OTHER_JOB, "combine")
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
    workspace.call("produce", job, *options, "--overwrite").refused(2, "s3://lab/precious ")
    assert set(objects(bucket, "lab/precious")) == {"thesis.txt"}


@pytest.mark.parametrize(
    ("command", "code", "path"),
    [
        (
            ("plan", "job.json", "-i", "s3://none/in.zarr"),
            ErrorCode.STORE_MISSING,
            "s3://none/in.zarr",
        ),
        (
            ("plan", "job.json", "-i", "s3://lab/none.zarr"),
            ErrorCode.STORE_MISSING,
            "s3://lab/none.zarr",
        ),
        (
            ("plan", "job.json", "-i", "s3://lab/none.npy"),
            ErrorCode.STORE_MISSING,
            "s3://lab/none.npy",
        ),
        (
            ("produce", "job.json", "-o", "s3://none/out.zarr"),
            ErrorCode.STORE_UNUSABLE,
            "s3://none/out.zarr",
        ),
        (("status", "s3://none/out.zarr"), ErrorCode.JOB_MISSING, "s3://none/out.zarr"),
        (("finalize", "s3://lab/none.zarr"), ErrorCode.JOB_MISSING, "s3://lab/none.zarr"),
    ],
)
def test_a_missing_bucket_or_key_is_reported_in_one_line(
    workspace: Workspace,
    bucket: s3fs.S3FileSystem,
    command: tuple[str, ...],
    code: ErrorCode,
    path: str,
) -> None:
    workspace.call(*command).refused(2, code, path)


def test_every_command_reports_an_unreachable_server_in_one_line(workspace: Workspace) -> None:
    """Run the commands concurrently, because each client retries for some seconds."""
    unreachable = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
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
            (code, stack.enter_context(workspace.start(*command, **unreachable)))
            for code, group in commands.items()
            for command in group
        ]
        for code, process in started:
            answer = process.wait(60)
            answer.refused(code, "Could not connect to the endpoint URL")
            assert len(answer.err.splitlines()) == 1
            assert SECRET not in answer.err


def test_put_new_does_not_replace_an_object_that_was_created_after_the_check(
    workspace: Workspace, bucket: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mock.patch.dict(os.environ, workspace.env, clear=True):
        folder = ObjectFolder("s3://lab/exclusive")
        monkeypatch.setattr(ObjectFolder, "exists", lambda self, name: False)
        assert folder.put_new("job.json", b"first")
        assert not folder.put_new("job.json", b"second")
        with hold_claim(folder, "job.json", b"first") as has_claim:
            assert has_claim
            with hold_claim(folder, "job.json", b"first") as other_has_claim:
                assert not other_has_claim
    assert objects(bucket, "lab/exclusive") == {"job.json": b"first"}


def test_a_job_that_replaces_another_in_a_bucket_has_a_new_array(
    workspace: Workspace, bucket: s3fs.S3FileSystem, tmp_path: Path
) -> None:
    paths = ("-i", "s3://lab/in.zarr", "-o", "s3://lab/replaced.zarr")
    queue = f"sqlite://{tmp_path}/queue.db"
    bucket.put(f"{workspace.folder}/in.zarr", "lab/in.zarr", recursive=True)
    workspace.call("produce", "job.json", *paths, "--queue", queue).ok()
    assert "0/zarr.json" in objects(bucket, "lab/replaced.zarr")
    bucket.pipe_file("lab/replaced.zarr/0/c/0/0/0", b"written by the first job")
    workspace.call("produce", "job.json", *paths, "--queue", queue, "--overwrite").ok()
    record = json.loads(objects(bucket, "lab/replaced.zarr.chunkq")["job.json"])
    names = {name.partition("/")[0] for name in objects(bucket, "lab/replaced.zarr")}
    assert names == {"zarr.json", f"0.{record['epoch']}"}


def test_a_job_on_s3_has_endpoint_and_keys_of_the_aws_configuration_files(
    workspace: Workspace,
    endpoint: str,
    bucket: s3fs.S3FileSystem,
    local: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """The metadata are written by s3fs and the voxels by tensorstore."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").write_text(
        f"[profile lab]\nservices = lab\n[services lab]\ns3 =\n  endpoint_url = {endpoint}\n"
    )
    (tmp_path / ".aws/credentials").write_text(
        f"[lab]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {SECRET}\n"
    )
    env = {"HOME": str(tmp_path), "AWS_PROFILE": "lab", "AWS_EC2_METADATA_DISABLED": "true"}
    user = Workspace(workspace.folder, workspace.values, env)
    output = "s3://lab/profile.zarr"
    user.call("produce", "job.json", "-o", output).ok()
    user.compute_inline(output=output)
    user.call("finalize", output).ok()
    assert without_digest(objects(bucket, "lab/profile.zarr")) == without_digest(local)


@pytest.mark.parametrize("output", ["s3://lab", "s3://lab/", "s3://lab/."])
@pytest.mark.parametrize("option", [(), ("--overwrite",)])
def test_a_whole_bucket_is_refused_as_output_without_other_advice(
    workspace: Workspace, output: str, option: tuple[str, ...]
) -> None:
    answer = workspace.call("produce", "job.json", "-o", output, *option)
    answer.refused(2, ErrorCode.PATH_INVALID, "s3://lab/out.zarr")
    assert "--overwrite" not in answer.err


def test_tiff_stacks_and_hdf5_in_a_bucket_are_read(
    endpoint: str, bucket: s3fs.S3FileSystem
) -> None:
    values, box = random_volume(SHAPE), Box((2, 3, 4), (9, 20, 12))
    with mock.patch.dict(os.environ, environment(endpoint)):
        for path in (
            write_stack("s3://lab/slices", values, layout="strips", compression="zlib"),
            write_hdf5("s3://lab/in.h5", values, "gzip"),
        ):
            source = find_source(path)
            np.testing.assert_array_equal(source.open().read(box), values[box.slices((0, 0, 0))])
            assert source.identity() is not None
        with pytest.raises(StoreError, match=r"s3://lab/slices/\*\.tif") as error:
            find_source("s3://lab/slices")
    assert error.value.code is ErrorCode.STORE_UNSUPPORTED


def test_damaged_objects_of_a_bucket_are_found_and_repaired(
    workspace: Workspace, bucket: s3fs.S3FileSystem, done: list[CommandResult]
) -> None:
    output = "s3://lab/out.zarr"
    assert "sound" in workspace.call("verify", output).ok().out
    before = objects(bucket, "lab/out.zarr")
    names = sorted(name for name in before if name.startswith("0/c/"))
    deleted, cut, foreign = names[0], names[-1], "0/c/9/9/9"
    bucket.rm_file(f"lab/out.zarr/{deleted}")
    bucket.pipe_file(f"lab/out.zarr/{cut}", before[cut][:-1])
    bucket.pipe_file(f"lab/out.zarr/{foreign}", b"x")
    bucket.rm_file("lab/out.zarr/zarr.json")
    result = workspace.call("verify", output, "--json")
    assert result.code == 1
    report = json.loads(result.out)
    found = {entry["object"]: entry["damage"] for entry in report["damaged"]}
    assert found == {deleted: "missing", cut: "damaged", foreign: "foreign"}
    assert report["documents"] == {"zarr.json": "missing"}
    workspace.call("verify", output, "--repair").ok()
    workspace.compute_inline(output=output)
    workspace.call("finalize", output).ok()
    assert objects(bucket, "lab/out.zarr") == before
