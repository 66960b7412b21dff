"""Hypothesis strategies: small legal jobs of every kind, with the reference's view of each.

Every drawn case is legal by construction, so a refusal by `resolve` is a failure, too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from chunkq.job import parse_job
from chunkq.plan import Plan, Volume
from chunkq.resolve import resolve
from tests import reference as ref

PAD_MODES = ("constant", "reflect", "symmetric", "edge")
BUILT_INS = ("weight_uniform", "weight_gaussian", "weight_linear", "weight_hann", "weight_bump")
LONGEST = {1: 40, 2: 12, 3: 7, 4: 4}
MOST_BLOCKS = {1: 10, 2: 4, 3: 3, 4: 2}
WIDEST_PATCH = {1: 7, 2: 7, 3: 6, 4: 4}


def job_values(patch: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """A legal job file's values for patches of this shape; `more` replaces or adds keys.

    `model` among them is merged into `model_config`.
    """
    model = {
        "runtime": "torch",
        "type": "torchscript",
        "ts_file": "/model.pt",
        "model_input_shape": list(patch),
    }
    model |= more.pop("model", {})
    return {"input": "/in.zarr", "output": "/out.zarr", "model_config": model} | more


def plan_for(
    volume: tuple[int, ...], patch: tuple[int, ...], dtype: str = "uint8", **more: Any
) -> Plan:
    """The plan of `job_values` over a volume."""
    return resolve(parse_job(job_values(patch, **more)), Volume(volume, dtype))


@dataclass(frozen=True)
class Case:
    """A legal job over a small volume."""

    volume: tuple[int, ...]
    patch: tuple[int, ...]
    output: tuple[int, ...]
    keys: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """What chunkq makes of it."""
        return plan_for(self.volume, self.patch, **self.keys)

    @property
    def channels(self) -> int:
        """Channels that the network gives."""
        shape = self.keys["model"]["model_output_shape"]
        return shape[0] if len(shape) > len(self.volume) else 1

    @property
    def setup(self) -> ref.Setup:
        """What the reference makes of it."""
        names = ("pad_width", "edge", "pad_mode", "pad_value")
        given = {k: self.keys[k] for k in names if k in self.keys}
        if "pad_width" in given:
            given["pad_width"] = tuple(given["pad_width"])
        kind = self.keys["inference_type"]
        if kind == "sliding_window":
            strides = tuple(self.keys["strides"])
            return ref.sliding_window(self.volume, self.patch, strides, self.output, **given)
        if kind == "crop_margin":
            margin = tuple(self.keys["margin"])
            return ref.crop_margin(self.volume, self.patch, margin, self.output, **given)
        offsets = [tuple(o) for o in self.keys.get("offsets", [])]
        return ref.patch(self.volume, self.patch, self.output, offsets=offsets, **given)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def cases(draw: st.DrawFn, max_rank: int = 4) -> Case:
    """Any inference type, rank, patch, stride, offset, pad, edge, chunk and storage chunk."""
    rank = draw(st.integers(1, max_rank))
    kind = draw(st.sampled_from(("patch", "sliding_window", "crop_margin")))

    def along(values: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(values, min_size=rank, max_size=rank))

    def each(lows: list[int], highs: list[int]) -> list[int]:
        return [draw(st.integers(a, b)) for a, b in zip(lows, highs, strict=True)]

    volume = along(st.integers(1, LONGEST[rank]))
    patch = along(st.integers(1, WIDEST_PATCH[rank]))
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
    few = [-(-v // MOST_BLOCKS[rank]) for v in volume]
    least = [max(min(k, v), f) for k, v, f in zip(kept, volume, few, strict=True)]
    keys["chunksize"] = each(least, [n + 6 for n in least])
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
    keys["activation"] = draw(st.sampled_from(("none", "softmax", "sigmoid")))
    return Case(tuple(volume), tuple(patch), tuple(output), keys)


def user_weights(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Positive weights of an output patch that are no product of profiles, and not symmetric."""
    return np.random.default_rng(shape).uniform(0.1, 2.0, shape)


def without_margin(
    array: np.ndarray[Any, np.dtype[np.float64]], margin: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The part of an output patch's array that is kept."""
    return array[tuple(slice(m, n - m) for n, m in zip(array.shape, margin, strict=True))]
