"""Detect the format of a model file from its content; file names are ignored."""

from __future__ import annotations

import io
import json
import zipfile
from types import MappingProxyType

MAGIC = MappingProxyType(
    {
        b"\x89HDF\r\n\x1a\n": "keras_h5",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "torch_save",  # before torch 1.6
    }
)
MEMBERS = MappingProxyType(
    {
        "/data/weights/": "exported",
        "serialized_exported_program.json": "exported",  # before torch 2.8
        "/code/": "torchscript",
        "/data.pkl": "torch_save",
        "model.weights.h5": "keras",
    }
)
"""Part of a member name in a zip file -> format. The first match decides."""
ONNX_FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42"
"""Protobuf tags that can follow `ir_version`, the first field of an ONNX model."""
MAX_HEADER = 100_000_000
"""Largest header of a safetensors file in bytes, by its specification."""
USES = MappingProxyType(
    {
        "torchscript": "a TorchScript file; use runtime: torch, type: torchscript and ts_file",
        "exported": "a torch.export file; use runtime: torch, type: exported and model_file",
        "torch_save": "a torch.save file; use runtime: torch and, if it contains weights, type: "
        "class with it as checkpoint, or, if it contains the network, type: file with model_file "
        "and trusted: true",
        "onnx": "an ONNX file; use runtime: onnx, type: file and model_file",
        "keras": "a Keras file; use runtime: tensorflow, type: file and model_file",
        "keras_h5": "a Keras HDF5 file; use runtime: tensorflow and, if it contains the network, "
        "type: file with model_file, or, if it contains weights, type: class or json with it as "
        "checkpoint",
        "keras_json": "a Keras JSON file; use runtime: tensorflow, type: json and json_file",
        "safetensors": "a safetensors file, which contains weights; use runtime: torch and type: "
        "class with it as checkpoint",
    }
)
"""Format -> its name and the keys of the job file to use it with; the end of an error message."""


def format_of(content: bytes) -> str | None:
    """Return the format of a model file, a key of USES, or None if it is unknown."""
    for magic, name in MAGIC.items():
        if content.startswith(magic):
            return name
    if members := _members(content):
        matches = (MEMBERS[part] for part in MEMBERS if any(part in f"/{m}" for m in members))
        return next(matches, None)
    if len(content) > 2 and content[0] == 8 and content[1] < 64 and content[2] in ONNX_FIELDS:
        return "onnx"
    if _is_safetensors(content):
        return "safetensors"
    return "keras_json" if _is_keras_json(content) else None


def _members(content: bytes) -> list[str]:
    try:
        return zipfile.ZipFile(io.BytesIO(content)).namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return []


def _is_safetensors(content: bytes) -> bool:
    """Return whether a file starts with the length of a JSON header, and the header."""
    length = int.from_bytes(content[:8], "little")
    return 2 <= length < MAX_HEADER and content[8:10] in (b'{"', b"{}")


def _is_keras_json(content: bytes) -> bool:
    if content.lstrip()[:1] != b"{":
        return False
    try:
        values = json.loads(content)
    except ValueError:
        return False
    return isinstance(values, dict) and "class_name" in values and "config" in values
