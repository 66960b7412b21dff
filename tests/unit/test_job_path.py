"""Canonical paths of outputs and job folders."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import ErrorCode, JobError
from chunkq.job.job_path import canonical, check_job_path, output_path, path_problem, printable_path
from chunkq.job.job_reading import load_job
from chunkq.paths import absolute

BASE = Path("/base/folder")
SPELLINGS = {
    # What a user writes -> the one path of the output.
    "out.zarr": "/base/folder/out.zarr",
    "./a//b/../out.zarr/": "/base/folder/a/out.zarr",
    "../../../out.zarr": "/out.zarr",
    "//data//out.zarr": "/data/out.zarr",
    "/data/x/../out.zarr": "/data/out.zarr",
    "file:///data/x/../out.zarr": "/data/out.zarr",
    "FILE:///data/out.zarr/": "/data/out.zarr",
    "local:///data/./out.zarr": "/data/out.zarr",
    "file://localhost/data/out.zarr": "/data/out.zarr",
    "file://out.zarr": "/base/folder/out.zarr",
    "/data/%2e%2e/out.zarr": "/data/%2e%2e/out.zarr",  # not decoded on a local disk
    "/data/..\\out.zarr": "/data/..\\out.zarr",
    "s3://bucket/a/out.zarr/": "s3://bucket/a/out.zarr",
    "S3://bucket//a/./b/../out.zarr": "s3://bucket/a/out.zarr",
    "s3://Bucket/A/out.zarr": "s3://Bucket/A/out.zarr",  # keys are case-sensitive
    "HTTPS://me@Host.ORG:80/A/out.zarr": "https://me@host.org:80/A/out.zarr",
    "memory:///out.zarr": "memory://out.zarr",
    "memory://a/../out.zarr": "memory://out.zarr",
    "gs://bucket/\u00e4.zarr": "gs://bucket/\u00e4.zarr",
}


@pytest.mark.parametrize(("spelling", "path"), SPELLINGS.items())
def test_every_spelling_of_a_path_has_one_canonical_form(spelling: str, path: str) -> None:
    assert output_path(spelling, BASE) == path
    assert output_path(path, Path("/elsewhere")) == path
    check_job_path(f"{path}.chunkq")
    if spelling != path:
        assert path_problem(spelling) is not None


WITHOUT_CANONICAL_FORM = [
    "s3://bucket/../other/out.zarr",
    "s3://bucket/a/../../other/out.zarr",
    "memory://../out.zarr",
    "s3:///out.zarr",
    "s3://",
    "memory://",
    "s3://bucket/a\\..\\out.zarr",
    "s3://bucket/out.zarr?versionId=1",
    "s3://bucket/out.zarr#a",
    "https://host/a/%2e%2e/out.zarr",
    "https://host/a/%2E./out.zarr",
    "https://host/a%2fout.zarr",
    "https://host/a/%252e%252e/out.zarr",
    "https://host/a%00/out.zarr",
    "simplecache::file:///data/out.zarr",
    "filecache::s3://bucket/out.zarr",
    "dir::file:///data/out.zarr",
    "zip://out.zarr::/data/a.zip",
    "://data/out.zarr",
    "/data/a://out.zarr",
    "/data/out\0.zarr",
    "/data/out\n.zarr",
    "/data/out\x1b[2J.zarr",
    "s3://bucket/out\u2028.zarr",
    "/data/\udcff.zarr",
    "/data/" + "x" * 5000,
]


@pytest.mark.parametrize("path", WITHOUT_CANONICAL_FORM)
def test_an_output_without_a_canonical_form_is_rejected_in_one_line(path: str) -> None:
    with pytest.raises(JobError) as error:
        output_path(path, BASE)
    assert error.value.code == ErrorCode.PATH_INVALID
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600
    with pytest.raises(JobError) as error:
        check_job_path(f"{path}.chunkq")
    assert error.value.code == ErrorCode.PATH_INVALID


@pytest.mark.parametrize(
    "job",
    [
        "",
        ".chunkq",
        "/.chunkq",
        "/data/.chunkq",
        "s3://bucket/.chunkq",
        "memory://.chunkq",
        "/data/out.zarr",
        "/data/out.zarr.chunkq/",
        "data/out.zarr.chunkq",
        "./out.zarr.chunkq",
        "~/out.zarr.chunkq",
        "//data/out.zarr.chunkq",
        "/data//out.zarr.chunkq",
        "/data/./out.zarr.chunkq",
        "/data/../out.zarr.chunkq",
        "file:///data/out.zarr.chunkq",
        "FILE:///data/out.zarr.chunkq",
        "local:///data/out.zarr.chunkq",
        "S3://bucket/out.zarr.chunkq",
        "s3://bucket//out.zarr.chunkq",
        "s3://bucket/./out.zarr.chunkq",
        "s3://bucket/a/../out.zarr.chunkq",
        "memory:///out.zarr.chunkq",
        "https://HOST/out.zarr.chunkq",
    ],
)
def test_the_job_folder_of_a_task_must_have_the_canonical_form(job: str) -> None:
    with pytest.raises(JobError) as error:
        check_job_path(job)
    assert error.value.code == ErrorCode.PATH_INVALID


parts = st.sampled_from(
    ["a", "b.zarr", ".", "..", "...", "", "\u00e4", "%2e%2e", "a::b", "\\", "?"]
)
starts = st.sampled_from(["", "/", "//", "file://", "file:///", "LOCAL://", "s3://b/", "memory://"])


@given(starts, st.lists(parts, max_size=6))
def test_the_canonical_form_is_idempotent(start: str, inner: list[str]) -> None:
    form = canonical(start + "/".join(inner), BASE)
    assert canonical(form, Path("/elsewhere")) == form
    if path_problem(form) is None:
        inner_parts = form.partition("://")[2].split("/") if "://" in form else form[1:].split("/")
        assert form == "/" or not {".", "..", ""} & {*inner_parts}


def test_the_output_of_a_job_is_canonical_or_reported_with_all_other_mistakes() -> None:
    model = {"runtime": "torch", "type": "torchscript", "ts_file": "/n.pt"}
    values = {
        "input": "s3://bucket//in.zarr",
        "output": "S3://bucket//out.zarr/",
        "model_config": {**model, "model_input_shape": [8]},
    }
    job = load_job(values)
    assert job.output == "s3://bucket/out.zarr"
    assert job.input == ("s3://bucket//in.zarr",)  # a key may have an empty part
    with pytest.raises(JobError) as error:
        load_job(values, output="s3://bucket/../x.zarr")
    assert error.value.code == ErrorCode.PATH_INVALID
    with pytest.raises(JobError) as error:
        load_job({**values, "chunksize": [0], "output": "a\0"})
    assert [line.partition(":")[0] for line in error.value.problems] == ["chunksize.0", "output"]


def test_a_path_is_printed_in_one_short_line_without_its_password() -> None:
    assert printable_path("/a\n\x1b[1m\u2028b") == "/a\\x0a\\x1b[1m\\x2028b"
    assert printable_path("ftp://me:hush@host/x") == "ftp://me:***@host/x"
    assert len(printable_path("/" + "x" * 9000)) < 400
    assert printable_path("/\udcff") == "/\\udcff"


def test_the_home_folder_of_an_unknown_user_is_an_ordinary_name() -> None:
    assert absolute("~no_such_user/x", BASE) == "/base/folder/~no_such_user/x"
