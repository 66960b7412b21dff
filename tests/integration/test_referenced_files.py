"""Files to which the files of a job refer: a change of one is noticed by producers and workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunkq_worker.run_task import run_task

from chunkq.errors import ErrorCode, JobError, ModelError
from chunkq.job.allowed_paths import ALLOW_VARIABLE
from chunkq.job.file_hashes import changed_files, hash_files
from chunkq.job.job_file import Job
from chunkq.job.job_parsing import parse_job
from chunkq.queue.contract.executor import Attempt
from tests.harness.small_job import small_workspace
from tests.harness.workspace import Workspace

NEAR, STEPS = "model_config.class_file: near.py", "model_config.processing_steps: parts/scale.py"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Return a job whose network and steps import a module of their folder in a function."""
    workspace = small_workspace(tmp_path)
    network = Path(workspace.values["model_config"]["class_file"])
    network = network if network.is_absolute() else tmp_path / network
    network.write_text(network.read_text() + "\n\ndef helper():\n    import near\n")
    (tmp_path / "near.py").write_text("factor = 1\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "scale.py").write_text("by = 1\n")
    (tmp_path / "steps.py").write_text(
        "from parts.scale import by\n\ndef preprocessing(batch):\n    return batch * by\n"
    )
    workspace.values["model_config"] |= {"processing_steps": "steps.py"}
    workspace.write_job()
    return workspace


def test_a_job_with_a_changed_neighbor_is_another_job(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    workspace.call("produce", "job.json", "--resume").ok()
    (workspace.folder / "near.py").write_text("factor = 2\n")
    (workspace.folder / "parts" / "scale.py").write_text("by = 2\n")
    for options in ((), ("--resume",)):
        refused = workspace.call("produce", "job.json", *options)
        refused.refused(2, ErrorCode.OUTPUT_OF_OTHER_JOB, NEAR, STEPS, "--overwrite")
    workspace.call("produce", "job.json", "--overwrite").ok()
    assert workspace.job.record.changed_files() == []


def test_a_worker_refuses_a_job_with_a_changed_or_missing_neighbor(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    (workspace.folder / "near.py").write_text("factor = 2\n")
    (workspace.folder / "parts" / "scale.py").unlink()
    assert workspace.job.record.changed_files() == [NEAR, STEPS]
    with pytest.raises(ModelError) as caught:
        run_task(workspace.job.items[0].task("infer", (0, 0)), Attempt(1, "inline"))
    assert f": {NEAR}, {STEPS}: " in str(caught.value)
    assert workspace.commits() == []


def test_other_modules_of_the_folder_do_not_change_the_job(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    (workspace.folder / "unrelated.py").write_text("")
    (workspace.folder / "parts" / "other.py").write_text("")
    workspace.call("produce", "job.json", "--resume").ok()


def test_a_worker_does_not_read_neighbors_that_it_may_not_load(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "near.py"
    outside.write_text("factor = 1\n")
    near = workspace.folder / "near.py"
    near.unlink()
    near.symlink_to(outside)
    workspace.call("produce", "job.json").ok()
    outside.write_text("factor = 2\n")
    assert workspace.job.record.changed_files() == [NEAR]
    monkeypatch.setenv(ALLOW_VARIABLE, str(workspace.folder))
    assert workspace.job.record.changed_files() == []


def onnx_job(folder: Path, location: str = "weights.bin") -> Job:
    from onnx import TensorProto, helper, numpy_helper, save

    start, end = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, 4]) for name in ("x", "y")
    )
    weights = numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [start], [end], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = folder / "net.onnx"
    save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    section: dict[str, Any] = {"runtime": "onnx", "type": "file", "model_file": str(path)}
    section["model_input_shape"] = [4, 4]
    return parse_job({"input": "/in.zarr", "output": "/out.zarr", "model_config": section})


def test_the_weights_beside_an_onnx_file_are_files_of_the_job(tmp_path: Path) -> None:
    job, key = onnx_job(tmp_path), "model_config.model_file: weights.bin"
    hashes = hash_files(job)
    assert sorted(hashes) == ["model_config.model_file", key]
    assert changed_files(job, hashes) == []
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert changed_files(job, hashes) == [key]
    weights.unlink()
    assert sorted(hash_files(job)) == ["model_config.model_file"]  # loading the network reports it


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"^model_config.model_file: no file "):
        hash_files(onnx_job(tmp_path).with_files({"model_config.model_file": "/nothing.onnx"}))
