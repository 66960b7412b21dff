"""`SleapPackage`: what the folders of a network of sleap-nn contain, read without sleap-nn."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from chunkq.errors import ErrorCode, JobError
from chunkq.images.skeleton import Skeleton

KEY = "model_config.package"
CONFIG, CHECKPOINT = "training_config.yaml", "best.ckpt"
"""Files of the folder of a trained model."""
METADATA, GRAPH = "export_metadata.json", "model.onnx"
"""Files of the folder of an export."""
MAX_BYTES = 16 << 20
"""Largest size of a file that describes a model."""
SINGLE, BOTTOM_UP, CENTROIDS, CROPS = (
    "single_instance",
    "bottomup",
    "centroid",
    "centered_instance",
)
"""Kinds of trained models that chunkq runs, as sleap-nn names them."""
EXPORTED: dict[str, PackageKind] = {
    "single_instance": "single",
    "bottomup": "bottom-up",
    "topdown": "top-down",
}
"""Kind of an export in its metadata -> kind of a package."""

PackageKind = Literal["single", "bottom-up", "top-down"]


@dataclass(frozen=True)
class SleapPackage:
    """A network of sleap-nn that finds the keypoints of animals in a frame.

    kind       `single`: one animal; `bottom-up`: parts, then animals; `top-down`: the center of
               each animal, then the parts in a crop around it
    folders    folders, absolute: one, or of trained `top-down` models the one of the centers and
               the one of the crops
    is_export  whether it is an export to ONNX, in which thresholds and refinement are fixed
    skeleton   names of the keypoints and the edges between them
    channels   number of channels that an export takes; 0 for trained models, which convert frames
    """

    kind: PackageKind
    folders: tuple[str, ...]
    is_export: bool
    skeleton: Skeleton
    channels: int = 0


def package_files(folders: Sequence[str]) -> dict[str, str]:
    """Return the files of folders that determine the predictions: `package[0]/NAME` -> path."""
    return {
        f"package[{number}]/{name}": path
        for number, folder in enumerate(folders)
        for name in (CONFIG, CHECKPOINT, METADATA, GRAPH)
        if os.path.isfile(path := os.path.join(folder, name))
    }


def folder_of(key: str) -> int | None:
    """Return the number of the folder of a key of `package_files`, None for another key."""
    match = re.fullmatch(r"package\[(\d)\]/.+", key)
    return match and int(match[1])


def read_package(folders: Sequence[str]) -> SleapPackage:
    """Return what one folder contains, or two with the trained models of `top-down`, in order.

    Raises JobError in one line if a folder is no package of sleap-nn, is damaged, or has a model
    that chunkq does not run.
    """
    if len(folders) not in (1, 2):
        raise _refused(f"{len(folders)} folders; use one, or two for a top-down model")
    folders = [os.path.abspath(folder) for folder in folders]
    for folder in folders:
        if not os.path.isdir(folder):
            raise _refused(f"{folder} is no folder; fix the path")
    is_export = [os.path.exists(os.path.join(folder, METADATA)) for folder in folders]
    if len(folders) == 1 and is_export[0]:
        return _export(folders[0])
    if any(is_export):
        raise _refused(
            f"{folders[is_export.index(True)]} is an export, which contains both networks; use it "
            "alone"
        )
    return _trained(folders)


def _export(folder: str) -> SleapPackage:
    path = os.path.join(folder, METADATA)
    try:
        metadata = json.loads(_read(path))
    except ValueError as error:
        raise _refused(f"{path} is damaged: {error}; export the model again") from None
    if not isinstance(metadata, dict) or "model_type" not in metadata:
        raise _refused(f"{path} has no `model_type`; export the model again")
    model_type = str(metadata["model_type"])
    if model_type not in EXPORTED:
        raise _refused(
            f"{folder} is an export of the unsupported type {model_type}; expected one of "
            f"{', '.join(EXPORTED)}"
        )
    graph = os.path.join(folder, GRAPH)
    if not os.path.isfile(graph):
        raise _refused(f"{graph} is missing; export the model again with --format onnx")
    try:
        names = tuple(str(name) for name in metadata["node_names"])
        edges = tuple((int(a), int(b)) for a, b in metadata["edge_inds"])
        skeleton, channels = Skeleton(names, edges), int(metadata["input_channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(
            f"{path} has no valid `node_names`, `edge_inds` and `input_channels`: {error}; export "
            "the model again"
        ) from None
    return SleapPackage(EXPORTED[model_type], (folder,), True, skeleton, channels)


def _trained(folders: Sequence[str]) -> SleapPackage:
    configs = [_config(folder) for folder in folders]
    types = [_model_type(folder, c) for folder, c in zip(folders, configs, strict=True)]
    for folder in folders:
        checkpoint = os.path.join(folder, CHECKPOINT)
        if not os.path.isfile(checkpoint):
            raise _refused(f"{checkpoint} is missing; train the model to its end, or copy it")
    kinds: dict[tuple[str, ...], PackageKind] = {
        (SINGLE,): "single",
        (BOTTOM_UP,): "bottom-up",
        (CENTROIDS, CROPS): "top-down",
    }
    if tuple(types) not in kinds:
        raise _refused(_wrong_types(folders, types))
    skeletons = [_skeleton(folder, c) for folder, c in zip(folders, configs, strict=True)]
    return SleapPackage(kinds[tuple(types)], tuple(folders), False, skeletons[-1])


def _wrong_types(folders: Sequence[str], types: Sequence[str]) -> str:
    """Return what is wrong with models that do not make up a network, and what to do."""
    if len(types) == 1:
        if types[0] == CENTROIDS:
            return f"{folders[0]} finds centers only; use a list of it and the folder of the crops"
        if types[0] == CROPS:
            return f"{folders[0]} needs centers; use a list of their folder and this one"
        return (
            f"{folders[0]} has a model of the unsupported type {types[0]}; expected "
            f"{SINGLE}, {BOTTOM_UP}, or a list of {CENTROIDS} and {CROPS}"
        )
    order = f"found {types[0]} and {types[1]}, expected {CENTROIDS} and {CROPS}"
    if tuple(types) == (CROPS, CENTROIDS):
        return f"{order}; exchange the folders"
    if types[0] in (SINGLE, BOTTOM_UP):
        return f"{order}; use {folders[0]} alone"
    return f"{order}; fix the folders"


def _config(folder: str) -> Mapping[str, Any]:
    import yaml  # many commands look for a package, few find one

    path = os.path.join(folder, CONFIG)
    if not os.path.isfile(path):
        older = os.path.exists(os.path.join(folder, "training_config.json"))
        raise _refused(
            f"{folder} has a model of SLEAP 1.4 or older, which is unsupported; train it with "
            "sleap-nn"
            if older
            else f"{folder} is no folder of sleap-nn: {CONFIG} and {METADATA} are missing; use the "
            "folder of a trained model or of an export"
        )
    try:
        config = yaml.safe_load(_read(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise _refused(f"{path} is damaged: {reason}; copy it again") from None
    if not isinstance(config, dict):
        raise _refused(f"{path} is damaged: expected a mapping; copy it again")
    return config


def _model_type(folder: str, config: Mapping[str, Any]) -> str:
    """Return the only head of a model that is not null, as sleap-nn names it."""
    section: Any = config.get("model_config")
    heads = section.get("head_configs") if isinstance(section, dict) else None
    types = [str(k) for k, v in heads.items() if v is not None] if isinstance(heads, dict) else []
    if len(types) != 1:
        raise _refused(
            f"{os.path.join(folder, CONFIG)} is damaged: expected one head below "
            f"model_config.head_configs, found {len(types)}; copy it again"
        )
    return types[0]


def _skeleton(folder: str, config: Mapping[str, Any]) -> Skeleton:
    """Return the first skeleton of a model, the one that sleap-nn predicts."""
    try:
        first = config["data_config"]["skeletons"][0]
        names = tuple(str(node["name"]) for node in first["nodes"])
        edges = tuple(
            (names.index(edge["source"]["name"]), names.index(edge["destination"]["name"]))
            for edge in first.get("edges") or ()
        )
        return Skeleton(names, edges, str(first.get("name") or ""))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _refused(
            f"{os.path.join(folder, CONFIG)} is damaged: no valid skeleton below "
            f"data_config.skeletons ({error}); copy it again"
        ) from None


def _read(path: str) -> str:
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise _refused(f"{path} has more than {MAX_BYTES} bytes; copy it again")
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise _refused(f"{path} cannot be read: {error.strerror}; fix its permissions") from None


def _refused(problem: str) -> JobError:
    return JobError(f"{KEY}: {problem}", code=ErrorCode.MODEL_UNUSABLE)
