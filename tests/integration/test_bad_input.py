"""Every mistake is one clear line on stderr with the right exit code, and nothing is written."""

import io
import json
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from chunkq_producer import submit
from chunkq_worker import model_check

from chunkq.job import load_job
from tests.harness.files import everything_below
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace

SHAPE = (32, 24)
Change = Callable[[Workspace], dict[str, Any]]


def make_bench(folder: Path) -> Workspace:
    folder.mkdir(parents=True, exist_ok=True)
    write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4],
        "chunksize": [16, 12],
        "storage_chunks": [4, 4],
        "threads": 1,
        "model_config": toy_model(folder, (8, 8), scale=100.0, runtime="torch"),
    }
    return Workspace(folder, values)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_bench(tmp_path)


def refused(
    workspace: Workspace, code: int, *fragments: str, command: tuple[str, ...] = ("produce",)
) -> str:
    """Run a command on job.json; it must refuse and leave the folder as it was."""
    before = everything_below(workspace.folder)
    answer = workspace.call(*command, "job.json")
    answer.refused(code, *fragments)
    assert answer.out == ""
    assert everything_below(workspace.folder) == before
    return answer.err


def test_a_missing_input_is_refused(workspace: Workspace) -> None:
    workspace.write_job(input="nowhere.zarr")
    refused(workspace, 2, f"input: {workspace.folder}/nowhere.zarr is not there")


def test_a_missing_npy_file_is_refused(workspace: Workspace) -> None:
    workspace.write_job(input="nowhere.npy")
    refused(workspace, 2, f"input: no file {workspace.folder}/nowhere.npy")


def test_a_path_that_is_not_inside_the_store_is_refused(workspace: Workspace) -> None:
    workspace.write_job(input="in.zarr/deeper")
    refused(workspace, 2, "in.zarr/deeper is not there")


@pytest.mark.parametrize("name", ["picture.tif", "volume.npz"])
def test_a_file_that_is_no_array_is_refused(workspace: Workspace, name: str) -> None:
    (workspace.folder / name).write_bytes(b"II*\0")
    workspace.write_job(input=name)
    refused(workspace, 2, f"{name} is a file, not a Zarr store or .npy")


def test_a_folder_that_is_no_store_is_refused(workspace: Workspace) -> None:
    (workspace.folder / "plain").mkdir()
    workspace.write_job(input="plain")
    refused(workspace, 2, "plain holds no Zarr array")


@pytest.mark.parametrize("content", [b"not an array", b"", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_a_npy_file_with_something_else_in_it_is_refused(
    workspace: Workspace, content: bytes
) -> None:
    (workspace.folder / "in.npy").write_bytes(content)
    workspace.write_job(input="in.npy")
    refused(workspace, 2, "in.npy: not a .npy file")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.asfortranarray(random_volume(SHAPE)), "C order"),
        (np.zeros(SHAPE, np.complex64), "holds complex64; real numbers are needed"),
        (np.zeros(SHAPE, [("a", "i4"), ("b", "f4")]), "real numbers are needed"),
        (np.zeros(SHAPE, "U3"), "real numbers are needed"),
        (np.float32(3), "has 0 axes"),
        (np.zeros((0, 24)), "so no voxel"),
        (np.zeros((1, 1, 1, 8, 8), np.uint8), "has 5 axes"),
    ],
)
def test_arrays_that_are_no_volume_are_refused(
    workspace: Workspace, values: Any, words: str
) -> None:
    np.save(workspace.folder / "in.npy", values)
    workspace.write_job(input="in.npy")
    refused(workspace, 2, "in.npy", words)


def test_a_zarr_array_of_strings_is_refused(workspace: Workspace) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.create_array(workspace.folder / "words.zarr", shape=SHAPE, chunks=(8, 8), dtype=str)
        workspace.write_job(input="words.zarr")
        refused(workspace, 2, "words.zarr", "real numbers are needed")


def test_a_group_without_an_image_is_refused_with_its_members(workspace: Workspace) -> None:
    group = zarr.create_group(workspace.folder / "group.zarr")
    for name in ("raw", "labels"):
        group.create_array(name, shape=(4, 4), chunks=(4, 4), dtype="uint8")
    workspace.write_job(input="group.zarr")
    refused(workspace, 2, "is a Zarr group, not an array", "labels, raw")


def test_an_empty_group_is_refused(workspace: Workspace) -> None:
    zarr.create_group(workspace.folder / "group.zarr")
    workspace.write_job(input="group.zarr")
    refused(workspace, 2, "and it is empty")


def test_lists_and_shapes_of_the_wrong_rank_are_refused_all_at_once(workspace: Workspace) -> None:
    workspace.write_job(
        strides=[4, 4, 4], chunksize=[16], model={"model_input_shape": [1, 1, 8, 8]}
    )
    said = refused(
        workspace,
        2,
        "strides: has 3 entries, the input has 2 axes",
        "chunksize: has 1 entries, the input has 2 axes",
        "model_config.model_input_shape: has 4 entries",
    )
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"stride": [4, 4]}, "stride: unknown key; did you mean 'strides'?"),
        ({"chunk_size": [4, 4]}, "chunk_size: unknown key; did you mean 'chunksize'?"),
        (
            {"model": {"max_batchsize": 2}},
            "model_config.max_batchsize: unknown key; did you mean 'max_batch_size'?",
        ),
        ({"zzz": 1}, "zzz: unknown key; `chunkq schema` lists the legal ones"),
        (
            {"combine": "sofd"},
            "combine: 'sofd' is none of 'weighted_avg', 'soft' or 'hard'; did you mean 'soft'?",
        ),
        (
            {"weight_function": ["weight_gausian"]},
            "weight_function: unknown name 'weight_gausian'; did you mean 'weight_gaussian'?",
        ),
    ],
)
def test_a_misspelt_word_is_refused_with_the_nearest_legal_one(
    workspace: Workspace, changes: dict[str, Any], line: str
) -> None:
    workspace.write_job(**changes)
    assert refused(workspace, 2) == f"chunkq: {line}\n"


def test_several_mistakes_are_named_at_once_one_line_each(workspace: Workspace) -> None:
    workspace.write_job(
        strides=None,
        chunksize=[16, -1],
        pad_width=[1.5, 2],
        margin=[1, 1],
        model={"max_batch_size": 0, "class_name": None},
    )
    said = refused(
        workspace,
        2,
        "strides: missing; sliding_window needs the step",
        "chunksize.1: input should be greater than 0, not -1",
        "pad_width.0: input should be a valid integer",
        "model_config.max_batch_size: input should be greater than 0, not 0",
        "model_config.class_name: missing; type class needs it",
        "margin: only for inference_type crop_margin",
    )
    assert len(said.splitlines()) == 6


def test_a_chunk_smaller_than_the_patch_is_refused(workspace: Workspace) -> None:
    workspace.write_job(chunksize=[16, 4])
    refused(
        workspace,
        2,
        "chunksize: 4 along axis 1 is smaller than the output patch's 8 voxels",
        "at least 8",
    )


def test_storage_chunks_that_do_not_divide_the_chunk_are_refused(workspace: Workspace) -> None:
    workspace.write_job(storage_chunks=[5, 4])
    refused(workspace, 2, "storage_chunks: 5 along axis 0 does not divide the chunk's 16")


def test_voxels_that_no_patch_speaks_for_are_refused_with_what_would_cover_them(
    workspace: Workspace,
) -> None:
    workspace.values["model_config"] = toy_model(workspace.folder, (8, 8), output=(8, 4))
    workspace.write_job()
    refused(
        workspace,
        2,
        "pad_width: along axis 1 voxel 0 lies in no output patch; 2 there would cover it",
    )


def test_strides_wider_than_the_patch_are_refused(workspace: Workspace) -> None:
    workspace.write_job(strides=[4, 9])
    refused(workspace, 2, "strides: 9 along axis 1", "make it at most 8")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "return np.hanning(shape[0])[:, None] * np.ones(shape)",
            "gave 0.0 at [0, 0]",
        ),
        ("return np.full(shape, np.nan)", "gave nan at [0, 0]"),
        ("return np.ones((2, 2))", "gave shape [2, 2]; the output patch is [8, 8]"),
        ("return 1 / 0", "raised ZeroDivisionError"),
    ],
)
def test_a_weight_function_that_gives_no_weights_is_refused(
    workspace: Workspace, body: str, words: str
) -> None:
    (workspace.folder / "weights.py").write_text(
        f"import numpy as np\n\ndef mine(shape):\n    {body}\n"
    )
    workspace.write_job(weight_function=["weights.py", "mine"])
    refused(workspace, 2, "weight_function: mine of", words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "weight_function: no file"),
        ("def other(shape): pass", "has no 'mine'; it defines other"),
        ("def mine(:", "is not Python"),
        ("raise KeyError('x')", "raised KeyError"),
    ],
)
def test_a_weight_file_without_the_function_is_refused(
    workspace: Workspace, text: str | None, words: str
) -> None:
    if text is not None:
        (workspace.folder / "weights.py").write_text(text)
    workspace.write_job(weight_function=["weights.py", "mine"])
    refused(workspace, 2, words)


def test_every_missing_model_file_is_named(workspace: Workspace) -> None:
    workspace.write_job(model={"class_file": "a.py", "kwargs_file": "b.py", "checkpoint": "c.pt"})
    said = refused(workspace, 2)
    for key, name in (("class_file", "a.py"), ("kwargs_file", "b.py"), ("checkpoint", "c.pt")):
        assert f"chunkq: model_config.{key}: no file {workspace.folder}/{name}\n" in said


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model": {"runtime": "onnx", "type": "torchscript", "ts_file": "m.pt"}},
            "model_config.type: onnx has no torchscript; its types are file",
        ),
        (
            {"model": {"runtime": "tensorflow", "type": "exported", "model_file": "m.pt2"}},
            "model_config.type: tensorflow has no exported; its types are class, file, json",
        ),
        (
            {"model": {"type": "json", "json_file": "m.json"}},
            "model_config.type: torch has no json; its types are class, file",
        ),
        ({"model": {"runtime": "jax"}}, "model_config.runtime: 'jax' is none of"),
        (
            {"model": {"processing_steps": "steps.py"}},
            "model_config.processing_steps: no file",
        ),
        ({"input": ["in.zarr", "in.zarr"]}, "input: several volumes need model_config.join_dim"),
        ({"roi": [[0, 4], [0, 4]]}, "roi: not in this version"),
        (
            {"model": {"runtime": "onnx", "type": "file", "model_file": "m.onnx", "compile": True}},
            "model_config.compile: only for runtime torch",
        ),
    ],
)
def test_what_this_version_cannot_do_is_refused_by_name(
    workspace: Workspace, changes: dict[str, Any], line: str
) -> None:
    workspace.write_job(**changes)
    refused(workspace, 2, line)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 300, 1.5, -1])
def test_a_pad_value_that_the_input_cannot_hold_is_refused(
    workspace: Workspace, value: float
) -> None:
    workspace.write_job(pad_value=value)
    refused(workspace, 2, f"pad_value: {value} cannot be held by the input's dtype uint8")


@pytest.mark.parametrize(
    "queue", ["kafka://host/queue", "redis:/host", "queue.db", "sqlit:///q.db"]
)
def test_a_queue_of_an_unknown_kind_is_refused(workspace: Workspace, queue: str) -> None:
    workspace.write_job()
    before = everything_below(workspace.folder)
    workspace.call("produce", "job.json", "--queue", queue).refused(2, "queue:", "sqlite://")
    assert everything_below(workspace.folder) == before


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("job.yaml", "input: [in.zarr\nstrides: 4", "not YAML"),
        ("job.yaml", "input:\tin.zarr\n\tx: 1", "not YAML"),
        ("job.yaml", "- just\n- a list\n", "a job file is a mapping"),
        ("job.yaml", "", "a job file is a mapping"),
        ("job.yaml", "1: 2\n", "keys should be strings"),
        ("job.json", '{"input": ', "not JSON"),
        ("job.json", "[1]", "a job file is a mapping"),
        ("job.yaml", b"\xff\xfe\x00", "cannot be read as a job file"),
    ],
)
def test_a_file_that_is_no_job_is_refused(
    workspace: Workspace, name: str, text: str | bytes, words: str
) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (workspace.folder / name).write_bytes(content)
    before = everything_below(workspace.folder)
    workspace.call("produce", name).refused(2, words)
    assert everything_below(workspace.folder) == before


def test_a_job_file_that_is_not_there_is_refused(workspace: Workspace) -> None:
    workspace.call("plan", "nowhere.yaml").refused(
        2, "nowhere.yaml: no such job file", "chunkq init"
    )


@pytest.mark.parametrize("output", ["in.zarr", ".", "in.zarr/c"])
@pytest.mark.parametrize("how", [(), ("--overwrite",)])
def test_an_output_that_would_destroy_its_own_input_is_refused(
    workspace: Workspace, output: str, how: tuple[str, ...]
) -> None:
    workspace.write_job(output=output)
    before = everything_below(workspace.folder)
    workspace.call("produce", "job.json", *how).refused(2, "would overwrite the input")
    assert everything_below(workspace.folder) == before


def test_an_output_that_is_the_input_by_another_name_is_refused(workspace: Workspace) -> None:
    (workspace.folder / "link.zarr").symlink_to(workspace.folder / "in.zarr")
    workspace.write_job(output="link.zarr")
    workspace.call("produce", "job.json", "--overwrite").refused(2, "would overwrite the input")
    assert (workspace.folder / "in.zarr" / "c").is_dir()


def test_an_output_beside_the_array_in_one_group_is_accepted(workspace: Workspace) -> None:
    group = zarr.create_group(workspace.folder / "both.zarr")
    group.create_array("raw", data=random_volume(SHAPE), chunks=(8, 8))
    workspace.write_job(input="both.zarr/raw", output="both.zarr/prediction")
    workspace.call("produce", "job.json").ok()


def test_an_output_that_cannot_be_written_is_refused(workspace: Workspace) -> None:
    (workspace.folder / "a file").write_text("")
    workspace.write_job(output="a file/out.zarr")
    before = everything_below(workspace.folder)
    workspace.call("produce", "job.json").refused(
        2, "output: ", "a file/out.zarr", "cannot be written"
    )
    after = everything_below(workspace.folder)
    assert [name for name in after if not name.startswith("queue.db")] == before


def test_an_output_that_is_named_like_a_job_folder_is_refused(workspace: Workspace) -> None:
    workspace.write_job(output="out.zarr.chunkq")
    refused(workspace, 2, "ends in .chunkq, as job folders do")


# What only loading the network shows: `chunkq run` tries it before anything is written.


def saved(folder: Path, what: str) -> Path:
    path, module = folder / "model.pt", torch.nn.Conv2d(1, 3, 3, padding=1)
    if what == "module":
        torch.save(module, path)
    elif what == "state_dict":
        torch.save(module.state_dict(), path)
    elif what == "exported":
        program = torch.export.export(module.eval(), (torch.zeros(1, 1, 8, 8),))
        torch.export.save(program, path)
    elif what == "pickle":
        path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    elif what == "executable":
        torch.save({"state_dict": Malicious(str(folder / "owned"))}, path)
    else:
        path.write_bytes(what.encode())
    return path


class Malicious:
    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self._path, "w"))


def torchscript(what: str) -> Change:
    def change(workspace: Workspace) -> dict[str, Any]:
        path = saved(workspace.folder, what)
        return {
            "type": "torchscript",
            "ts_file": str(path),
            "class_file": None,
            "class_name": None,
            "kwargs_file": None,
        }

    return change


def checkpoint(what: str) -> Change:
    return lambda workspace: {"checkpoint": str(saved(workspace.folder, what))}


def file(key: str, text: str, **more: Any) -> Change:
    def change(workspace: Workspace) -> dict[str, Any]:
        (workspace.folder / "user.py").write_text(text)
        return {key: str(workspace.folder / "user.py"), **more}

    return change


RAISING = """
import torch

class Toy(torch.nn.Module):
    def __init__(self, **kwargs):
        super().__init__()

    def forward(self, x):
        raise ValueError("too small")
"""
NETWORKS: dict[str, tuple[Change, str]] = {
    "a module saved whole as ts_file": (
        torchscript("module"),
        "was written by torch.save, not torch.jit.save",
    ),
    "a state_dict as ts_file": (
        torchscript("state_dict"),
        "was written by torch.save, not torch.jit.save",
    ),
    "an exported program as ts_file": (torchscript("exported"), "is a torch.export file"),
    "text as ts_file": (torchscript("hello"), "torch.jit.script"),
    "nothing as ts_file": (torchscript(""), "torch.jit.script"),
    "a class that is not there": (
        lambda b: {"class_name": "Unet"},
        "has no 'Unet'; it defines Toy",
    ),
    "a class that is no module": (
        file("class_file", "class Toy:\n    def __init__(self, **kw): pass\n"),
        "expected a torch.nn.Module",
    ),
    "a class file that raises": (
        file("class_file", "import nonsense_xyz\n"),
        "raised ModuleNotFoundError",
    ),
    "kwargs that do not fit": (
        file("kwargs_file", "kwargs = {'width': 3}"),
        "unexpected keyword argument 'width'",
    ),
    "a kwargs file without kwargs": (file("kwargs_file", "args = 1"), "has no 'kwargs'"),
    "kwargs that are no dict": (file("kwargs_file", "kwargs = [1]"), "expected a dict"),
    "a checkpoint of another network": (checkpoint("state_dict"), "does not fit the class"),
    "a checkpoint that is a whole module": (checkpoint("module"), "contains more than weights"),
    "a checkpoint that would run code": (checkpoint("executable"), "contains more than weights"),
    "a checkpoint that is no checkpoint": (checkpoint("hello"), "model_config.checkpoint"),
    "an empty checkpoint": (checkpoint(""), "model_config.checkpoint"),
    "a checkpoint of plain pickle": (checkpoint("pickle"), "model_config.checkpoint"),
    "cuda without a GPU": (
        lambda b: {"device": "cuda"},
        "set device: cpu",
    ),
    "another number of classes": (
        lambda b: {"model_output_shape": [4, 8, 8]},
        "returned shape [4, 3, 8, 8]",
    ),
    "a network that raises": (
        file(
            "class_file",
            RAISING,
        ),
        "the network raised ValueError on a batch of zeros: too small",
    ),
}


@pytest.mark.parametrize("mistake", NETWORKS)
def test_a_network_that_cannot_be_used_is_one_clear_error(
    workspace: Workspace,
    mistake: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, through the probe that `chunkq run` and `plan --check-model` start."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    change, words = NETWORKS[mistake]
    job = load_job(workspace.write_job(model=change(workspace)))
    before = everything_below(workspace.folder)
    record = submit.prepare(job).record
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(record.to_json())))
    model_check.main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert words in error, error
    assert "\n" not in error
    assert everything_below(workspace.folder) == before


def test_run_refuses_a_network_of_another_shape_before_anything_is_written(
    workspace: Workspace,
) -> None:
    workspace.write_job(model={"model_output_shape": [4, 8, 8]})
    before = everything_below(workspace.folder)
    answer = workspace.run("run", "job.json")
    answer.refused(1, "returned shape [4, 3, 8, 8]", "fix model_output_shape or the network")
    assert answer.out == ""
    assert everything_below(workspace.folder) == before


def test_a_worker_that_cannot_load_the_network_says_so_once_and_loses_no_chunk(
    workspace: Workspace,
) -> None:
    workspace.write_job(model={"class_name": "Unet"})
    workspace.call("produce", "job.json").ok()
    answer = workspace.run("work", "--burst", "--gpus", "none", "--quiet")
    assert answer.code == 1
    assert "Traceback" not in answer.err
    complaints = [line for line in answer.err.splitlines() if line.startswith("chunkq: ")]
    assert len(complaints) == 1
    assert "has no 'Unet'; it defines Toy" in complaints[0]
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (status["done"], status["queued"], status["failed"]) == (0, 4, 0)


def poisoned(folder: Path, **more: Any) -> Workspace:
    """A job without overlap; the network gives NaN for the one patch with a voxel of 255."""
    workspace = make_bench(folder)
    values = random_volume(SHAPE)
    values[20, 13] = 255
    write_zarr(folder / "marked.zarr", values, (8, 8))
    workspace.values.update(
        input="marked.zarr",
        inference_type="patch",
        strides=None,
        chunksize=[16, 8],
        model_config=toy_model(folder, (8, 8), scale=100.0, kind="pointwise", poison=200),
        **more,
    )
    workspace.write_job()
    return workspace


def test_a_network_that_gives_nan_fails_that_chunk_alone_and_names_the_patch(
    tmp_path: Path,
) -> None:
    workspace = poisoned(tmp_path)
    answer = workspace.run("run", "job.json", "--gpus", "none")
    assert answer.code == 3
    assert "Traceback" not in answer.err
    assert "chunkq: 1 chunks are not computed yet: 1.1" in answer.err
    assert "for the patch that reads voxels [16, 8] to [24, 16]" in answer.err
    assert {commit.chunk for commit in workspace.commits()} == {
        (i, j) for i in range(2) for j in range(3)
    } - {(1, 1)}
    [failure] = workspace.ledger.failures()
    assert failure.error == "PredictionError"
    assert failure.attempt == 3
    [group] = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)["failures"]
    assert group["chunks"] == ["1.1"]
    workspace.call("finalize", "out.zarr").refused(3, "1 chunks are not computed yet: 1.1")


def test_nan_zero_counts_the_prediction_as_zero_and_completes(tmp_path: Path) -> None:
    workspace = poisoned(tmp_path, nan="zero")
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    assert workspace.ledger.failures() == []
    workspace.call("finalize", "out.zarr").ok()
    found = read_output(workspace.output)
    assert np.isfinite(found).all()
    assert found[0, 16, 8] == 0
    assert found[0, 16, 9] != 0
    assert found[1, 16, 8] != 0


def test_a_corrupt_storage_chunk_fails_the_chunks_that_read_it_and_is_named(
    workspace: Workspace,
) -> None:
    stored = workspace.folder / "in.zarr" / "c" / "3" / "2"
    stored.write_bytes(b"\x00garbage" * 3)
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    workspace.call("finalize", "out.zarr").refused(3, "not computed yet: 1.1")
    assert {commit.chunk for commit in workspace.commits()} == {(0, 0), (0, 1), (1, 0)}
    [failure] = workspace.ledger.failures()
    assert failure.error == "ChunkReadError"
    assert failure.message.startswith(f"{workspace.folder}/in.zarr: voxels [")
    assert "cannot be read" in failure.message
    assert "3/2" in failure.message


def test_a_retry_after_the_cause_is_mended_completes_the_job(workspace: Workspace) -> None:
    stored = workspace.folder / "in.zarr" / "c" / "3" / "2"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-9])
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    workspace.call("cancel", "out.zarr").ok()
    assert workspace.call("retry", "out.zarr").ok().out == "1 chunks queued again\n"
    stored.write_bytes(whole)
    workspace.compute_inline()
    workspace.call("finalize", "out.zarr").ok()
    assert workspace.ledger.failures() == []


@pytest.mark.parametrize("key", ["input", "output"])
def test_a_password_in_a_path_is_refused_and_not_repeated(workspace: Workspace, key: str) -> None:
    workspace.write_job(**{key: "ftp://user:hunter2hunter2@host/volume.zarr"})
    said = refused(workspace, 2, f"{key}: ftp://user:***@host/volume.zarr carries credentials")
    assert "hunter2" not in said
