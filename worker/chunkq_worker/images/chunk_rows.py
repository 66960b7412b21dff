"""Table of a chunk: what is stored of the outputs of a network for some rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from chunkq.errors import ModelError
from chunkq.images.image_error import ImageError
from chunkq.images.poses import pose_columns
from chunkq.images.result_table import ChunkResult, chunk_result
from chunkq.job.image_rows import ImageRows, score_spec
from chunkq.job.job_file import Job
from chunkq_worker.images.keypoints import keypoint_names, poses_of
from chunkq_worker.images.rows import FailedRow, Result, RowOutput

OUTPUTS = {"logits": "logits", "features": "features"}
"""Value of `keep` -> column with the outputs of the network, flattened, float32."""


def chunk_rows(job: Job, rows: ImageRows, first: int, results: Iterable[Result]) -> ChunkResult:
    """Return the tables of the rows of a chunk, of which `first` is the number of the first one.

    `results` has one result per row, numbered from 0. Raises ModelError if the outputs are no
    scores of the job's classes.
    """
    good: list[int] = []
    failed: list[tuple[int, ImageError]] = []
    outputs: list[Any] = []
    for result in results:
        if isinstance(result, FailedRow):
            failed.append((result.row, result.error))
        else:
            good.append(result.row)
            outputs.append(reduced(job, result))
    columns = columns_of(job, outputs)
    if (truth := rows.truth) is not None:
        labels = truth.take(pa.array(good, pa.int64()))
        correct = [
            None if true is None else true == label
            for true, label in zip(labels.to_pylist(), columns["label"].to_pylist(), strict=True)
        ]
        columns |= {"truth": labels, "correct": pa.array(correct, pa.bool_())}
    return chunk_result(rows.listed, first, columns, good, failed)


def reduced(job: Job, output: RowOutput) -> Any:
    """Return what the columns are made of for one image.

    With `peaks` these are its poses, since the maps of a chunk would not fit into memory. Else it
    is what the network returned, float32: a score per class (C,), with `keep: features` of any
    shape. Raises ModelError if it is something else.
    """
    if job.peaks is not None:
        return poses_of(job, output)
    values = np.asarray(output.values[0], np.float32)
    if job.keep == "features":
        return values
    scores = np.atleast_1d(np.squeeze(values)) if values.ndim > 1 else values
    _check_scores(job, scores)
    return scores


def columns_of(job: Job, outputs: Sequence[Any]) -> dict[str, pa.Array]:
    """Return the columns of some images, one result of `reduced` per image.

    Raises ModelError if the numbers of scores differ.
    """
    if job.peaks is not None:
        maps = outputs[0].points.shape[1] if outputs else None
        return pose_columns(outputs, keypoint_names(job, maps))
    columns: dict[str, pa.Array] = {}
    if job.keep != "features":
        counts = {len(values) for values in outputs}
        if len(counts) > 1:
            raise ModelError(
                f"the network returned {min(counts)} scores for an image and {max(counts)} for "
                "another one; set image.resize and image.crop, or use keep: features"
            )
        scores = np.stack(outputs) if outputs else np.zeros((0, 1), np.float32)
        columns = score_spec(job).columns(scores)
    if job.keep in OUTPUTS:
        lists = [values.reshape(-1) for values in outputs]
        columns[OUTPUTS[job.keep]] = pa.array(lists, pa.list_(pa.float32()))
    return columns


def _check_scores(job: Job, values: npt.NDArray[np.float32]) -> None:
    """Raise ModelError unless an output has one score per class."""
    if values.ndim != 1 or not len(values):
        raise ModelError(
            f"the network returned shape {list(values.shape)} for an image; expected one score per "
            "class; use keep: features to store any outputs"
        )
    classes = len(job.classes) if isinstance(job.classes, tuple) else job.classes
    is_binary = classes == 2 and len(values) == 1
    if classes is not None and len(values) != classes and not is_binary:
        raise ModelError(
            f"classes: found {classes}, but the network returns {len(values)} scores for an image; "
            "fix one of them"
        )
    if len(values) == 1 and job.activation == "softmax":
        raise ModelError(
            "activation: softmax of a single score is always 1; use sigmoid, or keep: features for "
            "a network that returns no scores"
        )
