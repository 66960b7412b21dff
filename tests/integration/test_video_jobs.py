"""Jobs over videos: keypoints of each frame, in pixels, whoever decodes it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pyarrow.parquet as pq
import pytest
from chunkq_worker.images.preview import write_video as write_preview
from PIL import Image

from chunkq.create import check_job, create_job
from chunkq.errors import ChunkReadError, ErrorCode, JobError
from chunkq.finalize import finalize_job
from chunkq.job.job_reading import load_job
from tests.harness.videos import HEIGHT, WIDTH, all_frames, write_video
from tests.harness.workspace import Workspace, run_inline, run_tasks

NETWORK = """
import numpy as np

def halved(batch):
    with open({runs!r}, "a") as file:
        file.write("x" * len(batch))
    n, _, h, w = batch.shape
    return batch.reshape(n, 1, h // 2, 2, w // 2, 2).mean(axis=(3, 5))
"""
LENGTHS = {"a.mp4": 26, "c.mkv": 9}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", LENGTHS["a.mp4"], bf="2", g="7")
    (folder / "b.mp4").write_bytes(b"no video")
    write_video(folder / "c.mkv", LENGTHS["c.mkv"], shift=5)
    return folder


def video_job(videos: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    (folder / "network.py").write_text(NETWORK.format(runs=str(folder / "runs")))
    return {
        "input": str(videos / "*.m*"),
        "output": str(folder / "out.parquet"),
        "inference_type": "image",
        "image": {"mode": "L", "scale": 255},
        "peaks": {"threshold": 0.1},
        "chunksize": [8],
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(folder / "network.py"),
            "class_name": "halved",
            "model_input_shape": [1, HEIGHT, WIDTH],
            "max_batch_size": 3,
        },
    } | keys


def reference(frames: npt.NDArray[Any]) -> list[list[float]]:
    """Return x, y and score of the spot in each frame (T, H, W): argmax and center of mass."""
    points = []
    for frame in frames:
        halved = (frame / 255).reshape(HEIGHT // 2, 2, WIDTH // 2, 2).mean(axis=(1, 3))
        y, x = np.unravel_index(halved.argmax(), halved.shape)
        padded = np.pad(halved, 2)
        window = padded[y : y + 5, x : x + 5]
        steps = np.arange(-2, 3)
        dx, dy = (window.sum(axis=a) @ steps / window.sum() for a in (0, 1))
        points.append([2 * (x + dx), 2 * (y + dy), halved[y, x]])
    return points


def points_of(path: Path) -> dict[tuple[str, int], list[float]]:
    """Return x, y and score of each frame by video and number; one animal with one keypoint."""
    found = {}
    for row in pq.read_table(path).to_pylist():
        [[keypoint]] = row["keypoints"]
        values = [keypoint["x"], keypoint["y"], keypoint["score"]]
        found[Path(row["path"]).name, row["frame"]] = values
    return found


def test_two_workers_give_each_frame_of_each_video_once(videos: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, video_job(videos, tmp_path))
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    with workspace.start("work", "--burst", "--gpus", "none", "--workers", "2") as worker:
        assert worker.wait().code == 0
    workspace.call("finalize", "out.parquet").ok()
    found = points_of(tmp_path / "out.parquet")
    assert list(found) == [(name, n) for name, count in LENGTHS.items() for n in range(count)]
    for name in LENGTHS:
        expected = reference(all_frames(videos / name, "gray"))
        values = [point for (video, _), point in found.items() if video == name]
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-4)
    [errors] = tmp_path.glob("out.parquet.chunkq/*/errors.parquet")
    [error] = pq.read_table(errors).to_pylist()
    assert (Path(error["path"]).name, error["code"]) == ("b.mp4", ErrorCode.IMAGE_DAMAGED)
    table = (tmp_path / "out.parquet").read_bytes()
    run_inline(video_job(videos, tmp_path, output=str(tmp_path / "one.parquet")))
    assert (tmp_path / "one.parquet").read_bytes() == table


def test_picked_frames_are_those_of_the_whole_video(videos: Path, tmp_path: Path) -> None:
    run_inline(video_job(videos, tmp_path, output=str(tmp_path / "all.parquet")))
    source = {"path": str(videos / "*.m*"), "frames": "2:20:3"}
    run_inline(video_job(videos, tmp_path, input=source))
    found, whole = points_of(tmp_path / "out.parquet"), points_of(tmp_path / "all.parquet")
    assert list(found) == [
        (name, n) for name, count in LENGTHS.items() for n in range(2, min(20, count), 3)
    ]
    assert found == {key: whole[key] for key in found}


def test_torch_and_onnx_give_the_keypoints_of_numpy(videos: Path, tmp_path: Path) -> None:
    run_inline(video_job(videos, tmp_path))
    expected = points_of(tmp_path / "out.parquet")
    net = tmp_path / "net.py"
    net.write_text("import torch\n\ndef pool():\n    return torch.nn.AvgPool2d(2)\n")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    inputs, outputs = [
        [helper.make_tensor_value_info(name, kind, ["n", 1, h, w])]
        for name, h, w in (("x", HEIGHT, WIDTH), ("y", HEIGHT // 2, WIDTH // 2))
    ]
    model = helper.make_model(
        helper.make_graph([node], "pool", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "net.onnx")
    shape = {"model_input_shape": [1, HEIGHT, WIDTH], "max_batch_size": 3}
    for runtime in (
        {"runtime": "torch", "type": "class", "class_file": str(net), "class_name": "pool"},
        {"runtime": "onnx", "type": "file", "model_file": str(tmp_path / "net.onnx")},
    ):
        output = tmp_path / f"{runtime['runtime']}.parquet"
        run_inline(video_job(videos, tmp_path, output=str(output), model_config=shape | runtime))
        found = points_of(output)
        assert list(found) == list(expected)
        np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-4)


def test_a_preview_shows_keypoints_in_a_picture_and_in_a_video(
    videos: Path, tmp_path: Path
) -> None:
    run_inline(video_job(videos, tmp_path))
    workspace = Workspace(tmp_path, {})
    table = str(tmp_path / "out.parquet")
    picture, video = tmp_path / "preview.png", tmp_path / "preview.mp4"
    workspace.call("preview", table, "--rows", "0:4", "--to", str(picture)).ok()
    with Image.open(picture) as image:
        assert image.size == (2 * 320, 2 * round(320 * HEIGHT / WIDTH))
    workspace.call("preview", table, "--rows", "3:20", "--to", str(video)).ok()
    shown, expected = all_frames(video).astype(int), all_frames(videos / "a.mp4").astype(int)
    assert len(shown) == 17
    x, y, _ = points_of(tmp_path / "out.parquet")["a.mp4", 3]
    difference = np.abs(shown[0] - expected[3]).sum(axis=2)
    row, column = np.unravel_index(difference.argmax(), difference.shape)
    assert abs(row - y) <= 4
    assert abs(column - x) <= 4
    wrong = [(table, "--rows", "90:"), (table, "--to", "x.txt"), ("none.parquet",), ("out.slp",)]
    wrong.append((table, "--to", "missing/x.mp4"))
    for arguments in wrong:
        assert workspace.call("preview", *arguments).code == 2


def test_a_preview_of_narrow_images_is_a_video(tmp_path: Path) -> None:
    write_preview(str(tmp_path / "narrow.mp4"), iter([np.full((1, 5, 3), 99, np.uint8)] * 2))
    assert all_frames(tmp_path / "narrow.mp4").shape == (2, 2, 4, 3)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_preview_of_another_table_is_that_of_the_parquet_file(
    videos: Path, tmp_path: Path, suffix: str
) -> None:
    pictures = []
    for name in ("parquet", suffix):
        table = tmp_path / f"out.{name}"
        run_inline(video_job(videos, tmp_path, output=str(table)))
        picture = tmp_path / f"{name}.png"
        Workspace(tmp_path, {}).call("preview", str(table), "--to", str(picture)).ok()
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1]


def test_chunks_of_a_video_that_was_replaced_fail_and_the_job_is_another_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "videos").mkdir()
    video = tmp_path / "videos" / "a.mp4"
    write_video(video, 20)
    values = video_job(tmp_path / "videos", tmp_path)
    job = create_job(check_job(load_job(values)))
    write_video(video, 20, shift=3)
    with pytest.raises(ChunkReadError) as error:
        run_tasks(job)
    assert error.value.code is ErrorCode.INPUT_CHANGED
    assert not (tmp_path / "runs").exists()
    with pytest.raises(JobError) as refused:
        create_job(check_job(load_job(values)))
    assert refused.value.code is ErrorCode.OUTPUT_OF_OTHER_JOB
    job = create_job(check_job(load_job(values)), overwrite=True)
    run_tasks(job)
    finalize_job(job, worker="inline")
    assert len(points_of(tmp_path / "out.parquet")) == 20


def test_columns_of_a_list_are_no_predictions_and_a_missing_image_is_named(
    tmp_path: Path,
) -> None:
    Image.new("L", (WIDTH, 2), 99).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,frame,label,score\na.png,left,b,high\n")
    _, report = run_inline(video_job(tmp_path, tmp_path, input=str(tmp_path / "list.csv")))
    assert report["images"]["predicted"] is None
    for name in ("preview.png", "preview.mp4"):
        arguments = ("out.parquet", "--to", name)
        Workspace(tmp_path, {}).call("preview", *arguments).ok()
        assert (tmp_path / name).is_file()
    (tmp_path / "a.png").unlink()
    result = Workspace(tmp_path, {}).call("preview", str(tmp_path / "out.parquet"))
    assert ErrorCode.IMAGE_MISSING in result.err
    assert str(tmp_path / "a.png") in result.err
