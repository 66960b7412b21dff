"""Jobs over images: one table, whatever is damaged, killed, lost or continued."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import s3fs
from chunkq_producer.job_status import job_status
from chunkq_producer.reports.job_report import load_job_report
from chunkq_worker.images.image_check import check_images
from PIL import Image

import chunkq
from chunkq.create import check_job, create_job
from chunkq.errors import ErrorCode, IncompleteError, JobError, ModelError
from chunkq.finalize import finalize_job
from chunkq.job.job_handle import open_job
from chunkq.job.job_reading import load_job
from chunkq.model_check import ValueCheck
from chunkq.repair import repair_output
from chunkq.stages.tables import PIECE
from chunkq.verify import verify_job
from tests.harness.photos import COLORS, SIZE, errors_of, photo_job, runs, write_photos
from tests.harness.processes import kill_all
from tests.harness.servers.moto import moto_server
from tests.harness.servers.redis import RedisServer
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace, run_inline, run_tasks


def expected(folder: Path, damaged: dict[str, str]) -> list[dict[str, Any]]:
    """Return path, scores and truth of each sound image, computed by a plain loop."""
    rows = []
    for path in sorted(map(str, (folder / "photos").rglob("*.*"))):
        name = path.partition("/photos/")[2]
        if name in damaged:
            continue
        scores = softmax(10 * loaded(path).mean(axis=(0, 1)))
        rows.append({"path": path, "scores": scores, "truth": name.partition("/")[0]})
    return rows


def loaded(path: str) -> npt.NDArray[np.float64]:
    """Return the center of an image whose shorter side is resized, as values from 0 to 1."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    short = min(width, height)
    size = (SIZE * width // short, SIZE * height // short)
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float64)
    top, left = (round((n - SIZE) / 2) for n in pixels.shape[:2])
    return pixels[top : top + SIZE, left : left + SIZE] / 255


def softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


@pytest.fixture
def damaged(tmp_path: Path) -> dict[str, str]:
    return write_photos(tmp_path)


@pytest.fixture
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of the table of a job that nothing interrupts, with the paths of its folder."""
    folder = tmp_path_factory.mktemp("whole")
    write_photos(folder)
    run_inline(photo_job(folder))
    return normalized(folder)


def normalized(folder: Path) -> bytes:
    """Return the rows of the table without the folder, as bytes."""
    rows = rows_of(folder / "out.parquet")
    return json.dumps(rows).replace(str(folder), "").encode()


def test_the_table_is_that_of_a_plain_loop_and_the_errors_are_the_damaged_files(
    tmp_path: Path, damaged: dict[str, str]
) -> None:
    job, report = run_inline(photo_job(tmp_path))
    rows = rows_of(tmp_path / "out.parquet")
    wanted = expected(tmp_path, damaged)
    assert [row["path"] for row in rows] == [row["path"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        best = int(np.argmax(other["scores"]))
        assert (row["prediction"], row["label"]) == (best, COLORS[best])
        assert row["score"] == pytest.approx(other["scores"][best], abs=1e-5)
        assert row["top_labels"] == [COLORS[n] for n in np.argsort(-other["scores"])]
        assert row["top_scores"] == pytest.approx(sorted(other["scores"])[::-1], abs=1e-5)
        assert (row["truth"], row["correct"]) == (other["truth"], other["truth"] == COLORS[best])
    assert errors_of(job) == damaged
    assert report["images"]["failed"] == len(damaged)
    assert report["images"]["by_code"] == {"image_damaged": 2, "image_missing": 1}
    assert report["images"]["accuracy"]["correct"] == sum(row["correct"] for row in rows)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_tables_have_the_rows_of_the_parquet_file(
    tmp_path: Path, damaged: dict[str, str], suffix: str
) -> None:
    run_inline(photo_job(tmp_path))
    path = tmp_path / f"out.{suffix}"
    run_inline(photo_job(tmp_path, output=str(path)))
    with path.open() as file:
        lines = list(csv.DictReader(file)) if suffix == "csv" else [json.loads(n) for n in file]
    rows = rows_of(tmp_path / "out.parquet")
    assert [line["path"] for line in lines] == [row["path"] for row in rows]
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    preview(tmp_path / "out.parquet", tmp_path / "parquet.png")
    preview(path, tmp_path / "other.png")
    pictures = [(tmp_path / name).read_bytes() for name in ("parquet.png", "other.png")]
    assert pictures[0] == pictures[1]


def preview(table: Path, picture: Path) -> None:
    Workspace(table.parent, {}).call("preview", str(table), "--to", str(picture)).ok()


def test_a_job_of_which_all_images_failed_says_so_and_ends_well(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{n}.png\n" for n in range(5)))
    values = photo_job(tmp_path, input=str(tmp_path / "list.csv"), truth=None)
    _, report = run_inline(values)
    assert (report["images"]["failed"], report["images"]["rows"]) == (5, 5)
    table = pq.read_table(tmp_path / "out.parquet")
    assert (table.num_rows, table.column_names[0]) == (0, "path")
    workspace = Workspace(tmp_path, values)
    workspace.write_job()
    answer = workspace.call("finalize", "out.parquet").ok()
    assert "no image has a result" in answer.err.splitlines()[-1]
    Workspace(tmp_path, values | {"max_errors": 4, "output": "b.csv"}).write_job()
    workspace.call("produce", "job.json").ok()
    run_tasks(open_job(f"{tmp_path}/b.csv.chunkq"))
    workspace.call("finalize", "b.csv").refused(3, ErrorCode.TOO_MANY_ERRORS)


@pytest.mark.parametrize("backend", ["sqlite", "redis"])
def test_a_killed_worker_changes_no_byte_and_costs_no_image(
    tmp_path: Path, damaged: dict[str, str], table: bytes, backend: str, redis: RedisServer
) -> None:
    gate = tmp_path / "gate"
    values = photo_job(tmp_path, gate=str(gate))
    workspace = Workspace(tmp_path, values, url=None if backend == "sqlite" else redis.url)
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    with workspace.start("work", "--burst", "--gpus", "none", "--workers", "2") as worker:
        wait_until(lambda: runs(tmp_path) > 0, "a worker computes a chunk")
        kill_all(worker.children())
        gate.touch()
        assert worker.wait().code == 0
    workspace.call("finalize", "out.parquet").ok()
    assert normalized(tmp_path) == table


def test_an_interrupted_job_goes_on_where_it_stopped_and_overwrite_starts_again(
    tmp_path: Path, damaged: dict[str, str]
) -> None:
    values = photo_job(tmp_path)
    job = create_job(check_job(load_job(values)))
    assert job.items[0].tasks.costs.chunks == 4
    with pytest.raises(IncompleteError):
        finalize_job(job, worker="inline")
    assert not (tmp_path / "out.parquet").exists()
    run_tasks(job)
    before = runs(tmp_path)
    chunkq.run(values, executor="inprocess")
    assert runs(tmp_path) <= before + 9  # the check of the network repeats a batch
    first = (tmp_path / "out.parquet").read_bytes()
    chunkq.run(values, executor="inprocess", overwrite=True)
    assert (tmp_path / "out.parquet").read_bytes() == first
    assert open_job(job.folder.path).record.epoch != job.record.epoch


def test_the_result_of_a_chunk_that_is_lost_is_computed_again(
    tmp_path: Path, damaged: dict[str, str]
) -> None:
    values = photo_job(tmp_path)
    job = create_job(check_job(load_job(values)))
    run_tasks(job)
    item = job.items[0]
    item.ledger.objects.delete(f"pieces/0/1/{PIECE}")
    with pytest.raises(IncompleteError) as caught:
        finalize_job(job, worker="inline")
    assert caught.value.code is ErrorCode.RESULTS_LOST
    assert caught.value.missing == ("1",)
    run_inline(values)
    assert len(rows_of(tmp_path / "out.parquet")) == 12


def test_more_errors_than_allowed_end_with_code_3_until_the_number_is_raised(
    tmp_path: Path, damaged: dict[str, str]
) -> None:
    workspace = Workspace(tmp_path, photo_job(tmp_path, max_errors=2))
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    job = open_job(f"{tmp_path}/out.parquet.chunkq")
    run_tasks(job)
    result = workspace.call("finalize", "out.parquet")
    assert result.code == 3
    assert ErrorCode.TOO_MANY_ERRORS in result.err
    assert errors_of(job) == damaged
    assert not (tmp_path / "out.parquet").exists()
    assert not job.ledger.is_sealed()
    count = runs(tmp_path)
    Workspace(tmp_path, photo_job(tmp_path, max_errors=3)).write_job()
    workspace.call("produce", "job.json").ok()
    workspace.call("finalize", "out.parquet").ok()
    assert runs(tmp_path) == count
    assert len(rows_of(tmp_path / "out.parquet")) == 12


def test_a_damaged_table_is_found_and_made_again(tmp_path: Path, damaged: dict[str, str]) -> None:
    values = photo_job(tmp_path)
    job, _ = run_inline(values)
    path = tmp_path / "out.parquet"
    whole = path.read_bytes()
    assert verify_job(job).is_sound
    path.write_bytes(whole[:-1] + b"?")
    verification = verify_job(job)
    assert [problem.damage for problem in verification.problems] == ["damaged"]
    repair_output(job, verification)
    run_tasks(job)
    finalize_job(job, worker="inline")
    assert path.read_bytes() == whole
    assert verify_job(job).is_sound


def test_images_and_table_can_be_in_a_bucket(tmp_path: Path, damaged: dict[str, str]) -> None:
    with moto_server() as endpoint:
        values = photo_job(tmp_path, input="s3://lab/photos", output="s3://lab/out.parquet")
        access = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        workspace = Workspace(tmp_path, values, access | {"AWS_ENDPOINT_URL": endpoint})
        workspace.write_job()
        bucket = s3fs.S3FileSystem(
            endpoint_url=endpoint, key="k", secret="s", skip_instance_cache=True
        )
        bucket.mkdir("lab")
        (tmp_path / "photos" / "blue" / "gone.png").unlink()
        bucket.put(f"{tmp_path}/photos", "lab/photos", recursive=True)
        workspace.run("run", "job.json", "--gpus", "none").ok()
        with bucket.open("lab/out.parquet") as file:
            rows = pq.read_table(file).to_pylist()
    assert len(rows) == 12
    assert rows[0]["path"].startswith("s3://lab/photos/blue/")


def test_the_plan_counts_images_and_chunks_and_writes_nothing(
    tmp_path: Path, damaged: dict[str, str]
) -> None:
    workspace = Workspace(tmp_path, photo_job(tmp_path, price=1.0))
    workspace.write_job()
    plan = json.loads(workspace.call("plan", "job.json", "--json").ok().out)
    assert (plan["images"], plan["chunks"], plan["chunksize"]) == (15, 4, [4])
    assert (plan["truth"], plan["input_shape"], plan["price"]) == (15, [3, SIZE, SIZE], None)
    assert workspace.call("plan", "job.json").ok().out.startswith("input")
    assert not list(tmp_path.glob("out*"))


def test_a_table_of_some_of_the_images_is_not_written(
    tmp_path: Path, damaged: dict[str, str]
) -> None:
    job = create_job(check_job(load_job(photo_job(tmp_path))))
    with pytest.raises(JobError):
        finalize_job(job, worker="inline", allow_missing=True)


def test_status_and_report_speak_of_images(tmp_path: Path, damaged: dict[str, str]) -> None:
    job, _ = run_inline(photo_job(tmp_path, price=2.0))
    status = job_status(job, None)
    assert (status.unit, status.patches_done, status.image_errors) == ("images", 15, 3)
    report = load_job_report(job)
    assert report.unit == "images"
    assert report.cost is not None
    assert report.cost > 0


@pytest.mark.parametrize(("path", "notes"), [("0.png", 1), ('""', 0)])
def test_the_check_of_the_network_notes_that_no_image_can_be_read(
    tmp_path: Path, path: str, notes: int
) -> None:
    (tmp_path / "list.csv").write_text(f"path,n\n{path},1\n{path},2\n")
    values = photo_job(tmp_path, input=str(tmp_path / "list.csv"), truth=None)
    check = check_images(check_job(load_job(values)).record)
    assert len(check.notes) == notes
    assert check.values == ValueCheck()


def test_a_network_that_fails_for_every_image_is_an_error_of_the_job(
    tmp_path: Path, damaged: dict[str, str]
) -> None:
    values = photo_job(tmp_path, image={"mode": "L", "crop": SIZE, "scale": 255})
    with pytest.raises(ModelError):
        chunkq.run(values, executor="inprocess")
    assert not (tmp_path / "out.parquet").exists()
