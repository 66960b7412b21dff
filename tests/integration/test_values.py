"""What jobs store of predictions: integers of a range, activated averages, codecs, classes."""

import json
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import xarray
import zarr
from chunkq_worker.predictor import Predictor

import chunkq
from chunkq.errors import JobError
from tests import reference as ref
from tests.harness.small_job import SHAPE, small_workspace
from tests.harness.volumes import random_volume
from tests.harness.workspace import Workspace, run_inline

Array = npt.NDArray[Any]
PATCH, STRIDES = (8, 8), (5, 3)
NETWORK = """
import numpy as np

def scores(x):
    ramp = np.linspace(-1, 1, x.shape[-1], dtype=np.float32)
    return np.stack([x / 50 - ramp, ramp * x / 30, np.sin(x)], axis=1)

def score(x):
    return scores(x)[:, 1]
"""


def predict(x: ref.F64, _start: ref.Shape) -> ref.F64:
    ramp = np.linspace(-1, 1, x.shape[-1])
    return np.stack([x / 50 - ramp, ramp * x / 30, np.sin(x)])


def workspace_of(folder: Path, function: str = "scores", **changes: Any) -> Workspace:
    (folder / "net.py").write_text(NETWORK)
    model = {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(folder / "net.py"),
        "class_name": function,
        "model_input_shape": PATCH,
        "model_output_shape": [3, *PATCH] if function == "scores" else PATCH,
        "max_batch_size": 4,
    }
    keys = {
        "inference_type": "sliding_window",
        "strides": STRIDES,
        "weight_function": ["weight_gaussian"],
        "chunksize": [12, 16],
        "storage_chunks": [4, 4],
    }
    return small_workspace(folder, **(keys | {"model_config": model} | changes))


def keys_of(workspace: Workspace) -> dict[str, Any]:
    paths = {"input": str(workspace.folder / "in.zarr"), "output": str(workspace.output)}
    return workspace.values | paths


def run(workspace: Workspace) -> tuple[Array, dict[str, Any], dict[str, Any]]:
    """Return the output, the attributes of its group, and the report."""
    _, report = run_inline(keys_of(workspace))
    group = zarr.open_group(workspace.output, mode="r")
    return np.asarray(group["0"]), dict(group.attrs), report


def expected(**keys: Any) -> Array:
    setup = ref.sliding_window(SHAPE, PATCH, STRIDES)
    volume = random_volume(SHAPE)
    values = ref.reference(setup, volume, predict, weight="weight_gaussian", **keys).values
    return values[0] if keys.get("combine") == "entropy" else values


STORED: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "average": ({"output_dtype": "uint8", "range": [-2, 6]}, (-2, 6)),
    "shares": ({"output_dtype": "int16", "activation": "sigmoid"}, (0, 1)),
    "activated": ({"output_dtype": "uint16", "activation_after": "softmax"}, (0, 1)),
    "std": ({"output_dtype": "int8", "combine": "std", "range": [0, 3]}, (0, 3)),
    "entropy": (
        {"output_dtype": "uint8", "combine": "entropy", "activation": "softmax"},
        (0, float(np.log(3))),
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_integers_are_read_back_within_half_a_step_by_zarr_and_xarray(
    tmp_path: Path, case: str
) -> None:
    keys, span = STORED[case]
    workspace = workspace_of(tmp_path, **keys)
    stored, attributes, report = run(workspace)
    facts = attributes["chunkq"]
    assert facts["range"] == list(span)
    assert stored.dtype == keys["output_dtype"]
    values = stored * facts["scale"] + facts["offset"]
    names = ("combine", "activation", "activation_after")
    exact = expected(**{key: keys[key] for key in names if key in keys})
    # A small deviation has a larger error than its variance, which is within 1e-6.
    tolerance = 1e-3 if keys.get("combine") == "std" else 1e-5
    assert np.abs(values - np.clip(exact, *span)).max() <= facts["scale"] / 2 + tolerance
    decoded = xarray.open_zarr(tmp_path / "out.zarr", consolidated=False)["0"]
    assert np.abs(decoded.to_numpy() - values).max() < 1e-5
    [summary] = report["outputs"]
    assert summary["range"] == list(span)
    planned = json.loads(workspace.call("plan", workspace.job_file, "--json").out)
    assert planned["outputs"][0]["range"] == list(span)


@pytest.mark.parametrize("suffix", [".nii.gz", ".h5", ".ome.zarr"])
def test_files_and_conversions_keep_what_integers_stand_for(tmp_path: Path, suffix: str) -> None:
    workspace = workspace_of(tmp_path, "score", output_dtype="uint8", range=[-2, 6])
    stored, attributes, _ = run(workspace)
    facts = attributes["chunkq"]
    paths = [tmp_path / f"copy{suffix}"]
    assert workspace.call("convert", workspace.output, paths[0]).code == 0
    if suffix != ".ome.zarr":
        paths.append(tmp_path / f"job{suffix}")
        run_inline(keys_of(workspace) | {"output": str(paths[1])})
    for path in paths:
        if suffix == ".nii.gz":
            image = nibabel.load(path)  # type: ignore[attr-defined]
            assert image.get_data_dtype() == np.uint8
            np.testing.assert_allclose(
                image.get_fdata().squeeze().T, stored * facts["scale"] + facts["offset"], atol=1e-6
            )
            continue
        if suffix == ".h5":
            with h5py.File(path) as file:
                [dataset] = file.values()
                values, kept = dataset[...], dict(dataset.attrs)
        else:
            group = zarr.open_group(path, mode="r")
            values, kept = np.asarray(group["0"]), dict(group.attrs["chunkq"])  # type: ignore[arg-type]
            kept = {"scale_factor": kept["scale"], "add_offset": kept["offset"]}
        np.testing.assert_array_equal(values, stored)
        assert (kept["scale_factor"], kept["add_offset"]) == (facts["scale"], facts["offset"])


def test_averages_are_activated_after_they_are_averaged(tmp_path: Path) -> None:
    stored, attributes, _ = run(workspace_of(tmp_path, activation_after="softmax"))
    assert np.abs(stored - expected(activation_after="softmax")).max() < 1e-5
    assert np.abs(stored - expected(activation="softmax")).max() > 0.01
    assert "range" not in attributes["chunkq"]


def test_another_cut_changes_integers_by_at_most_one_step(tmp_path: Path) -> None:
    outputs = []
    for name, chunksize in {"a": [12, 16], "b": [8, 12], "c": [40, 40]}.items():
        folder = tmp_path / name
        folder.mkdir()
        keys = {"output_dtype": "uint16", "range": [-2, 6], "chunksize": chunksize}
        outputs.append(run(workspace_of(folder, **keys))[0].astype(int))
    for other in outputs[1:]:
        difference = np.abs(outputs[0] - other)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.1


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("codec", ["lz4", "zstd", "none", {"name": "zstd", "level": 7}])
@pytest.mark.parametrize("combine", ["soft", "weighted_avg"])
def test_every_codec_stores_the_same_voxels_for_other_readers(
    tmp_path: Path, combine: str, codec: Any, zarr_format: Any
) -> None:
    keys = {"combine": combine, "codec": codec, "zarr_format": zarr_format}
    stored, _, _ = run(workspace_of(tmp_path, **keys))
    plain = tmp_path / "plain"
    plain.mkdir()
    np.testing.assert_array_equal(stored, run(workspace_of(plain, combine=combine))[0])
    array = zarr.open_array(tmp_path / "out.zarr" / "0", mode="r")
    name, level = (codec, None) if isinstance(codec, str) else (codec["name"], codec["level"])
    if name == "none":
        assert array.compressors == ()
    else:
        config = str(array.compressors[0])
        assert name in config
        assert level is None or f"clevel={level}" in config


def test_class_names_are_in_the_metadata_the_plan_and_the_report(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("background\ngrey\n\nwhite\n")
    workspace = workspace_of(tmp_path, combine="soft", classes="names.txt")
    plan = workspace.call("plan", workspace.job_file).out
    assert "background, grey, white" in plan
    report = chunkq.run(workspace.job_file, queue="inprocess://")
    assert report["outputs"][0]["classes"] == ["background", "grey", "white"]
    label = dict(zarr.open_group(workspace.output, mode="r").attrs)["ome"]["image-label"]  # type: ignore[call-overload, index]
    assert [one["class"] for one in label["properties"]] == ["background", "grey", "white"]
    assert label["colors"][0] == {"label-value": 0, "rgba": [0, 0, 0, 0]}
    assert len({tuple(color["rgba"]) for color in label["colors"]}) == 3
    assert "background, grey, white" in workspace.call("report", workspace.output).out


def test_two_names_are_those_of_one_sigmoid_channel(tmp_path: Path) -> None:
    keys = {"combine": "soft", "activation": "sigmoid", "classes": ["air", "tissue"]}
    workspace = workspace_of(tmp_path, "score", **keys)
    stored, attributes, _ = run(workspace)
    assert set(np.unique(stored)) == {0, 1}
    assert [one["class"] for one in attributes["ome"]["image-label"]["properties"]] == keys[
        "classes"
    ]


def test_a_prediction_says_how_its_integers_are_read(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    keys = {"output_dtype": "uint8", "range": [-2, 6]}
    workspace = workspace_of(tmp_path, **keys)
    with Predictor.from_config(workspace.job_file) as predictor:
        prediction = predictor.predict(volume)
    exact, span = expected(), prediction.numpy().range
    assert prediction.probabilities is not None
    assert span is not None
    decoded = span.values(prediction.probabilities)
    assert np.abs(decoded - np.clip(exact, -2, 6)).max() <= span.scale / 2 + 1e-5
    np.testing.assert_array_equal(prediction.labels, np.argmax(decoded, 0))
    assert "range: -2 to 6 as uint8" in repr(prediction)
    image = prediction.to_nibabel("probabilities", affine=np.eye(4))
    image.to_filename(tmp_path / "p.nii")
    loaded: Any = nibabel.load(tmp_path / "p.nii")  # type: ignore[attr-defined]
    assert np.abs(loaded.get_fdata()[:, :, 0, 0, 1] - decoded[1]).max() < 1e-4
    assert prediction.to_xarray("probabilities").attrs["scale_factor"] == span.scale


def test_a_predictor_returns_deviations_and_no_labels(tmp_path: Path) -> None:
    with Predictor.from_config(workspace_of(tmp_path, combine="std").job_file) as predictor:
        prediction = predictor.predict(random_volume(SHAPE))
    assert prediction.labels is None
    assert prediction.probabilities is None
    stored = prediction.values
    assert stored is not None
    assert np.abs(stored**2 - expected(combine="std") ** 2).max() < 1e-4
    assert prediction.numpy().values is not None
    with pytest.raises(chunkq.errors.ChunkqError, match="labels"):
        prediction.plot()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no range": ("scores", {"output_dtype": "uint8"}, "range"),
    "a range of floats": ("scores", {"range": [0, 1]}, "range"),
    "an empty range": ("scores", {"output_dtype": "uint8", "range": [1, 1]}, "range"),
    "a range of labels": ("scores", {"combine": "soft", "range": [0, 1]}, "range"),
    "a dtype of labels": ("scores", {"combine": "hard", "output_dtype": "uint8"}, "output_dtype"),
    "entropy of scores": ("scores", {"combine": "entropy"}, "combine"),
    "entropy of sigmoid": ("scores", {"combine": "entropy", "activation": "sigmoid"}, "combine"),
    "activated labels": (
        "scores", {"combine": "soft", "activation_after": "softmax"}, "activation_after",
    ),
    "activated twice": (
        "scores", {"activation": "softmax", "activation_after": "softmax"}, "activation_after",
    ),
    "softmax of one channel": ("score", {"activation_after": "softmax"}, "activation_after"),
    "activated beside skip_empty": (
        "scores", {"activation_after": "softmax", "skip_empty": 0}, "activation_after",
    ),
    "a fill value beyond the range": (
        "scores", {"output_dtype": "uint8", "range": [0, 5], "fill_value": -1}, "fill_value",
    ),
    "no class as fill value": (
        "scores", {"combine": "std", "activation": "softmax", "fill_value": 3}, "fill_value",
    ),
    "a level of no codec": ("scores", {"codec": {"name": "none", "level": 3}}, "codec.level"),
    "an unknown codec": ("scores", {"codec": "gzip"}, "codec.name"),
    "a level beyond Blosc's": ("scores", {"codec": {"name": "zstd", "level": 12}}, "codec.level"),
    "classes that are missing": ("scores", {"classes": ["a", "b"]}, "classes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_keys_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    function, changes, key = REFUSED[case]
    workspace = workspace_of(tmp_path, function, **changes)
    with pytest.raises(JobError) as error:
        run_inline(keys_of(workspace))
    assert [line.partition(":")[0] for line in error.value.problems] == [key]
    assert not workspace.output.exists()
