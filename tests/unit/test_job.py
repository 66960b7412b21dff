import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from chunkq.access import Access
from chunkq.errors import ErrorCode, JobError
from chunkq.job.job_file import Job, job_schema
from chunkq.job.job_parsing import parse_job
from chunkq.job.job_reading import load_job
from chunkq.job.model_config import ModelConfig
from tests.strategies import job_values

CLASS = {"runtime": "torch", "type": "class", "model_input_shape": [4, 4]}
TENSORRT = {
    "runtime": "onnx",
    "type": "file",
    "model_file": "/m",
    "device": "cuda",
    "provider": "tensorrt",
}


def values(**more: Any) -> dict[str, Any]:
    """Return valid values, changed by `more`. A key set to None is omitted."""
    return {k: v for k, v in job_values((4, 4), **more).items() if v is not None}


def problems(job: dict[str, Any]) -> list[str]:
    """Return the problems of an invalid job."""
    with pytest.raises(JobError) as error:
        parse_job(job)
    assert str(error.value) == "\n".join(error.value.problems)
    assert error.value.exit_code == 2
    assert error.value.code is ErrorCode.JOB_INVALID
    return list(error.value.problems)


def keys(lines: list[str]) -> list[str]:
    """Return the key path with which each problem begins."""
    return [line.partition(": ")[0] for line in lines]


UNKNOWN_KEYS = [
    ({"pad_with": [1, 1]}, "pad_with", "'pad_width'"),
    ({"stride": [1, 1]}, "stride", "'strides'"),
    ({"xyzzy": 1}, "xyzzy", "chunkq explain"),
    ({"model": {"max_batchsize": 3}}, "model_config.max_batchsize", "'max_batch_size'"),
    ({"model": {"chunksize": [1]}}, "model_config.chunksize", "move it out of model_config"),
    ({"device": "cuda"}, "device", "move it into model_config"),
    ({"address": "a:1"}, "address", "move it into dask_config"),
    ({"patch_size": [1]}, "patch_size", "'model_config.model_input_shape'"),
    ({"model": {"patch_size": [1]}}, "model_config.patch_size", "'model_input_shape'"),
    ({"model": {"autocast": "bfloat16"}}, "model_config.autocast", "'precision'"),
    ({"dask_config": {"adress": "x"}}, "dask_config.adress", "'address'"),
    ({"ray_config": {"prot": 1}}, "ray_config.prot", "'port'"),
]
"""(change, key path of the problem, hint)."""

INVALID_VALUES: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"model": {"max_batch_size": "3"}}, "model_config.max_batch_size", ("integer", "'3'")),
    ({"model": {"max_batch_size": True}}, "model_config.max_batch_size", ("integer", "True")),
    ({"model": {"max_batch_size": 2.0}}, "model_config.max_batch_size", ("integer", "2.0")),
    ({"model": {"trusted": "yes"}}, "model_config.trusted", ("true", "false", "'yes'")),
    ({"pad_value": "abc"}, "pad_value", ("number", "'abc'")),
    ({"output": 3}, "output", ("string", "3")),
    ({"strides": "2"}, "strides", ("list", "'2'")),
    ({"strides": []}, "strides", ("list", "at least 1", "[]")),
    ({"threads": 0}, "threads", ("greater than 0", "found 0")),
    ({"threads": 2**50}, "threads", (str(2**40), str(2**50))),
    ({"chunksize": [64, "a"]}, "chunksize.1", ("integer", "'a'")),
    ({"chunksize": [True, 64]}, "chunksize.0", ("integer", "True")),
    ({"chunksize": [64, 0]}, "chunksize.1", ("greater than 0", "found 0")),
    ({"pad_width": [-1, 0]}, "pad_width.0", ("at least 0", "-1")),
    ({"offsets": [[1, 2], [1.5, 2]]}, "offsets.1.0", ("integer", "1.5")),
    ({"ray_config": {"port": "1"}}, "ray_config.port", ("integer", "'1'")),
    ({"zarr_format": 4}, "zarr_format", ("4", "2, 3")),
    ({"combine": 3}, "combine", ("3", "'weighted_avg', 'soft', 'hard'")),
    ({"model": {"device": "gpu"}}, "model_config.device", ("'gpu'", "'cuda'", "mean 'cuda'?")),
    (
        {"inference_type": "crop_margins"},
        "inference_type",
        ("'crop_margins'", "'patch', 'sliding_window', 'crop_margin'", "mean 'crop_margin'?"),
    ),
    (
        {"weight_function": "weight_gausian"},
        "weight_function",
        ("'weight_gausian'", "weight_hann", "mean 'weight_gaussian'?"),
    ),
    (
        {"weight_function": ["xyzzy"]},
        "weight_function",
        ("'xyzzy'", "weight_uniform, weight_gaussian, weight_linear, weight_hann, weight_bump"),
    ),
    (
        {"weight_function": ["/f.py", "f", "g"]},
        "weight_function",
        ("[name]", "[file.py, function]", "['f.py', 'f', 'g']"),
    ),
]
"""(change, key path of the problem, expected and found value)."""

INVALID_COMBINATIONS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"inference_type": "sliding_window"}, "strides", ("missing", "sliding_window")),
    ({"strides": [1, 1]}, "strides", ("patch", "sliding_window")),
    ({"inference_type": "crop_margin"}, "margin", ("missing", "crop_margin")),
    ({"margin": [0, 0]}, "margin", ("patch", "crop_margin")),
    (
        {"inference_type": "sliding_window", "strides": [2, 2], "offsets": [[1, 1]]},
        "offsets",
        ("sliding_window", "patch"),
    ),
    ({"combine": "soft", "output_dtype": "float16"}, "output_dtype", ("soft", "weighted_avg")),
    (
        {"model": {"type": "torchscript", "ts_file": None}},
        "model_config.ts_file",
        ("missing", "torchscript"),
    ),
    ({"roi": [[0, 1], [0, True]]}, "roi", ("[start, stop]", "null")),
    (
        {"model": {"runtime": "onnx", "type": "torchscript"}},
        "model_config.type",
        ("'torchscript'", "onnx", "expected file"),
    ),
    (
        {"model": {"type": "json", "json_file": "/m.json"}},
        "model_config.type",
        ("'json'", "torch", "one of class, file, torchscript, exported"),
    ),
    (
        {"model": {"precision": "float16", "dtype": "int8"}},
        "model_config.precision",
        ("float16", "dtype int8", "float32"),
    ),
    (
        {"model": {"precision": "bfloat16", "dtype": "float64"}},
        "model_config.precision",
        ("bfloat16", "dtype float64", "dtype: float32"),
    ),
    (
        {"model": {"precision": "float32", "dtype": "float16"}},
        "model_config.precision",
        ("float32", "dtype float16", "remove precision"),
    ),
    (
        {"model": {"precision": "tf32"}},
        "model_config.precision",
        ("'tf32'", "device cpu", "float32", "device cuda"),
    ),
    *(
        (
            {"model": {"runtime": runtime, "type": "file", "model_file": "/m", "precision": name}},
            "model_config.precision",
            (repr(name), f"runtime {runtime}", "float32", "runtime torch"),
        )
        for runtime in ("onnx", "tensorflow")
        for name in ("bfloat16", "float16")
    ),
    ({"model": {"cuda_graph": True}}, "model_config.cuda_graph", ("device cpu", "device cuda")),
    (
        {"model": {"device": "cuda", "provider": "tensorrt"}},
        "model_config.provider",
        ("'tensorrt'", "runtime torch", "runtime onnx"),
    ),
    (
        {"model": {"runtime": "onnx", "type": "file", "model_file": "/m", "provider": "cuda"}},
        "model_config.provider",
        ("'cuda'", "device cpu", "device cuda"),
    ),
    *(
        (
            {"model": TENSORRT | {"precision": name}},
            "model_config.precision",
            (repr(name), "provider tensorrt", "tf32 or float16"),
        )
        for name in ("float32", "bfloat16")
    ),
    (
        {"model": {"runtime": "onnx", "type": "file", "model_file": "/m", "cuda_graph": True}},
        "model_config.cuda_graph",
        ("runtime onnx", "runtime torch"),
    ),
]
"""(change, key path of the problem, conflicting values)."""

NUMPY = {"runtime": "numpy", "type": "class", "class_file": "/n.py", "class_name": "Net"}


@pytest.mark.parametrize(("change", "key", "hint"), UNKNOWN_KEYS)
def test_an_unknown_key_is_reported_with_a_hint(
    change: dict[str, Any], key: str, hint: str
) -> None:
    (line,) = problems(values(**change))
    assert line.startswith(f"{key}: unknown key; ")
    assert hint in line.partition("; ")[2]
    assert ("did you mean" in line) == hint.startswith("'")


@pytest.mark.parametrize(("change", "key", "fragments"), [*INVALID_VALUES, *INVALID_COMBINATIONS])
def test_an_invalid_value_is_one_line_with_its_key_the_found_and_the_expected_value(
    change: dict[str, Any], key: str, fragments: tuple[str, ...]
) -> None:
    (line,) = problems(values(**change))
    assert line.startswith(f"{key}: ")
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"checkpoint": "/c"}, "model_config.checkpoint"),
        ({"device": "cuda"}, "model_config.device"),
        ({"dtype": "bfloat16"}, "model_config.dtype"),
    ],
)
def test_options_that_the_numpy_runtime_does_not_support_are_reported(
    change: dict[str, Any], key: str
) -> None:
    (line,) = problems(values(model={**NUMPY, **change}))
    assert line.startswith(f"{key}: unsupported")
    assert "numpy" in line


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, "float32"),
        ({"device": "cuda"}, "tf32"),
        ({"device": "cuda", "dtype": "int8"}, "tf32"),  # of the batches: the network is float32
        ({"device": "cuda", "dtype": "float16"}, "float16"),
        ({"dtype": "float64"}, "float64"),
        ({"device": "cuda", "precision": "float32"}, "float32"),
        ({"device": "cuda", "precision": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "precision": "bfloat16"}, "bfloat16"),
        ({"device": "cuda", "runtime": "onnx", "type": "file", "model_file": "/m"}, "float32"),
        (TENSORRT, "tf32"),
        (TENSORRT | {"precision": "float16"}, "float16"),
        (
            {"device": "cuda", "runtime": "tensorflow", "type": "file", "model_file": "/m"},
            "float32",
        ),
    ],
)
def test_a_job_has_a_precision_also_without_the_key(model: dict[str, Any], expected: str) -> None:
    assert parse_job(values(model=model)).model.effective_precision == expected


@pytest.mark.parametrize("key", ["input", "output", "model_config"])
def test_a_missing_key_is_reported(key: str) -> None:
    (line,) = problems(values(**{key: None}))
    assert line.startswith(f"{key}: missing; ")
    assert f"`chunkq explain {key}`" in line


def test_type_class_requires_a_file_and_a_name() -> None:
    lines = problems(values(model_config=CLASS))
    assert keys(lines) == ["model_config.class_file", "model_config.class_name"]
    assert all("missing for type class" in line for line in lines)


@pytest.mark.parametrize("key", ["runtime", "type", "model_input_shape"])
def test_a_missing_model_key_is_reported_with_its_section(key: str) -> None:
    job = values()
    del job["model_config"][key]
    (line,) = problems(job)
    assert line.startswith(f"model_config.{key}: missing; ")


def test_all_mistakes_are_reported_at_once() -> None:
    lines = problems(
        values(
            pad_with=[1, 1],
            combine="sof",
            strides=[1, 1],
            roi=[[0, 1, 2]],
            weight_function="weight_hanm",
            chunksize=["a", 0],
            model={"device": "gpu", "trustd": True, "join_dim": 9, "ts_file": None},
        )
    )
    assert sorted(keys(lines)) == [
        "chunksize.0",
        "chunksize.1",
        "combine",
        "model_config.device",
        "model_config.join_dim",
        "model_config.trustd",
        "model_config.ts_file",
        "pad_with",
        "roi",
        "strides",
        "weight_function",
    ]


def test_a_misspelt_key_and_the_missing_key_are_both_reported() -> None:
    job = values(model={"ts_fil": "/m.pt"})
    del job["model_config"]["ts_file"]
    unknown, missing = problems(job)
    assert unknown.startswith("model_config.ts_fil: unknown key; did you mean 'ts_file'?")
    assert missing.startswith("model_config.ts_file: missing for type torchscript")


@pytest.mark.parametrize(
    "mistake",
    [
        {"inference_type": "sliding", "strides": [4]},
        {"inference_type": "crop", "margin": [1]},
        {"combine": "weighted", "output_dtype": "float16"},
    ],
)
def test_an_invalid_choice_has_no_second_line_about_a_key_that_depends_on_it(
    mistake: dict[str, Any],
) -> None:
    (line,) = problems(values(**mistake))
    assert line.startswith(f"{next(iter(mistake))}: ")


def test_a_key_with_a_wrong_type_is_reported_once() -> None:
    job = values(inference_type="sliding_window", strides="2")
    assert keys(problems(job)) == ["strides"]


def test_the_hint_names_one_value() -> None:
    (line,) = problems(values(inference_type="slidingwindow"))
    assert line.endswith("; did you mean 'sliding_window'?")


def test_a_missing_key_does_not_hide_other_mistakes() -> None:
    assert keys(problems(values(output=None, strides=[1, 1]))) == ["output", "strides"]


def test_paths_in_tuples_become_absolute_like_those_in_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = load_job(values(weight_function=("w.py", "blend")))
    assert job.weight_function == (f"{tmp_path}/w.py", "blend")


def test_the_section_of_the_model_is_only_called_model_config() -> None:
    job = values()
    job["model"] = job.pop("model_config")
    unknown, missing = sorted(problems(job))
    assert unknown.startswith("model: unknown key; did you mean 'model_config'?")
    assert missing.startswith("model_config: missing; ")


@pytest.mark.parametrize("section", [[1], "torch", None])
def test_a_section_must_be_a_mapping(section: object) -> None:
    (line,) = problems(values() | {"model_config": section})
    assert line.startswith("model_config: expected a mapping, found ")
    assert ("no value" if section is None else repr(section)) in line


def write(folder: Path, job: dict[str, Any], dump: Callable[[Any], str], name: str) -> Path:
    path = folder / name
    path.write_text(dump(job), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "dump"),
    [("job.json", json.dumps), ("job.yaml", yaml.safe_dump), ("job.yml", yaml.safe_dump)],
)
def test_yaml_json_and_a_mapping_give_the_same_job(tmp_path: Path, name: str, dump: Any) -> None:
    job = values(offsets=[[-1, 2]], pad_value=1.5, combine="soft")
    assert load_job(write(tmp_path, job, dump, name)) == load_job(job)
    assert load_job(str(tmp_path / name)).offsets == ((-1, 2),)


def refusal(path: Path) -> tuple[ErrorCode, str]:
    """Return the code and the only problem of a job file that cannot be read."""
    with pytest.raises(JobError) as error:
        load_job(path)
    (problem,) = error.value.problems
    assert problem.startswith(f"{path}: ")
    assert "\n" not in problem
    return error.value.code, problem


def test_a_missing_job_file_is_reported_with_its_path(tmp_path: Path) -> None:
    code, problem = refusal(tmp_path / "job.yaml")
    assert code is ErrorCode.JOB_FILE_MISSING
    assert "chunkq init" in problem


def test_a_folder_is_not_a_job_file(tmp_path: Path) -> None:
    code, problem = refusal(tmp_path)
    assert code is ErrorCode.JOB_FILE_UNREADABLE
    assert "directory" in problem


@pytest.mark.parametrize(
    ("name", "text", "fragment"),
    [
        ("j.json", '{"input": }', "JSON: Expecting value at line 1, column 11"),
        ("j.json", "input: a", "JSON: Expecting value at line 1, column 1"),
        ("j.yaml", "input: [a", "YAML: while parsing a flow sequence"),
        ("j.yaml", "a: b: c", "YAML: mapping values are not allowed here"),
        ("j.yaml", "a:\n\tb: 1", "tab at line 2, column 1"),
        ("j.yaml", "", "found no content"),
        ("j.yaml", "- input", "found ['input']"),
        ("j.json", "[1]", "found [1]"),
        ("j.yaml", b"\xff\xfe\xff", "UTF-8"),
        ("j.yaml", "a: 1\nb: 2\na: 3", "key 'a' is in line 1 and again in line 3"),
        ("j.yaml", "m:\n  a: 1\n  a: 3", "key 'a' is in line 2 and again in line 3"),
        ("j.json", '{"m": {"a": 1, "a": 1}}', "key 'a' appears twice"),
        ("j.yaml", "a: 1\nb 2\nc: 3", "line 2 has no colon"),
        ("j.yaml", "a:1\nb:2", "a space after each colon"),
        ("j.yaml", "a: [1\nb: 2", "of line 1"),
        ("j.yaml", "a: @b", "quotes"),
        ("j.yaml", "a: *.zarr", "quotes"),
        ("j.yaml", 'a: "C:\\data"', "single quotes"),
    ],
)
def test_a_file_that_is_not_a_job_is_reported_in_one_line(
    tmp_path: Path, name: str, text: str | bytes, fragment: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, problem = refusal(path)
    assert code is ErrorCode.JOB_FILE_UNREADABLE
    assert fragment in problem


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_job_file_of_a_windows_editor_is_read(tmp_path: Path, suffix: str) -> None:
    dump = json.dumps if suffix == ".json" else yaml.safe_dump
    text = dump(values()).replace("\n", "\r\n")
    path = tmp_path / f"job{suffix}"
    path.write_bytes(text.encode("utf-8-sig"))
    assert load_job(path) == load_job(values())


RELATIVE = {
    "input": "in.zarr/raw",
    "output": "../out.zarr",
    "weight_function": ["w.py", "blend"],
    "model_config": CLASS
    | {
        "class_file": "net/unet.py",
        "class_name": "UNet",
        "kwargs_file": "kwargs.py",
        "checkpoint": "s3://bucket/best.pt",
    },
}


def assert_relative_to(job: Job, base: Path) -> None:
    assert job.input == (f"{base}/in.zarr/raw",)
    assert job.output == f"{base.parent}/out.zarr"
    assert job.weight_function == (f"{base}/w.py", "blend")
    assert job.files == {
        "model_config.class_file": f"{base}/net/unet.py",
        "model_config.kwargs_file": f"{base}/kwargs.py",
        "model_config.checkpoint": "s3://bucket/best.pt",
        "weight_function": f"{base}/w.py",
    }
    assert job.model.class_name == "UNet"


def test_paths_in_a_file_are_relative_to_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    write(folder, RELATIVE, json.dumps, "job.json")
    assert_relative_to(load_job("jobs/job.json"), folder)


def test_paths_in_a_mapping_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_relative_to(load_job(RELATIVE), tmp_path)
    assert RELATIVE["input"] == "in.zarr/raw"


def test_the_arguments_input_and_output_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(folder, RELATIVE, json.dumps, "job.json")
    job = load_job(path, input="a.zarr", output="memory://b.zarr/")
    assert (job.input, job.output) == ((f"{tmp_path}/a.zarr",), "memory://b.zarr")


def test_the_name_of_a_built_in_weight_is_not_a_path() -> None:
    for weight_function in ("weight_hann", ["weight_hann"]):
        job = load_job(values(weight_function=weight_function))
        assert job.weight_function == ("weight_hann",)
        assert "weight_function" not in job.files


def test_omitted_keys_have_the_documented_defaults() -> None:
    job = parse_job(values())
    assert (job.combine, job.inference_type, job.hardware) == ("weighted_avg", "patch", "gpu")
    assert (job.pad_mode, job.pad_value, job.pad_width) == ("constant", 0, None)
    assert (job.weight_function, job.activation, job.nan) == (("weight_uniform",), "none", "fail")
    assert (job.zarr_format, job.cluster, job.chunksize) == (3, "local", None)
    assert (job.dask_config.protocol, job.dask_config.scheduler_port) == ("tcp", 8786)
    assert (job.ray_config.port, job.model.device, job.model.dtype) == (6379, "cpu", "float32")


@pytest.mark.parametrize(
    ("changes", "edge"),
    [
        ({}, "pad"),
        ({"inference_type": "sliding_window", "strides": [2, 2]}, "shift"),
        ({"inference_type": "crop_margin", "margin": [1, 1]}, "pad"),
        ({"edge": "shift"}, "shift"),
        ({"inference_type": "sliding_window", "strides": [2, 2], "edge": "pad"}, "pad"),
    ],
)
def test_the_edge_follows_the_inference_type_unless_it_is_set(
    changes: dict[str, Any], edge: str
) -> None:
    assert parse_job(values(**changes)).step_edge == edge


def test_every_key_of_spinns_published_config_is_accepted() -> None:
    job = load_job(
        {
            "input": "in.zarr",
            "output": "out.zarr",
            "cluster": "local",
            "combine": "weighted_avg",
            "inference_type": "patch",
            "chunksize": [64, 256, 256],
            "hardware": "cpu_only",
            "pad_mode": "reflect",
            "pad_value": 0,
            "pad_width": [0, 10, 10],
            "offsets": [[-32, -32, -32], [0, 16, 16]],
            "weight_function": ["weight_gaussian"],
            "dask_config": {
                "address": "tcp://10.0.0.1:8786",
                "protocol": "ucx",
                "interface": "ib0",
                "scheduler_port": 8790,
                "n_workers": 4,
                "threads_per_worker": 2,
            },
            "ray_config": {"address": "10.0.0.1", "port": 6380},
            "model_config": {
                "runtime": "torch",
                "type": "class",
                "model_input_shape": [1, 128, 128],
                "model_output_shape": [21, 1, 128, 128],
                "dtype": "float16",
                "max_batch_size": 8,
                "device": "cuda",
                "class_file": "net.py",
                "class_name": "Net",
                "kwargs_file": "kwargs.py",
                "checkpoint": "best.pt",
            },
        }
    )
    assert job.offsets == ((-32, -32, -32), (0, 16, 16))
    assert job.model.model_output_shape == (21, 1, 128, 128)
    assert job.dask_config.interface == "ib0"


@pytest.mark.parametrize("key", ["ts_file", "model_file", "json_file"])
def test_spinns_other_model_files_are_accepted(key: str) -> None:
    assert parse_job(values(model={key: "/x"})).model.files[key] == "/x"


def test_a_job_is_equal_after_a_round_trip_through_a_dictionary_and_json() -> None:
    job = parse_job(
        values(
            offsets=[[-1, 2]],
            pad_value=0.5,
            weight_function=["/w.py", "blend"],
            model={"model_output_shape": [3, 4, 4]},
        )
    )
    assert parse_job(job.as_dict()) == job
    assert parse_job(json.loads(json.dumps(job.as_dict()))) == job
    assert "model_config" in job.as_dict()


def test_a_job_cannot_be_changed() -> None:
    job = parse_job(values())
    with pytest.raises(ValidationError, match="frozen"):
        job.output = "/elsewhere"
    with pytest.raises(ValidationError, match="frozen"):
        job.model.device = "cuda"


def test_the_schema_has_the_key_names_of_the_job_file() -> None:
    schema = job_schema()
    assert set(schema["properties"]) >= {"input", "output", "model_config", "strides"}
    assert set(schema["required"]) == {"input", "output", "model_config"}
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("shapes", "lost_axis", "output_patch"),
    [
        ({"model_input_shape": [5, 8, 9]}, None, (5, 8, 9)),
        ({"model_input_shape": [1, 5, 8, 9]}, None, (5, 8, 9)),
        ({"model_input_shape": [5, 8, 9], "lost_dim": 0}, 0, (1, 8, 9)),
        ({"model_input_shape": [1, 5, 8, 9], "lost_dim": 1}, 0, (1, 8, 9)),
        ({"model_input_shape": [1, 8, 9, 5], "lost_dim": 3}, 2, (8, 9, 1)),
        # The declared shape holds, also where it contradicts `lost_dim`, which `resolve` reports.
        (
            {"model_input_shape": [5, 8, 9], "model_output_shape": [2, 3, 4, 7], "lost_dim": 0},
            0,
            (3, 4, 7),
        ),
        # `lost_dim` names the channel axis, which `resolve` reports.
        ({"model_input_shape": [1, 5, 8, 9], "lost_dim": 0}, -1, (5, 8, 9)),
    ],
)
def test_the_lost_axis_counts_spatial_axes_and_has_one_slice(
    shapes: dict[str, Any], lost_axis: int | None, output_patch: tuple[int, ...]
) -> None:
    model = ModelConfig(runtime="numpy", type="class", **shapes)
    assert model.lost_axis(3) == lost_axis
    assert model.output_patch(3) == output_patch


def test_an_input_says_how_it_is_accessed() -> None:
    inputs = ["/a.npy", {"path": "s3://b/a.zarr", "anonymous": True}]
    job = parse_job(values(input=inputs))
    assert [config.access for config in job.inputs] == [Access(), Access(anonymous=True)]
    assert parse_job(job.as_dict()).inputs == job.inputs


@pytest.mark.parametrize("path", ["/in.zarr", "https://host/in.zarr"])
def test_access_to_storage_without_accounts_is_refused(path: str) -> None:
    job = values(input={"path": path, "requester_pays": True})
    assert keys(problems(job)) == ["input.requester_pays"]


def test_a_list_with_an_invalid_item_is_not_too_short_as_well() -> None:
    assert keys(problems(values(chunksize=[0]))) == ["chunksize.0"]
    assert keys(problems(values(chunksize=[]))) == ["chunksize"]


# ------------------------------------------------------------------------------ inputs


def input_of(value: Any) -> Job:
    return load_job(job_values((4, 4)) | {"input": value})


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        (7, ["input: "]),
        ([], ["input: "]),
        ([7], ["input.0: "]),
        ({"path": "a.zarr", "axs": "zyx"}, ["input.axs: "]),
        ({"axes": "zyx"}, ["input.path: "]),
        ({"path": "a.zarr", "axes": "zz"}, ["input.axes: "]),
        ({"path": "a.zarr", "order": "zyq"}, ["input.order: "]),
        ({"path": "a.zarr", "level": -1}, ["input.level: "]),
        ({"path": "a.zarr", "channels": [1.5]}, ["input.channels: "]),
        ({"path": "a.zarr", "channels": "DAPI, GFP"}, ["input.channels: "]),
        ({"path": "a.zarr", "channels": []}, ["input.channels: "]),
        ({"path": "a.zarr", "time": True}, ["input.time: "]),
        (["a.zarr", {"path": "b.zarr", "axes": "", "level": 1.5}],
         ["input.1.axes: ", "input.1.level: "]),
    ],
)  # fmt: skip
def test_a_mistake_in_an_input_is_one_line_with_its_place(value: Any, lines: list[str]) -> None:
    with pytest.raises(JobError) as error:
        input_of(value)
    assert len(error.value.problems) == len(lines)
    for problem, start in zip(error.value.problems, lines, strict=True):
        assert problem.startswith(start)


def test_a_mapping_with_a_path_alone_is_the_path() -> None:
    assert input_of({"path": "/a.zarr"}).input == input_of("/a.zarr").input == ("/a.zarr",)


def test_the_input_of_the_command_line_replaces_the_path_of_a_mapping() -> None:
    values = job_values((4, 4)) | {"input": {"path": "a.zarr", "axes": "tyx"}}
    [config] = load_job(values, input="/b.zarr").inputs
    assert (config.path, config.axes) == ("/b.zarr", "tyx")


def test_an_input_is_equal_after_a_round_trip_through_json() -> None:
    mapping = {"path": "/a.zarr", "channels": [1, "GFP"], "time": "0:2", "level": "s1"}
    job = input_of([mapping, "/b.zarr"])
    assert parse_job(json.loads(json.dumps(job.as_dict()))) == job
