import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from chunkq.errors import JobError
from chunkq.job import Job, job_schema, load_job, parse_job
from tests.strategies import job_values

CLASS = {"runtime": "torch", "type": "class", "model_input_shape": [4, 4]}


def values(**more: Any) -> dict[str, Any]:
    """Legal values, except for `more`; a key set to None is left out."""
    return {k: v for k, v in job_values((4, 4), **more).items() if v is not None}


def problems(of: dict[str, Any]) -> list[str]:
    with pytest.raises(JobError) as caught:
        parse_job(of)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


UNKNOWN = [
    ({"pad_with": [1, 1]}, "pad_with: unknown key; did you mean 'pad_width'?"),
    ({"stride": [1, 1]}, "stride: unknown key; did you mean 'strides'?"),
    ({"xyzzy": 1}, "xyzzy: unknown key; `chunkq schema` lists the legal ones"),
    (
        {"model": {"max_batchsize": 3}},
        "model_config.max_batchsize: unknown key; did you mean 'max_batch_size'?",
    ),
    (
        # The nearest name is looked for in the section only: chunksize is a key outside it.
        {"model": {"chunksize": [1]}},
        "model_config.chunksize: unknown key; `chunkq schema` lists the legal ones",
    ),
    ({"dask_config": {"adress": "x"}}, "dask_config.adress: unknown key; did you mean 'address'?"),
    ({"ray_config": {"prot": 1}}, "ray_config.prot: unknown key; did you mean 'port'?"),
]

WRONG_TYPE = [
    (
        {"model": {"max_batch_size": "3"}},
        "model_config.max_batch_size: input should be a valid integer, not '3'",
    ),
    (
        {"model": {"max_batch_size": True}},
        "model_config.max_batch_size: input should be a valid integer, not True",
    ),
    (
        {"model": {"max_batch_size": 2.0}},
        "model_config.max_batch_size: input should be a valid integer, not 2.0",
    ),
    (
        {"model": {"trusted": "yes"}},
        "model_config.trusted: input should be a valid boolean, not 'yes'",
    ),
    ({"threads": 0}, "threads: input should be greater than 0, not 0"),
    ({"chunksize": [64, "a"]}, "chunksize.1: input should be a valid integer, not 'a'"),
    ({"chunksize": [True, 64]}, "chunksize.0: input should be a valid integer, not True"),
    ({"chunksize": [64, 0]}, "chunksize.1: input should be greater than 0, not 0"),
    (
        {"pad_width": [-1, 0]},
        "pad_width.0: input should be greater than or equal to 0, not -1",
    ),
    ({"offsets": [[1, 2], [1.5, 2]]}, "offsets.1.0: input should be a valid integer, not 1.5"),
    ({"ray_config": {"port": "1"}}, "ray_config.port: input should be a valid integer, not '1'"),
    ({"zarr_format": 4}, "zarr_format: 4 is none of 2 or 3"),
    ({"combine": 3}, "combine: 3 is none of 'weighted_avg', 'soft' or 'hard'"),
    (
        {"model": {"device": "gpu"}},
        "model_config.device: 'gpu' is none of 'cpu' or 'cuda'; did you mean 'cpu'?",
    ),
    (
        {"inference_type": "crop_margins"},
        "inference_type: 'crop_margins' is none of 'patch', 'sliding_window' or 'crop_margin'; "
        "did you mean 'crop_margin'?",
    ),
    (
        {"weight_function": "weight_gausian"},
        "weight_function: unknown name 'weight_gausian'; did you mean 'weight_gaussian'?",
    ),
    (
        {"weight_function": ["xyzzy"]},
        "weight_function: unknown name 'xyzzy'; built in are weight_uniform, weight_gaussian, "
        "weight_linear, weight_hann, weight_bump",
    ),
    (
        {"weight_function": ["/f.py", "f", "g"]},
        "weight_function: give [name] of a built-in or [file.py, function]",
    ),
]

IMPOSSIBLE = [
    (
        {"inference_type": "sliding_window"},
        "strides: missing; sliding_window needs the step along each axis",
    ),
    ({"strides": [1, 1]}, "strides: only for inference_type sliding_window, this job is patch"),
    (
        {"inference_type": "crop_margin"},
        "margin: missing; crop_margin needs the rim to cut along each axis",
    ),
    ({"margin": [0, 0]}, "margin: only for inference_type crop_margin, this job is patch"),
    (
        {"inference_type": "sliding_window", "strides": [2, 2], "offsets": [[1, 1]]},
        "offsets: only for inference_type patch, this job is sliding_window",
    ),
    (
        {"combine": "soft", "output_dtype": "float16"},
        "output_dtype: only for combine weighted_avg; soft gives labels",
    ),
    (
        {"model": {"type": "torchscript", "ts_file": None}},
        "model_config.ts_file: missing; type torchscript needs it",
    ),
]

NOT_YET = [
    ({"roi": [[0, 1], [0, 1]]}, "roi: not in this version; leave it out"),
    (
        {"input": ["/a", "/b"]},
        "input: several volumes need model_config.join_dim, the axis to stack them along",
    ),
    (
        {"model": {"runtime": "onnx", "type": "torchscript"}},
        "model_config.type: onnx has no torchscript; its types are file",
    ),
    (
        {"model": {"type": "json", "json_file": "/m.json"}},
        "model_config.type: torch has no json; its types are class, file, torchscript, exported",
    ),
    (
        {"model": {"autocast": "float16", "dtype": "int8"}},
        "model_config.autocast: dtype int8 is no floating point",
    ),
    (
        {"model": {"cuda_graph": True}},
        "model_config.cuda_graph: only for device cuda, this job's is cpu",
    ),
    (
        {"model": {"runtime": "onnx", "type": "file", "model_file": "/m", "cuda_graph": True}},
        "model_config.cuda_graph: only for runtime torch, this job's is onnx",
    ),
]


@pytest.mark.parametrize(("change", "line"), [*UNKNOWN, *WRONG_TYPE, *IMPOSSIBLE, *NOT_YET])
def test_a_mistake_is_one_line_with_its_key_and_a_remedy(change: dict[str, Any], line: str) -> None:
    assert problems(values(**change)) == [line]


@pytest.mark.parametrize("key", ["input", "output", "model_config"])
def test_a_missing_key_is_named(key: str) -> None:
    assert problems(values(**{key: None})) == [
        f"{key}: missing; `chunkq init` shows a complete job file"
    ]


def test_a_class_needs_its_file_and_its_name() -> None:
    assert problems(values(model_config=CLASS)) == [
        "model_config.class_file: missing; type class needs it",
        "model_config.class_name: missing; type class needs it",
    ]


@pytest.mark.parametrize("key", ["runtime", "type", "model_input_shape"])
def test_a_missing_model_key_is_named_with_its_section(key: str) -> None:
    of = values()
    del of["model_config"][key]
    assert problems(of) == [f"model_config.{key}: missing; `chunkq init` shows a complete job file"]


def test_all_mistakes_come_at_once() -> None:
    found = problems(
        values(
            pad_with=[1, 1],
            combine="sof",
            strides=[1, 1],
            roi=[[0, 1]],
            weight_function="weight_hanm",
            chunksize=["a", 0],
            model={"device": "gpu", "trustd": True, "join_dim": 9, "ts_file": None},
        )
    )
    assert sorted(line.partition(":")[0] for line in found) == [
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


def test_a_misspelt_key_is_not_reported_as_missing_besides() -> None:
    of = values(model={"ts_fil": "/m.pt"})
    del of["model_config"]["ts_file"]
    assert problems(of) == [
        "model_config.ts_fil: unknown key; did you mean 'ts_file'?",
        "model_config.ts_file: missing; type torchscript needs it",
    ]


def test_a_key_of_a_wrong_type_causes_no_second_complaint() -> None:
    of = values(inference_type="sliding_window", strides="2")
    assert [line.partition(":")[0] for line in problems(of)] == ["strides"]


def test_a_pad_value_that_is_no_number_is_one_line() -> None:
    assert problems(values(pad_value="abc")) == [
        "pad_value: input should be a valid number, not 'abc'"
    ]


def test_the_nearest_legal_value_is_one_value() -> None:
    (line,) = problems(values(inference_type="slidingwindow"))
    assert line.endswith("; did you mean 'sliding_window'?")


def test_a_missing_key_hides_no_other_mistake() -> None:
    found = problems(values(output=None, strides=[1, 1]))
    assert [line.partition(":")[0] for line in found] == ["output", "strides"]


def test_tuples_in_a_mapping_hold_paths_as_lists_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = load_job(values(weight_function=("w.py", "mine")))
    assert job.weight_function == (f"{tmp_path}/w.py", "mine")


def test_the_model_section_has_one_name() -> None:
    of = values()
    of["model"] = of.pop("model_config")
    assert "model: unknown key; did you mean 'model_config'?" in problems(of)


@pytest.mark.parametrize("wrong", [[1], "torch", None])
def test_a_section_must_be_a_mapping(wrong: object) -> None:
    (line,) = problems(values() | {"model_config": wrong})
    assert line.startswith("model_config: input should be a valid dictionary")


def write(folder: Path, of: dict[str, Any], dump: Callable[[Any], str], name: str) -> Path:
    path = folder / name
    path.write_text(dump(of), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "dump"),
    [("job.json", json.dumps), ("job.yaml", yaml.safe_dump), ("job.yml", yaml.safe_dump)],
)
def test_yaml_json_and_a_mapping_mean_the_same(tmp_path: Path, name: str, dump: Any) -> None:
    of = values(offsets=[[-1, 2]], pad_value=1.5, combine="soft")
    assert load_job(write(tmp_path, of, dump, name)) == load_job(of)
    assert load_job(str(tmp_path / name)).offsets == ((-1, 2),)


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        load_job(tmp_path / "job.yaml")
    assert caught.value.problems == (
        f"{tmp_path}/job.yaml: no such job file; `chunkq init` writes one to start from",
    )


def test_a_folder_is_no_job_file(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"cannot be read as a job file: .*directory") as caught:
        load_job(tmp_path)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("j.json", '{"input": }', "not JSON: Expecting value at line 1, column 11"),
        ("j.json", "input: a", "not JSON: Expecting value at line 1, column 1"),
        ("j.yaml", "input: [a", "not YAML: while parsing a flow sequence"),
        ("j.yaml", "a: b: c", "not YAML: mapping values are not allowed here"),
        ("j.yaml", "", "a job file is a mapping of keys to values; see `chunkq init`"),
        ("j.yaml", "- input", "a job file is a mapping of keys to values; see `chunkq init`"),
        ("j.json", "[1]", "a job file is a mapping of keys to values; see `chunkq init`"),
        ("j.yaml", b"\xff\xfe\xff", "cannot be read as a job file: "),
    ],
)
def test_a_file_that_is_no_job_is_one_line(
    tmp_path: Path, name: str, text: str | bytes, line: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(JobError) as caught:
        load_job(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: {line}")
    assert "\n" not in problem


RELATIVE = {
    "input": "in.zarr/raw",
    "output": "../out.zarr",
    "weight_function": ["w.py", "mine"],
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
    assert job.weight_function == (f"{base}/w.py", "mine")
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


def test_input_and_output_given_apart_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(folder, RELATIVE, json.dumps, "job.json")
    job = load_job(path, input="a.zarr", output="memory://b.zarr/")
    assert (job.input, job.output) == ((f"{tmp_path}/a.zarr",), "memory://b.zarr")


def test_a_name_of_a_built_in_weight_is_no_path() -> None:
    for given in ("weight_hann", ["weight_hann"]):
        job = load_job(values(weight_function=given))
        assert job.weight_function == ("weight_hann",)
        assert "weight_function" not in job.files


def test_left_out_keys_have_the_documented_defaults() -> None:
    job = parse_job(values())
    assert (job.combine, job.inference_type, job.hardware) == ("weighted_avg", "patch", "gpu")
    assert (job.pad_mode, job.pad_value, job.pad_width) == ("constant", 0, None)
    assert (job.weight_function, job.activation, job.nan) == (("weight_uniform",), "none", "fail")
    assert (job.zarr_format, job.cluster, job.chunksize) == (3, "local", None)
    assert (job.dask_config.protocol, job.dask_config.scheduler_port) == ("tcp", 8786)
    assert (job.ray_config.port, job.model.device, job.model.dtype) == (6379, "cpu", "float32")


@pytest.mark.parametrize(
    ("keys", "edge"),
    [
        ({}, "pad"),
        ({"inference_type": "sliding_window", "strides": [2, 2]}, "shift"),
        ({"inference_type": "crop_margin", "margin": [1, 1]}, "pad"),
        ({"edge": "shift"}, "shift"),
        ({"inference_type": "sliding_window", "strides": [2, 2], "edge": "pad"}, "pad"),
    ],
)
def test_the_edge_follows_the_inference_type_unless_given(keys: dict[str, Any], edge: str) -> None:
    assert parse_job(values(**keys)).step_edge == edge


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


def test_a_job_survives_its_own_dictionary_and_json() -> None:
    job = parse_job(
        values(
            offsets=[[-1, 2]],
            pad_value=0.5,
            weight_function=["/w.py", "mine"],
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


def test_the_schema_names_every_key_as_the_job_file_does() -> None:
    schema = job_schema()
    assert set(schema["properties"]) >= {"input", "output", "model_config", "strides"}
    assert set(schema["required"]) == {"input", "output", "model_config"}
    assert schema["additionalProperties"] is False
