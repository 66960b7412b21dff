"""Compare jobs over videos with predictions of sleap-nn itself: instances, scores, coordinates.

`make parity` runs this file in an environment with sleap-nn and chunkq. The jobs are computed by
one worker, then by three of which one is killed. Each has a broken video beside the others.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import sleap_io
import torch
from chunkq_worker.runtimes.sleap import load
from sleap_nn.inference import Predictor

import chunkq
from chunkq.errors import ModelError
from chunkq.job.model_config import ModelConfig

CHUNK = 4
MODELS = {
    "single": (["one"], ["models/single"]),
    "bottom-up": (["two", "other"], ["models/bottomup"]),
    "top-down": (["two", "other"], ["models/centroid", "models/centered"]),
    "single export": (["one"], ["exports/single"]),
    "bottom-up export": (["two", "other"], ["exports/bottomup"]),
    "top-down export": (["two", "other"], ["exports/topdown"]),
}
"""Network -> videos, folders."""
Poses = list[tuple[tuple[str, int], list[tuple[Any, Any, float]]]]
"""Video and number of each frame, and points, their scores and the score of each instance."""


def own_prediction(made: Path, folders: list[str], videos: list[str]) -> Poses:
    """Return what sleap-nn itself predicts for videos."""
    paths = [str(made / folder) for folder in folders]
    if "exports" in paths[0]:
        predictor = Predictor.from_export_dir(paths[0], runtime="onnx", device="cpu")
    else:
        predictor = Predictor.from_model_paths(paths, device="cpu")
    return poses_of(predictor.predict([str(made / f"{video}.mp4") for video in videos]))


def poses_of(labels: Any) -> Poses:
    """Return the instances of sleap-io's labels."""
    return [
        (
            (str(frame.video.filename), int(frame.frame_idx)),
            [(i.numpy(), i.points["score"], float(i.score)) for i in frame.instances],
        )
        for frame in labels
    ]


def compare(found: Poses, expected: Poses) -> tuple[int, float]:
    """Return the number of instances and the largest difference. Raises AssertionError."""
    assert [place for place, _ in found] == [place for place, _ in expected]
    count, worst = 0, 0.0
    for (_, first), (_, second) in zip(found, expected, strict=True):
        assert len(first) == len(second)
        for (points, scores, score), (own, own_scores, own_score) in zip(
            first, second, strict=True
        ):
            visible = np.isfinite(own).all(axis=1)
            np.testing.assert_array_equal(np.isfinite(points).all(axis=1), visible)
            for a, b in ((points, own), (scores, own_scores)):
                worst = max(worst, float(np.abs(a - b)[visible].max(initial=0)))
            worst, count = max(worst, abs(score - own_score)), count + 1
    assert worst < 1e-5, worst
    assert count
    return count, worst


def job(
    made: Path, folders: list[str], videos: list[str], broken: Path, output: Path
) -> dict[str, Any]:
    """Return the keys of a job over videos and one that is broken."""
    paths = [*(made / f"{video}.mp4" for video in videos), broken]
    return {
        "input": list(map(str, paths)),
        "inference_type": "image",
        "model_config": {"package": [str(made / folder) for folder in folders]},
        "chunksize": [CHUNK],
        "threads": 1,
        "output": str(output),
    }


def work(queue: str, workers: int, first_job: Path, *, kill: bool) -> None:
    """Run workers until the queue is empty; kill a process of one when a chunk is committed."""
    command = [sys.executable, "-m", "chunkq", "work", "--burst", "--queue", queue]
    running = [subprocess.Popen(command) for _ in range(workers)]
    if kill:
        while not list(first_job.glob("*/done/infer/**/*")):
            assert any(process.poll() is None for process in running)
            time.sleep(0.02)
        [victim, *_] = [
            child
            for process in running
            for child in psutil.Process(process.pid).children(recursive=True)
            if "chunkq_worker.worker_process" in child.cmdline()
        ]
        victim.send_signal(signal.SIGKILL)
        print("killed a worker process")  # noqa: T201
    assert [process.wait() for process in running] == [0] * workers


class Code:
    """An object whose pickle runs code."""

    def __reduce__(self) -> Any:
        return (print, ("code of a checkpoint runs",))


def check_refusals(made: Path, temporary: Path) -> None:
    """Load damaged and untrusted folders. Raises AssertionError unless each is refused."""
    folder = temporary / "untrusted"
    shutil.copytree(made / "models/single", folder)
    model = ModelConfig(
        runtime="sleap", type="package", package=(str(folder),), model_input_shape=(3, 9, 9)
    )
    weights = torch.load(folder / "best.ckpt", weights_only=False)
    found = []
    for content in ({**weights, "extra": Code()}, {"state_dict": {}}, None):
        if content is None:
            (folder / "best.ckpt").write_bytes(b"damaged")
        else:
            torch.save(content, folder / "best.ckpt")
        try:
            load(model, None, 1)
        except ModelError as error:
            found.append((str(error.code), len(str(error).splitlines())))
    assert found == [("model_untrusted", 1), ("model_unusable", 1), ("model_unusable", 1)], found


def main(made: Path) -> None:
    """Compare every network. Raises AssertionError."""
    with tempfile.TemporaryDirectory() as name:
        check_refusals(made, Path(name))
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        broken = temporary / "broken.mp4"
        broken.write_text("no video")
        for workers in (1, 3):
            queue, outputs = f"sqlite://{temporary}/{workers}.db", temporary / str(workers)
            outputs.mkdir()
            for network, (videos, folders) in MODELS.items():
                output = outputs / f"{network}.slp"
                chunkq.produce(job(made, folders, videos, broken, output), queue=queue)
            started = time.time()
            folder = outputs / f"{next(iter(MODELS))}.slp.chunkq"
            work(queue, workers, folder, kill=workers > 1)
            print(f"{workers} workers: {time.time() - started:.1f} s")  # noqa: T201
            for network in MODELS:
                report = chunkq.finalize(outputs / f"{network}.slp")
                assert report["images"]["failed"] == 1
        for network, (videos, folders) in MODELS.items():
            one, three = (temporary / str(n) / f"{network}.slp" for n in (1, 3))
            assert one.read_bytes() == three.read_bytes(), network
            found = poses_of(sleap_io.load_slp(str(three)))
            expected = own_prediction(made, folders, videos)
            count, worst = compare(found, expected)
            print(f"{network}: {count} instances, at most {worst:.2g} apart")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())  # as the videos in the output
