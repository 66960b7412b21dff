"""`ImageRows`: the images of a job with their true labels, found once and stored with the job."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from typing_extensions import Buffer, override

from chunkq.errors import ErrorCode, JobError, StoreError
from chunkq.geometry.axes import Axis
from chunkq.images.frame_list import FRAME, STATE, with_frames
from chunkq.images.image_list import PATH, RESERVED, ImageList, find_images, join_lists
from chunkq.images.scores import ScoreSpec
from chunkq.job.image_config import TruthConfig
from chunkq.job.job_file import Job
from chunkq.storage.images import DIGEST, IMAGE_LIST, ImageSource

TRUTH = f"{RESERVED}truth"
"""Column of the stored table with the true label of each row; absent without `truth`."""
SAMPLE = "sample"
"""Option of the source: path, frame and state of some rows as JSON, for the network's check."""
SAMPLE_ROWS = 16
GROUP_ROWS = 1 << 14
"""Rows that are stored, and read again, together."""
NAMES_SHOWN = 6
DEFAULT_TOP_K = 5


@dataclass(frozen=True)
class ImageRows:
    """The rows of a job: the column `path`, those of the list, and `TRUTH` if the job has it."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def paths(self) -> list[str]:
        """The path of each row; empty where the list has none."""
        return [path or "" for path in self.table.column(PATH).to_pylist()]

    @property
    def frames(self) -> list[int | None]:
        """The number of the frame of each row of a video; None for images."""
        names = self.table.column_names
        if FRAME not in names or not pa.types.is_integer(self.table.schema.field(FRAME).type):
            return [None] * len(self)
        frames: list[int | None] = self.table.column(FRAME).to_pylist()
        return frames

    @property
    def listed(self) -> pa.Table:
        """The rows as they were listed: `path`, then the columns of the list."""
        added = [name for name in (TRUTH, STATE) if name in self.table.column_names]
        return self.table.drop_columns(added) if added else self.table

    @property
    def states(self) -> list[str | None]:
        """The state of the video of each row when the job was created, see `STATE`."""
        if STATE not in self.table.column_names:
            return [None] * len(self)
        states: list[str | None] = self.table.column(STATE).to_pylist()
        return states

    @property
    def has_truth(self) -> bool:
        """Whether the rows have true labels."""
        return TRUTH in self.table.column_names

    @property
    def truth(self) -> pa.Array | None:
        """The true label of each row, null where it is unknown; None if the job has no truth."""
        return self.table.column(TRUTH).combine_chunks() if self.has_truth else None

    def part(self, start: int, stop: int) -> ImageRows:
        """Return the rows from `start` on, without `stop`."""
        return ImageRows(self.table.slice(start, stop - start))

    def source(self, path: str) -> ImageSource:
        """Return the list, which has this path, as the source of a job."""
        count = len(self)
        picks = sorted({round(n * (count - 1) / SAMPLE_ROWS) for n in range(SAMPLE_ROWS + 1)})
        picked = ImageRows(self.table.take(pa.array(picks, pa.int64())))
        sampled = zip(picked.paths, picked.frames, picked.states, strict=True)
        sample = json.dumps([row for row in sampled if row[0]])
        options = {DIGEST: self._digest(), SAMPLE: sample}
        axes = (Axis("row", "space", count),)
        return ImageSource(IMAGE_LIST, path, axes, "uint8", options, named_by="the list")

    def _digest(self) -> str:
        """Return the SHA-256 of the rows, as hexadecimal digits."""
        table = self.table.combine_chunks()
        sink = _Hash()
        with pa.ipc.new_stream(pa.PythonFile(sink, "w"), table.schema) as writer:
            writer.write_table(table)
        return sink.sha256.hexdigest()

    def to_bytes(self) -> bytes:
        """Return the rows as a Parquet file with checksums, which `StoredRows` reads."""
        sink = io.BytesIO()
        pq.write_table(
            self.table,
            sink,
            compression="zstd",
            write_page_checksum=True,
            row_group_size=GROUP_ROWS,
        )
        return sink.getvalue()


class _Hash(io.RawIOBase):
    """File that keeps the SHA-256 of what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = hashlib.sha256()

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, content: Buffer, /) -> int:
        self.sha256.update(content)
        return memoryview(content).nbytes


def find_rows(job: Job) -> ImageRows:
    """Return the images that a job names, with their true labels.

    Raises StoreError if a list cannot be read or names no image, and JobError if `truth` does not
    fit it.
    """
    images = join_lists(
        [
            with_frames(find_images(config.path, config.access), config.frames, config.access)
            for config in job.inputs
        ]
    )
    # A pattern can match the output of the job's last run, which would make it another job.
    images = images.without(job.output)
    if not len(images):
        raise StoreError(
            "input: names no image but the output; fix the path or the pattern",
            code=ErrorCode.IMAGE_LIST_INVALID,
        )
    if job.truth is None:
        return ImageRows(images.table)
    names = job.classes if isinstance(job.classes, tuple) else ()
    truth = _truth(images, job.truth, names)
    return ImageRows(images.table.append_column(TRUTH, truth))


def sample_rows(source: ImageSource) -> list[tuple[str, int | None, str | None]]:
    """Return the path, the frame and the state of a few rows of a list, spread over it."""
    return [(path, *others) for path, *others in json.loads(str(source.options[SAMPLE]))]


def score_spec(job: Job) -> ScoreSpec:
    """Return how the outputs of a classifier become columns."""
    names = job.classes if isinstance(job.classes, tuple) else ()
    return ScoreSpec(job.activation, names, job.top_k or DEFAULT_TOP_K)


def _truth(images: ImageList, config: TruthConfig, names: Sequence[str]) -> pa.Array:
    """Return the true label of each row, null where it is unknown."""
    key = "truth.regex" if config.column is None else "truth.column"
    if config.column is None:
        pattern = re.compile(config.regex or "")
        matches = (pattern.search(path or "") for path in images.paths)
        labels = pa.array([m and m.group(1) for m in matches], pa.string())
        problem = f"matches none of {len(images)} paths, such as {images.paths[0]}"
        if labels.null_count == len(labels):
            raise _truth_error(f"{key}: {config.regex!r} {problem}; fix the expression")
    else:
        columns = images.table.column_names
        if config.column not in columns:
            listed = ", ".join(name for name in columns if name != PATH) or "no other column"
            raise _truth_error(
                f"{key}: the list has no column {config.column!r}, found {listed}; fix the name"
            )
        labels = _labels(images.table.column(config.column).combine_chunks(), names, key)
    if names:
        others = sorted({*labels.drop_null().to_pylist()} - {*names})
        if others:
            shown = ", ".join(map(repr, others[:NAMES_SHOWN]))
            more = f" and {len(others) - NAMES_SHOWN} more" if len(others) > NAMES_SHOWN else ""
            raise _truth_error(f"{key}: {shown}{more} are not in classes; add them, or fix {key}")
    return labels


def _labels(values: pa.Array, names: Sequence[str], key: str) -> pa.Array:
    """Return labels as texts. Integers are numbers of classes where these have names."""
    if pa.types.is_string(values.type):
        return values
    if not pa.types.is_integer(values.type):
        raise _truth_error(f"{key}: the column has the type {values.type}; use text or integers")
    if not names:
        return pc.cast(values, pa.string())
    numbers = values.drop_null().to_pylist()
    outside = [number for number in numbers if not 0 <= number < len(names)]
    if outside:
        raise _truth_error(
            f"{key}: {outside[0]} is the number of no class; expected 0 to {len(names) - 1}"
        )
    return pa.array(names, pa.string()).take(values)


def _truth_error(line: str) -> JobError:
    return JobError(line, code=ErrorCode.IMAGE_LIST_INVALID)
