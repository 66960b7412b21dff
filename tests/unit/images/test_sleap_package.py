"""Folders of sleap-nn, read without it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunkq.errors import ErrorCode, JobError
from chunkq.images.skeleton import Skeleton
from chunkq.images.sleap_package import read_package

NAMES = ["head", "thorax", "tail"]
HEADS = ("single_instance", "centroid", "centered_instance", "bottomup", "multi_class_topdown")
SKELETON = Skeleton(tuple(NAMES), ((0, 1), (1, 2)), "fly")


def config(head: str) -> dict[str, Any]:
    """The keys of a training_config.yaml that count, as sleap-nn 0.3.5 writes them."""
    edges = [{"source": {"name": a}, "destination": {"name": b}} for a, b in pairwise(NAMES)]
    skeleton = {"nodes": [{"name": n} for n in NAMES], "edges": edges, "name": "fly"}
    return {
        "data_config": {"skeletons": [skeleton]},
        "model_config": {"head_configs": {h: {} if h == head else None for h in HEADS}},
    }


def trained(folder: Path, head: str, name: str = "") -> str:
    path = folder / (name or head)
    path.mkdir()
    (path / "training_config.yaml").write_text(yaml.safe_dump(config(head)))
    (path / "best.ckpt").write_bytes(b"weights")
    return str(path)


def exported(folder: Path, model_type: str) -> str:
    path = folder / f"export-{model_type}"
    path.mkdir()
    metadata = {"model_type": model_type, "node_names": NAMES, "edge_inds": [[0, 1], [1, 2]]}
    (path / "export_metadata.json").write_text(json.dumps(metadata))
    (path / "model.onnx").write_bytes(b"graph")
    return str(path)


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
        assert package.files == {
            "model_config.package/training_config.yaml": f"{folder}/training_config.yaml",
            "model_config.package/best.ckpt": f"{folder}/best.ckpt",
        }


def test_centers_and_crops_are_one_network(tmp_path: Path) -> None:
    folders = [trained(tmp_path, "centroid"), trained(tmp_path, "centered_instance")]
    package = read_package(folders)
    assert (package.kind, package.folders) == ("top-down", tuple(folders))
    assert len(package.files) == 4
    assert package.files["model_config.package[1]/best.ckpt"] == f"{folders[1]}/best.ckpt"


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("single_instance", "single"), ("bottomup", "bottom-up"), ("topdown", "top-down")],
)
def test_an_export_has_its_kind_and_skeleton(tmp_path: Path, model_type: str, kind: str) -> None:
    package = read_package([exported(tmp_path, model_type)])
    assert (package.kind, package.is_export) == (kind, True)
    assert package.skeleton == Skeleton(SKELETON.names, SKELETON.edges)
    assert [path.rpartition("/")[2] for path in package.files.values()] == [
        "export_metadata.json",
        "model.onnx",
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
