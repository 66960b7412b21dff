"""Folders as sleap-nn 0.3.5 writes them, with the keys that count."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from chunkq.images.skeleton import Skeleton

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
    metadata["input_channels"] = 1
    (path / "export_metadata.json").write_text(json.dumps(metadata))
    (path / "model.onnx").write_bytes(b"graph")
    return str(path)
