"""Make the paths in the values of a job file absolute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chunkq.job.job_path import canonical
from chunkq.job.model_config import ModelConfig
from chunkq.paths import absolute, absolute_input


def make_absolute(values: dict[str, Any], base: Path) -> None:
    """Make every path in the mapping absolute, in place.

    Empty paths and values of a wrong type stay unchanged.
    """
    if isinstance(output := values.get("output"), str) and output:
        values["output"] = canonical(output, base)
    inputs = values.get("input")
    if isinstance(inputs, (list, tuple)):
        values["input"] = [_absolute_input(value, base) for value in inputs]
    elif inputs is not None:
        values["input"] = _absolute_input(inputs, base)
    if (mask := values.get("mask")) is not None:
        values["mask"] = _absolute_input(mask, base)
    weights = values.get("weight_function")
    if isinstance(weights, (list, tuple)) and len(weights) == 2 and isinstance(weights[0], str):
        values["weight_function"] = [absolute(weights[0], base), weights[1]]
    model = values.get("model_config")
    if isinstance(model, dict):
        paths = {"processing_steps"} | {k for k in ModelConfig.model_fields if k.endswith("_file")}
        values["model_config"] = {
            key: absolute(value, base)
            if key in paths | {"checkpoint"} and isinstance(value, str) and value
            else value
            for key, value in model.items()
        }
        if (package := model.get("package")) is not None:
            values["model_config"]["package"] = _absolute_folders(package, base)


def _absolute_folders(value: object, base: Path) -> object:
    """Return one folder, or a list of folders, with absolute paths; other values as they are."""
    if isinstance(value, str):
        return [absolute(value, base)] if value else value
    if isinstance(value, (list, tuple)):
        return [absolute(v, base) if isinstance(v, str) and v else v for v in value]
    return value


def _absolute_input(value: object, base: Path) -> object:
    """Return an input with an absolute path; a value of a wrong type stays unchanged."""
    if isinstance(value, str) and value:
        return absolute_input(value, base)
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value["path"]:
        return {**value, "path": absolute_input(value["path"], base)}
    return value
