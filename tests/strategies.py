"""Hypothesis strategies for small valid jobs of every kind, with the setup of the reference.

Every drawn case is valid by construction, so a JobError from `resolve` is a test failure.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from hypothesis import strategies as st

from chunkq.blend.weights import Weights
from chunkq.images.poses import Poses
from chunkq.job.job_file import Job
from chunkq.job.job_parsing import parse_job
from chunkq.job.resolve import resolve
from chunkq.job.user_code import load_blend_weights
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume
from tests import reference as ref

PAD_MODES = ("constant", "reflect", "symmetric", "edge")
BUILT_INS = ("weight_uniform", "weight_gaussian", "weight_linear", "weight_hann", "weight_bump")
MAX_LENGTH = {1: 40, 2: 12, 3: 7, 4: 4}
MAX_BLOCKS = {1: 10, 2: 4, 3: 3, 4: 2}
MAX_PATCH = {1: 7, 2: 7, 3: 6, 4: 4}
"""Limits along one axis, by the number of axes."""


def job_values(patch: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """Return the values of a valid job file for patches of this shape.

    `more` replaces or adds keys; its key `model` is merged into `model_config`.
    """
    model = {
        "runtime": "torch",
        "type": "torchscript",
        "ts_file": "/model.pt",
        "model_input_shape": list(patch),
    }
    model |= more.pop("model", {})
    return {"input": "/in.zarr", "output": "/out.zarr", "model_config": model} | more


@dataclass(frozen=True)
class JobPlan(Plan):
    """A plan with its job."""

    job: Job

    @classmethod
    def of(cls, job: Job, volume: Volume) -> Self:
        """Return the plan of a job over a volume."""
        plan = resolve(job, volume)
        return cls(plan.volume, plan.grid, plan.outputs, job)

    def blend_weights(self) -> Weights:
        """Return the blend weights of the job."""
        return load_blend_weights(self.job.weight_function, self)


def plan_for(
    volume: tuple[int, ...], patch: tuple[int, ...], dtype: str = "uint8", **more: Any
) -> JobPlan:
    """Return the plan of `job_values` over a volume."""
    return JobPlan.of(parse_job(job_values(patch, **more)), Volume(volume, dtype))


@dataclass(frozen=True)
class Case:
    """A valid job over a small volume."""

    volume: tuple[int, ...]
    patch: tuple[int, ...]
    output: tuple[int, ...]
    keys: dict[str, Any]

    @property
    def plan(self) -> JobPlan:
        """The plan of the job."""
        return plan_for(self.volume, self.patch, **self.keys)

    @property
    def channels(self) -> int:
        """Number of channels that the network returns."""
        shape = self.keys["model"]["model_output_shape"]
        return shape[0] if len(shape) > len(self.volume) else 1

    @property
    def setup(self) -> ref.Setup:
        """The setup of the job for the reference."""
        names = ("pad_width", "edge", "pad_mode", "pad_value")
        options = {k: self.keys[k] for k in names if k in self.keys}
        if "pad_width" in options:
            options["pad_width"] = tuple(options["pad_width"])
        kind = self.keys["inference_type"]
        if kind == "sliding_window":
            strides = tuple(self.keys["strides"])
            return ref.sliding_window(self.volume, self.patch, strides, self.output, **options)
        if kind == "crop_margin":
            margin = tuple(self.keys["margin"])
            return ref.crop_margin(self.volume, self.patch, margin, self.output, **options)
        offsets = [tuple(o) for o in self.keys.get("offsets", [])]
        return ref.patch(self.volume, self.patch, self.output, offsets=offsets, **options)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def cases(draw: st.DrawFn, max_rank: int = 4) -> Case:
    """Draw any inference type, rank, patch, stride, offset, pad, edge, chunk and storage chunk."""
    rank = draw(st.integers(1, max_rank))
    kind = draw(st.sampled_from(("patch", "sliding_window", "crop_margin")))

    def along(values: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(values, min_size=rank, max_size=rank))

    def each(lows: list[int], highs: list[int]) -> list[int]:
        return [draw(st.integers(a, b)) for a, b in zip(lows, highs, strict=True)]

    volume = along(st.integers(1, MAX_LENGTH[rank]))
    patch = along(st.integers(1, MAX_PATCH[rank]))
    shrink = along(st.sampled_from((0, 0, 1, 2)))
    output = [p - 2 * s if p > 2 * s else p for p, s in zip(patch, shrink, strict=True)]
    margin = [0] * rank
    keys: dict[str, Any] = {"inference_type": kind}
    if kind == "crop_margin":
        margin = each([0] * rank, [(q - 1) // 2 for q in output])
        keys["margin"] = margin
    kept = [q - 2 * m for q, m in zip(output, margin, strict=True)]
    lead = [(p - k) // 2 for p, k in zip(patch, kept, strict=True)]
    if kind == "sliding_window":
        keys["strides"] = each([1] * rank, kept)
    if kind == "patch":
        offset = st.tuples(*(st.integers(-q, q) for q in output)).map(list)
        keys["offsets"] = draw(st.lists(offset, max_size=2))
    if (any(lead) and kind != "crop_margin") or draw(st.booleans()):
        keys["pad_width"] = each(lead, [n + 9 for n in lead])
    if draw(st.booleans()):
        keys["edge"] = draw(st.sampled_from(("pad", "shift")))
    for_few_blocks = [-(-v // MAX_BLOCKS[rank]) for v in volume]
    smallest = [max(min(k, v), n) for k, v, n in zip(kept, volume, for_few_blocks, strict=True)]
    keys["chunksize"] = each(smallest, [n + 6 for n in smallest])
    keys["storage_chunks"] = [draw(st.sampled_from(divisors(c))) for c in keys["chunksize"]]
    keys["pad_mode"] = draw(st.sampled_from(PAD_MODES))
    keys["pad_value"] = draw(st.integers(0, 5))
    channels = draw(st.sampled_from(([], [1], [2], [3])))
    leading = draw(st.sampled_from(([], [1])))
    keys["model"] = {
        "model_input_shape": [*leading, *patch],
        "model_output_shape": [*channels, *output],
    }
    keys["combine"] = draw(st.sampled_from(("weighted_avg", "soft", "hard")))
    softmax = ["softmax"] if channels in ([2], [3]) else []  # of one channel it is refused
    keys["activation"] = draw(st.sampled_from(("none", "sigmoid", *softmax)))
    return Case(tuple(volume), tuple(patch), tuple(output), keys)


def user_weights(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return positive weights of an output patch, neither separable nor symmetric."""
    return np.random.default_rng(shape).uniform(0.1, 2.0, shape)


def without_margin(
    array: np.ndarray[Any, np.dtype[np.float64]], margin: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the kept part of an array of the shape of an output patch."""
    return array[tuple(slice(m, n - m) for n, m in zip(array.shape, margin, strict=True))]


@st.composite
def poses(draw: st.DrawFn, keypoints: int = 3) -> Poses:
    """Draw the poses of an image: any number of animals, each keypoint found or not."""
    animals = draw(st.integers(0, 3))
    numbers = st.floats(-9, 999, width=32)
    points = np.full((animals, keypoints, 2), np.nan, np.float32)
    point_scores = np.full((animals, keypoints), np.nan, np.float32)
    for at in np.ndindex(animals, keypoints):
        if draw(st.booleans()):
            points[at] = draw(numbers), draw(numbers)
            point_scores[at] = draw(numbers)
    scores = np.array([draw(numbers) for _ in range(animals)], np.float32)
    return Poses(points, point_scores, scores)
