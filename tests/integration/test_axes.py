"""Jobs over images with channels and time, in any order of axes, and the metadata that they write.

The network sums what it sees per voxel, so the output follows from NumPy alone.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

import chunkq
from chunkq.errors import ErrorCode, JobError, StoreError
from chunkq.storage.images import find_source
from chunkq.storage.selection import Selection
from tests.harness.volumes import read_output, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace, run_inline

SIZES = {"t": 3, "c": 2, "z": 9, "y": 10, "x": 11}
UNITS = {"t": "second", "z": "micrometer", "y": "nanometer", "x": "micrometer"}
TYPES = {"t": "time", "c": "channel"}
SCALES = {"t": 30.0, "c": 1.0, "z": 2.0, "y": 0.5, "x": 0.25}
LABELS = ["DAPI", "GFP"]
NETWORK = '''
import os, time
import numpy as np


def network(batch):
    """Return channel k times (k + 1), added up, and minus the first channel: (N, 2, *P)."""
    time.sleep(float(os.environ.get("TOY_DELAY", "0")))
    x = batch.astype(np.float32)
    factors = np.arange(1, x.shape[1] + 1, dtype=np.float32).reshape(-1, *(1,) * (x.ndim - 2))
    return np.stack([(x * factors).sum(1), -x[:, 0]], 1)


def identity(batch):
    return batch.astype(np.float32)
'''


def values_of(names: str) -> npt.NDArray[Any]:
    shape = [SIZES[name] for name in names]
    return np.random.default_rng(len(names)).integers(0, 200, shape).astype(np.uint8)


def write_image(
    path: Path | str, names: str, values: npt.NDArray[Any], version: str = "0.5"
) -> None:
    """Write an OME-Zarr image with the levels `full` and `half`."""
    scales = [SCALES[name] for name in names]
    transforms = [
        {"type": "scale", "scale": scales},
        {"type": "translation", "translation": [4 * scale for scale in scales]},
    ]
    image = {
        "version": version,
        "axes": [
            {"name": n, "type": TYPES.get(n, "space")} | ({"unit": UNITS[n]} if n in UNITS else {})
            for n in names
        ],
        "datasets": [
            {"path": "full", "coordinateTransformations": transforms},
            {"path": "half", "coordinateTransformations": [
                {"type": "scale", "scale": [2.0 * (n in "zyx") or 1.0 for n in names]}]},
        ],
        "coordinateTransformations": [{"type": "scale", "scale": [1.0] * len(names)}],
    }  # fmt: skip
    attributes: dict[str, Any] = {"multiscales": [image]}
    if "c" in names:
        attributes["omero"] = {"channels": [{"label": label} for label in LABELS]}
    is_v3 = version == "0.5"
    group = zarr.create_group(
        path,
        zarr_format=3 if is_v3 else 2,
        attributes={"ome": attributes} if is_v3 else attributes,
    )
    group.create_array("full", data=values, chunks=(4,) * values.ndim)
    half = values[tuple(slice(None, None, 2 if name in "zyx" else 1) for name in names)]
    group.create_array("half", data=half, chunks=(4,) * values.ndim)


def workspace_over(
    folder: Path, input: Any, shape: list[int], *, function: str = "network", **changes: Any
) -> Workspace:
    """Write a job over an input whose `model_input_shape` is `shape`."""
    (folder / "network.py").write_text(NETWORK)
    model = {
        "runtime": "numpy",
        "type": "class",
        "class_file": "network.py",
        "class_name": function,
        "model_input_shape": shape,
        "max_batch_size": 3,
    }
    if function == "network":
        model["model_output_shape"] = [2, *shape[1:]]
    values = {"input": input, "output": "out.zarr", "threads": 1, "model_config": model}
    workspace = Workspace(folder, values | changes)
    workspace.write_job("job.yaml")
    return workspace


def run(workspace: Workspace) -> npt.NDArray[Any]:
    """Run the job in this process; return its output."""
    with contextlib.chdir(workspace.folder):
        run_inline(workspace.values)
    return read_output(workspace.output)


def network_of(values: npt.NDArray[Any], channel_axis: int) -> npt.NDArray[Any]:
    """Return what the network makes of a whole image, with its two channels first."""
    x = np.moveaxis(values.astype(np.float32), channel_axis, 0)
    return np.stack([np.tensordot(np.arange(1, len(x) + 1, dtype=np.float32), x, 1), -x[0]])


def ome_axes(output: Path) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Return axes and transformations of the only level of an image, after a check of both."""
    group = zarr.open_group(output, mode="r")
    attributes = dict(group.attrs)
    [image] = attributes.get("ome", attributes)["multiscales"]
    [dataset] = image["datasets"]
    check_image(image, group["0"])
    return image["axes"], dataset["coordinateTransformations"]


def check_image(image: dict[str, Any], array: zarr.Array) -> None:
    """Check what the specifications of OME-Zarr 0.4 and 0.5 require of axes and scales."""
    types = [axis["type"] for axis in image["axes"]]
    assert types == sorted(types, key=["time", "channel", "space"].index)
    assert 2 <= types.count("space") <= 3
    assert max(types.count("time"), types.count("channel")) <= 1
    names = [axis["name"] for axis in image["axes"]]
    assert len(set(names)) == len(names) == array.ndim
    first, *others = image["datasets"][0]["coordinateTransformations"]
    assert first["type"] == "scale"
    assert [other["type"] for other in others] in ([], ["translation"])
    assert all(len(t[t["type"]]) == array.ndim for t in (first, *others))
    if array.metadata.zarr_format == 3:
        assert list(array.metadata.dimension_names) == names


# ------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("names", ["czyx", "zyxc", "zcyx", "xyzc", "cyx", "yxc"])
def test_channels_are_the_channels_of_the_network_wherever_they_are_stored(
    tmp_path: Path, names: str
) -> None:
    values = values_of(names)
    write_image(tmp_path / "in.zarr", names, values)
    patch = [5, 4, 6][: len(names) - 1]
    output = run(workspace_over(tmp_path, "in.zarr", [2, *patch]))
    np.testing.assert_array_equal(output, network_of(values, names.index("c")))
    axes, transforms = ome_axes(tmp_path / "out.zarr")
    spatial = names.replace("c", "")
    assert [axis["name"] for axis in axes] == ["c", *spatial]
    assert [axis.get("unit") for axis in axes] == [None, *(UNITS[n] for n in spatial)]
    assert transforms[0]["scale"] == [1.0, *(SCALES[n] for n in spatial)]
    assert transforms[1]["translation"] == [0.0, *(4 * SCALES[n] for n in spatial)]


@pytest.mark.parametrize(
    ("picks", "indices"),
    [(["GFP", 0], [1, 0]), ([1], [1]), ("1:2", [1]), ([1, "DAPI"], [1, 0]), (0, [0])],
)
def test_channels_are_chosen_and_ordered_by_index_and_label(
    tmp_path: Path, picks: Any, indices: list[int]
) -> None:
    values = values_of("cyx")
    write_image(tmp_path / "in.zarr", "cyx", values)
    selected = {"path": "in.zarr", "channels": picks}
    output = run(workspace_over(tmp_path, selected, [len(indices), 4, 6]))
    np.testing.assert_array_equal(output, network_of(values[indices], 0))


@pytest.mark.parametrize(
    "keys",
    [
        {"inference_type": "sliding_window", "strides": [3, 2], "weight_function": ["weight_hann"]},
        {"inference_type": "crop_margin", "margin": [1, 1], "pad_mode": "reflect"},
        {"combine": "hard", "chunksize": [8, 8], "storage_chunks": [4, 4]},
        {"pad_width": [3, 2], "pad_value": 7, "chunksize": [4, 6], "storage_chunks": [4, 6]},
    ],
    ids=str,
)
def test_channels_are_padded_and_blended_like_volumes_of_one_channel(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    values = values_of("cyx")
    write_image(tmp_path / "in.zarr", "cyx", values)
    output = run(workspace_over(tmp_path, "in.zarr", [2, 4, 6], **keys))
    expected = network_of(values, 0)
    if keys.get("combine") == "hard":
        expected = expected.argmax(0)
    np.testing.assert_allclose(output, expected, rtol=1e-5)


def test_inputs_with_channels_are_joined_along_the_channels(tmp_path: Path) -> None:
    values = [values_of("cyx"), values_of("cyx")[::-1] // 2]
    for number, array in enumerate(values):
        write_image(tmp_path / f"{number}.zarr", "cyx", array)
    workspace = workspace_over(tmp_path, ["0.zarr", "1.zarr"], [2, 4, 6])
    workspace.values["model_config"]["join_dim"] = 1
    workspace.write_job("job.yaml")
    output = run(workspace)
    np.testing.assert_array_equal(output, network_of(np.concatenate(values), 0))


def test_a_list_of_images_of_one_channel_is_the_channels_of_a_network_with_as_many(
    tmp_path: Path,
) -> None:
    values = values_of("cyx")
    for number, array in enumerate(values):
        write_zarr(tmp_path / f"{number}.zarr", array, (4, 4))
    workspace = workspace_over(tmp_path, ["0.zarr", "1.zarr"], [2, 4, 6])
    np.testing.assert_array_equal(run(workspace), network_of(values, 0))


@pytest.mark.parametrize("shape", [[3, 4, 6], [4, 4, 6]])
def test_another_number_of_channels_than_the_network_takes_is_refused(
    tmp_path: Path, shape: list[int]
) -> None:
    write_image(tmp_path / "in.zarr", "cyx", values_of("cyx"))
    workspace = workspace_over(tmp_path, "in.zarr", shape)
    with pytest.raises(JobError, match=rf"{shape[0]} input channels.*in\.zarr has 2") as raised:
        run(workspace)
    assert raised.value.code is ErrorCode.JOB_INVALID


def test_a_network_of_one_channel_predicts_each_channel_by_itself(tmp_path: Path) -> None:
    values = values_of("zcyx")
    write_image(tmp_path / "in.zarr", "zcyx", values)
    output = run(workspace_over(tmp_path, "in.zarr", [1, 5, 4, 6], function="identity"))
    np.testing.assert_array_equal(output, np.moveaxis(values, 1, 0))
    axes, _ = ome_axes(tmp_path / "out.zarr")
    assert axes[0] == {"name": "c", "type": "channel"}


def test_several_outputs_for_each_channel_of_an_image_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "in.zarr", "cyx", values_of("cyx"))
    with pytest.raises(JobError, match="set channels"):
        run(workspace_over(tmp_path, "in.zarr", [1, 4, 6]))


# ---------------------------------------------------------------------------------- time


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("names", ["tczyx", "tyx", "yxt", "tcyx"])
def test_each_time_point_is_computed_by_itself_into_one_image(
    tmp_path: Path, names: str, version: str
) -> None:
    values = values_of(names)
    write_image(tmp_path / "in.zarr", names, values, version)
    spatial = [name for name in names if name in "zyx"]
    shape = [SIZES["c"] if "c" in names else 1, *[5, 4, 6][-len(spatial) :]]
    workspace = workspace_over(tmp_path, "in.zarr", shape, zarr_format=3 if version == "0.5" else 2)
    output = run(workspace)
    frames = np.moveaxis(values, names.index("t"), 0)
    frames = frames if "c" in names else frames[:, np.newaxis]
    np.testing.assert_array_equal(output, np.stack([network_of(f, 0) for f in frames]))
    axes, transforms = ome_axes(tmp_path / "out.zarr")
    assert axes[0] == {"name": "t", "type": "time", "unit": "second"}
    assert [axis["name"] for axis in axes] == ["t", "c", *spatial]
    assert transforms[0]["scale"][:2] == [30.0, 1.0]
    assert zarr.open_array(tmp_path / "out.zarr/0", mode="r").chunks[:2] == (1, 1)


def test_selected_time_points_have_their_positions_in_the_output(tmp_path: Path) -> None:
    values = values_of("tyx")
    write_image(tmp_path / "in.zarr", "tyx", values)
    selected = {"path": "in.zarr", "time": "1:3"}
    output = run(workspace_over(tmp_path, selected, [4, 6], function="identity"))
    np.testing.assert_array_equal(output, values[1:])
    _, transforms = ome_axes(tmp_path / "out.zarr")
    assert transforms[1]["translation"][0] == 4 * 30.0 + 30.0


def test_a_single_time_point_and_channel_are_dropped(tmp_path: Path) -> None:
    values = values_of("tczyx")
    write_image(tmp_path / "in.zarr", "tczyx", values)
    selected = {"path": "in.zarr", "time": 2, "channels": ["GFP"]}
    output = run(workspace_over(tmp_path, selected, [5, 4, 6], function="identity"))
    np.testing.assert_array_equal(output, values[2, 1])
    axes, _ = ome_axes(tmp_path / "out.zarr")
    assert [axis["name"] for axis in axes] == ["z", "y", "x"]


def series(folder: Path, **changes: Any) -> tuple[Workspace, npt.NDArray[Any]]:
    """Return a job over three time points of two channels, and its output."""
    values = values_of("tczyx")
    write_image(folder / "in.zarr", "tczyx", values)
    keys = {"chunksize": [5, 8, 6], "storage_chunks": [5, 4, 6]}
    workspace = workspace_over(folder, "in.zarr", [2, 5, 4, 6], **keys | changes)
    return workspace, np.stack([network_of(frame, 0) for frame in values])


def test_a_time_series_that_is_killed_on_two_workers_resumes_and_equals_numpy(
    tmp_path: Path,
) -> None:
    workspace, expected = series(tmp_path)
    arguments = ("run", workspace.job_file, "-w", "2", "--gpus", "none")
    with workspace.start(*arguments, TOY_DELAY="0.1") as command:
        wait_until(
            lambda: sum(1 for _ in workspace.job_folder.glob("*/done/infer/[12]/*")) >= 2,
            "two chunks of later time points are committed",
        )
        command.kill()
    status = chunkq.status(workspace.output, queue=workspace.queue_url)
    assert status.done < status.chunks
    with workspace.start(*arguments) as command:
        command.wait().ok()
    np.testing.assert_array_equal(read_output(workspace.output), expected)
    assert chunkq.status(workspace.output, queue="inprocess://").sealed


def test_the_plan_lists_the_time_points_and_says_what_names_the_axes(tmp_path: Path) -> None:
    workspace, _ = series(tmp_path)
    plan = json.loads(workspace.call("plan", workspace.job_file, "--json").ok().out)
    [axes] = plan["axes"]
    assert (axes["named_by"], axes["names"]) == ("OME-Zarr metadata", ["t", "c", "z", "y", "x"])
    assert [item["position"] for item in plan["items"]] == [{"t": 0}, {"t": 1}, {"t": 2}]
    assert plan["chunks"] == sum(item["chunks"] for item in plan["items"])
    assert plan["output_shape"] == [3, 2, 9, 10, 11]
    text = workspace.call("plan", workspace.job_file).ok().out
    assert "t 3, c 2, z 9, y 10, x 11, named by OME-Zarr metadata" in text


# ------------------------------------------------------- names, order, levels and colour


@pytest.mark.parametrize("order", [None, "zyx", "yxz"])
def test_spatial_axes_keep_their_order_or_have_the_one_of_the_job(
    tmp_path: Path, order: str | None
) -> None:
    values = values_of("xyz")
    write_image(tmp_path / "in.zarr", "xyz", values)
    selected = {"path": "in.zarr"} | ({"order": order} if order else {})
    output = run(workspace_over(tmp_path, selected, [5, 4, 6], function="identity"))
    names = order or "xyz"
    np.testing.assert_array_equal(output, values.transpose(["xyz".index(n) for n in names]))
    axes, transforms = ome_axes(tmp_path / "out.zarr")
    assert [axis["name"] for axis in axes] == [*names]
    assert transforms[0]["scale"] == [SCALES[name] for name in names]


@pytest.mark.parametrize("selected", ["half", 1, None])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_level_is_read_with_its_own_voxel_size_however_it_is_named(
    tmp_path: Path, selected: Any, version: str
) -> None:
    write_image(tmp_path / "in.zarr", "zyx", values_of("zyx"), version)
    named = {"path": "in.zarr", "level": selected} if selected else "in.zarr/half"
    output = run(workspace_over(tmp_path, named, [5, 4, 6], function="identity"))
    np.testing.assert_array_equal(output, values_of("zyx")[::2, ::2, ::2])
    axes, transforms = ome_axes(tmp_path / "out.zarr")
    assert [axis["unit"] for axis in axes] == [UNITS[name] for name in "zyx"]
    assert transforms == [{"type": "scale", "scale": [2.0, 2.0, 2.0]}]


@pytest.mark.parametrize("level", [2, "quarter"])
@pytest.mark.parametrize("name", ["in.zarr", "in.zarr/full", "in.npy"])
def test_a_level_that_does_not_exist_is_refused(
    tmp_path: Path, name: str, level: int | str
) -> None:
    write_image(tmp_path / "in.zarr", "yx", values_of("yx"))
    np.save(tmp_path / "in.npy", values_of("yx"))
    with pytest.raises(StoreError, match="level") as raised:
        find_source(f"{tmp_path}/{name}", Selection(level=level))
    assert raised.value.code is ErrorCode.STORE_UNSUPPORTED


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_level_at_a_url_has_the_axes_of_its_image(tmp_path: Path, version: str) -> None:
    url = f"memory://{tmp_path}/in.zarr"
    write_image(url, "xyc", values_of("xyc"), version)
    level = find_source(f"{url}/half")
    assert level == find_source(url, Selection(level="half"))
    assert [axis.kind for axis in level.axes] == ["space", "space", "channel"]
    assert [axis.scale for axis in level.spatial_axes] == [2.0, 2.0]
    assert find_source(url, Selection(channels=("GFP",))).channels == (1,)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_names_of_dimensions_name_the_axes_of_an_array_outside_of_images(
    tmp_path: Path, zarr_format: int
) -> None:
    values, names = values_of("tyx"), ["time", "y", "x"]
    options: dict[str, Any] = {"dimension_names": names}
    if zarr_format == 2:
        options = {"attributes": {"_ARRAY_DIMENSIONS": names}, "zarr_format": 2}
    write_zarr(tmp_path / "in.zarr", values, (4, 4, 4), **options)
    output = run(workspace_over(tmp_path, "in.zarr", [4, 6], function="identity"))
    np.testing.assert_array_equal(output, values)
    axes, _ = ome_axes(tmp_path / "out.zarr")
    assert [(axis["name"], axis["type"]) for axis in axes] == [
        ("time", "time"), ("y", "space"), ("x", "space")
    ]  # fmt: skip


def test_axes_in_the_job_file_override_what_the_metadata_say(tmp_path: Path) -> None:
    values = values_of("zyx")[:2]
    write_image(tmp_path / "in.zarr", "zyx", values)
    selected = {"path": "in.zarr", "axes": "cyx"}
    output = run(workspace_over(tmp_path, selected, [2, 4, 6]))
    np.testing.assert_array_equal(output, network_of(values, 0))


def test_colour_is_refused_until_the_job_says_what_the_last_axis_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (64, 48, 3)).astype(np.uint8)
    np.save(tmp_path / "in.npy", values)
    workspace = workspace_over(tmp_path, "in.npy", [3, 32, 16])
    with pytest.raises(JobError, match="axes: yxc") as raised:
        run(workspace)
    assert raised.value.code is ErrorCode.AXES_AMBIGUOUS
    (tmp_path / "channels").mkdir()
    named = {"path": str(tmp_path / "in.npy"), "axes": "yxc"}
    output = run(workspace_over(tmp_path / "channels", named, [3, 32, 16]))
    np.testing.assert_array_equal(output, network_of(values, 2))


def test_a_predictor_takes_channels_by_the_names_of_axes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (64, 48, 3)).astype(np.uint8)
    workspace = workspace_over(tmp_path, "unused.zarr", [3, 32, 16])
    with chunkq.Predictor.from_config(workspace.job_file) as predictor:
        with pytest.raises(JobError) as raised:
            predictor.predict(values)
        assert raised.value.code is ErrorCode.AXES_AMBIGUOUS
        prediction = predictor.predict(values, axes="yxc")
        np.testing.assert_array_equal(prediction.probabilities, network_of(values, 2))
        prediction.plot(tmp_path / "labels.png")
        predictor.predict_to_store(values, tmp_path / "stored.zarr", axes="yxc")
    np.testing.assert_array_equal(read_output(tmp_path / "stored.zarr"), network_of(values, 2))
