"""The job file: strict, frozen, checked as far as it can be without touching the volume."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from chunkq.combine import Activation, Combine
from chunkq.errors import ErrorCode, JobError, nearest
from chunkq.grids import Edge
from chunkq.job_path import canonical, path_problem, printable_path
from chunkq.padding import PadMode
from chunkq.paths import absolute, without_secret

InferenceType = Literal["patch", "sliding_window", "crop_margin"]
Dtype = Literal["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64"]


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_nested_tuple(value: object) -> object:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else _as_tuple(value)


LARGEST = 1 << 40
"""Largest whole number in a job file: products of one per axis and a dtype's size stay exact."""
MAX_FILE_BYTES = 1 << 20
"""Size of a job file that is still read; a longer one is some other file."""
MAX_VALUES = 100_000
"""Values that a job file may hold, each counted as often as aliases repeat it."""

Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Offset = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Shape = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Widths = Annotated[tuple[NonNegative, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Offsets = Annotated[tuple[tuple[Offset, ...], ...], BeforeValidator(_as_nested_tuple)]
Names = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(_one_or_more, json_schema_input_type=str | tuple[str, ...]),
]


class Section(BaseModel):
    """A part of the job file: no unknown keys, no silent conversions, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class DaskConfig(Section):
    """How to reach or make a Dask cluster."""

    address: str | None = None
    protocol: Literal["tcp", "tls", "ucx"] = "tcp"
    interface: str | None = None
    scheduler_port: Positive = 8786
    n_workers: Positive | None = None
    threads_per_worker: Positive | None = None


class RayConfig(Section):
    """How to reach or make a Ray cluster."""

    address: str | None = None
    port: Positive = 6379


class ModelConfig(Section):
    """The network: where it is, what it takes and what it gives."""

    runtime: Literal["torch", "tensorflow", "onnx", "numpy"]
    type: Literal["class", "file", "torchscript", "exported", "json"]
    model_input_shape: Shape
    model_output_shape: Shape | None = None
    dtype: Dtype = "float32"
    max_batch_size: Positive = 1
    device: Literal["cpu", "cuda"] = "cpu"
    processing_steps: str | None = None
    lost_dim: NonNegative | None = None
    join_dim: NonNegative | None = None
    class_file: str | None = None
    class_name: str | None = None
    kwargs_file: str | None = None
    checkpoint: str | None = None
    model_file: str | None = None
    ts_file: str | None = None
    json_file: str | None = None
    trusted: bool = False
    autocast: Literal["float16", "bfloat16"] | None = None
    compile: bool = False
    channels_last: bool = False
    cuda_graph: bool = False

    @property
    def files(self) -> dict[str, str]:
        """Files the network is made of, by key."""
        keys = (
            "class_file",
            "kwargs_file",
            "checkpoint",
            "ts_file",
            "model_file",
            "json_file",
            "processing_steps",
        )
        return {key: path for key in keys if (path := getattr(self, key)) is not None}


class Job(Section):
    """One job: a network, a volume, and how overlapping predictions combine.

    Lists speak of the volume's axes in storage order and in voxels.
    """

    input: Names
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
    output_dtype: Literal["float32", "float16"] | None = None
    zarr_format: Literal[2, 3] = 3
    storage_chunks: Shape | None = None
    roi: Any = None
    threads: Positive | None = None
    dask_config: DaskConfig = DaskConfig()
    ray_config: RayConfig = RayConfig()
    model: ModelConfig = Field(alias="model_config")

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Job:
        problems = [*_geometry_keys(self), *_weight_keys(self), *_model_keys(self.model)]
        problems += [*_input_keys(self), *_not_yet(self), *_path_texts(self), *_secrets(self)]
        if problems:
            raise JobError(problems)
        return self

    @property
    def step_edge(self) -> Edge:
        """Where the last patch goes: as asked, or the default of the inference type."""
        return self.edge or ("shift" if self.inference_type == "sliding_window" else "pad")

    @property
    def files(self) -> dict[str, str]:
        """Every file besides the volumes that decides the result, by key path."""
        files = {f"model_config.{key}": path for key, path in self.model.files.items()}
        if len(self.weight_function) == 2:
            files["weight_function"] = self.weight_function[0]
        return files

    def with_files(self, paths: Mapping[str, str]) -> Job:
        """Return the job with other paths for some of `files`, by key path."""
        section = "model_config."
        model = {k.removeprefix(section): p for k, p in paths.items() if k.startswith(section)}
        changed: dict[str, Any] = {"model": self.model.model_copy(update=model)}
        if "weight_function" in paths:
            changed["weight_function"] = (paths["weight_function"], *self.weight_function[1:])
        return self.model_copy(update=changed)

    def as_dict(self) -> dict[str, Any]:
        """Return the job as plain JSON values, with the job file's own key names."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def load_job(
    source: str | Path | Mapping[str, Any],
    *,
    input: str | None = None,
    output: str | None = None,
) -> Job:
    """Read a job from a YAML or JSON file or a mapping; every path in it becomes absolute.

    Paths inside a file are relative to that file, those of a mapping and `input`/`output`
    (which replace the job's own) to the working directory. Raises JobError with one line per
    mistake.
    """
    if isinstance(source, Mapping):
        values, base = dict(source), Path.cwd()
    else:
        path = Path(source)
        values, base = _read_file(path), path.absolute().parent
    _make_absolute(values, base)
    if input is not None:
        values["input"] = absolute(input, Path.cwd())
    if output is not None:
        values["output"] = canonical(output, Path.cwd())
    return _with_usable_output(values)


def _with_usable_output(values: Mapping[str, Any]) -> Job:
    """Check a mapping and that its output's path has a canonical form; one line per mistake."""
    output = values.get("output")
    problem = path_problem(output) if isinstance(output, str) else None
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
    """Check a mapping with absolute paths; raises JobError with one line per mistake."""
    try:
        return Job.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors()
    lines = [_one_line(item) for item in found]
    raise JobError([*lines, *_further_problems(values, [item["loc"] for item in found])])


MODEL_STAND_IN = MappingProxyType(
    {"runtime": "torch", "type": "torchscript", "model_input_shape": [1]}
)


def _further_problems(values: Mapping[str, Any], wrong: list[tuple[int | str, ...]]) -> list[str]:
    """Check how the other keys fit together, with stand-ins for what is wrong and needed."""
    wrong = [location for location in wrong if location]
    model = values.get("model_config")
    model = dict(model) if isinstance(model, dict) else {"ts_file": "/"}
    rest = dict(values)
    for section, *inner in wrong:
        if section == "model_config" and inner:
            model.pop(str(inner[0]), None)
        else:
            rest.pop(str(section), None)
    if "type" not in model:
        model["ts_file"] = "/"
    rest = {"input": "/", "output": "/", **rest, "model_config": {**MODEL_STAND_IN, **model}}
    known = {".".join(map(str, location[:2])) for location in wrong}
    known |= {str(location[0]) for location in wrong if location[0] != "model_config"}
    try:
        Job.model_validate(rest)
    except JobError as error:
        return [line for line in error.problems if line.partition(":")[0] not in known]
    except ValidationError:
        pass
    return []


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of the job file."""
    return Job.model_json_schema(by_alias=True)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = _content(path).decode()
    except FileNotFoundError:
        raise JobError(
            f"{path}: no such job file; `chunkq init` writes one to start from"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no possible path
        raise JobError(f"{path}: cannot be read as a job file: {error}") from None
    import yaml  # most commands read no job file

    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise JobError(f"{path}: not JSON: {error.msg} at {where}") from None
    except yaml.YAMLError as error:
        raise JobError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise JobError(f"{path}: lists or mappings are nested too deeply; remove levels") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML and json let these through: a date such as 2001-99-99, a number of 5000 digits.
        reason = " ".join(str(error).split())
        raise JobError(f"{path}: a value cannot be read: {reason}") from None
    if not isinstance(values, dict):
        raise JobError(f"{path}: a job file is a mapping of keys to values; see `chunkq init`")
    _check_size(path, values)
    return values


def _content(path: Path) -> bytes:
    """Return a job file's content; raises OSError for what is no file, or too large for one."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # a device may never end
            raise OSError("not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return content


def _check_size(path: Path, values: Any) -> None:
    """Refuse what aliases make endless or huge: a few lines of YAML can stand for 10^11 values."""
    count, waiting = 0, [values]
    while waiting:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
        if count + len(waiting) > MAX_VALUES:
            raise JobError(
                f"{path}: holds more than {MAX_VALUES} values, or an alias that contains itself; "
                "remove values or aliases"
            )


def _make_absolute(values: dict[str, Any], base: Path) -> None:
    """Resolve every path in place of a relative one; values of a wrong type are left to checks."""
    if isinstance(output := values.get("output"), str):
        values["output"] = canonical(output, base)
    inputs = values.get("input")
    if isinstance(inputs, str):
        values["input"] = absolute(inputs, base)
    elif isinstance(inputs, (list, tuple)):
        values["input"] = [absolute(v, base) if isinstance(v, str) else v for v in inputs]
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


def _legal_names(location: Iterable[int | str]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "model_config": ModelConfig,
        "dask_config": DaskConfig,
        "ray_config": RayConfig,
    }
    section = sections.get(str(next(iter(location), "")), Job)
    return [field.alias or name for name, field in section.model_fields.items()]


def _one_line(item: Any) -> str:
    """Turn one of pydantic's findings into `key.path: what is wrong; what to do`."""
    location = item["loc"]
    path = ".".join(str(part) for part in location if part not in ("int", "float")) or "a key"
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        hint = nearest(str(location[-1]), _legal_names(location if len(location) > 1 else ()))
        return f"{path}: unknown key{hint or '; `chunkq schema` lists the legal ones'}"
    if kind == "missing":
        return f"{path}: missing; `chunkq init` shows a complete job file"
    if kind == "literal_error":
        legal = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        hint = nearest(_shown(item["input"]).strip("'"), legal)
        return f"{path}: {_shown(item['input'])} is none of {context['expected']}{hint}"
    message = str(item["msg"]).replace("valid tuple", "list")
    return f"{path}: {message[0].lower()}{message[1:]}, not {_shown(item['input'])}"


def _shown(value: object) -> str:
    """Return a value as a message shows it: shortened, without the password of a URL."""
    return VALUES.repr(without_secret(value) if isinstance(value, str) else value)


class _Values(Repr):
    """Shows a few entries of a list and a few levels, whatever the value holds."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel, self.maxstring, self.maxlong = 3, 120, 60

    def repr_int(self, x: int, level: int) -> str:
        """Show a number; Python refuses to write one of more than 4300 digits."""
        return super().repr_int(x, level) if abs(x) < 10**1000 else "a number of over 1000 digits"


VALUES = _Values()


def _geometry_keys(job: Job) -> list[str]:
    kind = job.inference_type
    problems = []
    if kind == "sliding_window" and job.strides is None:
        problems.append("strides: missing; sliding_window needs the step along each axis")
    if kind != "sliding_window" and job.strides is not None:
        problems.append(f"strides: only for inference_type sliding_window, this job is {kind}")
    if kind != "patch" and job.offsets:
        problems.append(f"offsets: only for inference_type patch, this job is {kind}")
    if kind == "crop_margin" and job.margin is None:
        problems.append("margin: missing; crop_margin needs the rim to cut along each axis")
    if kind != "crop_margin" and job.margin is not None:
        problems.append(f"margin: only for inference_type crop_margin, this job is {kind}")
    if job.combine != "weighted_avg" and job.output_dtype is not None:
        problems.append(f"output_dtype: only for combine weighted_avg; {job.combine} gives labels")
    return problems


def _weight_keys(job: Job) -> list[str]:
    from chunkq.weights import LOG_PROFILES

    names = job.weight_function
    if len(names) > 2:
        return ["weight_function: give [name] of a built-in or [file.py, function]"]
    if len(names) == 1 and names[0] not in LOG_PROFILES:
        hint = nearest(names[0], list(LOG_PROFILES)) or f"; built in are {', '.join(LOG_PROFILES)}"
        return [f"weight_function: unknown name {_shown(names[0])}{hint}"]
    return []


_NEEDED = {
    "class": ("class_file", "class_name"),
    "torchscript": ("ts_file",),
    "file": ("model_file",),
    "exported": ("model_file",),
    "json": ("json_file",),
}
_TYPES = {
    "torch": ("class", "file", "torchscript", "exported"),
    "tensorflow": ("class", "file", "json"),
    "onnx": ("file",),
    "numpy": ("class",),
}
_TORCH_ONLY = ("autocast", "compile", "channels_last", "cuda_graph")


def _model_keys(model: ModelConfig) -> list[str]:
    runtime, legal = model.runtime, _TYPES[model.runtime]
    problems = [
        f"model_config.{key}: missing; type {model.type} needs it"
        for key in _NEEDED[model.type]
        if getattr(model, key) is None
    ]
    if model.type not in legal:
        problems = [
            f"model_config.type: {runtime} has no {model.type}; its types are {', '.join(legal)}"
        ]
    if runtime != "torch":
        problems += [
            f"model_config.{key}: only for runtime torch, this job's is {runtime}"
            for key in _TORCH_ONLY
            if getattr(model, key)
        ]
        if model.dtype == "bfloat16":
            problems.append(f"model_config.dtype: {runtime} takes no bfloat16 here; use float32")
    elif model.cuda_graph and model.device != "cuda":
        problems.append(
            f"model_config.cuda_graph: only for device cuda, this job's is {model.device}"
        )
    if runtime == "numpy":
        problems += _numpy_keys(model)
    if model.autocast is not None and not model.dtype.startswith(("float", "bfloat")):
        problems.append(f"model_config.autocast: dtype {model.dtype} is no floating point")
    return problems


def _numpy_keys(model: ModelConfig) -> list[str]:
    problems = []
    if model.checkpoint is not None:
        problems.append(
            "model_config.checkpoint: runtime numpy reads no checkpoint; load the weights in "
            "class_file and leave it out"
        )
    if model.device == "cuda":
        problems.append("model_config.device: runtime numpy computes on the CPU; set device: cpu")
    return problems


def _input_keys(job: Job) -> list[str]:
    model, join = job.model, job.model.join_dim
    if join is None:
        several = len(job.input) > 1
        return (
            ["input: several volumes need model_config.join_dim, the axis to stack them along"]
            if several
            else []
        )
    shape = model.model_input_shape
    if not 1 <= join <= len(shape):
        return [
            f"model_config.join_dim: {join} names no axis of a batch (N, {str(shape)[1:-1]}); "
            f"give 1 to {len(shape)}"
        ]
    if shape[join - 1] != 1:
        return [
            f"model_config.join_dim: model_input_shape has {shape[join - 1]} there, not 1; the "
            f"network sees the {len(job.input)} inputs stacked there"
        ]
    return []


def _paths(job: Job) -> dict[str, str]:
    """Return every path of a job by its key."""
    several = len(job.input) > 1
    paths = {f"input.{n}" if several else "input": path for n, path in enumerate(job.input)}
    return paths | {"output": job.output} | job.files


def _path_texts(job: Job) -> list[str]:
    """Refuse texts that cannot be paths: no system call takes them."""
    problems = []
    for key, path in _paths(job).items():
        try:
            if b"\0" not in path.encode():
                continue
        except UnicodeEncodeError:
            pass
        problems.append(f"{key}: {path!r} cannot be a path; remove the null or half characters")
    return problems


def _secrets(job: Job) -> list[str]:
    """Refuse credentials in paths: these are stored beside the output and shown in messages."""
    return [
        f"{key}: {without_secret(path)} carries credentials; give them in the environment"
        for key, path in _paths(job).items()
        if without_secret(path) != path
    ]


def _not_yet(job: Job) -> list[str]:
    """Refuse, by name, what the design foresees and this version cannot do."""
    return [] if job.roi is None else ["roi: not in this version; leave it out"]
