"""The sizes that a plan predicts are those of the files that the job writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunkq_producer.stored_sizes import file_sizes, level_sizes

from chunkq.create import check_job
from chunkq.job.job_handle import JobHandle
from chunkq.job.job_reading import load_job
from chunkq.plan.object_sizes import StoredSize
from tests.harness.small_job import small_workspace
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace, run_inline

NOISE = """
import numpy as np

def noise(batch):
    x = batch.astype(np.float32)
    x = x * np.linspace(1, 1.3, x.shape[-1], dtype=np.float32)
    scores = np.abs(np.stack([np.sin(1e4 * x + n) for n in range(3)], axis=1))
    scores[:, 0] /= 100
    return {"scores": scores, "coarse": scores[:, 0, ::2, ::2]}
"""
"""Predictions without a pattern, which overlapping patches do not agree on, and labels 1 and 2."""
SHAPE, PATCH = (37, 50), [8, 8]
HEADS = {"scores": [3, *PATCH], "coarse": [4, 4]}
LABELS = {"head": "scores", "combine": "soft"}
AVERAGES = {"head": "scores"}
PLAIN: dict[str, Any] = {"codec": "none", "outputs": {"a": AVERAGES}}
SHARDS: dict[str, Any] = {"storage_shards": [8, 16], "chunksize": [16, 16]}
PYRAMID: dict[str, Any] = {"pyramid": {"levels": 3}}
SEVERAL: dict[str, Any] = {
    "tissue": LABELS | {"classes": 3},
    "byte": AVERAGES
    | {"output_dtype": "uint8", "range": [-1, 1], "fill_value": -1, "storage_chunks": [5, 4]},
    "half": AVERAGES | {"output_dtype": "float16", "channels": 1},
    "doubt": AVERAGES | {"combine": "entropy", "activation": "softmax", "storage_shards": [8, 8]},
    "coarse": {"head": "coarse", "scale": [2, 2], "storage_chunks": [4, 4]},
}
JOBS: dict[str, dict[str, Any]] = {
    "averages": PLAIN,
    "zarr 2": PLAIN | PYRAMID | {"zarr_format": 2},
    "shards": PLAIN | PYRAMID | SHARDS,
    "labels": PLAIN | PYRAMID | {"outputs": {"a": LABELS}},
    "several": PLAIN | PYRAMID | {"outputs": SEVERAL, "chunksize": [40, 40]},
    "region": PLAIN | PYRAMID | {"roi": [[3, 33], [5, None]]},
    "mask": PLAIN | SHARDS | PYRAMID | {"mask": "mask.npy"},
    "time series": PLAIN | PYRAMID | {"input": {"path": "series.npy", "axes": "tyx"}},
    "list": PLAIN | PYRAMID | {"input": ["in.zarr", "other.npy"]},
    "lz4": PYRAMID | {"outputs": SEVERAL, "chunksize": [40, 40]},
    "zstd in shards": PYRAMID | SHARDS | {"outputs": {"a": LABELS, "b": AVERAGES}, "codec": "zstd"},
    "volume": PYRAMID | {"outputs": {"a": AVERAGES}, "output": "precomputed://out"},
    "volumes": {
        "outputs": {"half": AVERAGES | {"output_dtype": "float16"}, "classes": LABELS},
        "storage_chunks": [12, 20],
        "chunksize": [24, 20],
        "output": "precomputed://out",
    }
    | PYRAMID,
    "nifti": {"outputs": {"a": AVERAGES, "b": LABELS}, "output": "out.nii"},
    "nifti.gz": {"outputs": {"a": AVERAGES, "b": LABELS}, "output": "out.nii.gz"},
    "tiff": {"outputs": {"a": AVERAGES, "b": LABELS}, "output": "out.tif"},
    "hdf5": {"outputs": {"a": AVERAGES, "b": LABELS}, "output": "out.h5"},
}
AT_MOST = {"mask", "lz4", "zstd in shards", "nifti.gz", "tiff", "hdf5"}
METADATA = {"zarr.json", ".zarray", ".zattrs", "chunkq.json"}


def workspace_of(folder: Path, **keys: Any) -> Workspace:
    heads = {one["head"] for one in keys["outputs"].values()}
    network = {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(folder / "noise.py"),
        "class_name": "noise",
        "model_input_shape": PATCH,
        "model_output_shape": {name: HEADS[name] for name in sorted(heads)},
    }
    workspace = small_workspace(folder, model_config=network)
    (folder / "noise.py").write_text(NOISE)
    write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8), overwrite=True)
    np.save(folder / "other.npy", random_volume((21, 30)))
    np.save(folder / "series.npy", random_volume((3, *SHAPE)))
    mask = np.zeros(SHAPE, np.uint8)
    mask[20:, 22:40] = 1
    np.save(folder / "mask.npy", mask)
    workspace = Workspace(folder, workspace.values | {"chunksize": [16, 20]} | keys)
    workspace.write_job()
    return workspace


def stored_levels(job: JobHandle, output: int) -> list[list[int]]:
    """Return the sizes of the objects of each level of an output, over all images."""
    levels: list[list[int]] = []
    for image in job.record.images:
        for level, array in enumerate(job.output.image(image, output).arrays):
            folder = Path(job.folder.output, array.folder)
            files = (path for path in folder.rglob("*") if path.is_file())
            sizes = [path.stat().st_size for path in files if path.name not in METADATA]
            levels += [[]] if level == len(levels) else []
            levels[level] += sizes
    return levels


def compared(
    name: str, keys: dict[str, Any], folder: Path
) -> Iterator[tuple[str, StoredSize, StoredSize]]:
    """Run a job; yield what is predicted and what is stored of each level and file."""
    workspace = workspace_of(folder, **keys)
    checked = check_job(load_job(workspace.folder / "job.json"))
    job, _ = run_inline(workspace.folder / "job.json")
    files = list(file_sizes(checked))
    for file, size in files:
        stored = Path(file.path).stat().st_size
        yield Path(file.path).name, size, StoredSize.of_file(stored, is_exact=True)
    for number, spec in enumerate([] if files else checked.largest.outputs):
        predicted = level_sizes(checked, number)
        levels = stored_levels(job, number)
        assert len(levels) == len(predicted)
        for level, (size, objects) in enumerate(zip(predicted, levels, strict=True)):
            stored_size = StoredSize(len(objects), sum(objects), max(objects), True)
            yield f"{spec.name}/{level}", size, stored_size


@pytest.mark.parametrize("name", JOBS)
def test_what_is_stored_has_the_predicted_size(name: str, tmp_path: Path) -> None:
    exact = 0
    for part, predicted, stored in compared(name, JOBS[name], tmp_path):
        if predicted.is_exact:
            exact += 1
            assert stored == predicted, part
        else:
            assert name == "mask" or stored.objects == predicted.objects, part
            assert stored.bytes <= predicted.bytes, part
            assert stored.object_bytes <= predicted.object_bytes, part
    assert bool(exact) == (name not in AT_MOST)


def test_objects_of_the_fill_value_are_not_stored(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path, **PLAIN | {"skip_empty": {"below": 1000}})
    checked = check_job(load_job(workspace.folder / "job.json"))
    job, _ = run_inline(workspace.folder / "job.json")
    (size,) = level_sizes(checked, 0)
    assert size.bytes > 0
    assert not size.is_exact
    assert stored_levels(job, 0) == [[]]


def test_the_command_prints_the_size_of_each_output_level_and_file(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path, **JOBS["several"])
    values = json.loads(workspace.call("plan", workspace.job_file, "--json").ok().out)
    checked = check_job(load_job(workspace.folder / "job.json"))
    for number, output in enumerate(values["outputs"]):
        level, *above = level_sizes(checked, number)
        assert output["stored"]["bytes"] == level.bytes
        assert output["stored"]["is_exact"]
        stored = [one["stored"] for one in values["pyramid"] if one["output"] == output["name"]]
        assert [one["bytes"] for one in stored] == [size.bytes for size in above]
    assert values["files"] == []
    text = workspace.call("plan", workspace.job_file).ok().out
    assert "at most" not in text.partition("chunks ")[0]
    compressed = workspace_of(tmp_path / "file", output="out.nii.gz", outputs={"a": AVERAGES})
    text = compressed.call("plan", compressed.job_file).ok().out
    assert "out.a.nii.gz, at most" in " ".join(text.split())
    (file,) = json.loads(compressed.call("plan", compressed.job_file, "--json").ok().out)["files"]
    assert file["path"].endswith("out.a.nii.gz")
    assert not file["stored"]["is_exact"]
