"""Memory of a worker of a job over images; `make prove PART=images`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from chunkq_worker.child_env import child_env
from PIL import Image

from chunkq.create import check_job, create_job
from chunkq.finalize import finalize_job
from chunkq.job.job_handle import JobHandle
from chunkq.job.job_reading import load_job
from tests.harness.photos import photo_job

TIME, THREADS = 900, 2
MORE_BYTES = 32 << 20
"""Memory that a longer list or video may take beyond a shorter one: what measurements differ by."""
WORK = """
import json, sys
from chunkq_worker.run_task import run_task
from chunkq.job.job_handle import open_job
from chunkq.queue.contract.executor import Attempt
from chunkq.system.memory import peak_bytes

job = open_job(sys.argv[1])
chunks = list(job.items[0].tasks.chunks())
for chunk in chunks if sys.argv[2] == "all" else (chunks[0], chunks[len(chunks) // 2], chunks[-1]):
    run_task(job.items[0].task("infer", chunk), Attempt(1, "worker"), lambda event: None)
print(json.dumps(peak_bytes()))
"""
"""Computes chunks of a job like a worker; prints the peak memory of the process."""
SPOTS = """
def spots(batch):
    n, _, h, w = batch.shape
    return batch.reshape(n, 1, h // 4, 4, w // 4, 4).mean(axis=(3, 5))
"""
HEIGHT, WIDTH, GROUP = 480, 640, 50
"""Size of the frames in pixels, and their number from one keyframe to the next."""
SHORT, LONG = 200, 4000
"""Frames."""


def peak_of(job: JobHandle, which: str = "all") -> int:
    """Compute chunks of a job in the environment of a worker; return its peak memory (bytes)."""
    command = [sys.executable, "-c", WORK, job.folder.path, which]
    environment = os.environ | child_env(THREADS)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def report(capsys: pytest.CaptureFixture[str], unit: str, peaks: dict[int, int]) -> None:
    with capsys.disabled():
        for count, peak in peaks.items():
            print(f"\n{count} {unit}: peak memory {peak / 1e6:.0f} MB", end="")  # noqa: T201


def listed_job(folder: Path, rows: int) -> JobHandle:
    """Create a job over a list that names one image again and again."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "some.png")
    path = folder / f"{rows}.csv"
    path.write_text("path,number\n" + "".join(f"some.png,{n}\n" for n in range(rows)))
    values = photo_job(folder, input=str(path), output=str(folder / f"{rows}.parquet"), truth=None)
    return create_job(check_job(load_job(values | {"chunksize": [512]})))


@pytest.mark.proof("images")
@pytest.mark.timeout(TIME)
def test_the_memory_of_a_worker_does_not_depend_on_the_length_of_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {rows: peak_of(listed_job(tmp_path, rows), "some") for rows in (10**5, 10**6)}
    report(capsys, "rows", peaks)
    assert peaks[10**6] - peaks[10**5] < MORE_BYTES


def write_long_video(path: Path, frames: int) -> None:
    """Write a video with a bright spot that moves."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "g": str(GROUP)}
        stream: Any = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "gray"
        for t in range(frames):
            distance = (x - (40 + t) % WIDTH) ** 2 + (y - (30 + 2 * t) % HEIGHT) ** 2
            frame = np.where(distance < 80, 255, 20).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())


def spot_job(folder: Path, frames: int, output: str) -> JobHandle:
    (folder / "spots.py").write_text(SPOTS)
    video = folder / f"{frames}.mp4"
    if not video.exists():
        write_long_video(video, frames)
    values = {
        "input": str(video),
        "output": str(folder / output),
        "inference_type": "image",
        "image": {"mode": "L", "scale": 255},
        "peaks": {"threshold": 0.1},
        "classes": ["spot"],
        "chunksize": [100],
        "threads": THREADS,
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(folder / "spots.py"),
            "class_name": "spots",
            "model_input_shape": [1, HEIGHT, WIDTH],
            "max_batch_size": 8,
        },
    }
    return create_job(check_job(load_job(values)))


@pytest.mark.proof("images")
@pytest.mark.timeout(TIME)
@pytest.mark.parametrize("suffix", ["parquet", "slp"])
def test_the_memory_of_a_worker_does_not_depend_on_the_length_of_a_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    peaks = {}
    for frames in (SHORT, LONG):
        job = spot_job(tmp_path, frames, f"{frames}.{suffix}")
        peaks[frames] = peak_of(job)
        report_of_job = finalize_job(job, worker="here")
        assert (report_of_job["patches"], report_of_job["images"]["failed"]) == (frames, 0)
    report(capsys, f"frames of {WIDTH} x {HEIGHT} pixels", peaks)
    assert peaks[LONG] - peaks[SHORT] < MORE_BYTES
