"""Inputs of every form, outputs in both formats, and objects that appear whole or not at all."""

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

from chunkq.box import Box
from chunkq.errors import ChunkqError, ChunkReadError, ErrorCode
from chunkq.finalize import finalize_job
from chunkq.job_handle import open_job
from chunkq.objects import PARTIAL, ObjectFolder
from chunkq.stores import TensorStoreArray, ZarrPythonArray, find_source, open_array
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
    """A job with overlap over chunk borders: uneven shapes, gaussian weights, four channels."""
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
        lambda given, start: network(given / 100.0, start),
        combine,
        "weight_gaussian",
    )


def check(folder: Path, source: str | Path, values: npt.NDArray[Any], pad: int = 0) -> None:
    """Run the job and compare with the reference over `values`."""
    opened, _ = run_inline(job_over(folder, source, values.ndim, pad_width=[pad] * values.ndim))
    found = read_output(opened.folder.output)
    np.testing.assert_allclose(found, expected(values, pad=pad).average, rtol=0, atol=1e-5)


def write_ome(path: Path, values: npt.NDArray[Any], version: str) -> Path:
    """An OME-Zarr image with two levels; only level 0 holds `values`."""
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
def test_an_input_of_this_form_gives_the_volume_of_the_reference(tmp_path: Path, form: str) -> None:
    values = random_volume(SHAPE)
    check(tmp_path, INPUTS[form](tmp_path, values), values)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64", "bool"])
def test_an_input_of_this_dtype_gives_the_volume_of_the_reference(
    tmp_path: Path, dtype: str
) -> None:
    values = random_volume((20, 17), dtype)
    if dtype == "int16":
        values = -values
    check(tmp_path, write_zarr(tmp_path / "in.zarr", values, (8, 8)), values)


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f4"])
@pytest.mark.parametrize("form", ["npy", "zarr v2", "zarr v3"])
def test_big_endian_input_is_read_as_the_numbers_it_holds(
    tmp_path: Path, dtype: str, form: str
) -> None:
    values = random_volume((20, 17), dtype)
    if form == "npy":
        source = _npy(tmp_path / "in.npy", values)
    elif form == "zarr v2":
        source = write_zarr(tmp_path / "in.zarr", values, (8, 8), zarr_format=2)
    else:
        from zarr.codecs import BytesCodec

        plain = values.astype(values.dtype.newbyteorder("="))
        source = write_zarr(
            tmp_path / "in.zarr", plain, (8, 8), serializer=BytesCodec(endian="big")
        )
    check(tmp_path, source, values.astype(values.dtype.newbyteorder("=")), pad=3)


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("key", ["filters", "compressor"])
@pytest.mark.parametrize("place", ["array", "image"])
def test_an_input_whose_voxels_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, place: str
) -> None:
    # Older numcodecs always unpickle.
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    folder = tmp_path / "in.zarr"
    folder.mkdir()
    path = folder / "0" if place == "image" else folder
    write_zarr(path, random_volume((8,), "float32"), zarr_format=2, compressors=None)
    described = json.loads((path / ".zarray").read_text())
    described |= {"dtype": "|O", "filters": [{"id": "vlen-utf8"}]}
    if key == "compressor":
        described["compressor"] = {"id": "pickle"}
    else:
        described["filters"].append({"id": "pickle"})
    (path / ".zarray").write_text(json.dumps(described))
    (path / "0").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    if place == "image":
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text('{"multiscales": [{"datasets": [{"path": "0"}]}]}')
    with pytest.raises(ChunkqError) as refusal:
        open_array(find_source(str(folder)).array_path).read(Box((0,), (8,)))
    assert not (tmp_path / "ran").exists()
    assert refusal.value.code == ErrorCode.CODEC_UNSAFE


@pytest.mark.parametrize("shape", [(50,), (20, 17), (9, 10, 8, 9)])
def test_volumes_of_one_two_and_four_axes_give_the_volume_of_the_reference(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    values = random_volume(shape)
    check(tmp_path, write_zarr(tmp_path / "in.zarr", values), values)


def test_storage_chunks_that_an_input_does_not_store_are_its_fill_value(tmp_path: Path) -> None:
    values = random_volume((20, 17))
    source = write_zarr(tmp_path / "in.zarr", values, (8, 8), fill_value=42)
    for gone in ("c/0/0", "c/1/2"):
        (source / gone).unlink()
    values[:8, :8] = values[8:16, 16:] = 42
    check(tmp_path, source, values)


def test_a_missing_shard_is_the_fill_value_too(tmp_path: Path) -> None:
    values = random_volume((20, 17))
    source = write_zarr(tmp_path / "in.zarr", values, (4, 4), shards=(8, 8), fill_value=7)
    (source / "c/1/0").unlink()
    values[8:16, :8] = 7
    check(tmp_path, source, values)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_level_0_of_an_image_is_taken_with_its_scale_and_units(
    tmp_path: Path, version: str
) -> None:
    found = find_source(str(write_ome(tmp_path / "in.zarr", random_volume(SHAPE), version)))
    assert found.array_path.endswith("in.zarr/level0")
    assert found.volume.shape == SHAPE
    assert found.space.scale == tuple(SPACE["scale"])
    assert found.space.translation == tuple(SPACE["translation"])
    assert found.space.units == tuple(SPACE["units"])


def output_of(folder: Path, source: str | Path, rank: int = 3, **more: Any) -> Path:
    opened, _ = run_inline(job_over(folder, source, rank, **more))
    return Path(opened.folder.output)


def through_tensorstore(output: Path, driver: str) -> npt.NDArray[Any]:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{output}/0/"}}
    return np.asarray(ts.open(spec, open=True).result().read().result())


def test_a_zarr_v3_output_is_an_ome_zarr_0_5_image_in_the_inputs_space(tmp_path: Path) -> None:
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
    }
    array = json.loads((output / "0" / "zarr.json").read_text())
    assert array["dimension_names"] == ["z", "y", "x"]
    assert array["data_type"] == "uint8"
    found = read_output(output)
    truth = expected(random_volume(SHAPE), "soft")
    clear = truth.margin_of_decision > 1e-5
    np.testing.assert_array_equal(found[clear], truth.labels[clear])
    np.testing.assert_array_equal(through_tensorstore(output, "zarr3"), found)


def test_a_zarr_v2_output_is_an_ome_zarr_0_4_image_in_the_inputs_space(tmp_path: Path) -> None:
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
    found = read_output(output)
    np.testing.assert_allclose(found, expected(random_volume(SHAPE)).average, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(through_tensorstore(output, "zarr"), found)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_float16_output_is_the_average_rounded_once(tmp_path: Path, zarr_format: int) -> None:
    values = random_volume((20, 17))
    source = write_zarr(tmp_path / "in.zarr", values)
    output = output_of(
        tmp_path, source, 2, output_dtype="float16", zarr_format=zarr_format, chunksize=[8, 12]
    )
    found = read_output(output)
    assert found.dtype == np.float16
    truth = expected(values).average
    np.testing.assert_allclose(found, truth, rtol=2**-11, atol=1e-5)
    driver = "zarr3" if zarr_format == 3 else "zarr"
    np.testing.assert_array_equal(through_tensorstore(output, driver), found)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_volume_of_one_axis_gets_no_image_metadata(tmp_path: Path, zarr_format: int) -> None:
    source = write_zarr(tmp_path / "in.zarr", random_volume((50,)))
    output = output_of(tmp_path, source, 1, zarr_format=zarr_format)
    attributes = dict(zarr.open_group(output, mode="r").attrs)
    assert set(attributes) == {"chunkq"}
    assert attributes["chunkq"]["state"] == "complete"


@pytest.mark.parametrize(
    ("combine", "zarr_format"), list(itertools.product(["weighted_avg", "soft"], [2, 3]))
)
def test_the_output_has_the_shape_dtype_and_chunks_that_the_plan_foretells(
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


def test_nothing_a_sealed_job_leaves_is_a_partial_file_or_a_piece(tmp_path: Path) -> None:
    source = write_zarr(tmp_path / "in.zarr", random_volume((20, 17)))
    output = output_of(tmp_path, source, 2)
    assert {path.name for path in output.iterdir()} == {"zarr.json", "0"}
    left = [*files_below(output), *files_below(Path(f"{output}.chunkq"))]
    assert not [name for name in left if "partial" in name or "pieces" in name]


PUT_FOREVER = """
import sys
from chunkq.objects import ObjectFolder

folder, content = ObjectFolder(sys.argv[1]), bytes(range(256)) * (1 << 16)
for _ in iter(int, 1):
    folder.put("pieces/thing", content)
"""


def test_a_writer_killed_in_the_middle_leaves_no_torn_object_and_nothing_listed(
    tmp_path: Path,
) -> None:
    content = bytes(range(256)) * (1 << 16)
    folder = ObjectFolder(str(tmp_path))
    left: list[Path] = []
    for _ in range(20):
        writer = subprocess.Popen([sys.executable, "-c", PUT_FOREVER, str(tmp_path)])
        try:
            # Killed while a partial file is there to be seen, so in the middle of writing.
            wait_until(lambda: list(tmp_path.glob(f"{PARTIAL}*")), "it writes")
        finally:
            writer.kill()
            writer.wait()
        assert folder.get("pieces/thing") in (None, content)
        assert [found.name for found in folder.list("pieces")] in ([], ["thing"])
        left = list(tmp_path.glob(f"{PARTIAL}*"))
        if left:
            assert not list(folder.list(""))
            break
    assert left, "no writer was ever caught in the middle"


def test_of_several_writers_of_a_new_object_the_first_one_s_stays(tmp_path: Path) -> None:
    folder = ObjectFolder(str(tmp_path))
    for content in (b"first", b"second"):
        folder.put_new("done/infer/0.0", content)
    assert folder.get("done/infer/0.0") == b"first"
    assert not list(tmp_path.glob(f"{PARTIAL}*"))


def test_a_failed_write_takes_its_partial_file_away(tmp_path: Path) -> None:
    folder = ObjectFolder(str(tmp_path))
    (tmp_path / "done" / "name").mkdir(parents=True)
    with pytest.raises(OSError, match="name"):
        folder.put("done/name", b"content")
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["name"]


def test_objects_over_a_url_read_list_and_vanish_as_local_ones_do(tmp_path: Path) -> None:
    for root in (str(tmp_path / "objects"), "memory://objects"):
        folder = ObjectFolder(root)
        assert list(folder.list("done")) == []
        assert folder.get("done/a") is None
        assert not folder.exists("done/a")
        before = time.time()
        for name in ("done/a", "done/b", "done/deeper/c"):
            folder.put(name, name.encode())
        found = {entry.name: entry.modified for entry in folder.list("done")}
        assert set(found) == {"a", "b"}
        assert all(before - 2 < moment < time.time() + 2 for moment in found.values())
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
def test_ledger_input_and_output_may_lie_behind_a_url_that_only_fsspec_knows(
    tmp_path: Path, zarr_format: int
) -> None:
    root = f"memory://{tmp_path.name}{zarr_format}"
    values = random_volume((20, 17))
    array = zarr.create_array(f"{root}/in.zarr", shape=(20, 17), chunks=(8, 8), dtype="uint8")
    array[...] = values
    local = write_zarr(tmp_path / "in.zarr", values, (8, 8))
    more = {"zarr_format": zarr_format, "combine": "soft"}
    there, report = run_inline(
        job_over(tmp_path, f"{root}/in.zarr", 2, output=f"{root}/out.zarr", **more)
    )
    here, _ = run_inline(job_over(tmp_path, local, 2, **more))
    assert isinstance(there.sources[0], ZarrPythonArray)
    assert isinstance(here.sources[0], TensorStoreArray)
    assert report["missing"] == []
    np.testing.assert_array_equal(read_output(there.folder.output), read_output(here.folder.output))
    filesystem = fsspec.filesystem("memory")
    inside = filesystem.find(f"/{tmp_path.name}{zarr_format}/out.zarr.chunkq")
    assert not [name for name in inside if "pieces" in name]
    again = finalize_job(open_job(there.folder.path), worker="again")
    assert again == report
    filesystem.rm(f"/{tmp_path.name}{zarr_format}", recursive=True)


def test_reading_and_writing_a_box_agree_through_both_libraries(tmp_path: Path) -> None:
    values = random_volume((20, 17), "float32")
    path = str(write_zarr(tmp_path / "in.zarr", values, (8, 8)))
    box = Box((3, 5), (14, 16))
    fast, plain = open_array(path, write=True), ZarrPythonArray(path, zarr.open_array(path))
    assert isinstance(fast, TensorStoreArray)
    np.testing.assert_array_equal(fast.read(box), values[3:14, 5:16])
    np.testing.assert_array_equal(plain.read(box), values[3:14, 5:16])
    block = Box((8, 8), (16, 16))
    fast.write(block, values[:8, :8])
    np.testing.assert_array_equal(plain.read(block), values[:8, :8])


@pytest.mark.parametrize("form", ["zarr v2", "zarr v3", "npy"])
def test_an_input_cut_short_on_disk_is_an_error_that_names_the_voxels(
    tmp_path: Path, form: str
) -> None:
    source = INPUTS[form](tmp_path, random_volume(SHAPE))
    broken = {"zarr v2": "0.0.0", "zarr v3": "c/0/0/0", "npy": ""}[form]
    file = source / broken if broken else source
    file.write_bytes(file.read_bytes()[:-30])
    array = open_array(str(source))
    with pytest.raises(ChunkReadError, match=r"voxels \[0, 0, 0\] to \[13, 10, 11\]"):
        array.read(Box.of_shape(SHAPE))


def test_npy_files_behind_a_url_are_read_in_ranges_with_the_same_voxels(tmp_path: Path) -> None:
    values = random_volume(SHAPE, ">i2")
    local = _npy(tmp_path / "in.npy", values)
    url = f"memory://{tmp_path.name}/in.npy"
    with fsspec.open(url, "wb") as file:
        file.write(local.read_bytes())
    box = Box((3, 2, 5), (11, 10, 9))
    for path in (str(local), url):
        np.testing.assert_array_equal(open_array(path).read(box), values[3:11, 2:10, 5:9])
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
