"""Outputs with the name of another format than Zarr are refused before work starts."""

from pathlib import Path

import pytest

from chunkq.errors import ErrorCode, JobError
from chunkq.job.job_reading import load_job
from chunkq.job.output_name import FORMATS, WRITTEN, FileName, check_new_output
from tests.strategies import job_values

OTHER_FORMATS = [
    ("out.npy", "out.zarr"),
    ("v1.2.mrc", "v1.2.zarr"),
    (".tif.gz", "out.zarr"),
    ("s3://bucket/a/out.nrrd", "out.zarr"),
    ("file:///data/out.mha", "out.zarr"),
    ("out.zarr.zip", "out.zarr"),
    ("out.n5/", "out.zarr"),
    (".tif", "out.zarr"),
    ("a folder/größe.png", "größe.zarr"),
    ("s3://bucket/a/seg.precomputed", "seg.zarr"),
    ("precomputed://gs://bucket/seg.nii.gz", "precomputed://seg"),
    ("precomputed://./seg.ome.zarr", "precomputed://seg"),
    ("n5://s3://bucket/seg.n5", "seg.zarr"),
]
"""(output, name in the remedy)."""


@pytest.mark.parametrize(("output", "remedy"), OTHER_FORMATS)
def test_the_name_of_another_format_is_refused_with_the_name_to_use(
    output: str, remedy: str
) -> None:
    with pytest.raises(JobError) as caught:
        load_job(job_values((4, 4)), output=output)
    (line,) = caught.value.problems
    assert caught.value.code is ErrorCode.STORE_UNSUPPORTED
    assert line.startswith("output: ")
    assert line.endswith(f"use {remedy}")


def test_the_name_in_a_job_file_is_reported_with_the_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        load_job(job_values((4, 4), output="labels.mrc", combine="sofd"))
    keys = [line.partition(":")[0] for line in caught.value.problems]
    assert keys == ["combine", "output"]


@pytest.mark.parametrize(
    "output",
    [
        "out.zarr",
        "out.ome.zarr",
        "labels",
        "v1.2",
        "2026.11.28",
        "a.tif/labels",
        "volume.tif.zarr",
        "tif",
        "s3://bucket.h5/labels",
        "file:///data/out.zarr",
        "labels.tif",
        "labels.OME.TIFF",
        "seg.nii",
        "seg.NII.gz",
        "v1.2.h5",
        "s3://bucket/a/out.h5",
        "precomputed://seg",
        "PRECOMPUTED://gs://bucket/seg",
        "precomputed://s3://bucket/a/seg.precomputed",
    ],
)
def test_other_names_are_accepted(output: str) -> None:
    assert load_job(job_values((4, 4)), output=output).output.endswith(output.rpartition("/")[2])


def test_a_zarr_url_of_neuroglancer_is_refused_with_the_path_to_use() -> None:
    with pytest.raises(JobError, match="without it") as caught:
        check_new_output("zarr://s3://bucket/out.zarr", Path("/"))
    assert caught.value.code is ErrorCode.STORE_UNSUPPORTED


@pytest.mark.parametrize("output", ["precomputed://", "precomputed:/x", "s3:/bucket/x.zarr"])
def test_a_misspelled_url_is_no_folder(output: str) -> None:
    with pytest.raises(JobError) as error:
        check_new_output(output, Path("/data"))
    assert error.value.code is ErrorCode.PATH_INVALID


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(JobError) as caught:
        load_job(job_values((4, 4)), input="", output="")
    keys = [line.partition(":")[0] for line in caught.value.problems]
    assert keys == ["input", "output"]
    with pytest.raises(JobError, match=r"^model_config\.ts_file: empty path"):
        load_job(job_values((4, 4), model={"ts_file": ""}))


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_every_suffix_is_found_in_upper_and_lower_case(suffix: str) -> None:
    for name in (f"a.{suffix}", f"a.{suffix.upper()}"):
        if suffix in WRITTEN:
            check_new_output(name, Path("/"))
        with pytest.raises(JobError):
            check_new_output(name, Path("/"), zarr_only=True)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/a/seg.nii.gz", ("/a", "seg", ".nii.gz", "nifti")),
        ("/a/seg.v1.ome.tif", ("/a", "seg.v1", ".ome.tif", "tiff")),
        ("s3://b/k/out.h5", ("s3://b/k", "out", ".h5", "hdf5")),
        ("/a/seg.nii.bz2", None),
        ("/a/seg.tif.gz", None),
        ("/a/out.zarr", None),
        ("/a/.nii", None),
    ],
)
def test_the_name_of_a_file_has_a_stem_and_a_format(
    path: str, parts: tuple[str, ...] | None
) -> None:
    assert FileName.parse(path) == (parts and FileName(*parts))
