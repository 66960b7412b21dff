"""The command `chunkq preview`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.geometry.position_range import positions_in
from chunkq.install_hint import install_command
from chunkq.job.job_path import job_folder_of, output_path
from chunkq.job.output_name import SLP, table_suffix
from chunkq.paths import open_filesystem, without_secret
from chunkq.system.standard_output import print_line
from chunkq.units import counted

if TYPE_CHECKING:
    from chunkq.job.job_handle import JobHandle

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".mkv", ".mov")
DEFAULT_PICTURES, DEFAULT_FRAMES = 12, 250
"""Rows of a picture, spread over the table, and of a video, from its start."""
PATH = "path"


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

    OUTPUT is a .parquet, .csv or .jsonl file. The images and videos of its rows are read again. A
    video shows them one after the other, 25 per second.
    """
    suffix = to.suffix.lower()
    if suffix not in (*PICTURES, *VIDEOS):
        raise JobError(
            f"--to: {to} has an unknown suffix; use one of {', '.join((*PICTURES, *VIDEOS))}"
        )
    if not to.parent.is_dir():
        raise JobError(f"--to: the folder {to.parent} is missing; create it, or fix the path")
    try:
        from chunkq_worker.images.preview import SIDE, annotated, write_picture, write_video
    except ImportError as error:
        raise _missing("images", error) from None
    from chunkq.job.job_handle import open_job

    path = output_path(output, Path.cwd())
    _check_table(path)
    job = open_job(job_folder_of(path))
    listed = _rows(path, rows, _columns(job), is_video=suffix in VIDEOS)
    drawn = _images(job, listed)
    if suffix in PICTURES:
        write_picture(str(to), [annotated(pixels, row, SIDE) for pixels, row in drawn])
    else:
        try:
            write_video(str(to), (annotated(pixels, row) for pixels, row in drawn))
        except ImportError as error:
            raise _missing("video", error) from None
    print_line(f"wrote {counted(len(listed), 'image', 'images')} to {to}")


def _check_table(path: str) -> None:
    """Raise JobError if a path is not that of a table that can be drawn."""
    suffix = table_suffix(path)
    if suffix is None or suffix == SLP:
        raise JobError(
            f"{without_secret(path)} is no table that can be drawn; use the output of a complete "
            "job over images, .parquet, .csv or .jsonl"
        )


def _rows(path: str, picks: str | None, columns: Any, *, is_video: bool) -> list[dict[str, Any]]:
    """Return the picked rows of a table. Raises JobError if it is none, or for no row."""
    import pyarrow as pa

    from chunkq.images.result_table import read_columns, to_rows

    printed, suffix = without_secret(path), str(table_suffix(path))
    filesystem, inner = open_filesystem(path)
    try:
        with filesystem.open(inner, "rb") as file:
            table = read_columns(file, suffix, columns)
        if PATH not in table.column_names:
            raise pa.ArrowInvalid("no column `path`")
    except (OSError, pa.ArrowInvalid) as error:
        raise JobError(
            f"{printed}: no table can be read ({error}); use the output of a complete job over "
            "images"
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
    return to_rows(table.take(list(numbers)), columns)


def _columns(job: JobHandle) -> Any:
    """Return the schema of the columns that are drawn. Others of these names are the list's."""
    import pyarrow as pa

    from chunkq.images.frame_list import FRAME
    from chunkq.images.poses import COLUMN_TYPES, KEYPOINTS

    columns, keys = {PATH: pa.string()}, job.record.job
    listed = job.rows.part(0, 1).listed.schema
    if FRAME in listed.names and pa.types.is_integer(listed.field(FRAME).type):
        columns[FRAME] = pa.int64()
    if keys.peaks is not None:
        columns[KEYPOINTS] = COLUMN_TYPES[KEYPOINTS]
    if keys.predicts_classes:
        columns |= {"label": pa.string(), "score": pa.float32()}
    return pa.schema(columns)


def _images(job: JobHandle, rows: list[dict[str, Any]]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the pixels (H, W, C) of each row with the row. Raises JobError if one is missing."""
    from chunkq.images.decoding import pixels_of, unlimited
    from chunkq.images.image_error import ImageError
    from chunkq_worker.images.compute import row_inputs

    paths, frames = [row["path"] for row in rows], [row.get("frame") for row in rows]
    inputs = row_inputs(job.record.job, paths, frames, [None] * len(rows))
    for one, row in zip(inputs, rows, strict=True):
        try:
            pixels = pixels_of(one.read(unlimited))
        except ImageError as error:
            raise JobError(f"{without_secret(row['path'])}: {error}", code=error.code) from None
        yield pixels, row


def _missing(extra: str, error: ImportError) -> ChunkqError:
    return ChunkqError(
        f"preview: packages are missing ({error}); run `{install_command(extra)}`",
        code=ErrorCode.PACKAGE_MISSING,
    )
