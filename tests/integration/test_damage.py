"""Damage to stored files is detected when they are read, and never changes a result."""

import json
import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from chunkq.create import CheckedJob, check_job, create_job
from chunkq.errors import ChunkqError, ErrorCode, IncompleteError
from chunkq.finalize import finalize_job
from chunkq.job.image_output import ImageOutput
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_reading import load_job
from chunkq.job.task_records import Failure
from chunkq.job.tasks import chunk_name
from chunkq.queue.contract.executor import TaskCounts
from chunkq.storage import claims, documents
from chunkq.storage.objects import ObjectFolder
from tests.harness.files import files_below
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.waiting import TIMEOUT
from tests.harness.workspace import Workspace

SHAPE = (24, 22)
CHUNKS = {(i, j) for i in range(2) for j in range(2)}
COMMANDS = [
    ("status", "out.zarr"),
    ("report", "out.zarr"),
    ("finalize", "out.zarr"),
    ("retry", "out.zarr"),
    ("produce", "job.json"),
    ("run", "job.json"),
]


def make_workspace(folder: Path) -> Workspace:
    """Create a job of four chunks whose blocks all have bands."""
    write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4],
        "chunksize": [12, 12],
        "storage_chunks": [4, 4],
        "threads": 1,
        "model_config": toy_model(folder, (8, 8), scale=100.0),
    }
    workspace = Workspace(folder, values)
    workspace.write_job()
    return workspace


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("reference"))
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    workspace.call("finalize", "out.zarr").ok()
    return workspace


@pytest.fixture
def produced(tmp_path: Path) -> Workspace:
    workspace = make_workspace(tmp_path)
    workspace.call("produce", "job.json").ok()
    return workspace


@pytest.fixture
def inferred(produced: Workspace) -> Workspace:
    produced.compute_inline()
    return produced


@pytest.fixture
def sealed(inferred: Workspace) -> Workspace:
    inferred.call("finalize", "out.zarr").ok()
    return inferred


def flip_bit_of_value(path: Path) -> None:
    """Flip a bit of a JSON document that changes a value; one of a last digit may not."""
    content = path.read_bytes()
    for at in range(len(content) // 2, len(content)):
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        try:
            is_same = json.loads(flipped) == json.loads(content)
        except ValueError:
            is_same = False
        if not is_same:
            path.write_bytes(flipped)
            return
    raise AssertionError("no bit changes a value")


def code_of(call: Callable[[], object]) -> ErrorCode:
    with pytest.raises(ChunkqError) as error:
        call()
    return error.value.code


# ------------------------------------------------------------------------ the job record


def with_other_strides(path: Path) -> None:
    """Change a value and update the checksum of the document."""
    values = documents.decode(path.read_bytes())
    assert values is not None
    values["job"]["strides"] = [5, 5]
    path.write_bytes(documents.encode(values, indent=1))


RECORD_DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped bit": flip_bit_of_value,
    "changed digit": lambda p: p.write_text(p.read_text().replace("4,", "5,", 1)),
    "a value and the checksum changed": with_other_strides,
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "empty": lambda p: p.write_bytes(b""),
    "not JSON": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "another type of JSON": lambda p: p.write_text("[1]"),
    "nested deeply": lambda p: p.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", RECORD_DAMAGES)
def test_a_damaged_record_is_rejected_by_every_command(inferred: Workspace, damage: str) -> None:
    path = inferred.job_folder / "job.json"
    RECORD_DAMAGES[damage](path)
    before = files_below(inferred.output)
    folder = JobFolder(str(inferred.job_folder))
    assert code_of(folder.read_record) == ErrorCode.JOB_RECORD_DAMAGED
    for command in COMMANDS:
        inferred.call(*command).refused(2, ErrorCode.JOB_RECORD_DAMAGED, f"{path}: ", "--overwrite")
    assert files_below(inferred.output) == before


def test_cancel_and_overwrite_work_with_a_damaged_record(
    produced: Workspace, reference: Workspace
) -> None:
    flip_bit_of_value(produced.job_folder / "job.json")
    produced.call("cancel", "out.zarr").ok()
    with produced.queue() as queue:
        assert queue.jobs() == {}
    produced.call("produce", "job.json", "--overwrite").ok()
    produced.compute_inline()
    produced.call("finalize", "out.zarr").ok()
    np.testing.assert_array_equal(read_output(produced.output), read_output(reference.output))


def test_a_worker_computes_no_chunk_of_a_job_with_a_damaged_record(produced: Workspace) -> None:
    path, job = produced.job_folder / "job.json", produced.job.id
    with_other_strides(path)
    answer = produced.work()
    assert answer.code != 0
    assert f"{path}: damaged" in answer.err
    with produced.queue() as queue:
        assert queue.jobs() == {job: TaskCounts(queued=len(CHUNKS))}


def test_a_job_folder_of_an_earlier_version_is_rejected(produced: Workspace) -> None:
    path = produced.job_folder / "job.json"
    values = json.loads(path.read_bytes())
    for key in ("checksum", "layout", "epoch"):
        del values[key]
    path.write_text(json.dumps(values))
    folder = JobFolder(str(produced.job_folder))
    assert code_of(folder.read_record) == ErrorCode.JOB_RECORD_UNSUPPORTED
    produced.call("status", "out.zarr").refused(2, ErrorCode.JOB_RECORD_UNSUPPORTED, f"{path}: ")
    produced.call("produce", "job.json", "--overwrite").ok()


# ------------------------------------------------------------------------ the output's metadata


def edit_metadata(workspace: Workspace, **changes: object) -> None:
    path = workspace.array / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


OTHER_METADATA: list[dict[str, object]] = [
    {"shape": [3, 24, 20]},
    {"data_type": "float64"},
    {"fill_value": 1.0},
    {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 8, 8]}}},
    {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
]


@pytest.mark.parametrize("changes", OTHER_METADATA, ids=lambda changes: next(iter(changes)))
def test_an_output_array_with_changed_metadata_is_not_written_and_not_sealed(
    inferred: Workspace, changes: dict[str, object]
) -> None:
    edit_metadata(inferred, **changes)
    voxels = {name: data for name, data in files_below(inferred.array).items() if "/" in name}
    job = inferred.job
    assert code_of(lambda: finalize_job(job, worker="finalizer")) == ErrorCode.OUTPUT_CHANGED
    assert code_of(inferred.job.output.image(inferred.item.item).open) == ErrorCode.OUTPUT_CHANGED
    inferred.call("finalize", "out.zarr").refused(
        2, ErrorCode.OUTPUT_CHANGED, f"({next(iter(changes))})"
    )
    assert not job.ledger.is_sealed()
    after = {name: data for name, data in files_below(inferred.array).items() if "/" in name}
    assert after == voxels


@pytest.mark.parametrize("changes", OTHER_METADATA[:2], ids=lambda changes: next(iter(changes)))
def test_a_sealed_output_with_changed_metadata_is_reported(
    sealed: Workspace, changes: dict[str, object]
) -> None:
    edit_metadata(sealed, **changes)
    for command in [("finalize", "out.zarr"), ("produce", "job.json"), ("run", "job.json")]:
        sealed.call(*command).refused(2, ErrorCode.OUTPUT_CHANGED, "0/zarr.json: ")


def test_attributes_that_a_user_adds_are_kept(sealed: Workspace) -> None:
    edit_metadata(sealed, attributes={"stain": "DAPI"})
    group = sealed.output / "zarr.json"
    values = json.loads(group.read_text())
    values["attributes"]["ome"]["omero"] = {"channels": []}
    values["attributes"]["lab"] = 7
    group.write_text(json.dumps(values))
    before = files_below(sealed.output)
    sealed.call("produce", "job.json").ok()
    assert files_below(sealed.output) == before
    attributes = json.loads(group.read_text())["attributes"]
    values["attributes"]["chunkq"]["state"] = "incomplete"  # a suspended process may write this
    group.write_text(json.dumps(values))
    sealed.call("produce", "job.json").ok()
    assert json.loads(group.read_text())["attributes"] == attributes


@pytest.mark.parametrize("damage", ["empty", "not JSON", "another type of JSON", "missing"])
def test_damaged_metadata_of_the_group_are_written_again(
    sealed: Workspace, reference: Workspace, damage: str
) -> None:
    path = sealed.output / "zarr.json"
    path.unlink() if damage == "missing" else RECORD_DAMAGES[damage](path)
    sealed.call("status", "out.zarr").ok()
    sealed.call("run", "job.json").ok()
    np.testing.assert_array_equal(read_output(sealed.output), read_output(reference.output))


def test_interrupted_sealing_is_finished_by_the_next_command(
    inferred: Workspace, reference: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = inferred.job
    for method in ("_rename_to_final", "_write_group"):
        with monkeypatch.context() as patch:
            patch.setattr(ImageOutput, method, _kill)
            with pytest.raises(KeyboardInterrupt):
                finalize_job(job, worker="killed")
        assert not inferred.status()["sealed"]
    inferred.call("produce", "job.json").ok()
    assert inferred.status()["sealed"]
    np.testing.assert_array_equal(read_output(inferred.output), read_output(reference.output))


def _kill(*_: object) -> None:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------ small files

SMALL_DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped bit": flip_bit_of_value,
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "empty": lambda p: p.write_bytes(b""),
    "not JSON": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "another type of JSON": lambda p: p.write_text('"x"'),
}


@pytest.mark.parametrize("damage", SMALL_DAMAGES)
@pytest.mark.parametrize("kind", ["infer", "finalize"])
def test_a_task_with_a_damaged_commit_record_is_not_done(
    inferred: Workspace, reference: Workspace, kind: str, damage: str
) -> None:
    if kind == "finalize":
        inferred.call("finalize", "out.zarr").ok()
        inferred.job.ledger.unseal()
    SMALL_DAMAGES[damage](inferred.done_folder(kind) / "1.1")
    assert not inferred.ledger.is_committed(kind, (1, 1))
    inferred.call("status", "out.zarr", "--json").ok()
    inferred.call("report", "out.zarr").ok()
    answer = inferred.call("finalize", "out.zarr")
    assert answer.code == IncompleteError.exit_code
    assert "1.1" in answer.err
    inferred.call("produce", "job.json").ok()
    inferred.compute_inline()
    inferred.call("finalize", "out.zarr").ok()
    np.testing.assert_array_equal(read_output(inferred.output), read_output(reference.output))


def test_swapped_commit_records_are_damaged(inferred: Workspace) -> None:
    one, other = (inferred.done_folder() / name for name in ("0.0", "1.1"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    committed = {index for index in CHUNKS if inferred.ledger.is_committed("infer", index)}
    assert committed == CHUNKS - {(0, 0), (1, 1)}


def test_a_commit_record_of_an_earlier_job_is_damaged(inferred: Workspace) -> None:
    record = inferred.done_folder() / "0.0"
    content = record.read_bytes()
    inferred.call("produce", "job.json", "--overwrite").ok()
    os.makedirs(inferred.done_folder())
    (inferred.done_folder() / "0.0").write_bytes(content)
    assert not inferred.ledger.is_committed("infer", (0, 0))


@pytest.mark.parametrize("damage", SMALL_DAMAGES)
def test_a_damaged_report_is_treated_as_missing(sealed: Workspace, damage: str) -> None:
    SMALL_DAMAGES[damage](sealed.epoch_folder / "report.json")
    assert sealed.job.ledger.read_report() is None
    assert sealed.status()["sealed"]
    assert json.loads(sealed.call("report", "out.zarr", "--json").ok().out)["chunks"] == len(CHUNKS)


@pytest.mark.parametrize("damage", SMALL_DAMAGES)
def test_a_damaged_failure_record_is_skipped(produced: Workspace, damage: str) -> None:
    for chunk in [(0, 0), (0, 1)]:
        produced.ledger.record_failure(
            Failure("infer", 0, chunk, 1, "worker", "OSError", "no space left", "")
        )
    SMALL_DAMAGES[damage](produced.epoch_folder / "failed" / "infer" / "0" / "0.0.json")
    [group] = produced.status()["failures"]
    assert group["chunks"] == ["0.1"]
    produced.call("retry", "out.zarr").ok()


FOREIGN_NAMES = [
    ".DS_Store",
    ".nfs0000000000000001",
    "Thumbs.db",
    "9.9",
    "0",
    "1.1 ",
    "01.1",
    "x\ny",
]


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_foreign_files_are_ignored(inferred: Workspace, reference: Workspace, name: str) -> None:
    sealed_array = inferred.output / "0"
    folders = [inferred.output, inferred.array, *_folders_below(inferred.job_folder)]
    for folder in folders:
        if not (folder / name).exists() and folder / name != sealed_array:
            (folder / name).write_bytes(b"\0\1")
    assert inferred.status()["failures"] == []
    for command in COMMANDS[:-1]:
        inferred.call(*command).ok()
    assert inferred.status()["sealed"]
    np.testing.assert_array_equal(read_output(inferred.output), read_output(reference.output))


def _folders_below(folder: Path) -> list[Path]:
    return [Path(top) for top, _, _ in os.walk(folder)]


def test_a_folder_with_the_name_of_a_commit_record_is_reported(produced: Workspace) -> None:
    folder = produced.done_folder() / "1.1"
    folder.mkdir(parents=True)
    produced.compute_inline()
    assert {commit.chunk for commit in produced.commits()} == CHUNKS - {(1, 1)}
    [failure] = produced.failures()
    assert str(folder) in failure.message


def test_after_all_pieces_are_deleted_one_run_computes_them_again(
    inferred: Workspace, reference: Workspace
) -> None:
    shutil.rmtree(inferred.pieces_folder())
    with pytest.raises(IncompleteError) as error:
        finalize_job(inferred.job, worker="finalizer")
    assert error.value.code == ErrorCode.RESULTS_LOST
    assert set(error.value.missing) == set(map(chunk_name, CHUNKS))
    assert inferred.commits() == []
    inferred.call("produce", "job.json").ok()
    inferred.compute_inline()
    shutil.rmtree(inferred.pieces_folder())
    inferred.run("run", "job.json").ok()
    np.testing.assert_array_equal(read_output(inferred.output), read_output(reference.output))


# ------------------------------------------------------------------------ the inputs


def replace_input(workspace: Workspace, shape: tuple[int, ...], dtype: str = "uint8") -> None:
    shutil.rmtree(workspace.folder / "in.zarr")
    write_zarr(workspace.folder / "in.zarr", random_volume(shape).astype(dtype), (8, 8))


@pytest.mark.parametrize(("shape", "dtype"), [((30, 22), "uint8"), (SHAPE, "uint16")])
def test_an_input_that_is_replaced_before_work_starts_fails_every_chunk(
    produced: Workspace, shape: tuple[int, ...], dtype: str
) -> None:
    replace_input(produced, shape, dtype)
    assert code_of(produced.job.check_inputs) == ErrorCode.INPUT_CHANGED
    produced.compute_inline()
    assert produced.commits() == []
    assert {failure.chunk for failure in produced.failures()} == CHUNKS


def test_an_input_that_is_replaced_while_a_chunk_is_computed_fails_the_chunk(
    produced: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = produced.item
    read_halos = type(item).read_halos

    def read_and_replace(self: object, chunk: object) -> object:
        halos = read_halos(self, chunk)  # type: ignore[arg-type]
        replace_input(produced, (30, 22))
        return halos

    with monkeypatch.context() as patch:
        patch.setattr(type(item), "read_halos", read_and_replace)
        produced.compute_inline(only={(0, 0)}.__contains__)
    assert produced.commits() == []
    assert produced.pieces() == []


def test_finalize_reports_an_input_that_was_replaced(
    inferred: Workspace,
) -> None:
    replace_input(inferred, (30, 22))
    job = inferred.job
    assert code_of(lambda: finalize_job(job, worker="finalizer")) == ErrorCode.INPUT_CHANGED
    assert not job.ledger.is_sealed()
    inferred.call("finalize", "out.zarr").refused(2, ErrorCode.INPUT_CHANGED, "in.zarr ")


def test_produce_reports_an_input_of_the_same_shape_that_was_replaced(
    tmp_path: Path,
) -> None:
    workspace = make_workspace(tmp_path)
    values = random_volume(SHAPE)
    np.save(tmp_path / "in.npy", values)
    workspace.write_job(input="in.npy")
    workspace.call("produce", "job.json").ok()
    np.save(tmp_path / "in.npy", values + 1)
    os.utime(tmp_path / "in.npy", ns=(1, 1))
    workspace.call("produce", "job.json").refused(
        2, ErrorCode.INPUT_CHANGED, "in.npy ", "--overwrite"
    )
    assert code_of(workspace.job.check_inputs) == ErrorCode.INPUT_CHANGED


def test_an_input_that_was_restored_without_its_time_continues_with_the_named_command(
    tmp_path: Path,
) -> None:
    workspace = make_workspace(tmp_path)
    np.save(tmp_path / "in.npy", random_volume(SHAPE))
    workspace.write_job(input="in.npy")
    workspace.call("produce", "job.json").ok()
    time = (tmp_path / "in.npy").stat().st_mtime_ns
    os.utime(tmp_path / "in.npy", ns=(time, time + 1))
    refusal = workspace.call("produce", "job.json")
    refusal.refused(2, ErrorCode.INPUT_CHANGED, "in.npy ", "--overwrite")
    command = refusal.err.split("`")[1]
    subprocess.run(shlex.split(command), check=True)
    workspace.call("produce", "job.json").ok()


def test_finalize_warns_about_a_missing_input(inferred: Workspace) -> None:
    shutil.rmtree(inferred.folder / "in.zarr")
    answer = inferred.call("finalize", "out.zarr").ok()
    assert f"input: {inferred.folder}/in.zarr " in answer.err
    [warning] = inferred.report()["warnings"]
    assert warning.startswith(f"input: {inferred.folder}/in.zarr ")
    assert code_of(inferred.job.check_inputs) == ErrorCode.INPUT_MISSING


def test_a_node_without_the_mount_of_the_inputs_puts_the_job_aside(produced: Workspace) -> None:
    (produced.folder / "in.zarr").rename(produced.folder / "hidden.zarr")
    answer = produced.work("-q")
    assert answer.code == 1
    assert f"input: {produced.folder}/in.zarr " in answer.err
    assert produced.failures() == []
    assert set(produced.attempts()) == {0}


# ------------------------------------------------------------------------ two producers


@pytest.mark.parametrize("method", ["delete_folder", "discard", "delete_partial_files", "replace"])
def test_after_a_killed_overwrite_the_job_can_be_produced_again(
    sealed: Workspace, reference: Workspace, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(claims if method == "replace" else ObjectFolder, method, _kill)
        assert sealed.call("produce", "job.json", "--overwrite").code == 130
    sealed.call("produce", "job.json").ok()
    sealed.compute_inline()
    sealed.call("finalize", "out.zarr").ok()
    np.testing.assert_array_equal(read_output(sealed.output), read_output(reference.output))


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_exactly_one_of_two_jobs_produced_at_the_same_time_onto_one_output_succeeds(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    workspace = make_workspace(tmp_path)
    for attempt in range(10):
        output = str(tmp_path / f"race{attempt}.zarr")
        files = [workspace.write_job(f"{n}.json", strides=[n, n]) for n in (4, 6)]
        jobs = [check_job(load_job(file, output=output)) for file in files]
        if options:
            create_job(jobs[0])
        produced, codes = _race(jobs, options)
        stored = JobFolder(f"{output}.chunkq").require_record()
        if options:  # the second may start after the first has ended, and replace it
            assert produced
            assert stored.digest in {jobs[number].record.digest for number in produced}
        else:
            [number] = produced
            assert stored.digest == jobs[number].record.digest
            assert codes in ([ErrorCode.OUTPUT_OF_OTHER_JOB], [ErrorCode.JOB_REPLACED])


def _race(jobs: list[CheckedJob], options: dict[str, bool]) -> tuple[list[int], list[ErrorCode]]:
    """Produce all jobs at the same time; return the numbers of the produced, and other errors."""
    barrier = threading.Barrier(len(jobs), timeout=TIMEOUT)

    def produce(number: int) -> int | ErrorCode:
        barrier.wait()
        try:
            create_job(jobs[number], **options)
        except ChunkqError as error:
            return error.code
        return number

    with ThreadPoolExecutor(len(jobs)) as pool:
        results = [*pool.map(produce, range(len(jobs)))]
    codes = [result for result in results if isinstance(result, ErrorCode)]
    return [result for result in results if not isinstance(result, ErrorCode)], codes
