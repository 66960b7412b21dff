"""Train tiny models with sleap-nn on drawn videos, and export them.

`make parity` runs this file in an environment with sleap-nn. It imports nothing of chunkq.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHAPE = (96, 128)
FRAMES = 12
NODES = ("head", "thorax", "tail")
EDGES = (("head", "thorax"), ("thorax", "tail"))
TRAINED = {
    "single": ("one", {"single_instance": {"confmaps": {"part_names": None}}}),
    "bottomup": (
        "two",
        {
            "bottomup": {
                "confmaps": {"part_names": None, "loss_weight": 1.0},
                "pafs": {"edges": None, "sigma": 8.0, "output_stride": 4, "loss_weight": 1.0},
            }
        },
    ),
    "centroid": ("two", {"centroid": {"confmaps": {"anchor_part": "thorax"}}}),
    "centered": (
        "two",
        {"centered_instance": {"confmaps": {"part_names": None, "anchor_part": "thorax"}}},
    ),
}
"""Model -> video of the training, heads."""
PACKAGES = {
    "single": ["single"],
    "bottomup": ["bottomup"],
    "topdown": ["centroid", "centered"],
}
"""Package -> models."""


def draw(animals: int, start: int, count: int) -> tuple[npt.NDArray[np.uint8], Any]:
    """Return frames (t, y, x, 1) with moving animals of three parts, and their points."""
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    frames, points = [], []
    for time_point in range(start, start + count):
        image, instances = np.full(SHAPE, 40.0), []
        for number in range(animals):
            x = (30 + 60 * number + 2 * time_point) % SHAPE[1]
            y = 30 + 25 * number + 3 * np.sin(time_point + number)
            angle = 0.2 * time_point + number
            arm = 14 * np.array([np.cos(angle), np.sin(angle)])
            center = np.array([x, y])
            instance = np.array([center + arm, center, center - arm])
            for (u, v), value, sigma in zip(instance, (200, 150, 100), (3, 4, 3), strict=True):
                image += value * np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * sigma**2))
            instances.append(instance)
        frames.append(np.clip(image, 0, 255).astype(np.uint8)[..., None])
        points.append(instances)
    return np.stack(frames), points


def write_videos(folder: Path) -> None:
    """Write `one.mp4` and `two.mp4` with their labels, and `other.mp4` without."""
    import sleap_io as sio

    skeleton = sio.Skeleton(nodes=list(NODES), edges=list(EDGES))
    for name, animals in (("one", 1), ("two", 2)):
        frames, points = draw(animals, 0, FRAMES)
        path = str(folder / f"{name}.mp4")
        sio.save_video(frames, path)
        video = sio.load_video(path)
        labeled = [
            sio.LabeledFrame(
                video=video,
                frame_idx=number,
                instances=[sio.Instance.from_numpy(p, skeleton=skeleton) for p in instances],
            )
            for number, instances in enumerate(points)
        ]
        labels = sio.Labels(labeled, videos=[video], skeletons=[skeleton])
        sio.save_slp(labels, str(folder / f"{name}.slp"))
    sio.save_video(draw(2, 20, FRAMES + 3)[0], str(folder / "other.mp4"))


def train(folder: Path, name: str) -> None:
    """Train one model into the folder `models/NAME`."""
    from sleap_nn.train import train as train_model

    video, heads = TRAINED[name]
    for head in heads.values():
        head["confmaps"] |= {"sigma": 2.5, "output_stride": 2}
    labels = [str(folder / f"{video}.slp")]
    train_model(
        train_labels_path=labels,
        val_labels_path=labels,
        head_configs=heads,
        backbone_config={
            "unet": {
                "in_channels": 1,
                "kernel_size": 3,
                "filters": 8,
                "filters_rate": 1.5,
                "max_stride": 8,
                "convs_per_block": 2,
                "stacks": 1,
                "stem_stride": None,
                "middle_block": True,
                "up_interpolate": True,
                "output_stride": 2,
            }
        },
        ensure_grayscale=True,
        use_augmentations_train=False,
        batch_size=4,
        num_workers=0,
        trainer_accelerator="cpu",
        trainer_num_devices=1,
        enable_progress_bar=False,
        min_train_steps_per_epoch=60,
        max_epochs=8,
        learning_rate=2e-3,
        seed=0,
        save_ckpt=True,
        ckpt_dir=str(folder / "models"),
        run_name=name,
        crop_size=48 if name == "centered" else None,
        use_wandb=False,
    )


def export(folder: Path, name: str) -> None:
    """Export the models of a package into the folder `exports/NAME`."""
    models = [str(folder / "models" / model) for model in PACKAGES[name]]
    target = str(folder / "exports" / name)
    command = [str(Path(sys.executable).with_name("sleap-nn")), "export", *models]
    subprocess.run([*command, "-o", target, "--device", "cpu"], check=True)


def main(folder: Path) -> None:
    """Write videos, models and exports that do not exist yet."""
    done = folder / "made.json"
    if done.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_videos(folder)
    seconds = {}
    for name in TRAINED:
        started = time.time()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(folder), name]
        subprocess.run(command, check=True, env=environment)
        seconds[name] = round(time.time() - started, 1)
    for name in PACKAGES:
        export(folder, name)
    done.write_text(json.dumps(seconds))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        train(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
