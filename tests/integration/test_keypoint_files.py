"""Keypoints of a job as a `.slp` file: one skeleton, and the frames that have a result."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sleap_io
from chunkq_worker.run_task import run_task
from PIL import Image

from chunkq.create import check_job, create_job
from chunkq.errors import ErrorCode, StoreError
from chunkq.finalize import finalize_job
from chunkq.images import slp_packages
from chunkq.images.poses import read_poses
from chunkq.job.job_reading import load_job
from chunkq.queue.contract.executor import Attempt
from chunkq.verify import verify_job
from tests.harness.workspace import run_inline

NAMES = ["nose", "tail"]
DAMAGED = 5
NETWORK = """
import numpy as np

def maps(batch):
    return np.concatenate([batch, 1 - batch], axis=1) / np.float32(1)
"""


def keypoint_job(folder: Path, output: str, **keys: Any) -> dict[str, Any]:
    """Write 9 images of a spot on a slope, of which one is damaged; return the keys of a job."""
    frames = folder / "frames"
    frames.mkdir(exist_ok=True)
    rows, columns = np.mgrid[:16, :24]
    for number in range(9):
        spot = 200 * np.exp(-((columns - 3 - 2 * number) ** 2 + (rows - 7) ** 2) / 6)
        spot[15, number] = 0
        Image.fromarray((40 + spot).astype(np.uint8)).save(frames / f"{number}.png")
    (frames / f"{DAMAGED}.png").write_bytes(b"damaged")
    (folder / "network.py").write_text(NETWORK)
    return {
        "input": str(frames),
        "output": str(folder / output),
        "inference_type": "image",
        "image": {"mode": "L", "scale": 255},
        "classes": NAMES,
        "peaks": {"threshold": 0.3},
        "chunksize": [4],
        "threads": 1,
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(folder / "network.py"),
            "class_name": "maps",
            "model_input_shape": [1, 16, 24],
            "max_batch_size": 2,
        },
    } | keys


@pytest.mark.parametrize("multiple", [False, True])
def test_the_file_has_the_keypoints_of_the_table(tmp_path: Path, multiple: bool) -> None:
    peaks = {"threshold": 0.3, "multiple": multiple}
    run_inline(keypoint_job(tmp_path, "out.parquet", peaks=peaks))
    table = pq.read_table(tmp_path / "out.parquet")
    job, report = run_inline(keypoint_job(tmp_path, "out.slp", peaks=peaks))
    labels = sleap_io.load_slp(str(tmp_path / "out.slp"), open_videos=False)
    [video], [skeleton] = labels.videos, labels.skeletons
    assert skeleton.node_names == NAMES
    assert video.filename == [str(tmp_path / "frames" / f"{n}.png") for n in range(9)]
    assert [frame.frame_idx for frame in labels] == [n for n in range(9) if n != DAMAGED]
    for frame, poses in zip(labels, read_poses(table, NAMES), strict=True):
        points = np.reshape([one.numpy() for one in frame.instances], (-1, 2, 2))
        np.testing.assert_array_equal(points, poses.points)
        np.testing.assert_array_equal([one.score for one in frame.instances], poses.scores)
        assert len(points) or multiple
    assert report["images"]["failed"] == 1
    assert verify_job(job).is_sound


def test_the_file_has_the_same_bytes_in_any_order_of_chunks(tmp_path: Path) -> None:
    run_inline(keypoint_job(tmp_path, "first.slp"))
    job = create_job(check_job(load_job(keypoint_job(tmp_path, "second.slp"))))
    for index in [*job.items[0].tasks.chunks()][::-1]:
        run_task(job.items[0].task("infer", index), Attempt(1, "second"))
    finalize_job(job, worker="second")
    assert (tmp_path / "first.slp").read_bytes() == (tmp_path / "second.slp").read_bytes()


def test_a_missing_package_is_refused_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slp_packages, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"\[slp\]") as error:
        check_job(load_job(keypoint_job(tmp_path, "out.slp")))
    assert error.value.code == ErrorCode.PACKAGE_MISSING
    assert not (tmp_path / "out.slp.chunkq").exists()
