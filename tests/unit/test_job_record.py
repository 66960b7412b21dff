"""Job records: damage is detected, and exactly one of several creators succeeds."""

import json
import os
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from chunkq.errors import ErrorCode, JobError
from chunkq.geometry.axes import plain_axes
from chunkq.job.items import Image
from chunkq.job.job_folder import JobFolder
from chunkq.job.record import JobRecord
from chunkq.storage import documents
from chunkq.storage.claims import CLAIM_SECONDS, hold_claim
from chunkq.storage.images import ImageSource
from chunkq.storage.objects import ObjectFolder
from tests.strategies import plan_for

EPOCH = "0a1b2c3d"
AXIS = {"name": "y", "kind": "time", "unit": "nm", "scale": 2.0, "translation": 3.0}


def record_for(volume: tuple[int, ...] = (40,), **more: Any) -> JobRecord:
    plan = plan_for(volume, (10,), **more)
    source = ImageSource("zarr", "/in.zarr", plain_axes(plan.volume.shape), plan.volume.dtype)
    hashes = {"model_config.ts_file": "00"}
    metadata = {f"0.{EPOCH}/zarr.json": "{}"}
    return JobRecord(
        plan.job,
        (Image(0, "", (source,)),),
        hashes,
        (("identity",),),
        EPOCH,
        f"0.{EPOCH}",
        metadata,
        mask=source,
        mask_identity="identity",
    )


def code_of(content: bytes) -> ErrorCode:
    with pytest.raises(JobError) as error:
        JobRecord.from_json(content)
    return error.value.code


def changed(key: str) -> dict[str, Any]:
    """Return the values of a valid record, with one of them changed."""
    values = json.loads(record_for().to_json())
    values[key] = {
        "checksum": "00000000",
        "chunkq_version": "9.9.9",
        "digest": "0" * 64,
        "epoch": "ffffffff",
        "array": "0",
        "job": {**values["job"], "pad_value": 7},
        "images": [{**values["images"][0], "number": 1}],
        "identities": [["another"]],
        "file_hashes": {"model_config.ts_file": "01"},
        "mask": {**values["mask"], "path": "/other.zarr"},
        "mask_identity": "another",
        "metadata": {f"0.{EPOCH}/zarr.json": "[]"},
    }[key]
    return dict(values)


KEYS = [
    "checksum", "chunkq_version", "digest", "epoch", "array", "job", "images", "identities",
    "file_hashes", "mask", "mask_identity", "metadata",
]  # fmt: skip


def test_a_record_is_equal_after_a_round_trip_through_json() -> None:
    record = record_for()
    assert JobRecord.from_json(record.to_json()) == record
    assert sorted(json.loads(record.to_json())) == sorted([*KEYS, "layout"])


@pytest.mark.parametrize("key", KEYS)
def test_a_record_with_a_changed_value_is_damaged(key: str) -> None:
    assert code_of(json.dumps(changed(key)).encode()) == ErrorCode.JOB_RECORD_DAMAGED


@pytest.mark.parametrize("key", ["digest", "job", "images", "file_hashes"])
def test_changed_values_with_a_valid_checksum_are_detected_by_the_digest(
    key: str,
) -> None:
    values = changed(key)
    del values[documents.KEY]
    assert code_of(documents.encode(values)) == ErrorCode.JOB_RECORD_DAMAGED


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff"])
def test_a_record_that_is_not_a_document_is_damaged(content: bytes) -> None:
    assert code_of(content) == ErrorCode.JOB_RECORD_DAMAGED


def test_a_record_of_another_layout_is_unsupported_not_damaged() -> None:
    values = json.loads(record_for().to_json())
    del values[documents.KEY]
    assert code_of(documents.encode(values | {"layout": 99})) == ErrorCode.JOB_RECORD_UNSUPPORTED
    del values["layout"]  # the first versions wrote no checksum
    assert code_of(json.dumps(values).encode()) == ErrorCode.JOB_RECORD_UNSUPPORTED


@pytest.mark.parametrize(
    "change",
    [
        {"format": "npy"},
        {"path": "/other.zarr"},
        {"dtype": "uint16"},
        {"options": {"zarr_format": 2}},
        {"axes": plain_axes((41,))},
        *({"axes": (replace(*plain_axes((40,)), **{key: value}),)} for key, value in AXIS.items()),
    ],
    ids=str,
)
def test_the_digest_depends_on_everything_that_a_source_has(change: dict[str, Any]) -> None:
    record = record_for()
    [source] = record.sources
    image = Image(0, "", (replace(source, **change),))
    assert replace(record, images=(image,)).digest != record.digest


# --------------------------------------------------------------------------- several creators


@pytest.fixture(params=["local", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    local = str(tmp_path / "out.zarr.chunkq")
    return local if request.param == "local" else f"memory://{uuid.uuid4().hex}.chunkq"


def test_the_record_of_the_first_of_two_creators_is_kept(path: str) -> None:
    first, second = record_for(), record_for(pad_value=7)
    assert JobFolder(path).create_record(first) == first
    assert JobFolder(path).create_record(second) == first
    assert JobFolder(path).read_record() == first


def test_exactly_one_of_two_processes_that_replace_a_record_succeeds(path: str) -> None:
    first, second, third = record_for(), record_for(pad_value=7), record_for(pad_value=8)
    folder, codes = JobFolder(path), []
    folder.create_record(first)
    before = folder.objects.get("job.json")

    def other_process() -> None:
        with pytest.raises(JobError) as error:
            JobFolder(path).replace_record(before, third)
        codes.append(error.value.code)

    folder.replace_record(before, second, prepare=other_process)
    assert codes == [ErrorCode.JOB_REPLACED]
    assert folder.read_record() == second
    with pytest.raises(JobError) as error:  # the record has changed since it was read
        folder.replace_record(before, third)
    assert error.value.code == ErrorCode.JOB_REPLACED
    assert folder.read_record() == second


def test_exactly_one_of_two_claims_on_an_object_succeeds(path: str) -> None:
    folder = ObjectFolder(path)
    folder.put("job.json", b"before")
    with hold_claim(folder, "job.json", b"earlier") as claimed:
        assert not claimed
    with hold_claim(folder, "job.json", b"before") as first:
        with hold_claim(folder, "job.json", b"before") as second:
            assert (first, second) == (True, False)
        with hold_claim(
            folder, "job.json", b"before"
        ) as third:  # the failed claim did not release it
            assert not third
    with hold_claim(folder, "job.json", b"before") as fourth:
        assert fourth


@pytest.mark.parametrize(
    ("age", "taken_over"), [(CLAIM_SECONDS / 2, False), (CLAIM_SECONDS * 2, True)]
)
def test_the_claim_of_an_unknown_process_is_valid_for_a_minute(
    tmp_path: Path, age: float, taken_over: bool
) -> None:
    folder = ObjectFolder(str(tmp_path))
    folder.put("job.json", b"before")
    with hold_claim(folder, "job.json", b"before") as claimed:
        assert claimed
        [claim] = tmp_path.glob("*.claim")
    assert not claim.exists()
    claim.touch()
    os.utime(claim, (time.time() - age,) * 2)
    with hold_claim(folder, "job.json", b"before") as claimed:
        assert claimed == taken_over
    assert claim.exists() != taken_over


CLAIM_FOREVER = """
import sys, time
from chunkq.storage.claims import hold_claim
from chunkq.storage.objects import ObjectFolder

with hold_claim(ObjectFolder(sys.argv[1]), "job.json", b"before") as claimed:
    print(claimed, flush=True)
    time.sleep(1000)
"""


def test_the_claim_of_a_killed_process_of_this_machine_is_taken_over_immediately(
    tmp_path: Path,
) -> None:
    folder = ObjectFolder(str(tmp_path))
    folder.put("job.json", b"before")
    command = [sys.executable, "-c", CLAIM_FOREVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "True\n"
        with hold_claim(folder, "job.json", b"before") as claimed:
            assert not claimed
        owner.kill()
    with hold_claim(folder, "job.json", b"before") as claimed:
        assert claimed


def test_an_owner_does_not_delete_a_claim_that_another_process_took_over(
    tmp_path: Path,
) -> None:
    folder = ObjectFolder(str(tmp_path))
    folder.put("job.json", b"before")
    with ExitStack() as second:
        with hold_claim(folder, "job.json", b"before"):
            [claim] = tmp_path.glob("*.claim")
            os.utime(claim, (time.time() - 2 * CLAIM_SECONDS,) * 2)
            assert second.enter_context(hold_claim(folder, "job.json", b"before"))
        assert claim.exists()
    assert not claim.exists()


class NoConditionsError(OSError):
    """Error of s3fs for an S3 server that does not support If-None-Match."""

    response: ClassVar[dict[str, Any]] = {"Error": {"Code": "NotImplemented"}}


def test_creating_a_job_on_storage_without_conditional_writes_logs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = f"memory://{uuid.uuid4().hex}/out.zarr.chunkq"
    folder = JobFolder(path)
    pipe_file = folder.objects._filesystem.pipe_file

    def reject_conditions(target: str, content: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise NoConditionsError
        pipe_file(target, content)

    assert folder.objects.is_exclusive
    folder.objects.put_new("other", b"")
    assert caplog.records == []
    monkeypatch.setattr(folder.objects._filesystem, "pipe_file", reject_conditions)
    record = record_for()
    assert folder.create_record(record) == record
    assert not folder.objects.is_exclusive
    [warning] = caplog.records
    assert warning.levelname == "WARNING"
    assert path.removesuffix(".chunkq") in warning.getMessage()


def test_a_release_without_conditional_writes_is_detected_by_its_signature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = f"memory://{uuid.uuid4().hex}/out.zarr.chunkq"
    written = {}

    def pipe_file(self: object, target: str, content: bytes, **_options: object) -> None:
        written[target] = content

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", pipe_file)
    folder = JobFolder(path)
    assert not folder.objects.is_exclusive
    assert folder.objects.put_new("other", b"content")
    assert list(written.values()) == [b"content"]
