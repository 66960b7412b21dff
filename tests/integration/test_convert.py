"""`chunkq convert`: outputs and inputs in every format, read by independent software."""

import json
import os
import signal
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
import tifffile
import zarr
from ome_zarr_models import open_ome_zarr

from chunkq.convert import convert, plan_conversion
from chunkq.errors import ChunkReadError, ErrorCode, JobError, StoreError
from chunkq.geometry.box import Box
from chunkq.job.events import Event, StageProgress
from chunkq.storage.formats import gzip_file
from chunkq.storage.images import find_source
from chunkq.writers import blocks
from chunkq.writers.base import WriterOptions
from tests.contract.test_writer_contract import files_of
from tests.harness.nifti import AFFINE, TURNED, write_nifti
from tests.harness.volumes import read_output
from tests.harness.waiting import wait_until
from tests.harness.workspace import run_inline

SHAPE = (24, 26, 28)
WHOLE_VOXELS = np.diag([0.5, 1.5, 2, 1])
WHOLE_VOXELS[:3, 3] = -7, 3, 12
"""Affine whose positions are whole voxels."""
NETWORK = "def bright(batch):\n    return (batch > 50).astype('float32')\n"
TARGETS = ("out.zarr", "precomputed://out", "out.nii", "out.nii.gz", "out.ome.tif", "out.h5/labels")
Voxels = npt.NDArray[Any]


def run(source: Any, target: Any, **options: Any) -> dict[str, Any]:
    keys = {"path": str(source)} | options.pop("keys", {})
    overwrite, emit = options.pop("overwrite", False), options.pop("emit", lambda event: None)
    writing = WriterOptions(options.pop("levels", None))
    conversion = plan_conversion(keys, str(target), options=writing, **options)
    return convert(conversion, overwrite=overwrite, emit=emit)


def path_of(target: str, folder: Path) -> str:
    """Return a target in a folder."""
    scheme, separator, name = target.rpartition("://")
    return f"{scheme}{separator}{folder}/{name}"


def read(path: str) -> Voxels:
    array = find_source(path).open()
    return array.read(Box.of_shape(array.shape))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy images in many blocks, as large ones are."""
    monkeypatch.setattr(blocks, "COPY_BYTES", 1 << 13)
    monkeypatch.setattr("chunkq.writers.tiff.COPY_BYTES", 1 << 13)


def volume() -> Voxels:
    return np.random.default_rng(5).integers(0, 99, SHAPE, np.uint8)


PAIRS = [
    (source, target)
    for source, target in permutations(TARGETS, 2)
    if (TARGETS.index(source) - TARGETS.index(target)) % 5 == 1
]
"""Every format is read once and written once."""


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_readable_image_is_written_in_any_format(
    source: str, target: str, tmp_path: Path, small_blocks: None
) -> None:
    write_nifti(tmp_path / "scan.nii", volume(), affine=WHOLE_VOXELS)
    first, second = (tmp_path / name for name in ("first", "second"))
    first.mkdir()
    second.mkdir()
    begin, end = path_of(source, first), path_of(target, second)
    run(tmp_path / "scan.nii", begin)
    run(begin, end)
    np.testing.assert_array_equal(read(end), volume())
    for axis, size, start in zip(find_source(end).axes, (2, 1.5, 0.5), (12, 3, -7), strict=True):
        factor = {"millimeter": 1, "micrometer": 1e3, "nanometer": 1e6}[str(axis.unit)]
        assert axis.scale == pytest.approx(size * factor)
        assert axis.translation == pytest.approx(start * factor)
    assert [path.name for path in second.iterdir()] == [end.split("/second/")[1].split("/")[0]]


def labels_of(folder: Path, affine: Voxels, **keys: Any) -> tuple[str, Voxels]:
    """Run a job over a scan; return the output and its voxels."""
    folder.mkdir(exist_ok=True)
    write_nifti(folder / "scan.nii.gz", volume(), affine=affine)
    values = {
        "input": {"path": str(folder / "scan.nii.gz"), **keys.pop("input", {})},
        "output": str(folder / "labels.zarr"),
        "combine": "soft",
        "chunksize": [16, 16, 16],
        "threads": 1,
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(folder / "network.py"),
            "class_name": "bright",
            "model_input_shape": [1, 8, 8, 8],
        },
    } | keys
    (folder / "network.py").write_text(NETWORK)
    run_inline(values)
    return str(folder / "labels.zarr"), read_output(folder / "labels.zarr")


def geometry(path: Path) -> tuple[Any, ...]:
    image = SimpleITK.ReadImage(str(path))
    return image.GetOrigin(), image.GetSpacing(), image.GetDirection(), image.GetSize()


@pytest.mark.parametrize("affine", [AFFINE, TURNED], ids=["straight", "turned"])
@pytest.mark.parametrize(
    "selection",
    [{}, {"orientation": "LPS"}, {"order": "xyz"}, {"orientation": "RAS", "order": "yzx"}],
    ids=str,
)
def test_labels_lie_on_the_scan_voxel_for_voxel(
    tmp_path: Path, affine: Voxels, selection: dict[str, str]
) -> None:
    output, labels = labels_of(tmp_path, affine, input=selection)
    run(output, tmp_path / "labels.nii.gz")
    scan, written = (nibabel.load(tmp_path / n) for n in ("scan.nii.gz", "labels.nii.gz"))
    np.testing.assert_array_equal(written.affine, scan.affine)
    assert geometry(tmp_path / "scan.nii.gz") == geometry(tmp_path / "labels.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert written.header.get_intent()[0] == "label"
    np.testing.assert_array_equal(written.dataobj, np.asarray(scan.dataobj) > 50)
    assert labels.any()


@pytest.mark.parametrize("selection", [{}, {"orientation": "LPS"}, {"order": "yzx"}], ids=str)
def test_labels_of_a_region_lie_on_the_region_of_the_scan(
    tmp_path: Path, selection: dict[str, str]
) -> None:
    whole, _ = labels_of(tmp_path / "whole", TURNED, input=selection)
    output, labels = labels_of(
        tmp_path / "part", TURNED, input=selection, roi=[[4, 20], [3, None], [-17, -2]]
    )
    images = []
    for name, path in (("whole", whole), ("part", output)):
        run(path, tmp_path / f"{name}.nii")
        images.append(nibabel.load(tmp_path / f"{name}.nii"))
    full, part = images
    # Voxel 0 of the part is this voxel of the whole image.
    corner = np.linalg.inv(full.affine) @ part.affine @ np.array([0, 0, 0, 1])
    start = np.rint(corner[:3]).astype(int)
    np.testing.assert_allclose(corner[:3], start, atol=1e-4)
    crop = tuple(slice(n, n + size) for n, size in zip(start, part.shape, strict=True))
    np.testing.assert_array_equal(np.asarray(full.dataobj)[crop], np.asarray(part.dataobj))
    assert sorted(part.shape) == sorted(labels.shape)


def test_a_second_affine_of_the_scan_is_kept(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume(), TURNED)
    image.set_sform(TURNED, 4)
    image.set_qform(AFFINE, 1)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    run(tmp_path / "scan.nii.gz", tmp_path / "copy.nii.gz")
    scan, copy = (nibabel.load(tmp_path / n).header for n in ("scan.nii.gz", "copy.nii.gz"))
    for field in ("sform_code", "qform_code"):
        assert scan[field] == copy[field]
    np.testing.assert_array_equal(scan.get_sform(), copy.get_sform())
    np.testing.assert_allclose(scan.get_qform(), copy.get_qform(), atol=1e-5)


def test_labels_have_levels_of_the_most_frequent_label(tmp_path: Path) -> None:
    output, labels = labels_of(tmp_path, AFFINE, classes=["dark", "bright"])
    run(output, tmp_path / "levels.zarr", levels=3)
    group = open_ome_zarr(zarr.open_group(tmp_path / "levels.zarr", mode="r"))
    image = group.ome_attributes.multiscales[0]
    assert [dataset.path for dataset in image.datasets] == ["0", "1", "2"]
    assert image.type == "mode"
    level = np.asarray(zarr.open_group(tmp_path / "levels.zarr", mode="r")["1"])
    assert set(np.unique(level)) == {0, 1}
    run(output, f"precomputed://{tmp_path}/segments")
    info = json.loads((tmp_path / "segments" / "info").read_text())
    assert (info["type"], info["data_type"]) == ("segmentation", "uint32")
    names = json.loads((tmp_path / "segments" / info["segment_properties"] / "info").read_text())
    assert names["inline"]["ids"] == ["1"]
    assert names["inline"]["properties"][0]["values"] == ["bright"]
    np.testing.assert_array_equal(read(str(tmp_path / "segments")), labels)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("target", TARGETS)
def test_an_interrupted_conversion_appears_once_it_is_complete(
    target: str, tmp_path: Path, small_blocks: None
) -> None:
    write_nifti(tmp_path / "scan.nii", volume())
    path = path_of(target, tmp_path)
    place = path.rpartition("://")[2].removesuffix("/labels")

    def kill(event: Event) -> None:
        assert not os.path.exists(place)
        if isinstance(event, StageProgress) and event.done == event.total - 1:
            raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path / "scan.nii", path, emit=kill)
    assert not os.path.exists(place)
    result = run(tmp_path / "scan.nii", path)
    is_folder = target in ("out.zarr", "precomputed://out")
    assert result["continued_at"] == (result["steps"] - 1 if is_folder else 0)
    content = files_of(place)
    run(tmp_path / "scan.nii", path, overwrite=True)
    assert files_of(place) == content
    assert not os.path.exists(f"{place}.partial")


def test_an_interrupted_conversion_of_another_image_starts_again(
    tmp_path: Path, small_blocks: None
) -> None:
    for name, values in (("a", volume()), ("b", volume()[::-1])):
        write_nifti(tmp_path / f"{name}.nii", values)

    def kill(event: Event) -> None:
        if isinstance(event, StageProgress) and event.done == 1:
            raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path / "a.nii", tmp_path / "out.zarr", emit=kill)
    assert run(tmp_path / "b.nii", tmp_path / "out.zarr")["continued_at"] == 0
    np.testing.assert_array_equal(read(str(tmp_path / "out.zarr")), volume()[::-1])


def test_a_killed_command_leaves_no_output_and_is_continued(tmp_path: Path) -> None:
    shape = (8, 300, 400)
    values = np.random.default_rng(0).integers(0, 9, shape, np.uint16)
    np.save(tmp_path / "in.npy", values)
    command = [sys.executable, "-m", "chunkq", "convert", str(tmp_path / "in.npy")]
    code = (
        "import os, sys, chunkq.writers.blocks as b; b.COPY_BYTES = 1 << 14; "
        "from chunkq.writers.partial import Partial; import time; record = Partial.record\n"
        "def slow(*arguments):\n    record(*arguments)\n    time.sleep(0.2)\n"
        "Partial.record = slow; from chunkq.cli import main; sys.exit(main())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "convert", command[-1], str(tmp_path / "out.zarr")],
        stderr=subprocess.DEVNULL,
    )
    progress = tmp_path / "out.zarr.partial" / "progress.json"
    wait_until(lambda: progress.exists() and b'"steps": 2' in progress.read_bytes(), "two steps")
    with pytest.raises(StoreError) as caught:
        run(tmp_path / "in.npy", tmp_path / "out.zarr")
    assert caught.value.code is ErrorCode.OUTPUT_IN_USE
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out.zarr").exists()
    finished = subprocess.run(
        [*command, str(tmp_path / "out.zarr"), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(finished.stdout)["shape"] == list(shape)
    np.testing.assert_array_equal(read(str(tmp_path / "out.zarr")), values)


def test_a_file_that_cannot_be_read_by_region_is_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gzip_file, "WHOLE_BYTES", 1 << 10)
    write_nifti(tmp_path / "scan.nii.gz", volume(), affine=TURNED)
    stages = set()

    def note(event: Event) -> None:
        if isinstance(event, StageProgress):
            stages.add(event.stage)

    keys = {"orientation": "RAS"}
    run(tmp_path / "scan.nii.gz", tmp_path / "out.zarr", keys=keys, emit=note)
    assert stages == {"staging the input", "converting"}
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / "scan.nii.gz"))
    np.testing.assert_array_equal(read(str(tmp_path / "out.zarr")).T, canonical.dataobj)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.zarr"]


@pytest.mark.parametrize("name", ["out.zarr", "out.nii.gz", "out.tif", "out.h5"])
def test_an_output_in_a_bucket_appears_at_once(name: str, tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii", volume())
    url = f"memory://{tmp_path.name}-{name}/{name}"
    run(tmp_path / "scan.nii", url)
    np.testing.assert_array_equal(read(url), volume())
    with pytest.raises(StoreError) as caught:
        run(tmp_path / "scan.nii", url)
    assert caught.value.code is ErrorCode.OUTPUT_EXISTS


def test_channels_and_time_are_axes_of_each_format(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 9, (3, 2, 5, 6, 7), np.uint8)
    np.save(tmp_path / "in.npy", values)
    keys = {"axes": "tczyx", "channels": [1, 0], "time": "1:3"}
    expected = values[1:3, [1, 0]]
    run(tmp_path / "in.npy", tmp_path / "out.nii", keys=keys)
    image = np.asarray(nibabel.load(tmp_path / "out.nii").dataobj)
    np.testing.assert_array_equal(image, expected.transpose(4, 3, 2, 0, 1))
    run(tmp_path / "in.npy", tmp_path / "out.tif", keys=keys)
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert file.series[0].axes == "TCZYX"
        np.testing.assert_array_equal(file.series[0].asarray(), expected)
    run(tmp_path / "in.npy", f"precomputed://{tmp_path}/out", keys=keys)
    np.testing.assert_array_equal(read(str(tmp_path / "out" / "t001")), expected[1])
    assert run(tmp_path / "in.npy", tmp_path / "one.nii", keys=keys | {"channels": 1})["axes"] == [
        "t", "z", "y", "x",
    ]  # fmt: skip


def test_mistakes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii", volume().astype(np.float64))
    scan = tmp_path / "scan.nii"
    refusals: list[tuple[ErrorCode, str, dict[str, Any]]] = [
        (ErrorCode.STORE_UNSUPPORTED, "out.npy", {}),
        (ErrorCode.STORE_UNSUPPORTED, "out.n5", {}),
        (ErrorCode.STORE_UNSUPPORTED, "precomputed://out", {}),  # float64
        (ErrorCode.STORE_UNSUPPORTED, "precomputed://out", {"dtype": "float32", "is_labels": True}),
        (ErrorCode.STORE_UNSUPPORTED, "out.tif", {"dtype": "uint64"}),
        (ErrorCode.STORE_UNUSABLE, "scan.nii", {"overwrite": True}),
        (ErrorCode.JOB_INVALID, "out.zarr", {"keys": {"axes": "abc"}}),
        (ErrorCode.JOB_INVALID, "out.zarr", {"keys": {"channels": 0}}),
    ]
    for code, target, options in refusals:
        with pytest.raises((StoreError, JobError)) as caught:
            run(scan, path_of(target, tmp_path), **options)
        assert caught.value.code is code, target
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["scan.nii"]


def test_a_job_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    output, _ = labels_of(tmp_path, AFFINE)
    group = zarr.open_group(output)
    group.attrs["chunkq"] = {**group.attrs["chunkq"], "state": "incomplete"}  # type: ignore[dict-item]
    with pytest.raises(StoreError) as caught:
        run(output, tmp_path / "out.nii")
    assert caught.value.code is ErrorCode.STORE_UNUSABLE
    with pytest.raises(StoreError) as caught:
        run(tmp_path / "scan.nii.gz", output, overwrite=True)
    assert caught.value.code is ErrorCode.OUTPUT_OF_OTHER_JOB


def test_a_damaged_input_leaves_no_output(tmp_path: Path, small_blocks: None) -> None:
    write_nifti(tmp_path / "scan.nii", volume())
    run(tmp_path / "scan.nii", tmp_path / "in.zarr")
    chunk = next(path for path in (tmp_path / "in.zarr" / "0" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])
    for target in TARGETS[1:]:
        with pytest.raises(ChunkReadError):
            run(tmp_path / "in.zarr", path_of(target, tmp_path))
    assert {path.suffix for path in tmp_path.glob("out*")} == {".partial"}


def test_what_stored_integers_stand_for_is_kept(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", volume())
    run(tmp_path / "in.npy", tmp_path / "in.zarr")
    group = zarr.open_group(tmp_path / "in.zarr")
    group.attrs["chunkq"] = {"range": [-1, 4.1], "scale": 0.02, "offset": -1.0}
    values = volume() * 0.02 - 1
    for target in TARGETS:
        run(tmp_path / "in.zarr", path_of(target, tmp_path))
        if target.startswith("out.nii"):
            image = nibabel.load(tmp_path / target)
            np.testing.assert_allclose(np.asarray(image.dataobj).T, values, atol=1e-6)
        elif target == "out.zarr":
            attributes = zarr.open_group(tmp_path / target, mode="r").attrs["chunkq"]
            assert attributes == {"scale": 0.02, "offset": -1.0}
        elif target == "out.ome.tif":
            with tifffile.TiffFile(tmp_path / target) as file:
                assert '<M K="scale">0.02</M>' in str(file.ome_metadata)
        elif target == "out.h5/labels":
            array = find_source(str(tmp_path / "out.h5"))
            with h5py.File(tmp_path / "out.h5") as hdf5:
                assert hdf5["labels"].attrs["scale_factor"] == 0.02
            assert array.dtype == "uint8"
        else:
            info = json.loads((tmp_path / "out" / "info").read_text())
            assert info["chunkq"] == {"scale": 0.02, "offset": -1.0}
