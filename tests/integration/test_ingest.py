"""Jobs over NIfTI files, and the stage that stages those that cannot be read by region.

Files of the tests count as large if they are compressed: `staged` makes them so.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from chunkq_worker.run_task import run_task

import chunkq
from chunkq import Predictor
from chunkq.create import check_job
from chunkq.errors import ChunkReadError, ErrorCode, IncompleteError, JobError, QueueError
from chunkq.job.job_reading import load_job
from chunkq.job.sample_job import copy_job
from chunkq.queue.contract.executor import Attempt, TaskCounts
from chunkq.stages import ingest
from chunkq.stages.completion import job_completion
from chunkq.stages.registry import stage_of
from chunkq.storage.formats import gzip_file
from chunkq.storage.staged import StagedCopy
from tests.harness.files import files_below
from tests.harness.networks import toy_model
from tests.harness.nifti import AFFINE, TURNED, write_nifti
from tests.harness.servers.web import Habits, web_server
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace, run_inline

SHAPE = (200, 10, 11)
"""Four slabs, since a slab has at most 64 planes."""
SLABS = 4
HOLD = """
import os, sys, time

if "HOLD_SLAB" in os.environ and "chunkq_worker.worker_process" in sys.orig_argv:
    from chunkq.storage.staged import StagedCopy

    record = StagedCopy.record_slabs

    def record_and_hold(copy, count):
        record(copy, count)
        while count == int(os.environ["HOLD_SLAB"]):
            time.sleep(0.02)

    StagedCopy.record_slabs = record_and_hold
"""


@pytest.fixture
def staged() -> Iterator[None]:
    with mock.patch.object(gzip_file, "WHOLE_BYTES", 0):
        yield


def workspace_over(
    folder: Path, input: Any, *, patch: tuple[int, ...] = (8, 8, 8), **changes: Any
) -> Workspace:
    folder.mkdir(exist_ok=True)
    values = {
        "input": input,
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [6] * 3,
        "chunksize": [64, 16, 16],
        "storage_chunks": [16, 16, 16],
        "threads": 1,
        "model_config": toy_model(folder, patch, scale=100.0),
    }
    return Workspace(folder, values | changes)


def voxel_files(workspace: Workspace) -> dict[str, bytes]:
    """Return the files of every output array."""
    files = files_below(workspace.output)
    return {name: content for name, content in files.items() if "/c/" in name or "0/" in name}


def run(workspace: Workspace) -> dict[str, bytes]:
    """Run the job in this process; return the files of its output arrays."""
    with contextlib.chdir(workspace.folder):
        run_inline(workspace.values)
    assert not (workspace.epoch_folder / "ingest").exists()
    return voxel_files(workspace)


@pytest.fixture(scope="module")
def volume() -> npt.NDArray[np.int16]:
    return random_volume(SHAPE, "int16")


@pytest.fixture(scope="module")
def expected(
    volume: npt.NDArray[np.int16], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of the output of the job over the same voxels in Zarr."""
    folder = tmp_path_factory.mktemp("zarr")
    write_zarr(folder / "in.zarr", volume, (64, 8, 8))
    return run(workspace_over(folder, "in.zarr"))


# ------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("name", ["in.nii", "in.nii.gz"])
def test_a_job_over_nifti_writes_the_bytes_of_one_over_zarr(
    tmp_path: Path, volume: npt.NDArray[np.int16], expected: dict[str, bytes], name: str
) -> None:
    write_nifti(tmp_path / name, volume)
    workspace = workspace_over(tmp_path, name)
    assert run(workspace) == expected
    assert workspace.commits("ingest") == []
    metadata = json.loads((workspace.output / "zarr.json").read_text())
    [image] = metadata["attributes"]["ome"]["multiscales"]
    assert [axis["name"] for axis in image["axes"]] == ["c", "z", "y", "x"]
    assert {axis["unit"] for axis in image["axes"][1:]} == {"millimeter"}
    scale, translation = image["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [1.0, 2.0, 1.5, 0.5]
    assert translation["translation"] == [0.0, 11.0, 3.0, -7.0]


@pytest.mark.parametrize("name", ["in.nii", "in.nii.gz"])
def test_a_job_in_an_orientation_writes_the_bytes_of_one_over_the_canonical_image(
    tmp_path: Path, volume: npt.NDArray[np.int16], staged: None, name: str
) -> None:
    write_nifti(tmp_path / name, volume, affine=TURNED)
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / name))  # type: ignore[attr-defined]
    canonical.to_filename(tmp_path / "canonical.nii")
    expected = run(workspace_over(tmp_path / "a", "../canonical.nii"))
    workspace = workspace_over(tmp_path / "b", {"path": f"../{name}", "orientation": "RAS"})
    with mock.patch.object(StagedCopy, "record_slabs", autospec=True) as record:
        assert run(workspace) == expected
    assert record.call_count == (SLABS if name.endswith(".gz") else 0)
    metadata = [
        json.loads((tmp_path / folder / "out.zarr" / "zarr.json").read_text()) for folder in "ab"
    ]
    [written], [other] = (values["attributes"]["ome"]["multiscales"] for values in metadata)
    assert written["axes"] == other["axes"]
    assert written["datasets"] == other["datasets"]


def test_a_job_over_a_large_compressed_file_writes_the_bytes_of_one_over_zarr(
    tmp_path: Path, volume: npt.NDArray[np.int16], expected: dict[str, bytes], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    workspace = workspace_over(tmp_path, "in.nii.gz")
    with mock.patch.object(StagedCopy, "record_slabs", autospec=True) as record:
        assert run(workspace) == expected
    assert [call.args[1] for call in record.call_args_list] == [1, 2, 3, 4]


@pytest.mark.parametrize("letters", ["tzyx", "czyx", "ctzyx", "zyxc"])
def test_time_and_channels_of_a_staged_file_are_those_of_the_file(
    tmp_path: Path, letters: str, staged: None
) -> None:
    sizes = {"t": 3, "c": 2, "z": 12, "y": 10, "x": 11}
    values = random_volume(tuple(sizes[letter] for letter in letters), "uint8")
    write_zarr(tmp_path / "in.zarr", values, (4,) * values.ndim)
    write_nifti(tmp_path / "in.nii.gz", values)
    outputs = []
    for name in ("in.zarr", "in.nii.gz"):
        folder = tmp_path / name.partition(".")[2]
        path = {"path": str(tmp_path / name), "axes": letters}
        path |= {"channels": 1} if "c" in letters else {}
        workspace = workspace_over(folder, path, chunksize=None, storage_chunks=None)
        outputs.append(run(workspace))
    assert outputs[0] == outputs[1]


def test_only_the_inputs_that_need_it_are_staged(
    tmp_path: Path, volume: npt.NDArray[np.int16], expected: dict[str, bytes], staged: None
) -> None:
    write_zarr(tmp_path / "a.zarr", volume, (64, 8, 8))
    write_nifti(tmp_path / "b.nii.gz", volume)
    write_nifti(tmp_path / "b.nii", volume)
    workspace = workspace_over(tmp_path, ["a.zarr", "b.nii.gz", "b.nii"])
    plan = json.loads(workspace.call("plan", workspace.write_job(), "--json").ok().out)
    assert [Path(entry["path"]).name for entry in plan["staged"]] == ["b.nii.gz"]
    assert plan["staged_bytes"] == volume.nbytes
    files = run(workspace)
    for name in ("a", "b", "b_2"):
        part = {k.removeprefix(f"{name}/"): v for k, v in files.items() if k.startswith(f"{name}/")}
        assert {k: v for k, v in part.items() if "/c/" in k} == {
            k: v for k, v in expected.items() if "/c/" in k
        }


def test_the_plan_says_what_is_staged_and_how_large_it_is(
    tmp_path: Path, volume: npt.NDArray[np.int16], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume, slope=0.5)
    workspace = workspace_over(tmp_path, "in.nii.gz")
    text = workspace.call("plan", workspace.write_job()).ok().out
    assert "gzip" in text
    plan = json.loads(workspace.call("plan", workspace.write_job(), "--json").ok().out)
    assert plan["staged_bytes"] == 8 * volume.size
    write_nifti(tmp_path / "in.nii", volume)
    plan = json.loads(workspace.call("plan", workspace.job_file, "-i", "in.nii", "--json").ok().out)
    assert plan["staged"] == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_compressed_file_on_a_web_server_is_streamed(
    tmp_path: Path,
    volume: npt.NDArray[np.int16],
    expected: dict[str, bytes],
    ranges: bool,
    staged: None,
) -> None:
    (tmp_path / "www").mkdir()
    write_nifti(tmp_path / "www" / "in.nii.gz", volume)
    with web_server(tmp_path / "www", Habits(ranges=ranges)) as url:
        assert run(workspace_over(tmp_path, f"{url}/in.nii.gz")) == expected


# ------------------------------------------------------------------------- the stage


def test_chunks_wait_until_their_input_is_staged(
    tmp_path: Path, volume: npt.NDArray[np.int16], expected: dict[str, bytes], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    workspace = workspace_over(tmp_path, "in.nii.gz")
    workspace.produce()
    assert workspace.counts() == TaskCounts(queued=1, waiting=4)
    status = workspace.status()
    assert (status["waiting"], status["chunks"], status["staged_share"]) == (4, 4, 0)
    assert (status["inputs_staged"], status["inputs_to_stage"]) == (0, 1)
    assert "0/1 inputs staged" in workspace.call("status", workspace.output).ok().out
    assert workspace.finalize().code == IncompleteError.exit_code
    assert workspace.work().code == 0
    assert len(workspace.commits("ingest")) == 1
    assert (workspace.epoch_folder / "ingest" / "0.zarr").exists()
    workspace.finalize().ok()
    status = workspace.status()
    assert (status["sealed"], status["inputs_staged"], status["staged_share"]) == (True, 1, 1)
    assert not (workspace.epoch_folder / "ingest").exists()
    assert not (workspace.epoch_folder / "done" / "ingest").exists()
    assert voxel_files(workspace) == expected


def test_a_sealed_job_is_complete_without_its_staged_input(
    tmp_path: Path, volume: npt.NDArray[np.int16], expected: dict[str, bytes], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    workspace = workspace_over(tmp_path, "in.nii.gz")
    run(workspace)
    workspace.produce("--resume")
    assert workspace.counts() == TaskCounts()
    workspace.finalize().ok()
    workspace.ledger.delete_commits("infer", [(2, 0, 0)])
    workspace.produce("--resume")
    assert workspace.counts() == TaskCounts(queued=1, waiting=1)
    assert run(workspace) == expected


def test_a_worker_that_is_killed_while_it_stages_loses_no_slab(
    tmp_path: Path, volume: npt.NDArray[np.int16], expected: dict[str, bytes], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(HOLD)
    path = os.pathsep.join([str(tmp_path / "hooks"), os.environ.get("PYTHONPATH", "")])
    workspace = workspace_over(tmp_path, "in.nii.gz")
    workspace.produce()
    progress = workspace.epoch_folder / "ingest" / "0.json"
    arguments = ("work", "--burst", "--gpus", "none")
    with workspace.start(*arguments, "--lease", "1", HOLD_SLAB="2", PYTHONPATH=path) as command:
        wait_until(lambda: progress.exists() and b'"slabs": 2' in progress.read_bytes(), "2 slabs")
        assert workspace.status()["staged_share"] == 2 / SLABS
        command.kill()
    chunks = {path: path.stat().st_mtime_ns for path in progress.parent.glob("0.zarr/c/[01]/**/*")}
    assert chunks
    assert workspace.done("ingest") == {}
    workspace.produce("--resume")
    assert workspace.work().code == 0
    assert {path: path.stat().st_mtime_ns for path in chunks} == chunks
    workspace.finalize().ok()
    assert voxel_files(workspace) == expected


def test_a_staged_input_that_lost_a_storage_chunk_is_staged_again(
    tmp_path: Path, volume: npt.NDArray[np.int16], expected: dict[str, bytes], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    workspace = workspace_over(tmp_path, "in.nii.gz")
    workspace.produce()
    job = workspace.job
    stage_of("ingest").run(job.items[0], (0,), Attempt(1, "test"))
    next((workspace.epoch_folder / "ingest" / "0.zarr" / "c").rglob("1/*/*")).unlink()
    assert workspace.work().code == IncompleteError.exit_code
    assert workspace.failures() == []
    assert workspace.commits("ingest") == []
    assert run(workspace) == expected


def test_a_file_that_changes_while_it_is_staged_is_noticed(
    tmp_path: Path, volume: npt.NDArray[np.int16], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    workspace = workspace_over(tmp_path, "in.nii.gz")
    workspace.produce()
    record = StagedCopy.record_slabs

    def replace(copy: StagedCopy, count: int) -> None:
        record(copy, count)
        if count == 2:
            write_nifti(tmp_path / "new.nii.gz", volume + 1)
            (tmp_path / "new.nii.gz").rename(tmp_path / "in.nii.gz")

    with (
        mock.patch.object(StagedCopy, "record_slabs", replace),
        pytest.raises(ChunkReadError) as error,
    ):
        stage_of("ingest").run(workspace.job.items[0], (0,), Attempt(1, "test"))
    assert error.value.code is ErrorCode.INPUT_CHANGED
    copy = workspace.job.images[0].staged_copy(0)
    assert copy is not None
    assert copy.slabs_written() == 2
    with pytest.raises(JobError) as changed:
        chunkq.produce(workspace.job_file, queue=workspace.queue_url, resume=True)
    assert changed.value.code is ErrorCode.INPUT_CHANGED


def test_a_damaged_file_fails_the_run_once_and_is_named(
    tmp_path: Path, volume: npt.NDArray[np.int16], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    content = bytearray((tmp_path / "in.nii.gz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "in.nii.gz").write_bytes(content)
    workspace = workspace_over(tmp_path, "in.nii.gz")
    answer = workspace.call("run", workspace.write_job(), "--queue", "inprocess://")
    assert answer.code == IncompleteError.exit_code
    assert "in.nii.gz" in answer.err
    assert "computing them again" not in answer.err
    [failure] = workspace.failures()
    assert (failure.kind, failure.attempt) == ("ingest", 3)
    [group] = workspace.status()["failures"]
    assert (group["chunks"], group["is_staging"]) == (["input"], True)


def test_a_task_of_the_stage_that_the_job_does_not_have_is_refused(
    tmp_path: Path, volume: npt.NDArray[np.int16]
) -> None:
    write_zarr(tmp_path / "in.zarr", volume)
    workspace = workspace_over(tmp_path, "in.zarr")
    workspace.produce()
    with pytest.raises(QueueError) as error:
        stage_of("ingest").run(workspace.job.items[0], (0,), Attempt(1, "test"))
    assert error.value.code is ErrorCode.TASK_INVALID


def test_a_task_that_writes_slabs_is_not_over_its_time_limit(
    tmp_path: Path, volume: npt.NDArray[np.int16], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    workspace = workspace_over(tmp_path, "in.nii.gz")
    workspace.produce()
    task = workspace.item.task("ingest", (0,))
    assert not ingest.is_advancing(task)
    stage_of("ingest").run(workspace.item, (0,), Attempt(1, "test"))
    assert ingest.is_advancing(task)
    with mock.patch.object(ingest, "SLAB_SECONDS", 0):
        assert not ingest.is_advancing(task)
    assert not ingest.is_advancing(workspace.item.task("infer", (0,)))


def test_a_sample_of_a_job_reads_a_large_file_itself(
    tmp_path: Path, volume: npt.NDArray[np.int16], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    workspace = workspace_over(tmp_path, "in.nii.gz")
    job = copy_job(check_job(load_job(workspace.write_job())).record, str(tmp_path / "sample"))
    run_task(job.items[0].task("infer", (2, 0, 0)), Attempt(1, "test"))
    assert job.items[0].ledger.count("infer") == 1
    assert job_completion(job).pending["ingest"] == []


# ------------------------------------------------------------------------- the Python API


def predictor_for(folder: Path) -> Predictor:
    values = workspace_over(folder, "unused", combine="soft").values
    return Predictor.from_config({k: v for k, v in values.items() if k not in ("input", "output")})


def test_a_path_is_predicted_as_in_a_job_and_written_in_the_order_of_its_file(
    tmp_path: Path, volume: npt.NDArray[np.int16], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    with predictor_for(tmp_path) as predictor:
        prediction = predictor.predict(tmp_path / "in.nii.gz")
        expected = predictor.predict(volume)
    np.testing.assert_array_equal(prediction.labels, expected.labels)
    assert [axis.name for axis in prediction.geometry.axes] == ["z", "y", "x"]
    assert prediction.voxel_size == (2.0, 1.5, 0.5)
    image = prediction.to_nibabel()
    np.testing.assert_array_equal(image.affine, AFFINE)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), np.asarray(expected.labels).T)


def test_a_predictor_with_an_orientation_computes_the_canonical_image(
    tmp_path: Path, volume: npt.NDArray[np.int16]
) -> None:
    write_nifti(tmp_path / "in.nii", volume, affine=TURNED)
    write_nifti(tmp_path / "mask.nii", (volume > 0).astype("u1"), affine=TURNED)
    canonical = tmp_path / "canonical.nii"
    image = nibabel.as_closest_canonical(nibabel.load(tmp_path / "in.nii"))  # type: ignore[attr-defined]
    image.to_filename(canonical)
    values = workspace_over(tmp_path, {"orientation": "RAS"}, combine="soft").values
    with Predictor.from_config({k: v for k, v in values.items() if k != "output"}) as predictor:
        prediction = predictor.predict(tmp_path / "in.nii")
        for stored in (tmp_path / "mask.nii", nibabel.load(tmp_path / "mask.nii")):  # type: ignore[attr-defined]
            with pytest.raises(JobError, match="set orientation: RAS in mask"):
                predictor.predict(tmp_path / "in.nii", mask=stored)
        mask = {"path": str(tmp_path / "mask.nii"), "orientation": "RAS"}
        predictor.predict(tmp_path / "in.nii", mask=mask)
        with pytest.raises(JobError, match="orientation is for NIfTI") as error:
            predictor.predict(volume)
    assert error.value.code is ErrorCode.STORE_UNSUPPORTED
    with predictor_for(tmp_path) as predictor:
        expected = predictor.predict(canonical)
    np.testing.assert_array_equal(prediction.labels, expected.labels)
    assert prediction.geometry.axes == expected.geometry.axes
    np.testing.assert_array_equal(prediction.to_nibabel().affine, image.affine)


def test_an_image_of_nibabel_keeps_the_order_of_its_array(
    tmp_path: Path, volume: npt.NDArray[np.int16]
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    image = nibabel.load(tmp_path / "in.nii.gz")  # type: ignore[attr-defined]
    with predictor_for(tmp_path) as predictor:
        assert predictor.predict(image).labels.shape == SHAPE[::-1]
        assert predictor.predict(tmp_path / "in.nii.gz").labels.shape == SHAPE


def test_a_predictor_stages_a_large_file_for_a_stored_output(
    tmp_path: Path, volume: npt.NDArray[np.int16], staged: None
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    with predictor_for(tmp_path) as predictor:
        predictor.predict_to_store(tmp_path / "in.nii.gz", tmp_path / "out.zarr")
        expected = predictor.predict(volume)
    np.testing.assert_array_equal(read_output(tmp_path / "out.zarr"), expected.labels)


def test_a_small_compressed_file_is_not_staged(
    tmp_path: Path, volume: npt.NDArray[np.int16]
) -> None:
    write_nifti(tmp_path / "in.nii.gz", volume)
    [source] = check_job(load_job(workspace_over(tmp_path, "in.nii.gz").write_job())).record.sources
    assert source.staged == ""
