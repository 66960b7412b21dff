"""The error for a job file that pydantic refuses: one line per mistake."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from chunkq.errors import JobError
from chunkq.job.error_lines import error_line, without_branches
from chunkq.job.job_file import Job

PLACEHOLDER_MODEL = MappingProxyType(
    {"runtime": "torch", "type": "torchscript", "model_input_shape": [1]}
)


def invalid_job_error(values: Mapping[str, Any], error: ValidationError) -> JobError:
    """Return the error for keys with absolute paths, with all that is wrong with them."""
    errors: list[Any] = _independent(error.errors())
    has_one_input = not isinstance(values.get("input"), (list, tuple))
    for detail in errors:
        detail["loc"] = without_branches(detail["loc"], has_one_input=has_one_input)
    lines = [error_line(detail) for detail in errors]
    return JobError([*lines, *_combination_problems(values, [e["loc"] for e in errors])])


def _independent(errors: list[Any]) -> list[Any]:
    """Return pydantic's errors without those of lists that are too short without invalid items."""
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(e["loc"][:-1][: len(error["loc"])] == error["loc"] for e in errors)
    ]


def _combination_problems(
    values: Mapping[str, Any], invalid: list[tuple[int | str, ...]]
) -> list[str]:
    """Check the combinations of the valid keys; placeholders replace required invalid keys.

    pydantic skips these checks if any key is invalid. `invalid` has the locations of these keys.
    """
    invalid = [location for location in invalid if location]
    model = values.get("model_config")
    model = dict(model) if isinstance(model, dict) else {"ts_file": "/"}
    valid = dict(values)
    for section, *inner in invalid:
        if section == "model_config" and inner:
            model.pop(str(inner[0]), None)
        else:
            valid.pop(str(section), None)
    if "type" not in model:
        model["ts_file"] = "/"
    valid = {"input": "/", "output": "/", **valid, "model_config": {**PLACEHOLDER_MODEL, **model}}
    reported = {".".join(map(str, location[:2])) for location in invalid}
    reported |= {str(location[0]) for location in invalid if location[0] != "model_config"}
    try:
        Job.model_validate(valid)
    except JobError as error:
        # A line such as "strides: unsupported for inference_type patch" may come from the default
        # that replaced an invalid inference_type.
        keys = "|".join(re.escape(str(location[-1])) for location in invalid) or "(?!)"
        reason = re.compile(rf"\bfor ({keys})\b")
        return [
            line
            for line in error.problems
            if line.partition(":")[0] not in reported and not reason.search(line)
        ]
    except ValidationError:
        pass
    return []
