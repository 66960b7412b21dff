"""The command `chunkq preview`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.geometry.position_range import positions_in
from chunkq.install_hint import install_command
from chunkq.job.job_path import job_folder_of, output_path
from chunkq.paths import open_filesystem, without_secret
from chunkq.system.standard_output import print_line

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".mkv", ".mov")
DEFAULT_PICTURES, DEFAULT_FRAMES = 12, 250
"""Rows of a picture, spread over the table, and of a video, from its start."""


@click.command()
@click.argument("output")
@click.option(
    "-t", "--to", type=click.Path(path_type=Path, dir_okay=False), default=Path("preview.png"),
    show_default=True, help=f"File to write: {', '.join((*PICTURES, *VIDEOS))}.",
)  # fmt: skip
@click.option(
    "--rows",
    help="Rows of the table: a half-open range START:STOP:STEP (default: 12 that are spread over "
    "the table, of a video the first 250).",
)
def preview(output: str, to: Path, rows: str | None) -> None:
    """Draw some images of OUTPUT, a table of a job, with their labels or keypoints.

    OUTPUT is a Parquet file. The images and videos of its rows are read again. A video shows them
    one after the other, 25 per second.
    """
    suffix = to.suffix.lower()
    if suffix not in (*PICTURES, *VIDEOS):
        raise JobError(
            f"--to: {to} has an unknown suffix; use one of {', '.join((*PICTURES, *VIDEOS))}"
        )
    try:
        from chunkq_worker.images.preview import SIDE, annotated, write_picture, write_video
    except ImportError as error:
        raise _missing("images", error) from None
    path = output_path(output, Path.cwd())
    listed = _rows(path, rows, is_video=suffix in VIDEOS)
    drawn = _images(path, listed)
    if suffix in PICTURES:
        write_picture(str(to), [annotated(pixels, row, SIDE) for pixels, row in drawn])
    else:
        try:
            write_video(str(to), (annotated(pixels, row) for pixels, row in drawn))
        except ImportError as error:
            raise _missing("video", error) from None
    print_line(f"wrote {len(listed)} images to {to}")


def _rows(path: str, picks: str | None, *, is_video: bool) -> list[dict[str, Any]]:
    """Return the picked rows of a table. Raises JobError if it is none, or for no row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    printed = without_secret(path)
    filesystem, inner = open_filesystem(path)
    try:
        with filesystem.open(inner, "rb") as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise JobError(
            f"{printed}: no Parquet table can be read ({error}); use the output of a complete job "
            "over images, .parquet"
        ) from None
    numbers = range(table.num_rows)
    if picks is not None:
        positions = positions_in(picks, table.num_rows)
        if positions is None:
            raise JobError(f"--rows: found {picks!r}; expected a range such as 0:100:5")
        numbers = positions
    elif is_video:
        numbers = numbers[:DEFAULT_FRAMES]
    else:
        numbers = numbers[:: max(1, -(-len(numbers) // DEFAULT_PICTURES))]
    if not numbers:
        raise JobError(f"--rows: names none of the {table.num_rows} rows of {printed}; fix it")
    rows: list[dict[str, Any]] = table.take(list(numbers)).to_pylist()
    return rows


def _images(path: str, rows: list[dict[str, Any]]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the pixels (H, W, C) of each row with the row. Raises ImageError if one is missing."""
    from chunkq.job.job_handle import open_job
    from chunkq_worker.images.compute import row_inputs

    job = open_job(job_folder_of(path)).record.job
    paths, frames = [row["path"] for row in rows], [row.get("frame") for row in rows]
    for one, row in zip(row_inputs(job, paths, frames), rows, strict=True):
        yield one.read(), row


def _missing(extra: str, error: ImportError) -> ChunkqError:
    return ChunkqError(
        f"preview: packages are missing ({error}); run `{install_command(extra)}`",
        code=ErrorCode.PACKAGE_MISSING,
    )
