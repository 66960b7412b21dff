"""Jobs whose output is a file: assembled at the end, and continued after any kill."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from chunkq_producer.distribute import distribute
from chunkq_producer.job_status import job_status

import chunkq
from chunkq.create import check_job, check_output, create_job
from chunkq.errors import ChunkqError, ErrorCode, IncompleteError, JobError, StoreError
from chunkq.finalize import finalize_job
from chunkq.job.exported_output import ExportedOutput
from chunkq.job.job_handle import open_job
from chunkq.job.job_reading import load_job
from chunkq.job.ledger import ItemLedger, Ledger
from chunkq.job.task_records import Commit
from chunkq.queue.registry import open_executor
from chunkq.repair import repair_output
from chunkq.stages import export
from chunkq.stages.registry import stage_of
from chunkq.verify import verify_job
from chunkq.writers import copying
from tests.harness.nifti import TURNED, write_nifti
from tests.harness.volumes import read_output
from tests.harness.workspace import run_inline, run_tasks

SHAPE = (20, 22, 24)
NETWORK = """
def bright(batch):
    with open({runs!r}, "a") as file:
        file.write("x" * len(batch))
    return (batch > 50).astype("float32")
"""
NAMES = ("seg.nii", "seg.nii.gz", "seg.tif", "seg.h5")
Voxels = npt.NDArray[Any]


def volume() -> Voxels:
    return np.random.default_rng(4).integers(0, 99, SHAPE, np.uint8)


def job_in(folder: Path, output: str = "seg.nii.gz", **keys: Any) -> dict[str, Any]:
    """Write a scan and a network; return a job over it whose chunks overlap."""
    folder.mkdir(exist_ok=True)
    write_nifti(folder / "scan.nii.gz", volume(), affine=TURNED)
    (folder / "network.py").write_text(NETWORK.format(runs=str(folder / "runs")))
    return {
        "input": str(folder / "scan.nii.gz"),
        "output": str(folder / output),
        "combine": "soft",
        "inference_type": "sliding_window",
        "strides": [4, 8, 8],
        "chunksize": [10, 12, 24],
        "threads": 1,
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(folder / "network.py"),
            "class_name": "bright",
            "model_input_shape": [1, 8, 8, 8],
        },
    } | keys


def read(path: Path) -> Voxels:
    """Return the voxels of a file in the order of the scan's array, z, y, x."""
    if path.suffix == ".tif":
        return tifffile.imread(path)
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            values: Voxels = file["data"][...]
            return values
    return np.asarray(nibabel.load(path).dataobj).T  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_has_the_voxels_of_a_zarr_output(name: str, tmp_path: Path) -> None:
    run_inline(job_in(tmp_path, "seg.zarr"))
    job, report = run_inline(job_in(tmp_path, name))
    np.testing.assert_array_equal(read(tmp_path / name), read_output(tmp_path / "seg.zarr"))
    assert report["missing"] == []
    assert job_status(job, None).sealed
    assert not os.path.exists(job.ledger.store)
    assert not os.path.exists(job.ledger.exports)


@pytest.mark.parametrize("selection", [{}, {"orientation": "RAS"}, {"order": "xyz"}], ids=str)
def test_a_nifti_output_lies_on_the_scan(tmp_path: Path, selection: dict[str, str]) -> None:
    keys = job_in(tmp_path, strides=[8, 8, 8], chunksize=[24, 24, 24])
    run_inline(keys | {"input": {"path": keys["input"], **selection}})
    scan, labels = (nibabel.load(tmp_path / name) for name in ("scan.nii.gz", "seg.nii.gz"))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(labels.affine, scan.affine)
    np.testing.assert_array_equal(labels.dataobj, np.asarray(scan.dataobj) > 50)


class KilledError(BaseException):
    """A process is killed: nothing after it runs."""


def kill_after(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, *, before: bool) -> None:
    """Kill the process when a function is called, or when it has returned."""
    function = getattr(owner, name)

    def killed(*arguments: Any, **options: Any) -> Any:
        if not before:
            function(*arguments, **options)
        raise KilledError

    monkeypatch.setattr(owner, name, killed)


def kill_at_commit(monkeypatch: pytest.MonkeyPatch, *, before: bool) -> None:
    commit = ItemLedger.commit

    def killed(ledger: ItemLedger, record: Commit) -> None:
        if record.kind != "export":
            return commit(ledger, record)
        if not before:
            commit(ledger, record)
        raise KilledError

    monkeypatch.setattr(ItemLedger, "commit", killed)


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before the file is written": lambda m: kill_after(copying, "copy_image", m, before=True),
    "when it is written": lambda m: kill_after(copying, "copy_image", m, before=False),
    "before it appears": lambda m: kill_after(export, "replace_file", m, before=True),
    "when it has appeared": lambda m: kill_after(export, "replace_file", m, before=False),
    "before the commit": lambda m: kill_at_commit(m, before=True),
    "after the commit": lambda m: kill_at_commit(m, before=False),
    "after the seal": lambda m: kill_after(Ledger, "seal", m, before=False),
    "before the store is deleted": lambda m: kill_after(Ledger, "delete_store", m, before=True),
    "when the store is deleted": lambda m: kill_after(Ledger, "delete_store", m, before=False),
    "before the report": lambda m: kill_after(Ledger, "write_report", m, before=True),
}


KILLED_FILES = [
    *(("seg.nii.gz", moment) for moment in KILLS),
    ("seg.tif", "when it is written"),
    ("seg.h5", "when it is written"),
]


@pytest.mark.parametrize(("name", "moment"), KILLED_FILES)
def test_a_finalizer_that_is_killed_is_continued_with_the_same_bytes(
    name: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_inline(job_in(tmp_path / "whole", name))
    keys = job_in(tmp_path / "killed", name)
    job = create_job(check_job(load_job(keys)))
    run_tasks(job)
    with monkeypatch.context() as patch:
        KILLS[moment](patch)
        with pytest.raises(KilledError):
            finalize_job(job, worker="killed")
    runs = (tmp_path / "killed" / "runs").stat().st_size
    is_begun = moment in list(KILLS)[3:]
    assert (tmp_path / "killed" / name).exists() == is_begun
    continued = create_job(check_job(load_job(keys)))
    report = finalize_job(continued, worker="next")
    assert report["missing"] == []
    assert runs == (tmp_path / "killed" / "runs").stat().st_size
    whole, killed = (tmp_path / folder / name for folder in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    assert job_status(continued, None).sealed
    assert not os.path.exists(continued.ledger.store)


def test_the_volumes_of_a_list_are_files_in_a_folder(tmp_path: Path) -> None:
    keys = job_in(tmp_path)
    for name in ("left", "right"):
        write_nifti(tmp_path / f"{name}.nii.gz", volume()[: 14 + len(name)], affine=TURNED)
    job, _ = run_inline(
        keys | {"input": [str(tmp_path / f"{name}.nii.gz") for name in ("left", "right")]}
    )
    assert sorted(path.name for path in (tmp_path / "seg").iterdir()) == [
        "left.nii.gz",
        "right.nii.gz",
    ]
    for name in ("left", "right"):
        scan, labels = (
            nibabel.load(folder / f"{name}.nii.gz")  # type: ignore[attr-defined]
            for folder in (tmp_path, tmp_path / "seg")
        )
        np.testing.assert_array_equal(labels.dataobj, np.asarray(scan.dataobj) > 50)
    assert not (tmp_path / "seg.nii.gz").exists()
    assert job_status(job, None).sealed


def test_another_file_is_replaced_with_overwrite_only(tmp_path: Path) -> None:
    keys = job_in(tmp_path)
    (tmp_path / "seg.nii.gz").write_bytes(b"mine")
    checked = check_job(load_job(keys))
    with pytest.raises(StoreError) as caught:
        check_output(checked)
    assert caught.value.code is ErrorCode.OUTPUT_EXISTS
    job = create_job(checked, overwrite=True)
    assert not (tmp_path / "seg.nii.gz").exists()
    run_tasks(job)
    finalize_job(job, worker="first")
    first = (tmp_path / "seg.nii.gz").read_bytes()
    again = create_job(check_job(load_job(keys)), overwrite=True)
    assert not (tmp_path / "seg.nii.gz").exists()
    run_tasks(again)
    finalize_job(again, worker="second")
    assert (tmp_path / "seg.nii.gz").read_bytes() == first


@pytest.mark.parametrize("change", ["deleted", "truncated"])
def test_a_file_that_is_gone_or_changed_is_named(change: str, tmp_path: Path) -> None:
    keys = job_in(tmp_path)
    job, _ = run_inline(keys)
    file = tmp_path / "seg.nii.gz"
    if change == "deleted":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert not job_status(job, None).sealed
    with pytest.raises(ChunkqError) as caught:
        create_job(check_job(load_job(keys)))
    assert caught.value.code is ErrorCode.OUTPUT_CHANGED
    assert "seg.nii.gz" in str(caught.value)


def test_a_job_that_was_replaced_does_not_write_the_file(tmp_path: Path) -> None:
    keys = job_in(tmp_path)
    old = create_job(check_job(load_job(keys)))
    run_tasks(old)
    create_job(check_job(load_job(keys)), overwrite=True)
    item, stage = old.items[0], stage_of("export")
    with pytest.raises(ChunkqError) as caught:
        stage.run(item, (0,), export.Attempt(1, "late"))
    assert caught.value.code is ErrorCode.JOB_REPLACED
    assert not (tmp_path / "seg.nii.gz").exists()


def test_nothing_is_written_while_chunks_are_missing(tmp_path: Path) -> None:
    keys = job_in(tmp_path)
    job = create_job(check_job(load_job(keys)))
    with pytest.raises(IncompleteError):
        finalize_job(job, worker="early")
    report = finalize_job(job, worker="early", allow_missing=True)
    assert report["missing"]
    assert not (tmp_path / "seg.nii.gz").exists()
    assert isinstance(job.output, ExportedOutput)


def test_the_command_and_distributed_finalizing_write_the_file(tmp_path: Path) -> None:
    keys = job_in(tmp_path)
    job = create_job(check_job(load_job(keys)))
    run_tasks(job)
    with closing(open_executor("inprocess://exported")) as executor:  # no block is left for it
        for stage in ("finalize",):
            for item in job.items:
                for chunk in stage_of(stage).chunks(item):
                    stage_of(stage).run(item, chunk, export.Attempt(1, "here"))
        distribute(job, executor)
    assert not (tmp_path / "seg.nii.gz").exists()
    finalize_job(open_job(job.folder.path), worker="last")
    assert (tmp_path / "seg.nii.gz").exists()
    other = chunkq.run(job_in(tmp_path, "other.tif"), queue="inprocess://")
    assert other["missing"] == []
    np.testing.assert_array_equal(read(tmp_path / "other.tif"), read(tmp_path / "seg.nii.gz"))


def test_what_a_format_cannot_hold_is_refused_before_work_starts(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.zeros((4, 6, 6, 6), np.uint8))
    keys = job_in(tmp_path) | {
        "input": str(tmp_path / "in.npy"),
        "strides": [3, 3, 3, 3],
        "chunksize": [6, 6, 6, 6],
    }
    keys["model_config"] |= {"model_input_shape": [1, 3, 3, 3, 3]}
    for name in ("seg.nii.gz", "seg.tif"):
        with pytest.raises((StoreError, JobError)) as caught:
            check_job(load_job(keys | {"output": str(tmp_path / name)}))
        assert caught.value.code is ErrorCode.STORE_UNSUPPORTED
    assert not [path for path in os.listdir(tmp_path) if path.startswith("seg")]


def test_a_damaged_store_is_not_written(tmp_path: Path) -> None:
    job = create_job(check_job(load_job(job_in(tmp_path))))
    run_tasks(job)
    chunk = next(path for path in Path(job.ledger.store).rglob("c/*/*/*") if path.is_file())
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    with pytest.raises(ChunkqError):
        finalize_job(job, worker="last")
    assert not (tmp_path / "seg.nii.gz").exists()


def test_a_damaged_file_is_found_and_made_again(tmp_path: Path) -> None:
    keys = job_in(tmp_path)
    job, _ = run_inline(keys)
    file = tmp_path / "seg.nii.gz"
    content = file.read_bytes()
    assert verify_job(job).is_sound
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    found = verify_job(job)
    assert [(problem.name, problem.damage) for problem in found.problems] == [
        ("seg.nii.gz", "damaged")
    ]
    repair = repair_output(job, found)
    assert len(repair.chunks) == job.costs.chunks
    assert not verify_job(job).problems
    continued = create_job(check_job(load_job(keys)))
    run_tasks(continued)
    finalize_job(continued, worker="again")
    assert file.read_bytes() == content
    assert verify_job(continued).is_sound


def test_a_damaged_commit_record_of_a_file_writes_it_again(tmp_path: Path) -> None:
    job = create_job(check_job(load_job(job_in(tmp_path))))
    run_tasks(job)
    for chunk in stage_of("finalize").chunks(job.items[0]):
        stage_of("finalize").run(job.items[0], chunk, export.Attempt(1, "here"))
    stage_of("export").run(job.items[0], (0,), export.Attempt(1, "here"))
    content = (tmp_path / "seg.nii.gz").read_bytes()
    (record,) = Path(job.ledger.path, "done", "export", "0").iterdir()
    record.write_bytes(b"damaged")
    finalize_job(job, worker="last")
    assert (tmp_path / "seg.nii.gz").read_bytes() == content
    assert job_status(job, None).sealed


@pytest.mark.parametrize("suffix", [".nii.gz", ".h5"])
def test_several_outputs_are_a_file_each_or_datasets(suffix: str, tmp_path: Path) -> None:
    keys = job_in(tmp_path, f"seg{suffix}")
    del keys["combine"]
    keys["outputs"] = {"bright": {"combine": "soft"}, "score": {"output_dtype": "float16"}}
    keys["model_config"] |= {"model_output_shape": keys["model_config"]["model_input_shape"]}
    run_inline(keys)
    run_inline(keys | {"output": str(tmp_path / "seg.zarr")})
    for name, dtype in (("bright", "uint8"), ("score", "float32")):
        expected = read_output(tmp_path / "seg.zarr" / name)
        if suffix == ".h5":
            with h5py.File(tmp_path / "seg.h5") as file:
                assert sorted(file) == ["bright", "score"]
                np.testing.assert_array_equal(file[name][...].squeeze(), expected.squeeze())
            continue
        image = nibabel.load(tmp_path / f"seg.{name}.nii.gz")  # type: ignore[attr-defined]
        assert image.get_data_dtype() == dtype
        np.testing.assert_array_equal(np.asarray(image.dataobj).T.squeeze(), expected.squeeze())


@pytest.mark.parametrize("selection", [{}, {"orientation": "LPS"}], ids=str)
def test_a_coarser_output_has_the_affine_of_its_own_voxels(
    tmp_path: Path, selection: dict[str, str]
) -> None:
    keys = job_in(tmp_path, strides=[8, 8, 8], chunksize=[24, 24, 24])
    del keys["combine"]
    (tmp_path / "network.py").write_text(
        "def bright(batch):\n    return (batch[..., 1::2, 1::2] > 50).astype('float32')\n"
    )
    keys["input"] = {"path": keys["input"], **selection}
    keys["outputs"] = {"half": {"combine": "soft", "scale": [1, 2, 2]}}
    keys["model_config"] |= {"model_output_shape": [1, 8, 4, 4]}
    run_inline(keys)
    scan = nibabel.load(tmp_path / "scan.nii.gz")  # type: ignore[attr-defined]
    half = nibabel.load(tmp_path / "seg.half.nii.gz")  # type: ignore[attr-defined]
    sizes = np.array(scan.shape[:3]) / np.array(half.shape)
    assert sorted(sizes) == [1, 2, 2]
    # Both images have the same center.
    centers = [image.affine @ [*((np.array(image.shape[:3]) - 1) / 2), 1] for image in (scan, half)]
    np.testing.assert_allclose(*centers, atol=1e-5)
    np.testing.assert_allclose(
        nibabel.affines.voxel_sizes(half.affine),
        nibabel.affines.voxel_sizes(scan.affine) * sizes,
        rtol=1e-6,
    )
