"""What a process that is suspended while its job is replaced reports, and what it leaves."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from chunkq_worker.run_task import run_task

from chunkq import output as output_module
from chunkq.errors import ErrorCode, MissingJobError, StoreError
from chunkq.executors.base import Attempt
from chunkq.finalize import complete_block, finalize_job
from chunkq.job_handle import JobHandle
from chunkq.ledger import Ledger
from chunkq.output import Output
from chunkq.tasks import Task
from tests.harness.files import files_below
from tests.harness.small_job import SHAPE, small_workspace
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace

OTHER = {"weight_function": ["weight_linear"]}
"""What the job that replaces another has of its own: the same array with other voxels."""
BLOCK = (1, 1)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = small_workspace(tmp_path)
    workspace.call("produce", "job.json").ok()
    return workspace


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The output of the job that replaces another, done alone."""
    workspace = small_workspace(tmp_path_factory.mktemp("undisturbed"))
    workspace.call("produce", workspace.write_job("job.json", **OTHER)).ok()
    workspace.compute_inline()
    workspace.finalize().ok()
    return files_below(workspace.array)


def replace_job(workspace: Workspace) -> None:
    workspace.call("produce", workspace.write_job("other.json", **OTHER), "--overwrite").ok()


def replaced_when_called(
    workspace: Workspace, patch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """Replace the job the first time that a function is called, as if it was suspended there."""
    real = getattr(owner, name)

    def suspended(*args: Any, **kwargs: Any) -> Any:
        patch.undo()
        replace_job(workspace)
        return real(*args, **kwargs)

    patch.setattr(owner, name, suspended)


def ends_undisturbed(workspace: Workspace, undisturbed: dict[str, bytes]) -> None:
    """Do the new job, of which nothing was touched, to its end."""
    assert workspace.commits() == workspace.commits("finalize") == []
    assert workspace.ledger.failures() == []
    assert set(files_below(workspace.output / workspace.job.record.array)) == {"zarr.json"}
    workspace.compute_inline()
    workspace.finalize().ok()
    assert files_below(workspace.output / "0") == undisturbed
    assert {path.name for path in workspace.output.iterdir()} == {"zarr.json", "0"}
    own = attributes(workspace)
    assert (own["state"], own["epoch"]) == ("complete", workspace.job.record.epoch)


def attributes(workspace: Workspace) -> dict[str, Any]:
    return dict(zarr.open_group(workspace.output, mode="r").attrs["chunkq"])


def assert_replaced(call: Callable[[], object]) -> None:
    with pytest.raises(MissingJobError) as caught:
        call()
    assert caught.value.code == ErrorCode.JOB_REPLACED


def infer(workspace: Workspace, index: tuple[int, ...] = BLOCK) -> None:
    run_task(Task("infer", str(workspace.job_folder), index), Attempt(1, "worker"))


def test_a_worker_whose_job_is_replaced_while_it_computes_leaves_no_trace(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    earlier = workspace.epoch_folder
    array = workspace.job.target.shape  # it has the output open already
    with monkeypatch.context() as patch:
        replaced_when_called(workspace, patch, JobHandle, "read_halos")
        assert_replaced(lambda: infer(workspace))
    assert not earlier.exists()
    assert {path.name for path in workspace.output.iterdir()} == {
        "zarr.json", workspace.job.record.array
    }  # fmt: skip
    assert workspace.job.target.shape == array
    ends_undisturbed(workspace, undisturbed)


@pytest.mark.parametrize("is_open", [True, False], ids=["output-open", "output-not-yet-open"])
@pytest.mark.parametrize(
    ("owner", "name"), [(JobHandle, "write"), (Ledger, "put_piece")], ids=["write", "put_piece"]
)
def test_a_worker_suspended_before_it_writes_cannot_reach_the_voxels_of_the_new_job(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, bytes],
    owner: Any,
    name: str,
    is_open: bool,
) -> None:
    earlier = workspace.epoch_folder
    if is_open:
        assert workspace.job.target.shape == (3, *SHAPE)
    with monkeypatch.context() as patch:
        replaced_when_called(workspace, patch, owner, name)
        assert_replaced(lambda: infer(workspace))
    assert not (earlier / "done").exists()
    ends_undisturbed(workspace, undisturbed)


@pytest.mark.parametrize(
    ("owner", "name"), [(Ledger, "get_piece"), (JobHandle, "write")], ids=["get_piece", "write"]
)
def test_a_finalizer_suspended_in_a_block_cannot_reach_the_voxels_of_the_new_job(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, bytes],
    owner: Any,
    name: str,
) -> None:
    workspace.compute_inline()
    job, earlier = workspace.job, workspace.epoch_folder
    with monkeypatch.context() as patch:
        replaced_when_called(workspace, patch, owner, name)
        assert_replaced(lambda: complete_block(job, BLOCK, Attempt(1, "finalizer")))
    assert not (earlier / "done").exists()
    ends_undisturbed(workspace, undisturbed)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Ledger, "read_commits"),
        (Ledger, "seal"),
        (Output, "seal"),
        (Output, "_rename_to_final"),
        (Output, "_remove_strays"),
        (output_module, "sweep_locks"),
    ],
    ids=["records", "ledger", "output", "rename", "strays", "locks"],
)
def test_a_finalizer_suspended_while_it_seals_seals_nothing_of_the_new_job(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, bytes],
    owner: Any,
    name: str,
) -> None:
    workspace.compute_inline()
    job = workspace.job
    with monkeypatch.context() as patch:
        replaced_when_called(workspace, patch, owner, name)
        assert_replaced(lambda: finalize_job(job, worker="finalizer", threads=1))
    own = attributes(workspace)
    assert (own["state"], own["epoch"]) == ("incomplete", workspace.job.record.epoch)
    ends_undisturbed(workspace, undisturbed)


def test_group_metadata_that_a_suspended_finalizer_wrote_are_written_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    """The group's name carries no epoch; this one document can be an old one for a while."""
    workspace.compute_inline()
    job = workspace.job
    with monkeypatch.context() as patch:
        replaced_when_called(workspace, patch, Output, "_write_group")
        with pytest.raises(MissingJobError):
            finalize_job(job, worker="finalizer", threads=1)
    assert attributes(workspace)["epoch"] == job.record.epoch != workspace.job.record.epoch
    assert not workspace.status()["sealed"]
    ends_undisturbed(workspace, undisturbed)


def test_produce_removes_what_processes_of_earlier_jobs_wrote_after_they_were_replaced(
    workspace: Workspace,
) -> None:
    stray = workspace.output / "0.ffffffff" / "c" / "0"
    ledger = workspace.job_folder / "ffffffff" / "done"
    for folder in (stray, ledger):
        folder.mkdir(parents=True)
        (folder / "0").write_bytes(b"late")
    keep = [workspace.output / "0.notes" / "mine", workspace.job_folder / "notes" / "mine"]
    for file in keep:
        file.parent.mkdir()
        file.write_text("of the user")
    workspace.call("produce", "job.json").ok()
    assert not stray.parent.parent.exists()
    assert not ledger.parent.exists()
    assert workspace.epoch_folder.name == workspace.job.record.epoch
    assert [file.read_text() for file in keep] == ["of the user"] * 2


def test_a_foreign_array_in_the_sealed_name_is_not_replaced(workspace: Workspace) -> None:
    workspace.compute_inline()
    write_zarr(workspace.output / "0", random_volume((4, 4)))
    before = files_below(workspace.output / "0")
    job = workspace.job
    with pytest.raises(StoreError) as caught:
        finalize_job(job, worker="finalizer")
    assert caught.value.code == ErrorCode.OUTPUT_CHANGED
    assert files_below(workspace.output / "0") == before
    shutil.rmtree(workspace.output / "0")
    workspace.finalize().ok()
