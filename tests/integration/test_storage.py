"""Input formats, output formats and atomic writes of objects."""

import itertools
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore as ts
import zarr

from chunkq.errors import ChunkqError, ChunkReadError, ErrorCode
from chunkq.finalize import finalize_job
from chunkq.geometry.box import Box
from chunkq.job.job_handle import open_job
from chunkq.storage.formats.zarr import ZarrFormat
from chunkq.storage.formats.zarr_arrays import TensorStoreArray, ZarrPythonArray
from chunkq.storage.images import find_source
from chunkq.storage.local_files import PARTIAL
from chunkq.storage.objects import ObjectFolder
from tests import reference as ref
from tests.harness.files import files_below
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace, run_inline

SHAPE = (13, 10, 11)
SPACE: dict[str, list[Any]] = {
    "scale": [4.0, 0.5, 0.25],
    "translation": [100.0, 0.0, -2.5],
    "units": ["micrometer", "micrometer", None],
}


def job_over(folder: Path, source: str | Path, rank: int = 3, **more: Any) -> dict[str, Any]:
    """Return a job whose patches overlap chunk borders, with gaussian weights and 3 channels."""
    patch = (6,) * rank
    return {
        "input": str(source),
        "output": str(folder / "out.zarr"),
        "inference_type": "sliding_window",
        "strides": [3] * rank,
        "weight_function": ["weight_gaussian"],
        "chunksize": [8] * rank,
        "storage_chunks": [4] * rank,
        "threads": 1,
        "model_config": toy_model(folder, patch, scale=100.0),
    } | more


def expected(
    values: npt.NDArray[Any], combine: str = "weighted_avg", pad: int = 0
) -> ref.Reference:
    patch = (6,) * values.ndim
    network = ref.predictor("box_blur", 3, patch)
    return ref.reference(
        ref.sliding_window(values.shape, patch, (3,) * values.ndim, pad_width=(pad,) * values.ndim),
        values,
        lambda patch, start: network(patch / 100.0, start),
        combine,
        "weight_gaussian",
    )


def check(folder: Path, source: str | Path, values: npt.NDArray[Any], pad: int = 0) -> None:
    """Run the job and compare its output with the reference for `values`."""
    job, _ = run_inline(job_over(folder, source, values.ndim, pad_width=[pad] * values.ndim))
    output = read_output(job.folder.output)
    np.testing.assert_allclose(output, expected(values, pad=pad).average, rtol=0, atol=1e-5)


def write_ome(path: Path, values: npt.NDArray[Any], version: str) -> Path:
    """Write an OME-Zarr image with two levels; level 0 has `values`."""
    axes = [
        {"name": name, "type": "space"} | ({"unit": unit} if unit else {})
        for name, unit in zip("zyx", SPACE["units"], strict=True)
    ]
    levels = [
        {
            "path": f"level{number}",
            "coordinateTransformations": [
                {"type": "scale", "scale": [factor * s for s in SPACE["scale"]]},
                {"type": "translation", "translation": SPACE["translation"]},
            ],
        }
        for number, factor in ((0, 1), (1, 2))
    ]
    image = {"axes": axes, "datasets": levels}
    attributes = {"ome": {"version": version, "multiscales": [image]}}
    if version == "0.4":
        attributes = {"multiscales": [{"version": version, **image}]}
    zarr_format = 2 if version == "0.4" else 3
    group = zarr.create_group(path, zarr_format=zarr_format, attributes=attributes)
    group.create_array("level0", data=values, chunks=(8, 8, 8))
    group.create_array("level1", data=values[::2, ::2, ::2], chunks=(8, 8, 8))
    return path


INPUTS = {
    "zarr v2": lambda path, v: write_zarr(path / "in.zarr", v, (8, 5, 7), zarr_format=2),
    "zarr v3": lambda path, v: write_zarr(path / "in.zarr", v, (8, 5, 7)),
    "sharded zarr v3": lambda path, v: write_zarr(
        path / "in.zarr", v, (4, 4, 4), shards=(12, 8, 8)
    ),
    "zarr v2 with slashes": lambda path, v: write_zarr(
        path / "in.zarr",
        v,
        (8, 8, 8),
        zarr_format=2,
        chunk_key_encoding={"name": "v2", "separator": "/"},
    ),
    "ome-zarr 0.5": lambda path, v: write_ome(path / "in.zarr", v, "0.5"),
    "ome-zarr 0.4": lambda path, v: write_ome(path / "in.zarr", v, "0.4"),
    "a path inside a group": lambda path, v: write_ome(path / "in.zarr", v, "0.5") / "level0",
    "npy": lambda path, v: _npy(path / "in.npy", v),
}


def _npy(path: Path, values: npt.NDArray[Any]) -> Path:
    np.save(path, values)
    return path


@pytest.mark.parametrize("form", INPUTS)
def test_the_output_for_every_input_format_equals_the_reference(tmp_path: Path, form: str) -> None:
    values = random_volume(SHAPE)
    check(tmp_path, INPUTS[form](tmp_path, values), values)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64", "bool"])
def test_the_output_for_every_input_dtype_equals_the_reference(tmp_path: Path, dtype: str) -> None:
    values = random_volume((20, 17), dtype)
    if dtype == "int16":
        values = -values
    check(tmp_path, write_zarr(tmp_path / "in.zarr", values, (8, 8)), values)


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f4"])
@pytest.mark.parametrize("form", ["npy", "zarr v2", "zarr v3"])
def test_big_endian_input_is_read_correctly(tmp_path: Path, dtype: str, form: str) -> None:
    values = random_volume((20, 17), dtype)
    if form == "npy":
        source = _npy(tmp_path / "in.npy", values)
    elif form == "zarr v2":
        source = write_zarr(tmp_path / "in.zarr", values, (8, 8), zarr_format=2)
    else:
        from zarr.codecs import BytesCodec

        native = values.astype(values.dtype.newbyteorder("="))
        source = write_zarr(
            tmp_path / "in.zarr", native, (8, 8), serializer=BytesCodec(endian="big")
        )
    check(tmp_path, source, values.astype(values.dtype.newbyteorder("=")), pad=3)


class Marker:
    """Object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("key", ["filters", "compressor"])
@pytest.mark.parametrize("node", ["array", "image"])
def test_an_input_with_a_codec_that_can_run_code_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, node: str
) -> None:
    # Older releases of numcodecs always unpickle.
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    folder = tmp_path / "in.zarr"
    folder.mkdir()
    path = folder / "0" if node == "image" else folder
    write_zarr(path, random_volume((8,), "float32"), zarr_format=2, compressors=None)
    metadata = json.loads((path / ".zarray").read_text())
    metadata |= {"dtype": "|O", "filters": [{"id": "vlen-utf8"}]}
    if key == "compressor":
        metadata["compressor"] = {"id": "pickle"}
    else:
        metadata["filters"].append({"id": "pickle"})
    (path / ".zarray").write_text(json.dumps(metadata))
    (path / "0").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    if node == "image":
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text('{"multiscales": [{"datasets": [{"path": "0"}]}]}')
    with pytest.raises(ChunkqError) as error:
        find_source(str(folder)).open().read(Box((0,), (8,)))
    assert not (tmp_path / "ran").exists()
    assert error.value.code == ErrorCode.CODEC_UNSAFE


@pytest.mark.parametrize("shape", [(50,), (20, 17), (9, 10, 8, 9)])
def test_the_output_of_volumes_with_one_two_and_four_axes_equals_the_reference(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    values = random_volume(shape)
    check(tmp_path, write_zarr(tmp_path / "in.zarr", values), values)


def test_missing_storage_chunks_of_an_input_are_read_as_the_fill_value(tmp_path: Path) -> None:
    values = random_volume((20, 17))
    source = write_zarr(tmp_path / "in.zarr", values, (8, 8), fill_value=42)
    for chunk in ("c/0/0", "c/1/2"):
        (source / chunk).unlink()
    values[:8, :8] = values[8:16, 16:] = 42
    check(tmp_path, source, values)


def test_a_missing_shard_of_an_input_is_read_as_the_fill_value(tmp_path: Path) -> None:
    values = random_volume((20, 17))
    source = write_zarr(tmp_path / "in.zarr", values, (4, 4), shards=(8, 8), fill_value=7)
    (source / "c/1/0").unlink()
    values[8:16, :8] = 7
    check(tmp_path, source, values)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_level_0_of_an_image_is_the_input_with_its_scale_and_units(
    tmp_path: Path, version: str
) -> None:
    source = find_source(str(write_ome(tmp_path / "in.zarr", random_volume(SHAPE), version)))
    assert source.path.endswith("in.zarr/level0")
    assert source.shape == SHAPE
    assert [axis.name for axis in source.axes] == ["z", "y", "x"]
    assert [axis.scale for axis in source.axes] == SPACE["scale"]
    assert [axis.translation for axis in source.axes] == SPACE["translation"]
    assert [axis.unit for axis in source.axes] == SPACE["units"]


def output_of(folder: Path, source: str | Path, rank: int = 3, **more: Any) -> Path:
    job, _ = run_inline(job_over(folder, source, rank, **more))
    return Path(job.folder.output)


def read_with_tensorstore(output: Path, driver: str) -> npt.NDArray[Any]:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{output}/0/"}}
    return np.asarray(ts.open(spec, open=True).result().read().result())


def test_a_zarr_v3_output_is_an_ome_zarr_0_5_image_with_the_space_of_the_input(
    tmp_path: Path,
) -> None:
    source = write_ome(tmp_path / "in.zarr", random_volume(SHAPE), "0.4")
    output = output_of(tmp_path, source, combine="soft")
    metadata = json.loads((output / "zarr.json").read_text())
    assert metadata["zarr_format"] == 3
    assert metadata["node_type"] == "group"
    assert metadata["attributes"]["ome"] == {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [
                    {"name": "z", "type": "space", "unit": "micrometer"},
                    {"name": "y", "type": "space", "unit": "micrometer"},
                    {"name": "x", "type": "space"},
                ],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": SPACE["scale"]},
                            {"type": "translation", "translation": SPACE["translation"]},
                        ],
                    }
                ],
            }
        ],
        "image-label": {
            "version": "0.5",
            "colors": [
                {"label-value": 0, "rgba": [0, 0, 0, 0]},
                {"label-value": 1, "rgba": [31, 119, 180, 255]},
                {"label-value": 2, "rgba": [255, 127, 14, 255]},
            ],
        },
    }
    array = json.loads((output / "0" / "zarr.json").read_text())
    assert array["dimension_names"] == ["z", "y", "x"]
    assert array["data_type"] == "uint8"
    labels = read_output(output)
    truth = expected(random_volume(SHAPE), "soft")
    is_clear = truth.margin_of_decision > 1e-5
    np.testing.assert_array_equal(labels[is_clear], truth.labels[is_clear])
    np.testing.assert_array_equal(read_with_tensorstore(output, "zarr3"), labels)


def test_a_zarr_v2_output_is_an_ome_zarr_0_4_image_with_the_space_of_the_input(
    tmp_path: Path,
) -> None:
    source = write_ome(tmp_path / "in.zarr", random_volume(SHAPE), "0.5")
    output = output_of(tmp_path, source, zarr_format=2)
    assert json.loads((output / ".zgroup").read_text()) == {"zarr_format": 2}
    [image] = json.loads((output / ".zattrs").read_text())["multiscales"]
    assert image["version"] == "0.4"
    assert image["axes"] == [
        {"name": "c", "type": "channel"},
        {"name": "z", "type": "space", "unit": "micrometer"},
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space"},
    ]
    [level] = image["datasets"]
    assert level["path"] == "0"
    assert level["coordinateTransformations"] == [
        {"type": "scale", "scale": [1.0, *SPACE["scale"]]},
        {"type": "translation", "translation": [0.0, *SPACE["translation"]]},
    ]
    array = json.loads((output / "0" / ".zarray").read_text())
    assert array["dimension_separator"] == "/"
    assert array["chunks"] == [1, 4, 4, 4]
    scores = read_output(output)
    np.testing.assert_allclose(scores, expected(random_volume(SHAPE)).average, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(read_with_tensorstore(output, "zarr"), scores)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_float16_output_is_the_average_rounded_once(tmp_path: Path, zarr_format: int) -> None:
    values = random_volume((20, 17))
    source = write_zarr(tmp_path / "in.zarr", values)
    output = output_of(
        tmp_path, source, 2, output_dtype="float16", zarr_format=zarr_format, chunksize=[8, 12]
    )
    scores = read_output(output)
    assert scores.dtype == np.float16
    truth = expected(values).average
    np.testing.assert_allclose(scores, truth, rtol=2**-11, atol=1e-5)
    driver = "zarr3" if zarr_format == 3 else "zarr"
    np.testing.assert_array_equal(read_with_tensorstore(output, driver), scores)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_the_output_of_a_volume_with_one_axis_has_no_image_metadata(
    tmp_path: Path, zarr_format: int
) -> None:
    source = write_zarr(tmp_path / "in.zarr", random_volume((50,)))
    output = output_of(tmp_path, source, 1, zarr_format=zarr_format)
    attributes = dict(zarr.open_group(output, mode="r").attrs)
    assert set(attributes) == {"chunkq"}
    assert attributes["chunkq"]["state"] == "complete"


@pytest.mark.parametrize(
    ("combine", "zarr_format"), list(itertools.product(["weighted_avg", "soft"], [2, 3]))
)
def test_the_output_has_the_planned_shape_dtype_and_chunks(
    tmp_path: Path, combine: str, zarr_format: int
) -> None:
    source = write_zarr(tmp_path / "in.zarr", random_volume((20, 17)))
    values = job_over(tmp_path, source, 2, combine=combine, zarr_format=zarr_format)
    workspace = Workspace(tmp_path, values)
    job = workspace.write_job()
    plan = json.loads(workspace.call("plan", job, "--json").ok().out)
    workspace.call("produce", job).ok()
    assert not (workspace.output / "0").exists()
    array = zarr.open(workspace.output / workspace.job.record.array, mode="r")
    assert list(array.shape) == plan["output_shape"]
    assert str(array.dtype) == plan["output_dtype"]
    channels = [1] if combine == "weighted_avg" else []
    assert list(array.chunks) == [*channels, *plan["storage_chunks"]]


def test_a_sealed_job_has_no_partial_files_and_no_pieces(tmp_path: Path) -> None:
    source = write_zarr(tmp_path / "in.zarr", random_volume((20, 17)))
    output = output_of(tmp_path, source, 2)
    assert {path.name for path in output.iterdir()} == {"zarr.json", "0"}
    files = [*files_below(output), *files_below(Path(f"{output}.chunkq"))]
    assert not [name for name in files if "partial" in name or "pieces" in name]


PUT_FOREVER = """
import sys
from chunkq.storage.objects import ObjectFolder

folder, content = ObjectFolder(sys.argv[1]), bytes(range(256)) * (1 << 16)
for _ in iter(int, 1):
    folder.put("pieces/thing", content)
"""


def test_a_writer_killed_while_it_writes_leaves_no_incomplete_and_no_listed_object(
    tmp_path: Path,
) -> None:
    content = bytes(range(256)) * (1 << 16)
    folder = ObjectFolder(str(tmp_path))
    partial_files: list[Path] = []
    for _ in range(20):
        writer = subprocess.Popen([sys.executable, "-c", PUT_FOREVER, str(tmp_path)])
        try:
            # Kill the process while a partial file exists, that is while it writes.
            wait_until(lambda: list(tmp_path.glob(f"{PARTIAL}*")), "a partial file exists")
        finally:
            writer.kill()
            writer.wait()
        assert folder.get("pieces/thing") in (None, content)
        assert [info.name for info in folder.list("pieces")] in ([], ["thing"])
        partial_files = list(tmp_path.glob(f"{PARTIAL}*"))
        if partial_files:
            assert not list(folder.list(""))
            break
    assert partial_files, "no writer was killed while it wrote"


def test_put_new_keeps_the_object_of_the_first_writer(tmp_path: Path) -> None:
    folder = ObjectFolder(str(tmp_path))
    for content in (b"first", b"second"):
        folder.put_new("done/infer/0.0", content)
    assert folder.get("done/infer/0.0") == b"first"
    assert not list(tmp_path.glob(f"{PARTIAL}*"))


def test_a_failed_write_deletes_its_partial_file(tmp_path: Path) -> None:
    folder = ObjectFolder(str(tmp_path))
    (tmp_path / "done" / "name").mkdir(parents=True)
    with pytest.raises(OSError, match="name"):
        folder.put("done/name", b"content")
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["name"]


def test_objects_at_a_url_are_read_listed_and_deleted_like_local_ones(tmp_path: Path) -> None:
    for root in (str(tmp_path / "objects"), "memory://objects"):
        folder = ObjectFolder(root)
        assert list(folder.list("done")) == []
        assert folder.get("done/a") is None
        assert not folder.exists("done/a")
        before = time.time()
        for name in ("done/a", "done/b", "done/deeper/c"):
            folder.put(name, name.encode())
        modified = {info.name: info.modified for info in folder.list("done")}
        assert set(modified) == {"a", "b"}
        assert all(before - 2 < seconds < time.time() + 2 for seconds in modified.values())
        assert folder.get("done/a") == b"done/a"
        assert folder.get_many(["done/a", "done/none", "done/b"]) == {
            "done/a": b"done/a",
            "done/b": b"done/b",
        }
        assert folder.get_many(["done/a"]) == {"done/a": b"done/a"}
        assert folder.get_many(["done/none"]) == {}
        assert folder.get_many([]) == {}
        folder.delete("done/a")
        folder.delete("done/a")
        assert not folder.exists("done/a")
        folder.delete_folder("done")
        folder.delete_folder("done")
        assert list(folder.list("done")) == []
        folder.delete_folder()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_input_output_and_job_folder_may_have_a_url_that_only_fsspec_supports(
    tmp_path: Path, zarr_format: int
) -> None:
    root = f"memory://{tmp_path.name}{zarr_format}"
    values = random_volume((20, 17))
    array = zarr.create_array(f"{root}/in.zarr", shape=(20, 17), chunks=(8, 8), dtype="uint8")
    array[...] = values
    local = write_zarr(tmp_path / "in.zarr", values, (8, 8))
    more = {"zarr_format": zarr_format, "combine": "soft"}
    remote_job, report = run_inline(
        job_over(tmp_path, f"{root}/in.zarr", 2, output=f"{root}/out.zarr", **more)
    )
    local_job, _ = run_inline(job_over(tmp_path, local, 2, **more))
    assert isinstance(remote_job.items[0].sources[0], ZarrPythonArray)
    assert isinstance(local_job.items[0].sources[0], TensorStoreArray)
    assert report["missing"] == []
    np.testing.assert_array_equal(
        read_output(remote_job.folder.output), read_output(local_job.folder.output)
    )
    filesystem = fsspec.filesystem("memory")
    files = filesystem.find(f"/{tmp_path.name}{zarr_format}/out.zarr.chunkq")
    assert not [name for name in files if "pieces" in name]
    assert finalize_job(open_job(remote_job.folder.path), worker="again") == report
    filesystem.rm(f"/{tmp_path.name}{zarr_format}", recursive=True)


def test_tensorstore_and_zarr_python_read_and_write_the_same_box(tmp_path: Path) -> None:
    values = random_volume((20, 17), "float32")
    path = str(write_zarr(tmp_path / "in.zarr", values, (8, 8)))
    box = Box((3, 5), (14, 16))
    array = ZarrFormat().open_for_writing(path, {"zarr_format": 3})
    zarr_array = ZarrPythonArray(path, zarr.open_array(path))
    np.testing.assert_array_equal(array.read(box), values[3:14, 5:16])
    np.testing.assert_array_equal(zarr_array.read(box), values[3:14, 5:16])
    block = Box((8, 8), (16, 16))
    array.write(block, values[:8, :8])
    np.testing.assert_array_equal(zarr_array.read(block), values[:8, :8])


@pytest.mark.parametrize("form", ["zarr v2", "zarr v3"])
def test_the_error_for_a_truncated_input_has_the_voxels(tmp_path: Path, form: str) -> None:
    source = INPUTS[form](tmp_path, random_volume(SHAPE))
    file = source / {"zarr v2": "0.0.0", "zarr v3": "c/0/0/0"}[form]
    file.write_bytes(file.read_bytes()[:-30])
    array = find_source(str(source)).open()
    with pytest.raises(ChunkReadError, match=r"\[0, 0, 0\] to \[13, 10, 11\]") as error:
        array.read(Box.of_shape(SHAPE))
    assert error.value.code is ErrorCode.INPUT_UNREADABLE
    assert str(source) in str(error.value)


def test_npy_files_at_a_url_are_read_in_ranges_with_the_same_voxels(tmp_path: Path) -> None:
    values = random_volume(SHAPE, ">i2")
    local = _npy(tmp_path / "in.npy", values)
    url = f"memory://{tmp_path.name}/in.npy"
    with fsspec.open(url, "wb") as file:
        file.write(local.read_bytes())
    box = Box((3, 2, 5), (11, 10, 9))
    for path in (str(local), url):
        np.testing.assert_array_equal(find_source(path).open().read(box), values[3:11, 2:10, 5:9])
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
