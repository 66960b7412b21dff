"""Keys of jobs whose network is in folders of sleap-nn."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from chunkq_worker.runtimes.base import import_runtime
from PIL import Image

from chunkq.create import check_job
from chunkq.errors import ErrorCode, JobError, ModelError
from chunkq.job.job_file import Job
from chunkq.job.job_reading import load_job
from chunkq.job.keypoints import skeleton_of
from tests.harness.sleap_folders import exported, trained


def values(folder: Path, package: Any, **keys: Any) -> dict[str, Any]:
    model = {"package": package} | keys.pop("model", {})
    return {
        "input": str(folder / "frames"),
        "output": str(folder / "out.slp"),
        "inference_type": "image",
        "model_config": model,
    } | keys


def problems(keys: dict[str, Any]) -> list[str]:
    with pytest.raises(JobError) as error:
        load_job(keys)
    return list(error.value.problems)


def test_a_folder_is_all_that_a_job_says_of_its_network(tmp_path: Path) -> None:
    folder = trained(tmp_path, "bottomup")
    job = load_job(values(tmp_path, folder))
    assert (job.model.runtime, job.model.type, job.model.package) == ("sleap", "package", (folder,))
    assert job.model.max_batch_size == 4
    skeleton = skeleton_of(job)
    assert skeleton is not None
    assert skeleton.names == ("head", "thorax", "tail")


def test_folders_are_relative_to_the_job_file(tmp_path: Path) -> None:
    trained(tmp_path, "centroid")
    trained(tmp_path, "centered_instance")
    keys = values(tmp_path, ["centroid", "centered_instance"])
    (tmp_path / "job.yaml").write_text(json.dumps(keys))
    job = load_job(tmp_path / "job.yaml")
    assert job.model.package == (f"{tmp_path}/centroid", f"{tmp_path}/centered_instance")
    moved = job.with_files({key: f"/moved{path}" for key, path in job.files.items()})
    assert moved.model.package == tuple(f"/moved{folder}" for folder in job.model.package)


def test_a_stored_job_is_read_again(tmp_path: Path) -> None:
    job = load_job(values(tmp_path, trained(tmp_path, "bottomup"), peaks={"threshold": 0.4}))
    assert Job.model_validate(job.as_dict()) == job


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"classes": ["a"]}, "classes"),
        ({"image": {"mode": "L"}}, "image"),
        ({"peaks": {"stride": 2}}, "peaks.stride"),
        ({"peaks": {"multiple": True}}, "peaks.multiple"),
        ({"activation": "sigmoid"}, "activation"),
        ({"truth": {"column": "label"}}, "truth"),
        ({"keep": "logits"}, "keep"),
        ({"model": {"dtype": "float16"}}, "model_config.dtype"),
        ({"model": {"compile": True}}, "model_config.compile"),
        ({"model": {"checkpoint": "/a.pt"}}, "model_config.checkpoint"),
        ({"model": {"precision": "bfloat16"}}, "model_config.precision"),
        ({"model": {"processing_steps": "/a.py"}}, "model_config.processing_steps"),
        ({"model": {"package": ["a", "b", "c"]}}, "model_config.package"),
        ({"inference_type": "patch"}, "model_config"),
    ],
)
def test_a_key_that_the_network_has_itself_is_refused(
    tmp_path: Path, keys: dict[str, Any], key: str
) -> None:
    lines = problems(values(tmp_path, trained(tmp_path, "bottomup"), **keys))
    assert any(line.startswith(key) for line in lines), lines


def test_a_runtime_beside_a_package_is_refused(tmp_path: Path) -> None:
    model = {"runtime": "torch", "type": "torchscript", "ts_file": "/a.ts"}
    model["model_input_shape"] = [3, 8, 8]  # type: ignore[assignment]
    lines = problems(values(tmp_path, trained(tmp_path, "bottomup"), model=model))
    assert any(line.startswith("model_config.package") for line in lines), lines


def frames(folder: Path) -> None:
    (folder / "frames").mkdir()
    Image.new("L", (16, 16)).save(folder / "frames" / "0.png")


def test_a_folder_that_is_no_package_is_refused_before_work_starts(tmp_path: Path) -> None:
    frames(tmp_path)
    check_job(load_job(values(tmp_path, trained(tmp_path, "bottomup"))))
    for package in (str(tmp_path / "frames"), trained(tmp_path, "centroid")):
        with pytest.raises(JobError) as error:
            check_job(load_job(values(tmp_path, package)))
        assert error.value.code == ErrorCode.MODEL_UNUSABLE


def test_the_threshold_of_an_export_is_fixed(tmp_path: Path) -> None:
    frames(tmp_path)
    package = exported(tmp_path, "bottomup")
    check_job(load_job(values(tmp_path, package)))
    with pytest.raises(JobError, match="peaks"):
        check_job(load_job(values(tmp_path, package, peaks={"threshold": 0.3})))


def test_the_files_of_the_folders_belong_to_the_job(tmp_path: Path) -> None:
    frames(tmp_path)
    folder = trained(tmp_path, "bottomup")
    record = check_job(load_job(values(tmp_path, folder))).record
    (Path(folder) / "predictions.slp").write_bytes(b"other")
    assert record.changed_files() == []
    (Path(folder) / "best.ckpt").write_bytes(b"changed")
    assert record.changed_files() == ["model_config.package[0]/best.ckpt"]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **keys: Any) -> Any:
        if name.partition(".")[0] == "sleap_nn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **keys)

    monkeypatch.delitem(sys.modules, "chunkq_worker.runtimes.sleap", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"\[sleap\]"):
        import_runtime("sleap")
