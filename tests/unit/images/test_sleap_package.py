"""Folders of sleap-nn, read without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from chunkq.errors import ErrorCode, JobError
from chunkq.images.skeleton import Skeleton
from chunkq.images.sleap_package import package_files, read_package
from tests.harness.sleap_folders import SKELETON, config, exported, trained


def problem(*folders: str) -> str:
    with pytest.raises(JobError) as error:
        read_package(folders)
    assert error.value.code == ErrorCode.MODEL_UNUSABLE
    [line] = error.value.problems
    assert line.startswith("model_config.package: ")
    assert "; " in line
    return line


def test_a_trained_model_has_its_kind_and_skeleton(tmp_path: Path) -> None:
    for head, kind in (("single_instance", "single"), ("bottomup", "bottom-up")):
        folder = trained(tmp_path, head)
        package = read_package([folder])
        assert (package.kind, package.is_export) == (kind, False)
        assert package.skeleton == SKELETON
        assert package_files([folder]) == {
            "package[0]/training_config.yaml": f"{folder}/training_config.yaml",
            "package[0]/best.ckpt": f"{folder}/best.ckpt",
        }


def test_centers_and_crops_are_one_network(tmp_path: Path) -> None:
    folders = [trained(tmp_path, "centroid"), trained(tmp_path, "centered_instance")]
    package = read_package(folders)
    assert (package.kind, package.folders) == ("top-down", tuple(folders))
    files = package_files(folders)
    assert len(files) == 4
    assert files["package[1]/best.ckpt"] == f"{folders[1]}/best.ckpt"


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("single_instance", "single"), ("bottomup", "bottom-up"), ("topdown", "top-down")],
)
def test_an_export_has_its_kind_and_skeleton(tmp_path: Path, model_type: str, kind: str) -> None:
    folder = exported(tmp_path, model_type)
    package = read_package([folder])
    assert (package.kind, package.is_export, package.channels) == (kind, True, 1)
    assert package.skeleton == Skeleton(SKELETON.names, SKELETON.edges)
    assert list(package_files([folder])) == [
        "package[0]/export_metadata.json",
        "package[0]/model.onnx",
    ]


def test_folders_that_are_no_network_are_refused_in_one_line(tmp_path: Path) -> None:
    centers, crops = trained(tmp_path, "centroid"), trained(tmp_path, "centered_instance")
    single, export = trained(tmp_path, "single_instance"), exported(tmp_path, "topdown")
    (tmp_path / "empty").mkdir()
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "training_config.json").write_text("{}")
    assert "no folder" in problem(f"{single}/best.ckpt")
    assert "no folder" in problem(str(tmp_path / "missing"))
    assert "training_config.yaml" in problem(str(tmp_path / "empty"))
    assert "1.4" in problem(str(tmp_path / "older"))
    assert "list" in problem(centers)
    assert "list" in problem(crops)
    assert "exchange" in problem(crops, centers)
    assert "alone" in problem(single, crops)
    assert "alone" in problem(centers, export)
    assert "found centroid and centroid" in problem(centers, centers)
    assert "3 folders" in problem(centers, crops, single)
    assert "multi_class_topdown" in problem(trained(tmp_path, "multi_class_topdown"))
    assert "bbox_ssd" in problem(exported(tmp_path, "bbox_ssd"))


@pytest.mark.parametrize(
    "text", ["", "a: [", "- 1", "model_config: {}", "model_config: {head_configs: {centroid: {}}}"]
)
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    folder = trained(tmp_path, "single_instance")
    (Path(folder) / "training_config.yaml").write_text(text)
    assert folder in problem(folder)


def test_every_damage_of_a_configuration_is_one_line(tmp_path: Path) -> None:
    folder = Path(trained(tmp_path, "single_instance"))
    whole = config("single_instance")
    skeleton = whole["data_config"]["skeletons"][0]
    for damaged in (
        whole | {"data_config": None},
        whole | {"data_config": {"skeletons": []}},
        whole | {"data_config": {"skeletons": [skeleton | {"nodes": []}]}},
        whole | {"data_config": {"skeletons": [skeleton | {"nodes": [{"name": "other"}]}]}},
        whole | {"data_config": {"skeletons": [skeleton | {"edges": [{"source": 1}]}]}},
        whole | {"model_config": {"head_configs": {"single_instance": {}, "bottomup": {}}}},
    ):
        (folder / "training_config.yaml").write_text(yaml.safe_dump(damaged))
        assert "damaged" in problem(str(folder))
    (folder / "training_config.yaml").write_bytes(b"\xff\xfe\x00name: x")
    assert "damaged" in problem(str(folder))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder, export = Path(trained(tmp_path, "bottomup")), Path(exported(tmp_path, "bottomup"))
    (folder / "best.ckpt").unlink()
    (export / "model.onnx").unlink()
    assert "best.ckpt" in problem(str(folder))
    assert "model.onnx" in problem(str(export))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "bottomup", "node_names": 3}'])
def test_a_damaged_export_is_named(tmp_path: Path, text: str) -> None:
    folder = exported(tmp_path, "bottomup")
    (Path(folder) / "export_metadata.json").write_text(text)
    assert "export the model again" in problem(folder)
