"""`predict_to_store` writes the store of a job and continues it."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import zarr
from chunkq_worker import inputs as input_volumes

import chunkq
from chunkq.errors import ErrorCode, JobError, ModelError, PredictionError
from chunkq.job.job_handle import open_job
from tests.harness.files import everything_below
from tests.harness.predictor_job import CHUNKS, POISONED, SHAPE, keys
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import output_files, run_inline


def test_predict_to_store_refuses_the_name_of_another_format_before_it_copies_an_array(
    tmp_path: Path,
) -> None:
    with chunkq.Predictor.from_model(lambda batch: batch, model_input_shape=[4, 4]) as predictor:
        for name in ("out.tif", "seg.nii.gz"):
            with pytest.raises(JobError, match=r"^output: .*use \w+\.zarr$") as caught:
                predictor.predict_to_store(np.zeros((8, 8), "uint8"), tmp_path / name)
            assert caught.value.code is ErrorCode.STORE_UNSUPPORTED
    assert list(tmp_path.iterdir()) == []


def test_predict_to_store_writes_the_same_store_as_a_job(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    path = write_zarr(tmp_path / "in.zarr", volume, (8, 8, 8))
    values = keys(tmp_path, combine="soft")
    job, _ = run_inline(values | {"input": str(path), "output": str(tmp_path / "job.zarr")})
    steps: list[tuple[int, int]] = []
    with chunkq.Predictor.from_config(values) as predictor:
        report = predictor.predict_to_store(
            path, tmp_path / "out.zarr", progress=lambda done, total: steps.append((done, total))
        )
    assert output_files(tmp_path / "out.zarr") == output_files(tmp_path / "job.zarr")
    stored_job = open_job(f"{tmp_path}/out.zarr.chunkq")
    assert stored_job.record.digest == job.record.digest
    assert zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["chunkq"]["state"] == "complete"
    assert report["missing"] == []
    assert steps == [(n, report["chunks"]) for n in range(report["chunks"] + 1)]
    assert chunkq.status(tmp_path / "out.zarr").sealed


def test_an_interrupted_predict_to_store_continues_with_the_same_call(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (8, 8, 8))

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    output = tmp_path / "out.zarr"
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        with pytest.raises(KeyboardInterrupt):
            predictor.predict_to_store(path, output, progress=interrupt)
        before = chunkq.status(output).done
        assert 3 <= before < CHUNKS
        steps: list[int] = []
        report = predictor.predict_to_store(
            path, output, progress=lambda done, total: steps.append(done)
        )
        assert steps == list(range(before, CHUNKS + 1))
        assert report["patches"] == report["planned_patches"]
        expected = predictor.predict(path)
    np.testing.assert_array_equal(read_output(output), expected.probabilities)
    other = keys(tmp_path, combine="soft")
    with (
        chunkq.Predictor.from_config(other) as predictor,
        pytest.raises(JobError, match="different: combine") as caught,
    ):
        predictor.predict_to_store(path, output)
    assert caught.value.code is ErrorCode.OUTPUT_OF_OTHER_JOB


def test_storing_an_array_leaves_no_other_file_and_replaces_only_with_overwrite(
    tmp_path: Path,
) -> None:
    volume = random_volume(SHAPE)
    before = {*everything_below(tmp_path), "network.py", "kwargs.py"}
    output = tmp_path / "out.zarr"
    with (
        chunkq.Predictor.from_config(keys(tmp_path)) as predictor,
        mock.patch.object(input_volumes, "COPY_BYTES", 1000),  # three rows per write
    ):
        predictor.predict_to_store(volume, output)
        with pytest.raises(JobError) as caught:
            predictor.predict_to_store(volume, output)
        assert caught.value.code is ErrorCode.OUTPUT_OF_OTHER_JOB
        predictor.predict_to_store(np.asfortranarray(volume[::-1]), output, overwrite=True)
        expected = predictor.predict(np.ascontiguousarray(volume[::-1]))
    np.testing.assert_array_equal(read_output(output), expected.probabilities)
    files = {name for name in everything_below(tmp_path) if not name.startswith("out.zarr")}
    assert files - before <= {"__pycache__"}


def test_a_failing_chunk_raises_its_error_and_is_recorded_in_the_ledger(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    volume[16, 13, 18] = 255
    path = write_zarr(tmp_path / "in.zarr", volume)
    values = keys(tmp_path, POISONED)
    with (
        chunkq.Predictor.from_config(values) as predictor,
        pytest.raises(PredictionError, match="NaN"),
    ):
        predictor.predict_to_store(path, tmp_path / "out.zarr")
    status = chunkq.status(tmp_path / "out.zarr")
    assert [group.error for group in status.failures] == ["PredictionError"]
    assert not status.sealed


def test_a_changed_model_file_is_an_error(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE))
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        predictor.predict(path)
        (tmp_path / "network.py").write_text((tmp_path / "network.py").read_text() + "\n")
        with pytest.raises(ModelError, match="changed"):
            predictor.predict_to_store(path, tmp_path / "out.zarr")
