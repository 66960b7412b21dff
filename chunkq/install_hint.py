"""The command that installs an extra of chunkq into this environment."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PACKAGE = "chunkq"
EXTRAS = {
    "dask": "dask",
    "distributed": "dask",
    "h5py": "hdf5",
    "hdf5plugin": "hdf5",
    "imagecodecs": "tiff",
    "keras": "tensorflow",
    "matplotlib": "plot",
    "nibabel": "nifti",
    "onnx": "export",
    "onnxruntime": "onnx",
    "onnxscript": "export",
    "ray": "ray",
    "redis": "redis",
    "rq": "redis",
    "s3fs": "s3",
    "sleap_io": "slp",
    "starlette": "view",
    "tensorflow": "tensorflow",
    "tifffile": "tiff",
    "torch": "torch",
    "uvicorn": "view",
}
"""Package -> the extra of chunkq that installs it."""


def install_command(extra: str = "") -> str:
    """Return the command, quoted for a shell, that installs chunkq with an extra.

    It names the folder or file from which chunkq was installed, because pip finds the name
    `chunkq` only in an environment that contains it.
    """
    path, is_editable = _origin()
    name = shlex.quote(f"{path}[{extra}]" if extra else path)
    return f"pip install {'-e ' if is_editable else ''}{name}"


def remote_hint(extra: str, place: str) -> str:
    """Return how to install chunkq with an extra at a place other than this environment."""
    if _origin() == (PACKAGE, False):
        return f"run `{install_command(extra)}` {place}"
    return f"run `pip install '.[{extra}]'` {place}, in a clone of chunkq"


def package_hint(error: ModuleNotFoundError) -> str | None:
    """Return how to install a missing package, or None if no extra of chunkq installs it."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"{package}; run `{install_command(EXTRAS[package])}`"


def _origin() -> tuple[str, bool]:
    """Return what pip installs chunkq from, and whether as an editable installation.

    PEP 610: the file direct_url.json exists unless chunkq came from a package index.
    """
    try:
        record = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        root = Path(__file__).parents[1]
        return (str(root), True) if (root / "pyproject.toml").exists() else (PACKAGE, False)
    values: dict[str, Any] = json.loads(record or "{}")
    url = urlsplit(values.get("url", ""))
    path = unquote(url.path)
    if url.scheme == "file" and Path(path).exists():
        return path, bool(values.get("dir_info", {}).get("editable"))
    return PACKAGE, False
