"""What a model file is, whatever its name: told from its first bytes and what its zip holds."""

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
INSIDE = MappingProxyType(
    {
        "/data/weights/": "exported",
        "serialized_exported_program.json": "exported",  # before torch 2.8
        "/code/": "torchscript",
        "/data.pkl": "torch_save",
        "model.weights.h5": "keras",
    }
)
"""Part of a name inside the zip -> format; the first that is found decides."""
ONNX_FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42"
"""Tags that may follow a model's first field, its ir_version, in protobuf."""
USES = MappingProxyType(
    {
        "torchscript": "a TorchScript file; use runtime: torch, type: torchscript and ts_file",
        "exported": "a torch.export file; use runtime: torch, type: exported and model_file",
        "torch_save": "a file of torch.save; use runtime: torch and, if it holds weights, type: "
        "class with it as checkpoint, or, if it holds the network, type: file with model_file "
        "and trusted: true",
        "onnx": "an ONNX file; use runtime: onnx, type: file and model_file",
        "keras": "a Keras file; use runtime: tensorflow, type: file and model_file",
        "keras_h5": "a Keras HDF5 file; use runtime: tensorflow and, if it holds the network, "
        "type: file with model_file, or, if it holds weights, type: class or json with it as "
        "checkpoint",
        "keras_json": "a Keras JSON file; use runtime: tensorflow, type: json and json_file",
    }
)
"""Format -> what it is and the job's keys for it, to end a line that begins with the path."""


def format_of(content: bytes) -> str | None:
    """Return the key in USES of a model file's content; None where it is nothing known."""
    for magic, found in MAGIC.items():
        if content.startswith(magic):
            return found
    if names := _members(content):
        inside = (INSIDE[part] for part in INSIDE if any(part in f"/{name}" for name in names))
        return next(inside, None)
    if len(content) > 2 and content[0] == 8 and content[1] < 64 and content[2] in ONNX_FIELDS:
        return "onnx"
    return "keras_json" if _is_keras_json(content) else None


def _members(content: bytes) -> list[str]:
    try:
        return zipfile.ZipFile(io.BytesIO(content)).namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return []


def _is_keras_json(content: bytes) -> bool:
    if content.lstrip()[:1] != b"{":
        return False
    try:
        values = json.loads(content)
    except ValueError:
        return False
    return isinstance(values, dict) and "class_name" in values and "config" in values
