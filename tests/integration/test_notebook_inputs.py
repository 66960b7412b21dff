"""Arrays and images of other packages as inputs: voxels, regions read, axes of the result."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import h5py
import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import tifffile
import torch
import xarray
import zarr

import chunkq
from chunkq.errors import ChunkReadError, ErrorCode, JobError, StoreError
from chunkq.storage.formats.tiff_pages import PagesArray
from tests.harness.volumes import random_volume, read_output, write_zarr

SHAPE = (13, 9, 15)
AFFINE = np.array([[0, -2.0, 0, 10], [0.5, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])


def net(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([batch, 50 - batch], axis=1)


def create_predictor(**keys: Any) -> chunkq.Predictor:
    shapes = {"model_input_shape": [1, 4, 4, 4], "model_output_shape": [2, 4, 4, 4]}
    return chunkq.Predictor.from_model(net, **shapes, **({"chunksize": [4, 4, 4]} | keys))


def volume() -> npt.NDArray[Any]:
    return random_volume(SHAPE, "int16")


def as_dask(_: Path) -> Any:
    return dask.array.from_array(volume(), chunks=(5, 5, 5))


def as_data_array(_: Path) -> Any:
    coords = {
        "z": ("z", 1 + 0.5 * np.arange(13), {"units": "um"}),
        "x": 10 + 2 * np.arange(15),
        "slice": ("z", np.arange(13)),
    }
    values = volume()[None, :, :, :, None]
    return xarray.DataArray(values, dims=("time", "z", "y", "x", "channel"), coords=coords)


def as_data_array_of_dask(folder: Path) -> Any:
    return xarray.DataArray(as_dask(folder), dims=("z", "y", "x"))


def as_data_array_of_a_file(folder: Path) -> Any:
    write_zarr(folder / "set.zarr" / "a", volume(), dimension_names=("z", "y", "x"))
    zarr.open_group(folder / "set.zarr")
    return xarray.open_zarr(folder / "set.zarr", chunks=None, consolidated=False)["a"]


def as_h5py(folder: Path) -> Any:
    file = h5py.File(folder / "v.h5", "w")
    return file.create_dataset("v", data=volume().astype(">i2"), chunks=(5, 5, 5))


def as_zarr(folder: Path) -> Any:
    path = write_zarr(folder / "v.zarr", volume()[None], dimension_names=("c", "z", "y", "x"))
    return zarr.open_array(path, mode="r")


def as_tensorstore(folder: Path) -> Any:
    path = write_zarr(folder / "t.zarr", volume())
    spec = {"driver": "zarr3", "kvstore": f"file://{path}/"}
    return tensorstore.open(spec).result().translate_to[7, 8, 9]


def as_shifted_tensorstore(_: Path) -> Any:
    store = tensorstore.array(volume()[..., None])
    return store[tensorstore.d[:].label["x", "y", "z", "channel"]].translate_to[-5, 3, 100, 0]


def as_nibabel(_: Path) -> Any:
    return nibabel.Nifti1Image(volume()[..., None], AFFINE)


def as_nibabel_file(folder: Path, name: str = "v.nii") -> Any:
    image = nibabel.Nifti1Image(volume(), AFFINE)
    nibabel.save(image, folder / name)
    return nibabel.load(folder / name)


def as_compressed_nibabel_file(folder: Path) -> Any:
    return as_nibabel_file(folder, "v.nii.gz")


def tiff_path(folder: Path) -> str:
    path = folder / "v.ome.tif"
    metadata = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeZ": 3.0}
    tifffile.imwrite(path, volume(), metadata=metadata, tile=(16, 16), photometric="minisblack")
    return str(path)


OBJECTS: dict[str, Callable[[Path], Any]] = {
    "dask": as_dask,
    "DataArray": as_data_array,
    "DataArray of dask": as_data_array_of_dask,
    "DataArray of a file": as_data_array_of_a_file,
    "h5py": as_h5py,
    "zarr": as_zarr,
    "tensorstore": as_tensorstore,
    "shifted tensorstore": as_shifted_tensorstore,
    "nibabel": as_nibabel,
    "nibabel file": as_nibabel_file,
    "compressed nibabel file": as_compressed_nibabel_file,
    "TIFF path": tiff_path,
    "TiffFile": lambda folder: tifffile.TiffFile(tiff_path(folder)),
    "TIFF series": lambda folder: tifffile.TiffFile(tiff_path(folder)).series[0],
    "ZarrTiffStore": lambda folder: tifffile.imread(tiff_path(folder), aszarr=True),
    "tensor": lambda _: torch.from_numpy(volume()).requires_grad_(requires_grad=False),
    "gradient": lambda _: torch.from_numpy(volume().astype("f4")).requires_grad_(),
    "bfloat16": lambda _: torch.from_numpy(volume()).to(torch.bfloat16),
    "masked": lambda _: np.ma.masked_array(volume()),
    "memory map": lambda folder: np.load(saved(folder), mmap_mode="r"),
    "nested": lambda _: Nested(),
}


TIFF_OBJECTS = ("TiffFile", "TIFF series", "ZarrTiffStore")


def saved(folder: Path) -> Path:
    np.save(folder / "m.npy", volume())
    return folder / "m.npy"


class Nested:
    """Has only `__array__`."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return volume()


@pytest.mark.filterwarnings("ignore:.*rotates:chunkq.errors.PredictionWarning")
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_gives_the_bytes_of_its_voxels(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    value = OBJECTS[name](tmp_path / "in")
    with create_predictor(chunksize=[8, 8, 8]) as predictor:
        expected = predictor.predict(volume())
        prediction = predictor.predict(value)
        predictor.predict_to_store(value, tmp_path / "out.zarr")
    assert expected.probabilities is not None
    assert prediction.probabilities is not None
    assert prediction.probabilities.tobytes() == expected.probabilities.tobytes()
    assert read_output(tmp_path / "out.zarr").tobytes() == expected.probabilities.tobytes()
    np.testing.assert_array_equal(prediction.input, volume())
    assert prediction.input.dtype.isnative
    if name in TIFF_OBJECTS:
        getattr(value, "parent", value).close()


LAZY = ("dask", "DataArray of dask", "DataArray of a file", "zarr", "h5py", "tensorstore")


@pytest.mark.parametrize("name", [*LAZY, "nibabel file", "TIFF path"])
def test_what_is_not_in_memory_is_read_region_by_region(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chunkq_worker.input_objects import ObjectArray

    sizes: list[int] = []
    kind = PagesArray if name == "TIFF path" else ObjectArray
    read = kind.read

    def recorded(array: Any, box: Any) -> Any:
        sizes.append(box.size)
        return read(array, box)

    monkeypatch.setattr(kind, "read", recorded)
    value = OBJECTS[name](tmp_path)
    with create_predictor() as predictor:
        prediction = predictor.predict(value)
        assert max(sizes) < volume().size / 3
        converted = prediction.to("cpu").numpy()
        assert max(sizes) < volume().size / 3
    assert prediction.input.shape == converted.input.shape == SHAPE
    assert max(sizes) == volume().size


def test_dask_computes_only_the_chunks_of_a_region(tmp_path: Path) -> None:
    computed: list[tuple[int, ...]] = []

    def block(values: Any, block_info: Any = None) -> Any:
        if block_info:
            computed.append(tuple(block_info[0]["chunk-location"]))
        return values

    lazy = as_dask(tmp_path).map_blocks(block, dtype="int16")
    with create_predictor() as predictor:
        stream = predictor.predict_streaming(lazy)
        next(stream)
        stream.close()
    assert 0 < len(set(computed)) < 9  # of 18


# Axes


def test_the_affine_of_an_image_reaches_its_result(tmp_path: Path) -> None:
    image = as_nibabel(tmp_path)
    image.header.set_xyzt_units("mm")
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 2)
    with create_predictor() as predictor:
        prediction = predictor.predict(image)
        with pytest.warns(chunkq.PredictionWarning, match="rotates"):
            predictor.predict_to_store(image, tmp_path / "out.zarr")
    assert prediction.voxel_size == (0.5, 2.0, 3.0)
    assert "0.5 × 2 × 3 millimeter" in repr(prediction)
    result = prediction.to_nibabel()
    nibabel.save(result, tmp_path / "labels.nii.gz")
    loaded = nibabel.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(loaded.dataobj), prediction.labels)
    assert np.asanyarray(loaded.dataobj).dtype == np.uint8
    np.testing.assert_allclose(loaded.affine, AFFINE)
    header = loaded.header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 2)
    assert header.get_xyzt_units()[0] == "mm"
    channels = prediction.to_nibabel("probabilities")
    assert channels.shape == (*SHAPE, 1, 2)
    np.testing.assert_array_equal(channels.get_fdata()[..., 0, 1], prediction.probabilities[1])
    axes, scale = stored_axes(tmp_path / "out.zarr")
    assert scale == [1, 0.5, 2, 3]
    assert [axis["name"] for axis in axes] == ["c", "x", "y", "z"]
    assert axes[1]["unit"] == "millimeter"


def stored_axes(path: Path) -> tuple[list[dict[str, Any]], list[float]]:
    image = zarr.open_group(path, mode="r").attrs["ome"]["multiscales"][0]
    return image["axes"], image["datasets"][0]["coordinateTransformations"][0]["scale"]


def test_an_array_without_an_affine_needs_one_for_nibabel() -> None:
    with create_predictor() as predictor:
        prediction = predictor.predict(volume())
    with pytest.raises(chunkq.ChunkqError, match="affine="):
        prediction.to_nibabel()
    image = prediction.to_nibabel(affine=AFFINE)
    np.testing.assert_array_equal(image.affine, AFFINE)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), prediction.labels)
    with pytest.raises(chunkq.ChunkqError, match="4, 4"):
        prediction.to_nibabel(affine=np.eye(3))
    with pytest.raises(TypeError, match="probabilities"):
        prediction.to_nibabel("input")  # type: ignore[arg-type]


def test_a_scaled_image_is_read_with_its_scale(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume(), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, tmp_path / "s.nii")
    raw = nibabel.load(tmp_path / "s.nii")
    values = np.asanyarray(raw.dataobj)
    assert values.dtype == np.float64
    with create_predictor() as predictor:
        result, expected = predictor.predict(raw), predictor.predict(values)
    np.testing.assert_array_equal(result.probabilities, expected.probabilities)
    assert result.input.dtype == np.float64


def test_dimensions_and_coordinates_of_a_data_array_reach_its_result(tmp_path: Path) -> None:
    array = as_data_array(tmp_path)
    with create_predictor() as predictor:
        prediction = predictor.predict(array)
        predictor.predict_to_store(array, tmp_path / "out.zarr")
    labels = prediction.to_xarray()
    assert labels.dims == ("z", "y", "x")
    for name in ("z", "x", "slice"):
        np.testing.assert_array_equal(labels[name], array[name])
    assert prediction.to_xarray("probabilities").dims == ("c", "z", "y", "x")
    assert prediction.voxel_size == (0.5, 1.0, 2.0)
    axes, scale = stored_axes(tmp_path / "out.zarr")
    assert scale == [1, 0.5, 1, 2]
    assert axes[1] == {"name": "z", "type": "space", "unit": "micrometer"}
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    transformations = group.attrs["ome"]["multiscales"][0]["datasets"][0]
    translation = transformations["coordinateTransformations"][1]["translation"]
    assert translation == [0, 1, 0, 10]


def test_positions_of_an_image_become_coordinates(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume(), np.diag([1.0, 2, 3, 1]) + np.eye(4, k=3) * 7)
    with create_predictor() as predictor:
        labels = predictor.predict(image).to_xarray()
        plain = predictor.predict(volume()).to_xarray()
    np.testing.assert_array_equal(labels["x"], 7 + np.arange(13))
    np.testing.assert_array_equal(labels["z"], 3 * np.arange(15))
    assert plain.dims == ("z", "y", "x")


def stored_places(path: Path) -> tuple[list[float], list[float]]:
    """Return scale and translation of the spatial axes of an image."""
    (level,) = zarr.open_group(path, mode="r").attrs["ome"]["multiscales"][0]["datasets"]
    scale, *rest = level["coordinateTransformations"]
    translation = rest[0]["translation"] if rest else [0.0] * len(scale["scale"])
    return scale["scale"][-3:], translation[-3:]


def test_falling_coordinates_keep_the_position_of_every_voxel(tmp_path: Path) -> None:
    coords = {"z": 4 - 0.5 * np.arange(13), "y": 3.0 * np.arange(9), "x": -np.arange(15)}
    array = xarray.DataArray(volume(), dims=(*"zyx",), coords=coords)
    with create_predictor(combine="soft") as predictor:
        prediction = predictor.predict(array)
        predictor.predict_to_store(array, tmp_path / "out.zarr")
        again = predictor.predict(tmp_path / "out.zarr").to_xarray()
    assert stored_places(tmp_path / "out.zarr") == ([-0.5, 3, -1], [4, 0, 0])
    np.testing.assert_array_equal(read_output(tmp_path / "out.zarr"), prediction.labels)
    assert prediction.voxel_size == (0.5, 3, 1)
    for dim in "zyx":
        np.testing.assert_allclose(again[dim], array[dim])
        np.testing.assert_array_equal(prediction.to_xarray()[dim], array[dim])


def test_an_affine_without_rotation_keeps_the_position_of_every_voxel(tmp_path: Path) -> None:
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    affine[:3, 3] = 90, 126, -72
    affine[0, 1] = 1e-9  # a rounding error
    with create_predictor() as predictor:
        predictor.predict_to_store(nibabel.Nifti1Image(volume(), affine), tmp_path / "out.zarr")
    assert stored_places(tmp_path / "out.zarr") == ([-2, -2, 3], [90, 126, -72])


def test_positions_that_the_axes_cannot_hold_are_not_stored_and_are_a_warning(
    tmp_path: Path,
) -> None:
    z = xarray.DataArray(np.arange(13.0) ** 2, dims="z", attrs={"units": "um"})
    array = xarray.DataArray(volume(), dims=(*"zyx",), coords={"z": z, "x": np.arange(15) + 5})
    with create_predictor() as predictor:
        with pytest.warns(chunkq.PredictionWarning, match="along z"):
            predictor.predict_to_store(array, tmp_path / "out.zarr")
        predictor.predict_to_store(array, tmp_path / "out.zarr", overwrite=True)  # once
    assert stored_places(tmp_path / "out.zarr") == ([1, 1, 1], [0, 0, 5])
    axes, _ = stored_axes(tmp_path / "out.zarr")
    assert "unit" not in axes[1]
    with create_predictor() as predictor, pytest.warns(chunkq.PredictionWarning, match="affine"):
        predictor.predict_to_store(nibabel.Nifti1Image(volume(), AFFINE), tmp_path / "b.zarr")
    assert stored_places(tmp_path / "b.zarr") == ([0.5, 2, 3], [0, 0, 0])


def test_a_single_slice_keeps_its_position(tmp_path: Path) -> None:
    coords = {"z": [7.5], "y": np.arange(9), "x": np.arange(15)}
    array = xarray.DataArray(volume()[:1], dims=(*"zyx",), coords=coords)
    with create_predictor() as predictor:
        predictor.predict_to_store(array, tmp_path / "out.zarr")
    assert stored_places(tmp_path / "out.zarr") == ([1, 1, 1], [7.5, 0, 0])


def test_labels_and_voxel_sizes_of_a_dataset_are_those_of_its_axes(tmp_path: Path) -> None:
    file = h5py.File(tmp_path / "v.h5", "w")
    dataset = file.create_dataset("v", data=np.stack([volume()] * 2))
    for dim, label in zip(dataset.dims, "tzyx", strict=True):
        dim.label = label
    dataset.attrs["element_size_um"] = [3.0, 0.5, 0.25]
    with create_predictor(combine="soft") as predictor:
        prediction = predictor.predict(dataset)
        predictor.predict_to_store(dataset, tmp_path / "out.zarr")
    assert prediction.labels.shape == (2, *SHAPE)
    assert prediction.voxel_size == (3, 0.5, 0.25)
    assert stored_places(tmp_path / "out.zarr") == ([3, 0.5, 0.25], [0, 0, 0])
    file.close()


def test_a_zarr_level_has_the_axes_of_its_image(tmp_path: Path) -> None:
    image = xarray.DataArray(volume(), dims=(*"zyx",), coords={"z": 2.0 * np.arange(13) + 1})
    with create_predictor() as predictor:  # writes c, z, y, x
        predictor.predict_to_store(image, tmp_path / "in.zarr")
        level = zarr.open_group(tmp_path / "in.zarr", mode="r")["0"]
        expected = predictor.predict(level[1])
        shapes = {"model_input_shape": [2, 4, 4, 4], "model_output_shape": [1, 4, 4, 4]}
    with chunkq.Predictor.from_model(second_minus_first, **shapes) as predictor:
        prediction = predictor.predict(level)
    np.testing.assert_array_equal(prediction.input[1], expected.input)
    np.testing.assert_array_equal(prediction.to_xarray()["z"], image["z"])


def test_the_order_of_the_network_is_that_of_the_result(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("def net(batch): return batch * 1.0")
    model = {"runtime": "numpy", "type": "class", "class_name": "net"}
    model |= {"class_file": str(tmp_path / "net.py"), "model_input_shape": [1, 4, 5, 6]}
    values = {"input": {"path": "unused", "order": "zyx"}, "model_config": model}
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = 10, 20, 30
    image = nibabel.Nifti1Image(volume(), affine)
    array = xarray.DataArray(volume(), dims=(*"xyz",), coords={"x": 10 + 2.0 * np.arange(13)})
    with chunkq.Predictor.from_config(values) as predictor:
        result, from_array = predictor.predict(image), predictor.predict(array)
    np.testing.assert_array_equal(result.input, volume().transpose())
    back = result.to_nibabel("labels")
    point = back.affine @ [1, 2, 3, 1]  # z, y, x
    np.testing.assert_allclose(point, affine @ [3, 2, 1, 1])
    assert from_array.to_xarray().dims == ("z", "y", "x")
    np.testing.assert_array_equal(from_array.to_xarray()["x"], array["x"])


IRREGULAR = {
    "gaps": np.array([0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]),
    "names": np.array([*"abcdefghijklm"]),
    "dates": np.arange(13).astype("datetime64[D]"),
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_coordinates_without_a_step_have_no_voxel_size(name: str) -> None:
    array = xarray.DataArray(volume(), dims=("z", "y", "x"), coords={"z": IRREGULAR[name]})
    with create_predictor() as predictor:
        prediction = predictor.predict(array)
    assert prediction.voxel_size == (1, 1, 1)
    np.testing.assert_array_equal(prediction.to_xarray()["z"], array["z"])


def test_voxel_sizes_of_a_tiff_are_those_of_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "i.tif"
    tifffile.imwrite(
        path,
        volume(),
        imagej=True,
        resolution=(4.0, 2.0),
        metadata={"spacing": 3, "unit": "um", "axes": "ZYX"},
    )
    with create_predictor() as predictor:
        ome, imagej = predictor.predict(tiff_path(tmp_path)), predictor.predict(path)
    assert ome.voxel_size == (3.0, 1.0, 0.5)
    assert imagej.voxel_size == (3.0, 0.5, 0.25)
    assert imagej.geometry.axes[0].unit == ome.geometry.axes[0].unit == "micrometer"


# Errors

MANY: dict[str, Callable[[Path], Any]] = {
    "channels": lambda _: xarray.DataArray(np.zeros((2, *SHAPE)), dims=("channel", *"zyx")),
    "time": lambda _: xarray.DataArray(np.zeros((*SHAPE, 3)), dims=(*"zyx", "t")),
    "volumes": lambda _: nibabel.Nifti1Image(np.zeros((*SHAPE, 4), "f4"), AFFINE),
    "labels": lambda _: tensorstore.array(np.zeros((2, *SHAPE)))[
        tensorstore.d[:].label["c", "z", "y", "x"]
    ],
    "labelled dataset": lambda folder: labelled_dataset(folder, np.zeros((2, *SHAPE)), "czyx"),
    "names": lambda folder: zarr.open_array(
        write_zarr(folder / "n.zarr", np.zeros((2, *SHAPE)), dimension_names=("c", *"zyx"))
    ),
    "pages": lambda folder: tiff_of(folder, np.zeros((2, *SHAPE), "u1"), "CZYX"),
    "colors": lambda folder: tiff_of(folder, np.zeros((*SHAPE, 3), "u1"), "ZYXS"),
}


def labelled_dataset(folder: Path, values: npt.NDArray[Any], labels: str) -> h5py.Dataset:
    dataset = h5py.File(folder / "labels.h5", "w").create_dataset("a", data=values)
    for dimension, label in zip(dataset.dims, labels, strict=True):
        dimension.label = label
    return dataset


def tiff_of(folder: Path, values: npt.NDArray[Any], axes: str) -> str:
    path = folder / "many.ome.tif"
    tifffile.imwrite(path, values, metadata={"axes": axes}, ome=True)
    return str(path)


CHANNELS = [name for name in MANY if name not in ("time", "volumes")]


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_of_which_the_network_returns_several_are_refused(
    name: str, tmp_path: Path
) -> None:
    with create_predictor() as predictor, pytest.raises(JobError) as caught:
        predictor.predict(MANY[name](tmp_path))
    assert caught.value.code is ErrorCode.JOB_INVALID
    [line] = caught.value.problems
    assert line.startswith("input: ")
    assert "channels=" in line
    assert " in input" not in line


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_that_the_network_does_not_take_are_refused(name: str, tmp_path: Path) -> None:
    shapes = {"model_input_shape": [5, 4, 4, 4], "model_output_shape": [2, 4, 4, 4]}
    predictor = chunkq.Predictor.from_model(net, **shapes)
    with predictor, pytest.raises(JobError) as caught:
        predictor.predict(MANY[name](tmp_path))
    assert caught.value.code is ErrorCode.JOB_INVALID
    [line] = caught.value.problems
    assert line.startswith("model_config.model_input_shape: ")
    assert "axes=" in line
    assert " in input" not in line


def second_minus_first(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return batch[:, 1:] - batch[:, :1]


def test_a_predictor_reads_what_the_input_of_its_job_selects(tmp_path: Path) -> None:
    values = np.stack([volume(), volume()[::-1]])
    path = write_zarr(tmp_path / "in.zarr", values, dimension_names=("c", *"zyx"))
    (tmp_path / "net.py").write_text("def net(batch): return batch[:, 1:] - 1.0 * batch[:, :1]")
    model = {"runtime": "numpy", "type": "class", "class_name": "net"}
    model |= {"class_file": str(tmp_path / "net.py"), "max_batch_size": 4}
    model |= {"model_input_shape": [2, 8, 8, 8], "model_output_shape": [1, 8, 8, 8]}
    mapping = {"path": str(path), "channels": [1, 0]}
    with chunkq.Predictor.from_config({"input": mapping, "model_config": model}) as predictor:
        result = predictor.predict(path)
        predictor.predict_to_store(path, tmp_path / "out.zarr")
    expected = values[0].astype(np.float32) - values[1]
    np.testing.assert_array_equal(result.probabilities[0], expected)
    stored = zarr.open_array(tmp_path / "out.zarr" / "0", mode="r")[:]
    np.testing.assert_array_equal(stored.reshape(SHAPE), expected)
    with pytest.raises(JobError) as caught:
        chunkq.Predictor.from_config({"input": [mapping, mapping], "model_config": model})
    assert caught.value.code is ErrorCode.JOB_INVALID


def test_channels_that_an_object_names_feed_the_network(tmp_path: Path) -> None:
    values = np.stack([volume(), volume()[::-1]], -1).astype(np.int16)
    named = xarray.DataArray(values, dims=(*"zyx", "channel"))
    shapes = {"model_input_shape": [2, 8, 8, 8], "model_output_shape": [1, 8, 8, 8]}
    keys = {**shapes, "combine": "weighted_avg", "inference_type": "patch"}
    with chunkq.Predictor.from_model(second_minus_first, **keys) as predictor:
        result = predictor.predict(named)
        report = predictor.predict_to_store(named, tmp_path / "out.zarr")
    expected = values[..., 1].astype(np.float32) - values[..., 0]
    np.testing.assert_array_equal(result.probabilities[0], expected)
    assert result.input.shape == (2, *SHAPE)
    stored = zarr.open_array(tmp_path / "out.zarr" / "0", mode="r")[:]
    np.testing.assert_array_equal(stored.reshape(SHAPE), expected)
    assert report["patches"] > 0


def test_channels_of_a_data_array_are_selected_by_their_names(tmp_path: Path) -> None:
    values = np.stack([volume(), volume()[::-1]]).astype(np.int16)
    named = xarray.DataArray(values, dims=(*"czyx",), coords={"c": ["DAPI", "GFP"]})
    shapes = {"model_input_shape": [2, 8, 8, 8], "model_output_shape": [1, 8, 8, 8]}
    keys = {**shapes, "combine": "weighted_avg", "inference_type": "patch"}
    expected = values[0].astype(np.float32) - values[1]
    with chunkq.Predictor.from_model(second_minus_first, **keys) as predictor:
        result = predictor.predict(named, channels=["GFP", "DAPI"])
        predictor.predict_to_store(named, tmp_path / "out.zarr", channels=["GFP", "DAPI"])
        with pytest.raises(JobError, match="GFP"):
            predictor.predict(named, channels=["GFP", "RFP"])
    np.testing.assert_array_equal(result.probabilities[0], expected)
    stored = zarr.open_array(tmp_path / "out.zarr" / "0", mode="r")[:]
    np.testing.assert_array_equal(stored.reshape(SHAPE), expected)


def test_an_error_about_an_array_with_a_leading_axis_says_how_to_name_its_axes() -> None:
    with create_predictor() as predictor:
        with pytest.raises(JobError) as caught:
            predictor.predict(volume()[None])
        assert 'axes="czyx"' in caught.value.problems[-1]
        assert predictor.predict(volume()[None], axes="czyx").labels.shape == SHAPE


def ome_tiff(folder: Path, values: npt.NDArray[Any]) -> Any:
    metadata = {"axes": "CZYX", "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite(folder / "in.ome.tif", values, metadata=metadata)
    return tifffile.TiffFile(folder / "in.ome.tif")


def ome_zarr(folder: Path, values: npt.NDArray[Any]) -> Any:
    image = zarr.create_group(folder / "in.zarr")
    image.create_array("0", data=values)
    levels = {"datasets": [{"path": "0", "coordinateTransformations": []}]}
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space"} for n in "zyx")]
    channels = [{"label": "DAPI"}, {"label": "GFP"}]
    multiscales = [{**levels, "axes": axes}]
    ome = {"version": "0.5", "multiscales": multiscales, "omero": {"channels": channels}}
    image.attrs["ome"] = ome
    return image["0"]


@pytest.mark.parametrize("create", [ome_tiff, ome_zarr])
def test_channels_of_an_ome_image_are_selected_by_their_names(
    tmp_path: Path, create: Callable[[Path, npt.NDArray[Any]], Any]
) -> None:
    values = np.stack([volume(), volume()[::-1]]).astype(np.int16)
    keys = {"model_input_shape": [2, 8, 8, 8], "model_output_shape": [1, 8, 8, 8]}
    image = create(tmp_path, values)
    predictor = chunkq.Predictor.from_model(
        second_minus_first, **keys, combine="weighted_avg", inference_type="patch"
    )
    with predictor, contextlib.ExitStack() as stack:
        if hasattr(image, "close"):
            stack.callback(image.close)
        result = predictor.predict(image, channels=["GFP", "DAPI"])
    np.testing.assert_array_equal(result.probabilities[0], values[0].astype("f4") - values[1])


CONTAINERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dataset": (lambda _: xarray.Dataset({"raw": ("x", np.zeros(3))}), "raw"),
    "group": (lambda folder: zarr.open_group(folder / "g.zarr", mode="w"), "group"),
    "file": (lambda folder: h5py.File(folder / "f.h5", "w"), "HDF5"),
    "empty dataset": (
        lambda folder: h5py.File(folder / "e.h5", "w").create_dataset("a", data=h5py.Empty("f4")),
        "without values",
    ),
    "object": (lambda _: object(), "object"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_of_arrays_is_a_type_error_with_its_members(name: str, tmp_path: Path) -> None:
    create, fragment = CONTAINERS[name]
    with create_predictor() as predictor, pytest.raises(TypeError, match=r"^input: ") as caught:
        predictor.predict(create(tmp_path))
    assert fragment in str(caught.value)
    assert "object at 0x" not in str(caught.value)


def test_masked_voxels_and_unknown_shapes_are_refused() -> None:
    masked = np.ma.masked_greater(volume(), 50)
    unknown = dask.array.from_array(np.arange(20))
    unknown = unknown[unknown > 5]
    with create_predictor() as predictor:
        for value, advice in ((masked, "filled"), (unknown, "compute_chunk_sizes")):
            with pytest.raises(JobError, match=advice):
                predictor.predict(value)


def test_an_error_of_an_input_is_one_error_with_its_cause(tmp_path: Path) -> None:
    def fail(values: Any) -> Any:
        raise ValueError("no such scan")

    lazy = as_dask(tmp_path).map_blocks(fail, dtype="int16", meta=np.empty((0, 0, 0), "i2"))
    closed = as_h5py(tmp_path)
    with create_predictor() as predictor:
        with pytest.raises(ChunkReadError, match="no such scan") as caught:
            predictor.predict(lazy)
        assert isinstance(caught.value.__cause__, ValueError)
        prediction = predictor.predict(closed)
        closed.file.close()
        with pytest.raises(ChunkReadError):
            _ = prediction.input


def test_files_of_formats_without_regions_name_the_function_that_opens_them(tmp_path: Path) -> None:
    (tmp_path / "v.mgz").write_bytes(b"")
    (tmp_path / "damaged.tif").write_bytes(b"not a TIFF file")
    with create_predictor() as predictor:
        with pytest.raises(StoreError, match=r"nibabel\.load"):
            predictor.predict(tmp_path / "v.mgz")
        with pytest.raises(StoreError, match=r"damaged\.tif: not a TIFF file"):
            predictor.predict(tmp_path / "damaged.tif")


def test_a_tiff_needs_tifffile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiff_path(tmp_path)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with create_predictor() as predictor, pytest.raises(StoreError) as caught:
        predictor.predict(path)
    assert caught.value.code is ErrorCode.PACKAGE_MISSING
