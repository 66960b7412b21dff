"""A process that is suspended while its job is replaced raises an error and changes nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from chunkq_worker.run_task import run_task

from chunkq.errors import ErrorCode, MissingJobError, StoreError
from chunkq.finalize import finalize_job
from chunkq.job import image_output
from chunkq.job.image_output import ImageOutput
from chunkq.job.job_handle import ItemHandle
from chunkq.job.ledger import ItemLedger, Ledger
from chunkq.job.output import Output
from chunkq.job.output_handle import OutputHandle
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.finalize import FinalizeStage
from tests.harness.files import files_below
from tests.harness.small_job import SHAPE, small_workspace
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace

OTHER = {"weight_function": ["weight_linear"]}
"""Keys of the replacing job: its array has the same shape and other voxels."""
BLOCK = (1, 1)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = small_workspace(tmp_path)
    workspace.call("produce", "job.json").ok()
    return workspace


@pytest.fixture(scope="module")
def new_output(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Run the replacing job alone; return its output."""
    workspace = small_workspace(tmp_path_factory.mktemp("new_output"))
    workspace.call("produce", workspace.write_job("job.json", **OTHER)).ok()
    workspace.compute_inline()
    workspace.finalize().ok()
    return files_below(workspace.array)


def replace_job(workspace: Workspace) -> None:
    workspace.call("produce", workspace.write_job("other.json", **OTHER), "--overwrite").ok()


def replace_when_called(
    workspace: Workspace, patch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """Replace the job when a function is first called, as if the process was suspended there."""
    original = getattr(owner, name)

    def suspended(*args: Any, **kwargs: Any) -> Any:
        patch.undo()
        replace_job(workspace)
        return original(*args, **kwargs)

    patch.setattr(owner, name, suspended)


def assert_new_job_unchanged(workspace: Workspace, new_output: dict[str, bytes]) -> None:
    """Assert that the new job was not changed, run it, and compare its output."""
    assert workspace.commits() == workspace.commits("finalize") == []
    assert workspace.failures() == []
    assert set(files_below(workspace.output / workspace.job.record.array)) == {"zarr.json"}
    workspace.compute_inline()
    workspace.finalize().ok()
    assert files_below(workspace.output / "0") == new_output
    assert {path.name for path in workspace.output.iterdir()} == {"zarr.json", "0"}
    status = attributes(workspace)
    assert (status["state"], status["epoch"]) == ("complete", workspace.job.record.epoch)


def attributes(workspace: Workspace) -> dict[str, Any]:
    return dict(zarr.open_group(workspace.output, mode="r").attrs["chunkq"])


def assert_replaced(call: Callable[[], object]) -> None:
    with pytest.raises(MissingJobError) as error:
        call()
    assert error.value.code == ErrorCode.JOB_REPLACED


def infer(workspace: Workspace, index: tuple[int, ...] = BLOCK) -> None:
    run_task(Task("infer", *workspace.job.id, 0, index), Attempt(1, "worker"))


def test_a_worker_whose_job_is_replaced_while_it_computes_writes_nothing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, new_output: dict[str, bytes]
) -> None:
    earlier = workspace.epoch_folder
    array = workspace.item.outputs[0].target.shape  # open the output before the replacement
    with monkeypatch.context() as patch:
        replace_when_called(workspace, patch, ItemHandle, "read_halos")
        assert_replaced(lambda: infer(workspace))
    assert not earlier.exists()
    assert {path.name for path in workspace.output.iterdir()} == {
        "zarr.json", workspace.job.record.array
    }  # fmt: skip
    assert workspace.item.outputs[0].target.shape == array
    assert_new_job_unchanged(workspace, new_output)


@pytest.mark.parametrize("is_open", [True, False], ids=["output-open", "output-not-yet-open"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(OutputHandle, "write"), (ItemLedger, "put_piece")],
    ids=["write", "put_piece"],
)
def test_a_worker_suspended_before_it_writes_does_not_change_the_new_job(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    new_output: dict[str, bytes],
    owner: Any,
    name: str,
    is_open: bool,
) -> None:
    earlier = workspace.epoch_folder
    if is_open:
        assert workspace.item.outputs[0].target.shape == (3, *SHAPE)
    with monkeypatch.context() as patch:
        replace_when_called(workspace, patch, owner, name)
        assert_replaced(lambda: infer(workspace))
    assert not (earlier / "done").exists()
    assert_new_job_unchanged(workspace, new_output)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(ItemLedger, "get_piece"), (OutputHandle, "write")],
    ids=["get_piece", "write"],
)
def test_a_finalizer_suspended_in_a_block_does_not_change_the_new_job(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    new_output: dict[str, bytes],
    owner: Any,
    name: str,
) -> None:
    workspace.compute_inline()
    job, earlier = workspace.job, workspace.epoch_folder
    with monkeypatch.context() as patch:
        replace_when_called(workspace, patch, owner, name)
        assert_replaced(lambda: FinalizeStage().run(job.items[0], BLOCK, Attempt(1, "finalizer")))
    assert not (earlier / "done").exists()
    assert_new_job_unchanged(workspace, new_output)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ItemLedger, "read_commits"),
        (Ledger, "seal"),
        (Output, "seal"),
        (ImageOutput, "_rename_to_final"),
        (ImageOutput, "_delete_stray_arrays"),
        (image_output, "delete_stale_locks"),
    ],
    ids=["records", "ledger", "output", "rename", "strays", "locks"],
)
def test_a_finalizer_suspended_while_it_seals_does_not_seal_the_new_job(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    new_output: dict[str, bytes],
    owner: Any,
    name: str,
) -> None:
    workspace.compute_inline()
    job = workspace.job
    with monkeypatch.context() as patch:
        replace_when_called(workspace, patch, owner, name)
        assert_replaced(lambda: finalize_job(job, worker="finalizer", threads=1))
    status = attributes(workspace)
    assert (status["state"], status["epoch"]) == ("incomplete", workspace.job.record.epoch)
    assert_new_job_unchanged(workspace, new_output)


def test_group_metadata_written_by_a_suspended_finalizer_are_replaced(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, new_output: dict[str, bytes]
) -> None:
    """The name of the group has no epoch, so an earlier job can overwrite its metadata."""
    workspace.compute_inline()
    job = workspace.job
    with monkeypatch.context() as patch:
        replace_when_called(workspace, patch, ImageOutput, "_write_group")
        with pytest.raises(MissingJobError):
            finalize_job(job, worker="finalizer", threads=1)
    assert attributes(workspace)["epoch"] == job.record.epoch != workspace.job.record.epoch
    assert not workspace.status()["sealed"]
    assert_new_job_unchanged(workspace, new_output)


def test_produce_deletes_files_that_processes_of_earlier_jobs_wrote_later(
    workspace: Workspace,
) -> None:
    stray = workspace.output / "0.ffffffff" / "c" / "0"
    ledger = workspace.job_folder / "ffffffff" / "done"
    for folder in (stray, ledger):
        folder.mkdir(parents=True)
        (folder / "0").write_bytes(b"late")
    user_files = [workspace.output / "0.notes" / "a", workspace.job_folder / "notes" / "a"]
    for file in user_files:
        file.parent.mkdir()
        file.write_text("notes")
    workspace.call("produce", "job.json").ok()
    assert not stray.parent.parent.exists()
    assert not ledger.parent.exists()
    assert workspace.epoch_folder.name == workspace.job.record.epoch
    assert [file.read_text() for file in user_files] == ["notes"] * 2


def test_an_array_of_another_program_with_the_final_name_is_not_replaced(
    workspace: Workspace,
) -> None:
    workspace.compute_inline()
    write_zarr(workspace.output / "0", random_volume((4, 4)))
    before = files_below(workspace.output / "0")
    job = workspace.job
    with pytest.raises(StoreError) as error:
        finalize_job(job, worker="finalizer")
    assert error.value.code == ErrorCode.OUTPUT_CHANGED
    assert files_below(workspace.output / "0") == before
    shutil.rmtree(workspace.output / "0")
    workspace.finalize().ok()
