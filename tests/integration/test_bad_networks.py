"""Networks that cannot be used are reported in one line before anything is written."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chunkq_worker.model_check import run_check

from chunkq.create import check_job
from chunkq.errors import ChunkqError, ErrorCode
from chunkq.job.job_reading import load_job
from tests.harness.files import everything_below
from tests.harness.small_job import four_chunks
from tests.harness.workspace import Workspace

Change = Callable[[Workspace], dict[str, Any]]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return four_chunks(tmp_path, runtime="torch")


def save_model(folder: Path, content: str) -> Path:
    path, module = folder / "model.pt", torch.nn.Conv2d(1, 3, 3, padding=1)
    if content == "module":
        torch.save(module, path)
    elif content == "state_dict":
        torch.save(module.state_dict(), path)
    elif content == "exported":
        program = torch.export.export(module.eval(), (torch.zeros(1, 1, 8, 8),))
        torch.export.save(program, path)
    elif content == "pickle":
        path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    elif content == "executable":
        torch.save({"state_dict": Malicious(str(folder / "owned"))}, path)
    else:
        path.write_bytes(content.encode())
    return path


class Malicious:
    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self._path, "w"))


def torchscript(content: str) -> Change:
    def change(workspace: Workspace) -> dict[str, Any]:
        path = save_model(workspace.folder, content)
        return {
            "type": "torchscript",
            "ts_file": str(path),
            "class_file": None,
            "class_name": None,
            "kwargs_file": None,
        }

    return change


def checkpoint(content: str) -> Change:
    return lambda workspace: {"checkpoint": str(save_model(workspace.folder, content))}


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
CONVOLUTION = """
import torch

class Toy(torch.nn.Conv2d):
    def __init__(self, **kwargs):
        torch.manual_seed(0)
        super().__init__(1, 3, 1)
"""
NETWORKS: dict[str, tuple[Change, str]] = {
    "a pickled module as ts_file": (
        torchscript("module"),
        "was written by torch.save, not torch.jit.save",
    ),
    "a state_dict as ts_file": (
        torchscript("state_dict"),
        "was written by torch.save, not torch.jit.save",
    ),
    "an exported program as ts_file": (torchscript("exported"), "is a torch.export file"),
    "text as ts_file": (torchscript("hello"), "model_config.ts_file"),
    "an empty file as ts_file": (torchscript(""), "model_config.ts_file"),
    "a missing class": (
        lambda workspace: {"class_name": "Unet"},
        "has no 'Unet'; it defines Toy",
    ),
    "a class that is not a module": (
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
    "kwargs that are not a dict": (file("kwargs_file", "kwargs = [1]"), "list"),
    "a checkpoint of another network": (checkpoint("state_dict"), "does not fit the class"),
    "a checkpoint that is a pickled module": (checkpoint("module"), "torch.nn.modules.conv.Conv2d"),
    "a checkpoint that runs code": (checkpoint("executable"), "io.open"),
    "a checkpoint that is text": (checkpoint("hello"), "model_config.checkpoint"),
    "an empty checkpoint": (checkpoint(""), "model_config.checkpoint"),
    "a checkpoint that is a plain pickle": (checkpoint("pickle"), "model_config.checkpoint"),
    "cuda without a GPU": (
        lambda workspace: {"device": "cuda"},
        "model_config.device: cuda",
    ),
    "another number of classes": (
        lambda workspace: {"model_output_shape": [4, 8, 8]},
        "returned shape [4, 3, 8, 8]",
    ),
    "an input shape without the network's channel axis": (
        file("class_file", CONVOLUTION, model_input_shape=[8, 8], model_output_shape=[3, 8, 8]),
        "use model_input_shape [1, 8, 8]",
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
def test_a_network_that_cannot_be_used_is_reported_in_one_line(
    workspace: Workspace, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the model check of `chunkq run` and `plan --check-model` in this process."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    change, fragment = NETWORKS[mistake]
    job = load_job(workspace.write_job(model=change(workspace)))
    before = everything_below(workspace.folder)
    record = check_job(job).record
    with pytest.raises(ChunkqError) as raised:
        run_check(record)
    assert fragment in str(raised.value)
    assert "\n" not in str(raised.value)
    assert everything_below(workspace.folder) == before


def test_run_rejects_a_network_with_another_output_shape_before_it_writes_anything(
    workspace: Workspace,
) -> None:
    workspace.write_job(model={"model_output_shape": [4, 8, 8]})
    before = everything_below(workspace.folder)
    answer = workspace.run("run", "job.json")
    answer.refused(1, ErrorCode.MODEL_UNUSABLE, "[4, 3, 8, 8]", "model_output_shape")
    assert answer.out == ""
    assert everything_below(workspace.folder) == before


def test_a_worker_that_cannot_load_the_network_reports_it_once_and_loses_no_chunk(
    workspace: Workspace,
) -> None:
    workspace.write_job(model={"class_name": "Unet"})
    workspace.call("produce", "job.json").ok()
    answer = workspace.run("work", "--burst", "--gpus", "none", "--quiet")
    assert answer.code == 1
    assert "Traceback" not in answer.err
    [line] = [line for line in answer.err.splitlines() if line.startswith("chunkq: ")]
    assert "model_config.class_name: " in line
    assert "'Unet'" in line
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (status["done"], status["queued"], status["failed"]) == (0, 4, 0)
