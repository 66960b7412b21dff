"""Invalid input is reported in one line with an exit code and an error code; nothing is written."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from chunkq.create import check_job, check_output
from chunkq.errors import ErrorCode, StoreError
from chunkq.job.job_reading import load_job
from tests.harness.files import everything_below
from tests.harness.networks import toy_model
from tests.harness.small_job import four_chunks
from tests.harness.volumes import random_volume
from tests.harness.workspace import Workspace

SHAPE = (32, 24)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return four_chunks(tmp_path, runtime="torch")


def refused(
    workspace: Workspace, code: int, *fragments: str, command: tuple[str, ...] = ("produce",)
) -> str:
    """Run a command on job.json. Assert that it fails and writes nothing; return stderr."""
    before = everything_below(workspace.folder)
    answer = workspace.call(*command, "job.json")
    answer.refused(code, *fragments)
    assert answer.out == ""
    assert everything_below(workspace.folder) == before
    return answer.err


def lines_of(text: str) -> dict[str, str]:
    """Return the reported problems by the key with which they begin."""
    lines = [line.removeprefix("chunkq: ") for line in text.splitlines()]
    return {line.partition(": ")[0]: line for line in lines}


def test_a_missing_input_is_reported(workspace: Workspace) -> None:
    workspace.write_job(input="nowhere.zarr")
    refused(workspace, 2, ErrorCode.STORE_MISSING, f"input: {workspace.folder}/nowhere.zarr ")


def test_a_missing_npy_file_is_reported(workspace: Workspace) -> None:
    workspace.write_job(input="nowhere.npy")
    refused(workspace, 2, ErrorCode.STORE_MISSING, f"input: {workspace.folder}/nowhere.npy ")


def test_a_path_that_is_not_inside_the_store_is_reported(workspace: Workspace) -> None:
    workspace.write_job(input="in.zarr/deeper")
    refused(workspace, 2, ErrorCode.STORE_MISSING, "in.zarr/deeper ")


def test_a_file_that_is_not_an_array_is_rejected(workspace: Workspace) -> None:
    (workspace.folder / "volume.bin").write_bytes(b"II*\0")
    workspace.write_job(input="volume.bin")
    refused(workspace, 2, ErrorCode.STORE_UNSUPPORTED, "volume.bin is a file")


@pytest.mark.parametrize(
    ("name", "reader"),
    [("scan.mgz", "nibabel.load("), ("a.NRRD", "nrrd.read("), ("a.mrc", "mrcfile.read(")],
)
def test_a_file_of_another_format_is_rejected_with_the_code_that_converts_it(
    workspace: Workspace, name: str, reader: str
) -> None:
    (workspace.folder / name).write_bytes(b"II*\0")
    workspace.write_job(input=name)
    code = "zarr.create_array('volume.zarr', data="
    refused(workspace, 2, ErrorCode.STORE_UNSUPPORTED, name, code, reader)


def test_a_folder_that_is_not_a_store_is_rejected(workspace: Workspace) -> None:
    (workspace.folder / "plain").mkdir()
    workspace.write_job(input="plain")
    refused(workspace, 2, ErrorCode.STORE_UNSUPPORTED, f"{workspace.folder}/plain ")


@pytest.mark.parametrize("content", [b"not an array", b"", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_a_npy_file_with_other_content_is_rejected(workspace: Workspace, content: bytes) -> None:
    (workspace.folder / "in.npy").write_bytes(content)
    workspace.write_job(input="in.npy")
    refused(workspace, 2, ErrorCode.STORE_UNSUPPORTED, "in.npy: ")


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        (np.zeros(SHAPE, np.complex64), "complex64"),
        (np.zeros(SHAPE, [("a", "i4"), ("b", "f4")]), "('a', '<i4')"),
        (np.zeros(SHAPE, "U3"), "<U3"),
        (np.float32(3), "0 spatial axes"),
        (np.zeros((0, 24)), "[0, 24]"),
        (np.zeros((1, 1, 1, 8, 8), np.uint8), "5 spatial axes"),
    ],
)
def test_arrays_that_are_not_volumes_are_rejected(
    workspace: Workspace, values: Any, fragment: str
) -> None:
    np.save(workspace.folder / "in.npy", values)
    workspace.write_job(input="in.npy")
    refused(workspace, 2, "in.npy", fragment)


def test_a_zarr_array_of_strings_is_rejected(workspace: Workspace) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.create_array(workspace.folder / "words.zarr", shape=SHAPE, chunks=(8, 8), dtype=str)
        workspace.write_job(input="words.zarr")
        refused(workspace, 2, "words.zarr", "StringDType")


def test_a_group_without_an_image_is_rejected_with_its_members(workspace: Workspace) -> None:
    group = zarr.create_group(workspace.folder / "group.zarr")
    for name in ("raw", "labels"):
        group.create_array(name, shape=(4, 4), chunks=(4, 4), dtype="uint8")
    workspace.write_job(input="group.zarr")
    refused(workspace, 2, ErrorCode.STORE_UNSUPPORTED, "group.zarr ", "labels, raw")


def test_an_empty_group_is_rejected(workspace: Workspace) -> None:
    zarr.create_group(workspace.folder / "group.zarr")
    workspace.write_job(input="group.zarr")
    refused(workspace, 2, ErrorCode.STORE_UNSUPPORTED, "group.zarr ", "empty")


def test_lists_and_shapes_of_the_wrong_rank_are_reported_at_once(workspace: Workspace) -> None:
    workspace.write_job(
        strides=[4, 4, 4], chunksize=[16], model={"model_input_shape": [1, 1, 8, 8]}
    )
    lines = lines_of(refused(workspace, 2, ErrorCode.JOB_INVALID))
    assert lines.keys() == {"strides", "chunksize", "model_config.model_input_shape"}
    for key, entries in (("strides", "3"), ("chunksize", "1")):
        assert entries in lines[key]
        assert "2" in lines[key]
    assert "4" in lines["model_config.model_input_shape"]


@pytest.mark.parametrize(
    ("changes", "key", "hint"),
    [
        ({"stride": [4, 4]}, "stride", "did you mean 'strides'?"),
        ({"chunk_size": [4, 4]}, "chunk_size", "did you mean 'chunksize'?"),
        (
            {"model": {"max_batchsize": 2}},
            "model_config.max_batchsize",
            "did you mean 'max_batch_size'?",
        ),
        ({"zzz": 1}, "zzz", "`chunkq explain`"),
        ({"combine": "sofd"}, "combine", "did you mean 'soft'?"),
        (
            {"weight_function": ["weight_gausian"]},
            "weight_function",
            "did you mean 'weight_gaussian'?",
        ),
    ],
)
def test_a_misspelt_key_or_value_is_reported_with_the_nearest_valid_one(
    workspace: Workspace, changes: dict[str, Any], key: str, hint: str
) -> None:
    workspace.write_job(**changes)
    lines = lines_of(refused(workspace, 2, ErrorCode.JOB_INVALID, hint))
    assert lines.keys() == {key}


def test_several_mistakes_are_reported_at_once_in_one_line_each(workspace: Workspace) -> None:
    workspace.write_job(
        strides=None,
        chunksize=[16, -1],
        pad_width=[1.5, 2],
        margin=[1, 1],
        model={"max_batch_size": 0, "class_name": None},
    )
    lines = lines_of(refused(workspace, 2, ErrorCode.JOB_INVALID))
    assert lines.keys() == {
        "strides",
        "chunksize.1",
        "pad_width.0",
        "model_config.max_batch_size",
        "model_config.class_name",
        "margin",
    }
    assert "-1" in lines["chunksize.1"]
    assert "1.5" in lines["pad_width.0"]


def test_a_chunk_smaller_than_the_patch_is_rejected(workspace: Workspace) -> None:
    workspace.write_job(chunksize=[16, 4])
    refused(workspace, 2, ErrorCode.JOB_INVALID, "chunksize: 4 along axis 1 ", "at least 8")


def test_storage_chunks_that_do_not_divide_the_chunk_are_rejected(workspace: Workspace) -> None:
    workspace.write_job(storage_chunks=[5, 4])
    refused(workspace, 2, ErrorCode.JOB_INVALID, "storage_chunks: 5 along axis 0 ", "16")


def test_voxels_outside_all_output_patches_are_reported_with_the_padding_that_covers_them(
    workspace: Workspace,
) -> None:
    workspace.values["model_config"] = toy_model(workspace.folder, (8, 8), output=(8, 4))
    workspace.write_job()
    line = lines_of(refused(workspace, 2, ErrorCode.JOB_INVALID))["pad_width"]
    assert "axis 1" in line
    assert "voxel 0" in line
    assert "2" in line


def test_strides_larger_than_the_patch_are_rejected(workspace: Workspace) -> None:
    workspace.write_job(strides=[4, 9])
    refused(workspace, 2, ErrorCode.JOB_INVALID, "strides: 9 along axis 1", "at most 8")


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        ("return np.hanning(shape[0])[:, None] * np.ones(shape)", "0.0 at [0, 0]"),
        ("return np.full(shape, np.nan)", "nan at [0, 0]"),
        ("return np.ones((2, 2))", "shape [2, 2]; expected the output patch, [8, 8]"),
        ("return 1 / 0", "raised ZeroDivisionError"),
    ],
)
def test_a_weight_function_that_returns_invalid_weights_is_rejected(
    workspace: Workspace, body: str, fragment: str
) -> None:
    (workspace.folder / "weights.py").write_text(
        f"import numpy as np\n\ndef blend(shape):\n    {body}\n"
    )
    workspace.write_job(weight_function=["weights.py", "blend"])
    refused(workspace, 2, ErrorCode.JOB_INVALID, "weight_function: blend of ", fragment)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (None, "no file "),
        ("def other(shape): pass", "has no 'blend'; it defines other"),
        ("def blend(:", "is not Python"),
        ("raise KeyError('x')", "raised KeyError"),
    ],
)
def test_a_weight_file_without_the_function_is_rejected(
    workspace: Workspace, text: str | None, fragment: str
) -> None:
    if text is not None:
        (workspace.folder / "weights.py").write_text(text)
    workspace.write_job(weight_function=["weights.py", "blend"])
    refused(workspace, 2, ErrorCode.JOB_INVALID, "weight_function: ", "weights.py", fragment)


def test_every_missing_model_file_is_reported(workspace: Workspace) -> None:
    workspace.write_job(model={"class_file": "a.py", "kwargs_file": "b.py", "checkpoint": "c.pt"})
    lines = lines_of(refused(workspace, 2, ErrorCode.JOB_INVALID))
    files = {"class_file": "a.py", "kwargs_file": "b.py", "checkpoint": "c.pt"}
    assert lines.keys() == {f"model_config.{key}" for key in files}
    for key, name in files.items():
        assert f"{workspace.folder}/{name}" in lines[f"model_config.{key}"]


@pytest.mark.parametrize(
    ("changes", "key", "fragments"),
    [
        (
            {"model": {"runtime": "onnx", "type": "torchscript", "ts_file": "m.pt"}},
            "model_config.type",
            ("'torchscript'", "onnx", "expected file"),
        ),
        (
            {"model": {"runtime": "tensorflow", "type": "exported", "model_file": "m.pt2"}},
            "model_config.type",
            ("'exported'", "tensorflow", "one of class, file, json"),
        ),
        (
            {"model": {"type": "json", "json_file": "m.json"}},
            "model_config.type",
            ("'json'", "torch", "one of class, file"),
        ),
        ({"model": {"runtime": "jax"}}, "model_config.runtime", ("'jax'", "'torch'")),
        (
            {"model": {"processing_steps": "steps.py"}},
            "model_config.processing_steps",
            ("steps.py",),
        ),
        ({"roi": [0, 4]}, "roi", ("[start, stop]", "null")),
        (
            {"model": {"runtime": "onnx", "type": "file", "model_file": "m.onnx", "compile": True}},
            "model_config.compile",
            ("onnx", "torch"),
        ),
    ],
)
def test_unsupported_options_are_reported_by_key(
    workspace: Workspace, changes: dict[str, Any], key: str, fragments: tuple[str, ...]
) -> None:
    workspace.write_job(**changes)
    lines = lines_of(refused(workspace, 2, ErrorCode.JOB_INVALID, *fragments))
    assert key in lines


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 300, 1.5, -1])
def test_a_pad_value_outside_the_dtype_of_the_input_is_rejected(
    workspace: Workspace, value: float
) -> None:
    workspace.write_job(pad_value=value)
    refused(workspace, 2, ErrorCode.JOB_INVALID, f"pad_value: {value} ", "uint8")


@pytest.mark.parametrize(
    "queue", ["kafka://host/queue", "redis:/host", "queue.db", "sqlit:///q.db"]
)
def test_a_queue_with_an_unknown_scheme_is_rejected(workspace: Workspace, queue: str) -> None:
    workspace.write_job()
    before = everything_below(workspace.folder)
    for command in ("produce", "run"):
        answer = workspace.call(command, "job.json", "--queue", queue)
        answer.refused(2, ErrorCode.QUEUE_ADDRESS_INVALID, "queue:", "sqlite://")
    assert everything_below(workspace.folder) == before


@pytest.mark.parametrize(
    ("name", "text", "code", "fragment"),
    [
        ("job.yaml", "input: [in.zarr\nstrides: 4", ErrorCode.JOB_FILE_UNREADABLE, "YAML"),
        ("job.yaml", "input:\tin.zarr\n\tx: 1", ErrorCode.JOB_FILE_UNREADABLE, "YAML"),
        ("job.yaml", "- just\n- a list\n", ErrorCode.JOB_FILE_UNREADABLE, "['just', 'a list']"),
        ("job.yaml", "", ErrorCode.JOB_FILE_UNREADABLE, "no content"),
        ("job.yaml", "1: 2\n", ErrorCode.JOB_INVALID, "1"),
        ("job.json", '{"input": ', ErrorCode.JOB_FILE_UNREADABLE, "JSON"),
        ("job.json", "[1]", ErrorCode.JOB_FILE_UNREADABLE, "[1]"),
        ("job.yaml", b"\xff\xfe\x00", ErrorCode.JOB_FILE_UNREADABLE, "UTF-8"),
    ],
)
def test_a_file_that_is_not_a_job_is_rejected(
    workspace: Workspace, name: str, text: str | bytes, code: ErrorCode, fragment: str
) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (workspace.folder / name).write_bytes(content)
    before = everything_below(workspace.folder)
    workspace.call("produce", name).refused(2, code, fragment)
    assert everything_below(workspace.folder) == before


def test_a_missing_job_file_is_reported(workspace: Workspace) -> None:
    workspace.call("plan", "nowhere.yaml").refused(
        2, ErrorCode.JOB_FILE_MISSING, "nowhere.yaml: ", "chunkq init"
    )


@pytest.mark.parametrize("output", ["in.zarr", ".", "in.zarr/c"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_an_output_that_would_overwrite_the_input_is_rejected(
    workspace: Workspace, output: str, options: tuple[str, ...]
) -> None:
    workspace.write_job(output=output)
    before = everything_below(workspace.folder)
    workspace.call("produce", "job.json", *options).refused(2, "output: ", "overwrite the input")
    assert everything_below(workspace.folder) == before


def test_an_output_that_is_a_link_to_the_input_is_rejected(workspace: Workspace) -> None:
    (workspace.folder / "link.zarr").symlink_to(workspace.folder / "in.zarr")
    workspace.write_job(output="link.zarr")
    workspace.call("produce", "job.json", "--overwrite").refused(
        2, "output: ", "overwrite the input"
    )
    assert (workspace.folder / "in.zarr" / "c").is_dir()


def test_an_output_in_the_same_group_as_the_input_is_accepted(workspace: Workspace) -> None:
    group = zarr.create_group(workspace.folder / "both.zarr")
    group.create_array("raw", data=random_volume(SHAPE), chunks=(8, 8))
    workspace.write_job(input="both.zarr/raw", output="both.zarr/prediction")
    workspace.call("produce", "job.json").ok()


def test_an_output_that_cannot_be_written_is_rejected(workspace: Workspace) -> None:
    (workspace.folder / "a file").write_text("")
    workspace.write_job(output="a file/out.zarr")
    before = everything_below(workspace.folder)
    workspace.call("produce", "job.json").refused(
        2, "output: ", "a file/out.zarr", "cannot be written"
    )
    after = everything_below(workspace.folder)
    assert [name for name in after if not name.startswith("queue.db")] == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_in_a_folder_that_cannot_be_written_is_rejected_when_it_is_checked(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    workspace.write_job(output="shut/a/out.zarr")
    (workspace.folder / "shut").mkdir()
    checked = check_job(load_job(workspace.folder / "job.json"))
    # The superuser can write to every folder.
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("shut"))
    with pytest.raises(StoreError, match=r"^output: .*shut is read-only") as caught:
        check_output(checked, overwrite=overwrite)
    assert caught.value.code is ErrorCode.STORE_UNUSABLE


@pytest.mark.parametrize("name", ["labels.png", "seg.mha", "out.npy", "seg.precomputed"])
@pytest.mark.parametrize("command", ["plan", "run", "produce"])
def test_an_output_with_the_name_of_another_format_is_rejected(
    workspace: Workspace, command: str, name: str
) -> None:
    workspace.write_job()
    before = everything_below(workspace.folder)
    answer = workspace.call(command, "job.json", "-o", name)
    answer.refused(2, ErrorCode.STORE_UNSUPPORTED, "output: ", name.rpartition("/")[2], ".zarr")
    assert everything_below(workspace.folder) == before


def test_an_output_with_the_suffix_of_a_job_folder_is_rejected(workspace: Workspace) -> None:
    workspace.write_job(output="out.zarr.chunkq")
    refused(workspace, 2, "output: ", "out.zarr.chunkq ")


@pytest.mark.parametrize("key", ["input", "output"])
def test_a_password_in_a_path_is_rejected_and_not_printed(workspace: Workspace, key: str) -> None:
    workspace.write_job(**{key: "ftp://user:hunter2hunter2@host/volume.zarr"})
    stderr = refused(
        workspace, 2, ErrorCode.JOB_INVALID, f"{key}: ftp://user:***@host/volume.zarr "
    )
    assert "hunter2" not in stderr
