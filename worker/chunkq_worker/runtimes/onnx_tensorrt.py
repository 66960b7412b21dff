"""ONNX Runtime's TensorRT provider: its options, its engine cache, and its libraries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from chunkq.errors import ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.job.onnx_external import external_files
from chunkq.paths import file_hash, is_url, read_bytes
from chunkq_worker.runtimes.cache_folder import cache_folder
from chunkq_worker.runtimes.onnx_import import onnxruntime

TENSORRT = "TensorrtExecutionProvider"
PACKAGES = ("tensorrt-cu13-libs", "tensorrt-cu12-libs", "tensorrt")
"""Packages of which one has TensorRT's libraries, unless the system has them."""
MODULES = ("tensorrt_libs", "tensorrt")
"""Their modules, which load the libraries when imported."""
INSTALL = (
    "install the TensorRT version that this onnxruntime requires (pip install tensorrt), "
    "or use provider: cuda"
)


@dataclass(frozen=True)
class EngineKey:
    """What a built engine is valid for: the graph and its weights, the GPU, versions, options."""

    graph: str
    weights: tuple[str, ...]
    gpu: str
    versions: Mapping[str, str]
    precision: str

    def digest(self) -> str:
        """Return a name for the folder of the engine, 16 hex digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def provider(model: ModelConfig) -> tuple[str, dict[str, str]]:
    """Return the provider with its options for a session; create the folder of its engines.

    Raise ModelError if the installed ONNX Runtime has no such provider.
    """
    if TENSORRT not in onnxruntime.get_available_providers():
        raise ModelError(
            "model_config.provider: tensorrt, but the installed onnxruntime has no TensorRT "
            "provider; use provider: cuda, or another onnxruntime-gpu"
        )
    for module in MODULES:
        with suppress(
            ImportError, OSError
        ):  # then the system has the libraries, or the check fails
            import_module(module)
    return TENSORRT, provider_options(model, cache_folder("tensorrt", engine_key(model).digest()))


def check_provider(session: Any) -> None:
    """Raise ModelError if a session runs without TensorRT: ONNX Runtime only logs the reason."""
    if TENSORRT not in session.get_providers():
        raise ModelError(
            "model_config.provider: tensorrt, but onnxruntime cannot load its TensorRT libraries; "
            + INSTALL
        )


def provider_options(model: ModelConfig, folder: Path | None) -> dict[str, str]:
    """Return the options of the provider. Without a folder, each process builds the engine."""
    options = {"trt_fp16_enable": str(int(model.effective_precision == "float16"))}
    if folder is not None:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }
    return options


def engine_key(model: ModelConfig) -> EngineKey:
    """Return the key of the engine for a job's graph on the current GPU."""
    path = model.model_file or ""
    return EngineKey(
        graph=_file_hash(path),
        weights=_weight_hashes(path),
        gpu=_gpu(),
        versions={"onnxruntime": onnxruntime.__version__, **_package_versions()},
        precision=model.effective_precision,
    )


def _file_hash(path: str) -> str:
    """Return the hash of a file; an empty text if opening the session will report it."""
    try:
        return file_hash(path)
    except OSError:
        return ""


def _weight_hashes(path: str) -> tuple[str, ...]:
    if is_url(path):
        return ()  # external weights need a local file
    try:
        files = external_files(read_bytes(path))
    except (OSError, ValueError):
        return ()
    return tuple(_file_hash(str(Path(path).parent / name)) for name in files)


def _gpu() -> str:
    """Return the name and the compute capability of the current GPU.

    Without torch it is unknown; ONNX Runtime then tells GPUs apart by the capability in file names.
    """
    with suppress(ImportError, RuntimeError, AssertionError):
        torch = import_module("torch")
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{properties.name} {properties.major}.{properties.minor}"
    return "unknown"


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
