"""Job file: strict, frozen pydantic models. Validation does not read the volumes."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType
from typing import Any, Literal

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from chunkq.access import BUCKET_SCHEMES
from chunkq.errors import ArgumentError, ErrorCode, JobError, suggestion
from chunkq.geometry.grids import Edge
from chunkq.geometry.padding import PadMode
from chunkq.job.fields import (
    Classes,
    InferenceType,
    InputConfig,
    Inputs,
    Names,
    Offsets,
    Positive,
    Section,
    Shape,
    Widths,
)
from chunkq.job.job_path import canonical, output_problem, printable_path
from chunkq.job.model_config import ModelConfig, model_problems
from chunkq.paths import absolute, without_secret
from chunkq.plan.outputs import Activation, Combine

MAX_FILE_BYTES = 1 << 20
"""Maximum size of a job file. A larger file is something else."""
MAX_VALUES = 100_000
"""Maximum number of values in a job file; each repetition by a YAML alias counts."""


class DaskConfig(Section):
    """Options to connect to a Dask cluster or to start one."""

    address: str | None = None
    protocol: Literal["tcp", "tls", "ucx"] = "tcp"
    interface: str | None = None
    scheduler_port: Positive = 8786
    n_workers: Positive | None = None
    threads_per_worker: Positive | None = None


class RayConfig(Section):
    """Options to connect to a Ray cluster or to start one."""

    address: str | None = None
    port: Positive = 6379


class Job(Section):
    """A job: a network, the volumes and how overlapping predictions are combined.

    Lists have one entry per spatial axis of the volume, in storage order; lengths are in voxels.
    """

    input: Inputs
    output: str
    queue: str | None = None
    cluster: Literal["local", "slurm", "running"] = "local"
    hardware: Literal["gpu", "cpu_only"] = "gpu"
    combine: Combine = "weighted_avg"
    inference_type: InferenceType = "patch"
    chunksize: Shape | None = None
    pad_mode: PadMode = "constant"
    pad_value: float = 0
    pad_width: Widths | None = None
    offsets: Offsets = ()
    strides: Shape | None = None
    margin: Widths | None = None
    edge: Edge | None = None
    weight_function: Names = ("weight_uniform",)
    activation: Activation = "none"
    nan: Literal["fail", "zero"] = "fail"
    classes: Classes | None = None
    output_dtype: Literal["float32", "float16"] | None = None
    zarr_format: Literal[2, 3] = 3
    storage_chunks: Shape | None = None
    roi: Any = None
    allow_empty: bool = False
    threads: Positive | None = None
    dask_config: DaskConfig = DaskConfig()
    ray_config: RayConfig = RayConfig()
    model: ModelConfig = Field(alias="model_config")

    @model_validator(mode="after")
    def _check_key_combinations(self) -> Job:
        problems = [
            *_geometry_problems(self),
            *_weight_problems(self),
            *model_problems(self.model),
            *_input_problems(self),
            *_unsupported_keys(self),
            *_path_problems(self),
            *_credential_problems(self),
            *_access_problems(self),
        ]
        if problems:
            raise JobError(problems)
        return self

    @property
    def inputs(self) -> tuple[InputConfig, ...]:
        """Each input with how it is accessed and what is read of it."""
        return tuple(InputConfig(path=i) if isinstance(i, str) else i for i in self.input)

    @property
    def input_paths(self) -> tuple[str, ...]:
        """The path of each input."""
        return tuple(config.path for config in self.inputs)

    @property
    def step_edge(self) -> Edge:
        """Placement of the last patch: `edge`, or the default of the inference type."""
        return self.edge or ("shift" if self.inference_type == "sliding_window" else "pad")

    @property
    def files(self) -> dict[str, str]:
        """Files other than the volumes that determine the result, by key path."""
        files = {f"model_config.{key}": path for key, path in self.model.files.items()}
        if len(self.weight_function) == 2:
            files["weight_function"] = self.weight_function[0]
        return files

    def with_files(self, paths: Mapping[str, str]) -> Job:
        """Return a copy of the job with the paths of some `files` replaced, by key path."""
        section = "model_config."
        model = {k.removeprefix(section): p for k, p in paths.items() if k.startswith(section)}
        update: dict[str, Any] = {"model": self.model.model_copy(update=model)}
        if "weight_function" in paths:
            update["weight_function"] = (paths["weight_function"], *self.weight_function[1:])
        return self.model_copy(update=update)

    def as_dict(self) -> dict[str, Any]:
        """Return the job as JSON values with the key names of the job file."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def select_job_file(job: Path | None, config: Path | None) -> Path:
    """Return the job file of a command: its argument JOB, or the value of its option -c.

    Raises JobError unless exactly one of them is given.
    """
    if job is not None and config is not None:
        raise JobError(f"-c: found {config} beside the job file {job}; use one of them")
    path = job or config
    if path is None:
        raise JobError("JOB: missing; name a YAML or JSON job file, `chunkq init` writes one")
    return path


def load_job(
    source: str | Path | Mapping[str, Any],
    *,
    input: str | None = None,
    output: str | None = None,
) -> Job:
    """Read a job from a YAML file, a JSON file or a mapping, and make its paths absolute.

    Paths in a file are relative to the file's folder. Paths in a mapping, and the arguments
    `input` and `output`, which replace those of the job, are relative to the working directory.
    Raises JobError with one line per mistake.
    """
    values = job_values(source)
    if input is not None:
        volume, mapping = absolute(input, Path.cwd()), values.get("input")
        values["input"] = {**mapping, "path": volume} if isinstance(mapping, dict) else volume
    if output is not None:
        values["output"] = canonical(output, Path.cwd())
    return _parse_with_output(values)


def job_values(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a job file or a mapping, with absolute paths and not validated.

    Raises ArgumentError for a source of another type, and JobError for an unreadable file.
    """
    if isinstance(source, Mapping):
        values, base = dict(source), Path.cwd()
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        values, base = _read_file(path), path.absolute().parent
    else:
        raise ArgumentError(
            "job: expected the path of a job file or a dict of its keys, found "
            f"{type(source).__name__}"
        )
    _make_absolute(values, base)
    return values


def _parse_with_output(values: Mapping[str, Any]) -> Job:
    """Validate a mapping, including the canonical form of its output path.

    Raises JobError with one line per mistake.
    """
    output = values.get("output")
    problem = output_problem(output) if isinstance(output, str) else None
    lines = [] if problem is None else [f"output: {printable_path(str(output))} {problem}"]
    try:
        job = parse_job(values)
    except JobError as error:
        if any(problem.startswith("output: ") for problem in error.problems):
            raise
        raise JobError([*error.problems, *lines], code=error.code) from None
    if lines:
        raise JobError(lines, code=ErrorCode.PATH_INVALID)
    return job


def parse_job(values: Mapping[str, Any]) -> Job:
    """Validate a mapping with absolute paths. Raises JobError with one line per mistake."""
    try:
        return Job.model_validate(dict(values))
    except ValidationError as error:
        errors = _independent(error.errors())
    has_one_input = not isinstance(values.get("input"), (list, tuple))
    for detail in errors:
        detail["loc"] = _without_branches(detail["loc"], has_one_input=has_one_input)
    lines = [_message(error) for error in errors]
    raise JobError([*lines, *_combination_problems(values, [error["loc"] for error in errors])])


def _independent(errors: list[Any]) -> list[Any]:
    """Return pydantic's errors without those of lists that are too short without invalid items."""
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(e["loc"][:-1][: len(error["loc"])] == error["loc"] for e in errors)
    ]


PLACEHOLDER_MODEL = MappingProxyType(
    {"runtime": "torch", "type": "torchscript", "model_input_shape": [1]}
)


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


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of the job file."""
    return Job.model_json_schema(by_alias=True)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = _read_content(path).decode()
    except FileNotFoundError:
        raise JobError(
            f"{path}: no such job file; fix the path, or run `chunkq init` to write a job file",
            code=ErrorCode.JOB_FILE_MISSING,
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an invalid path
        raise _unreadable(path, f"cannot be read: {error}; use a YAML or JSON file") from None
    import yaml  # imported here because most commands read no job file

    from chunkq.job import yaml_values

    try:
        values = json.loads(text) if path.suffix == ".json" else yaml_values.load(text)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise _unreadable(path, f"not JSON: {error.msg} at {position}; fix the syntax") from None
    except yaml.YAMLError as error:
        raise _unreadable(path, f"not YAML: {_yaml_reason(error)}") from None
    except RecursionError:
        raise _unreadable(path, "lists or mappings are nested too deeply; remove levels") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML and json raise these for a number of 5000 digits, or `!!timestamp 2001-99-99`.
        reason = " ".join(str(error).split())
        raise _unreadable(path, f"a value cannot be read: {reason}; fix the value") from None
    if not isinstance(values, dict):
        content = "no content" if values is None else _printed(values)
        raise _unreadable(
            path,
            f"expected a mapping of keys to values, found {content}; "
            "run `chunkq init` to write a job file",
        )
    _check_size(path, values)
    return values


def _yaml_reason(error: Exception) -> str:
    """Return what is wrong with a YAML file, where, and what to do."""
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return f"{' '.join(str(error).split())}; fix the syntax"
    position = f"line {mark.line + 1}, column {mark.column + 1}"
    if r"'\t'" in problem:
        return f"tab at {position}; use spaces"
    context = getattr(error, "context", None)
    return f"{f'{context}: ' if context else ''}{problem} at {position}; fix the syntax"


def _unreadable(path: Path, problem: str) -> JobError:
    return JobError(f"{path}: {problem}", code=ErrorCode.JOB_FILE_UNREADABLE)


def _read_content(path: Path) -> bytes:
    """Return the content of a job file. Raises OSError if it is too large or not a file."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # reading a device may never end
            raise OSError("not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return content


def _check_size(path: Path, values: Any) -> None:
    """Raise JobError if there are more than `MAX_VALUES` values.

    YAML aliases can expand a few lines into 10^11 values, or into a list that contains itself.
    """
    count, pending = 0, [values]
    while pending:
        value = pending.pop()
        count += 1
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            pending.extend(value)
        if count + len(pending) > MAX_VALUES:
            raise _unreadable(
                path,
                f"contains more than {MAX_VALUES} values, or an alias that contains itself; "
                "remove values or aliases",
            )


def _make_absolute(values: dict[str, Any], base: Path) -> None:
    """Make every path in the mapping absolute, in place. Values of a wrong type stay unchanged."""
    if isinstance(output := values.get("output"), str):
        values["output"] = canonical(output, base)
    inputs = values.get("input")
    if isinstance(inputs, (list, tuple)):
        values["input"] = [_absolute_input(value, base) for value in inputs]
    elif inputs is not None:
        values["input"] = _absolute_input(inputs, base)
    weights = values.get("weight_function")
    if isinstance(weights, (list, tuple)) and len(weights) == 2 and isinstance(weights[0], str):
        values["weight_function"] = [absolute(weights[0], base), weights[1]]
    model = values.get("model_config")
    if isinstance(model, dict):
        paths = {"processing_steps"} | {k for k in ModelConfig.model_fields if k.endswith("_file")}
        values["model_config"] = {
            key: absolute(value, base)
            if key in paths | {"checkpoint"} and isinstance(value, str)
            else value
            for key, value in model.items()
        }


def _absolute_input(value: object, base: Path) -> object:
    """Return an input with an absolute path; a value of a wrong type stays unchanged."""
    if isinstance(value, str):
        return absolute(value, base)
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": absolute(value["path"], base)}
    return value


def _legal_names(location: Iterable[int | str]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "input": InputConfig,
        "model_config": ModelConfig,
        "dask_config": DaskConfig,
        "ray_config": RayConfig,
    }
    section = sections.get(str(next(iter(location), "")), Job)
    return [field.alias or name for name, field in section.model_fields.items()]


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "a list of at least {min_length} item",
}
"""pydantic's error type -> the expected value."""
_REPLACED_KEYS = {"model_config.autocast": "precision"}
"""Key of an earlier version -> the key that has its values."""


def _without_branches(
    location: tuple[int | str, ...], *, has_one_input: bool
) -> tuple[int | str, ...]:
    """Return pydantic's location of an error without the parts that name a branch of a union."""
    if location[:1] == ("input",):
        first = 1 if has_one_input else 2
        location = (*location[:first], *location[3:])
    return tuple(part for part in location if part not in ("int", "float"))


def _message(error: Any) -> str:
    """Format one of pydantic's errors as `key.path: what is wrong; what to do`."""
    location = error["loc"]
    path = ".".join(map(str, location)) or "a key"
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        if path in _REPLACED_KEYS:
            return f"{path}: unknown key; did you mean {_REPLACED_KEYS[path]!r}?"
        hint = suggestion(str(location[-1]), _legal_names(location if len(location) > 1 else ()))
        return f"{path}: unknown key{hint or '; run `chunkq schema` to list the valid keys'}"
    if kind == "missing":
        return f"{path}: missing; set it (run `chunkq init` for an example)"
    value = _printed(error["input"])
    if kind == "literal_error":
        legal = str(context["expected"]).replace(" or ", ", ")
        hint = suggestion(value.strip("'"), legal.replace("'", "").split(", "))
        return f"{path}: invalid value {value}; expected one of {legal}{hint}"
    if kind in _EXPECTED:
        return f"{path}: expected {_EXPECTED[kind].format(**context)}, found {value}"
    message = str(error["msg"])
    return f"{path}: {message[0].lower()}{message[1:]}, found {value}"


def _printed(value: object) -> str:
    """Return a value for a message: shortened, with the password of a URL masked."""
    return VALUES.repr(without_secret(value) if isinstance(value, str) else value)


class _ShortRepr(Repr):
    """Representation of a value with at most 8 entries per list and 3 levels."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel, self.maxstring, self.maxlong = 3, 120, 60

    def repr_int(self, x: int, level: int) -> str:
        """Format an integer. Python cannot format one of more than 4300 digits."""
        return super().repr_int(x, level) if abs(x) < 10**1000 else "a number of over 1000 digits"


VALUES = _ShortRepr()


def _geometry_problems(job: Job) -> list[str]:
    kind = job.inference_type
    problems = []
    if kind == "sliding_window" and job.strides is None:
        problems.append(
            "strides: missing for inference_type sliding_window; set the step along each axis"
        )
    if kind != "sliding_window" and job.strides is not None:
        problems.append(_wrong_inference_type("strides", "sliding_window", kind))
    if kind != "patch" and job.offsets:
        problems.append(_wrong_inference_type("offsets", "patch", kind))
    if kind == "crop_margin" and job.margin is None:
        problems.append(
            "margin: missing for inference_type crop_margin; set the margin to crop along each axis"
        )
    if kind != "crop_margin" and job.margin is not None:
        problems.append(_wrong_inference_type("margin", "crop_margin", kind))
    if job.combine != "weighted_avg" and job.output_dtype is not None:
        problems.append(
            f"output_dtype: unsupported for combine {job.combine}, whose output has labels; "
            "remove it, or use combine weighted_avg"
        )
    return problems


def _wrong_inference_type(key: str, expected: InferenceType, kind: InferenceType) -> str:
    return (
        f"{key}: unsupported for inference_type {kind}; remove it, or use inference_type {expected}"
    )


def _weight_problems(job: Job) -> list[str]:
    from chunkq.blend.weights import LOG_PROFILES

    names = job.weight_function
    if len(names) > 2:
        return [f"weight_function: expected [name] or [file.py, function], found {_printed(names)}"]
    if len(names) == 1 and names[0] not in LOG_PROFILES:
        hint = suggestion(names[0], list(LOG_PROFILES))
        return [
            f"weight_function: invalid value {_printed(names[0])}; "
            f"expected one of {', '.join(LOG_PROFILES)}{hint}"
        ]
    return []


def _input_problems(job: Job) -> list[str]:
    model, join = job.model, job.model.join_dim
    if join is None:
        return []
    shape = model.model_input_shape
    if not 1 <= join <= len(shape):
        return [
            f"model_config.join_dim: {join} is not an axis of a batch (N, {str(shape)[1:-1]}); "
            f"use 1 to {len(shape)}"
        ]
    if join > 1 and shape[join - 1] != 1:  # the first axis can have the channels of an input
        return [
            f"model_config.join_dim: found length {shape[join - 1]} at axis {join - 1} of "
            f"model_input_shape; expected 1, because the {len(job.input)} inputs are stacked there"
        ]
    return []


def _paths(job: Job) -> dict[str, str]:
    """Return every path of a job by its key."""
    inputs = job.input_paths
    paths = {f"input.{n}" if len(inputs) > 1 else "input": path for n, path in enumerate(inputs)}
    return paths | {"output": job.output} | job.files


def _path_problems(job: Job) -> list[str]:
    """Return the problems of paths that no system call accepts: with NUL or not Unicode."""
    problems = []
    for key, path in _paths(job).items():
        try:
            if b"\0" not in path.encode():
                continue
        except UnicodeEncodeError:
            pass
        problems.append(f"{key}: invalid path {path!r}; remove NUL and surrogate characters")
    return problems


def _credential_problems(job: Job) -> list[str]:
    """Return the problems of paths with credentials. Paths are stored and printed."""
    return [
        f"{key}: {without_secret(path)} contains credentials; set them in the environment"
        for key, path in _paths(job).items()
        if without_secret(path) != path
    ]


def _access_problems(job: Job) -> list[str]:
    """Return the problems of inputs whose storage has no anonymous access or requester pays."""
    schemes = "s3:// and gs://"
    return [
        f"input.{key}: unsupported for {without_secret(config.path)}; use it for {schemes} only"
        for config in job.inputs
        for key in config.access.options
        if config.path.partition("://")[0] not in BUCKET_SCHEMES
    ]


def _unsupported_keys(job: Job) -> list[str]:
    """Return the problems of keys that are reserved for a later version."""
    return [] if job.roi is None else ["roi: unsupported in this version; remove it"]
