"""Networks that the user's own Python code makes."""

from __future__ import annotations

from typing import Any

from chunkq.errors import JobError, ModelError
from chunkq.job import ModelConfig
from chunkq.userfile import load_names, neighbours, pick


def make(model: ModelConfig) -> Any:
    """Return what class_name of class_file gives, called with the kwargs of kwargs_file.

    Raises ModelError in one line.
    """
    path, name = model.class_file or "", model.class_name or ""
    try:
        names = load_names(path, "model_config.class_file")
        made = pick(names, name, path, "model_config.class_name")
        kwargs = _kwargs(model.kwargs_file)
    except JobError as error:
        raise ModelError(str(error)) from error
    try:
        with neighbours(path):
            return made(**kwargs)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model_config.class_name: {name}(**kwargs) raised {type(error).__name__}: {reason}; "
            f"kwargs were {sorted(kwargs)}"
        ) from error


def _kwargs(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    key = "model_config.kwargs_file"
    kwargs = pick(load_names(path, key), "kwargs", path, key)
    if not isinstance(kwargs, dict):
        raise ModelError(f"{key}: `kwargs` in {path} is no dict")
    return kwargs
