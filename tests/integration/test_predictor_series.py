"""Time points and channels that a predictor computes one by one."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import xarray
import zarr

from chunkq import JobError, Predictor
from chunkq.errors import ErrorCode
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import run_inline

SPATIAL = (9, 13, 11)
MOVIE = random_volume((3, *SPATIAL), "int16")
"""Axes t, z, y, x."""
IMAGE = random_volume((3, 2, *SPATIAL), "int16")
"""Axes t, c, z, y, x."""


def two(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([batch, 50 - batch], 1)


def sum_of_channels(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return batch.sum(1, keepdims=True) / 100


def create(network: Any = two, channels: int = 1, outputs: int = 2, **keys: Any) -> Predictor:
    shapes = {"model_input_shape": [channels, 4, 4, 4], "model_output_shape": [outputs, 4, 4, 4]}
    return Predictor.from_model(network, **shapes, **({"chunksize": [8, 8, 8]} | keys))


def named(values: Any, dims: str) -> Any:
    return xarray.DataArray(values, dims=tuple(dims))


def each(predictor: Predictor, volumes: Any, **keys: Any) -> Any:
    return [predictor.predict(one, **keys) for one in volumes]


def test_each_time_point_is_predicted_like_a_volume_and_the_results_are_stacked(
    tmp_path: Path,
) -> None:
    with create() as predictor:
        expected = each(predictor, MOVIE)
        for volume, keys in (
            (MOVIE, {"axes": "tzyx"}),
            (named(MOVIE, "tzyx"), {}),
            (named(np.moveaxis(MOVIE, 0, -1), "zyxt"), {}),
            (write_zarr(tmp_path / "m.zarr", MOVIE, dimension_names=(*"tzyx",)), {}),
        ):
            result = predictor.predict(volume, **keys)
            for name in ("labels", "probabilities", "input"):
                stacked = np.stack([getattr(one, name) for one in expected])
                np.testing.assert_array_equal(getattr(result, name), stacked)
    assert result.labels.shape == (3, *SPATIAL)
    assert result.probabilities is not None
    assert result.probabilities.shape == (3, 2, *SPATIAL)


@pytest.mark.parametrize("combine", ["weighted_avg", "soft"])
def test_a_stream_and_a_stored_image_have_the_time_points(tmp_path: Path, combine: Any) -> None:
    with create(combine=combine) as predictor:
        expected = each(predictor, MOVIE)
        names = "labels" if combine == "soft" else "probabilities"
        stacked = np.stack([getattr(one, names) for one in expected])
        streamed = np.zeros_like(stacked)
        counts = np.zeros(stacked.shape, int)
        for region, values in predictor.predict_streaming(MOVIE, axes="tzyx"):
            assert streamed[region].shape == values.shape
            streamed[region] = values
            counts[region] += 1
        predictor.predict_to_store(MOVIE, tmp_path / "out.zarr", axes="tzyx")
    np.testing.assert_array_equal(streamed, stacked)
    assert (counts == 1).all()
    np.testing.assert_array_equal(read_output(tmp_path / "out.zarr"), stacked)


def test_channels_are_predicted_one_by_one_if_the_network_takes_one(tmp_path: Path) -> None:
    with create(combine="soft") as predictor:
        expected = np.stack([[one.labels for one in each(predictor, t)] for t in IMAGE])
        result = predictor.predict(IMAGE, axes="tczyx")
        predictor.predict_to_store(named(IMAGE, "tczyx"), tmp_path / "out.zarr")
    np.testing.assert_array_equal(result.labels, expected)
    np.testing.assert_array_equal(result.input, IMAGE)
    np.testing.assert_array_equal(read_output(tmp_path / "out.zarr"), expected)
    assert result.to_xarray().dims == ("t", "c", "z", "y", "x")


def test_averages_of_channels_that_are_predicted_one_by_one_have_one_channel() -> None:
    with create(lambda x: x / 2, outputs=1) as predictor:
        expected = np.stack([one.probabilities for one in each(predictor, IMAGE[0])])
        result = predictor.predict(IMAGE[0], axes="czyx")
    np.testing.assert_array_equal(result.probabilities, expected)
    assert result.to_xarray("probabilities").dims == ("c", "z", "y", "x")


def test_channels_feed_a_network_that_takes_them_at_each_time_point(tmp_path: Path) -> None:
    with create(sum_of_channels, channels=2, outputs=1) as predictor:
        expected = np.stack([one.probabilities for one in each(predictor, IMAGE, axes="czyx")])
        last = np.moveaxis(IMAGE, 1, -1)  # t, z, y, x, c
        result = predictor.predict(last, axes="tzyxc")
        predictor.predict_to_store(last, tmp_path / "out.zarr", axes="tzyxc")
        volumes = predictor.predict(list(IMAGE[0]))
        movies = predictor.predict([IMAGE[:, 0], IMAGE[:, 1]], axes="tzyx")
    np.testing.assert_array_equal(result.probabilities, expected)
    np.testing.assert_array_equal(result.input, IMAGE)
    np.testing.assert_array_equal(read_output(tmp_path / "out.zarr"), expected)
    np.testing.assert_array_equal(volumes.probabilities, expected[0])
    np.testing.assert_array_equal(movies.probabilities, expected)
    np.testing.assert_array_equal(movies.input[1], IMAGE[:, 1])


def test_time_points_and_channels_are_selected_by_arguments() -> None:
    with create() as predictor:
        expected = each(predictor, [IMAGE[2, 1], IMAGE[0, 1]])
        image = named(IMAGE, "tczyx").assign_coords(t=[0.0, 5.0, 10.0])
        result = predictor.predict(image, channels=np.int64(1), time=[2, 0])
        single = predictor.predict(image, channels=[1], time=2)
    stacked = np.stack([one.labels for one in expected])
    np.testing.assert_array_equal(result.labels, stacked)
    np.testing.assert_array_equal(single.labels, stacked[0])
    np.testing.assert_array_equal(result.to_xarray()["t"], [10, 0])
    assert single.to_xarray().dims == ("z", "y", "x")


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"axes": "abcde"}, "input.axes: "),
        ({"axes": "tzyx"}, "input: "),
        ({"axes": "tczyx", "channels": 1.5}, "input.channels"),
        ({"axes": "tczyx", "channels": [2]}, "input: "),
        ({"axes": "tczyx", "time": "5:3"}, "input: "),
        ({"axes": "czyx", "time": 0}, "input: "),
    ],
)
def test_a_selection_that_the_array_does_not_have_is_one_line(keys: Any, where: str) -> None:
    with create() as predictor, pytest.raises(JobError) as caught:
        predictor.predict(IMAGE, **keys)
    (line,) = caught.value.problems
    assert line.startswith(where)


def test_the_times_of_a_tiff_are_those_of_its_metadata(tmp_path: Path) -> None:
    metadata = {"axes": "TZYX", "TimeIncrement": 30.0, "PhysicalSizeZ": 2.0}
    tifffile.imwrite(tmp_path / "m.ome.tif", MOVIE, metadata=metadata, ome=True)
    with create() as predictor:
        result = predictor.predict(tmp_path / "m.ome.tif")
    (axis,) = result.geometry.series
    assert (axis.size, axis.scale, axis.unit) == (3, 30, "second")
    assert result.voxel_size == (2, 1, 1)


def test_times_and_positions_reach_the_stored_image(tmp_path: Path) -> None:
    start = np.datetime64("2026-03-01T12:00:00", "ns")
    times = start + np.arange(3) * np.timedelta64(30, "s")
    image = named(MOVIE, "tzyx").assign_coords(t=times, z=8 - 2.0 * np.arange(9))
    with create() as predictor:
        result = predictor.predict(image)
        predictor.predict_to_store(image, tmp_path / "out.zarr")
    (level,) = zarr.open_group(tmp_path / "out.zarr").attrs["ome"]["multiscales"][0]["datasets"]
    scale, translation = level["coordinateTransformations"]
    assert scale["scale"] == [30, 1, -2, 1, 1]
    assert translation["translation"] == [0, 0, 8, 0, 0]
    np.testing.assert_array_equal(result.to_xarray()["t"], times)
    with create() as predictor:
        again = predictor.predict(tmp_path / "out.zarr", channels=0)
    assert (again.geometry.series[0].scale, again.geometry.series[0].unit) == (30, "second")
    np.testing.assert_array_equal(again.to_xarray()["z"], image["z"])


def test_a_nifti_image_of_a_series_has_its_time_points_fourth() -> None:
    values = np.moveaxis(MOVIE, 0, -1)
    image = nibabel.Nifti1Image(values, np.diag([2.0, 2, 3, 1]))
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = 2.5
    with create() as predictor:
        result = predictor.predict(image)
        expected = np.stack([one.labels for one in each(predictor, MOVIE)], -1)
    labels = result.to_nibabel()
    np.testing.assert_array_equal(np.asanyarray(labels.dataobj), expected)
    assert labels.header.get_zooms() == (2, 2, 3, 2.5)
    assert labels.header.get_xyzt_units() == ("mm", "sec")
    assert result.to_nibabel("probabilities").shape == (*SPATIAL, 3, 2)


def test_the_first_time_point_is_drawn_unless_another_one_is_chosen(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with create(sum_of_channels, channels=2, outputs=1) as predictor:
        result = predictor.predict(IMAGE, axes="tczyx")
    result.plot(tmp_path / "a.png")
    figure = result.plot(at=(2, 1, 2, 3))
    assert len(figure.axes) == 3
    for at in ((3, 1, 2, 3), (0, 1, 2, 99)):
        with pytest.raises(ValueError, match="at: "):
            result.plot(at=at)


def test_the_plan_of_a_series_is_that_of_one_time_point() -> None:
    with create() as predictor:
        plan = predictor.plan((3, *SPATIAL), axes="tzyx")
        assert plan == predictor.plan(SPATIAL)
    with create(sum_of_channels, channels=2, outputs=1) as predictor:
        assert predictor.plan((2, *SPATIAL), axes="czyx").volume.channels == 2
        with pytest.raises(JobError) as caught:
            predictor.plan((2, *SPATIAL))
    assert caught.value.code is ErrorCode.JOB_INVALID


def test_the_progress_counts_the_chunks_of_all_time_points() -> None:
    seen: list[tuple[int, int]] = []
    with create() as predictor:
        chunks = predictor.plan(SPATIAL).costs.chunks
        predictor.predict(MOVIE, axes="tzyx", progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (3 * chunks, 3 * chunks)


def test_a_list_that_the_network_takes_neither_way_is_refused() -> None:
    with create() as predictor, pytest.raises(JobError, match="join_dim") as caught:
        predictor.predict([IMAGE[0, 0], IMAGE[0, 1]])
    assert caught.value.code is ErrorCode.JOB_INVALID


ROI: list[Any] = [[1, 8], None, [2, -1]]
PICKS = [2, 0]
MASKED = {"roi": ROI, "skip_empty": 0, "fill_value": -3, "chunksize": [8, 8, 8], "threads": 1}


def masks() -> npt.NDArray[np.uint8]:
    """Return a mask for each time point of MOVIE, (t, z, y, x)."""
    mask = np.zeros(MOVIE.shape, np.uint8)
    mask[0, 2:6, 3:9, 1:7] = mask[2, 5:9, :5, 4:] = 1
    return mask


def test_a_region_of_masked_time_points_equals_the_output_of_a_job(tmp_path: Path) -> None:
    movie = MOVIE.copy()
    movie[:, :, :3] = 0
    volume = write_zarr(tmp_path / "in.zarr", movie, dimension_names=(*"tzyx",))
    mask = write_zarr(tmp_path / "mask.zarr", masks(), dimension_names=(*"tzyx",))
    config = MASKED | {"model_config": toy_model(tmp_path, (4, 4, 4), scale=100)}
    source = {"input": {"path": str(volume), "time": PICKS}, "output": str(tmp_path / "job.zarr")}
    run_inline(config | source | {"mask": str(mask)})
    expected = read_output(tmp_path / "job.zarr")
    region = tuple(slice(*(bounds or (None,))) for bounds in ROI)
    read = movie[(PICKS, *region)]
    assert expected.shape == (2, 3, *read.shape[1:])
    assert 0.5 < (expected == -3).mean() < 1
    cases = [(volume, mask), (named(movie, "tzyx"), named(masks(), "tzyx"))]
    cases += [(cases[1][0], mask), (volume, cases[1][1])]
    with Predictor.from_config(config) as predictor:
        for number, (one, mask_of_one) in enumerate(cases):
            progress: list[tuple[int, int]] = []
            keys: dict[str, Any] = {"time": PICKS, "mask": mask_of_one}
            result = predictor.predict(
                one, progress=lambda *n, kept=progress: kept.append(n), **keys
            )
            np.testing.assert_array_equal(result.probabilities, expected)
            np.testing.assert_array_equal(result.input, read)
            assert result.labels.shape == read.shape
            assert 0 < progress[-1][0] == progress[-1][1]
            streamed = np.zeros_like(expected)
            for where, values in predictor.predict_streaming(one, **keys):
                streamed[where] = values
            np.testing.assert_array_equal(streamed, expected)
            predictor.predict_to_store(one, tmp_path / f"{number}.zarr", **keys)
            np.testing.assert_array_equal(read_output(tmp_path / f"{number}.zarr"), expected)


def test_a_prediction_of_a_region_has_the_coordinates_of_its_time_points() -> None:
    movie = xarray.DataArray(
        MOVIE,
        dims=(*"tzyx",),
        coords={
            "t": [10.0, 20.0, 30.0],
            "z": np.arange(9) * 2.0,
            "tz": (("t", "z"), MOVIE[..., 0, 0]),
        },
    )
    with create(roi=ROI) as predictor:
        result = predictor.predict(movie, time=PICKS).to_xarray()
    part = movie.isel(t=PICKS, z=slice(1, 8), x=slice(2, -1))
    assert dict(result.sizes) == dict(part.sizes)
    for name, coordinate in part.coords.items():
        np.testing.assert_array_equal(result.coords[name], coordinate)


@pytest.mark.parametrize("is_path", [True, False])
def test_a_mask_follows_the_order_of_the_volume(tmp_path: Path, is_path: bool) -> None:
    values = random_volume((8, 8, 12), "int16")
    mask = np.zeros(values.shape, np.uint8)
    mask[2:5, :3, 6:] = 1
    volume = write_zarr(tmp_path / "in.zarr", values) if is_path else values
    config = {
        "input": {"axes": "zyx", "order": "xyz"},
        "fill_value": -3,
        "model_config": toy_model(tmp_path, (4, 4, 4), scale=100),
    }
    with Predictor.from_config(config) as predictor:
        result = predictor.predict(volume, mask=mask)
        predictor.predict_to_store(volume, tmp_path / "out.zarr", mask=mask)
    assert result.probabilities is not None
    inside = (result.probabilities != -3).all(0)
    np.testing.assert_array_equal(inside, mask.T > 0)
    np.testing.assert_array_equal(read_output(tmp_path / "out.zarr"), result.probabilities)


def test_a_mask_lies_on_an_image_whose_positions_fall(tmp_path: Path) -> None:
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    affine[:3, 3] = [90, 80, -70]
    fine = nibabel.Nifti1Image(random_volume((12, 8, 8), "int16"), affine)
    mask = np.zeros((3, 4, 4), np.uint8)
    mask[1:, 2:, :3] = 1
    coarse = affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    coarse[:3, 3] = affine[:3, :3] @ [4.5, 0.5, 0.5] + affine[:3, 3]  # from voxel 4 on
    image = nibabel.Nifti1Image(mask, coarse)
    expected = np.zeros(fine.shape, np.bool_)
    expected[4:10] = np.kron(mask, np.ones((2, 2, 2)))
    with create(fill_value=-3) as predictor:
        result = predictor.predict(fine, mask=image)
        predictor.predict_to_store(fine, tmp_path / "out.zarr", mask=image)
        flipped = nibabel.Nifti1Image(mask, np.diag([1.0, -1.0, 1.0, 1.0]) @ coarse)
        with pytest.raises(JobError, match="set scale in mask"):
            predictor.predict(fine, mask=flipped)
    assert result.probabilities is not None
    np.testing.assert_array_equal((result.probabilities != -3).all(0), expected)
    np.testing.assert_array_equal(read_output(tmp_path / "out.zarr"), result.probabilities)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_region_of_the_time_points_of_a_nifti_file_has_its_affine(
    tmp_path: Path, suffix: str
) -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = [-7, 5, 11]
    image = nibabel.Nifti1Image(np.moveaxis(MOVIE, 0, -1).transpose(2, 1, 0, 3), affine)
    nibabel.save(image, tmp_path / f"movie{suffix}")
    with create(roi=ROI, combine="soft") as predictor:
        result = predictor.predict(tmp_path / f"movie{suffix}", time=PICKS)
        expected = predictor.predict(MOVIE, axes="tzyx", time=PICKS).labels
    np.testing.assert_array_equal(result.labels, expected)
    converted = result.to_nibabel()
    assert converted.shape == (*reversed(expected.shape[1:]), 2)
    np.testing.assert_array_equal(np.asarray(converted.dataobj).T, expected)
    np.testing.assert_allclose(converted.affine, image.slicer[2:-1, :, 1:8].affine)
