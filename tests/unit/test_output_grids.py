"""Several outputs of one plan, some with other scales, in memory: each equals the reference."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chunkq.blend.combine import activate, to_votes
from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import Accumulator, Contribution, finalize_sums
from chunkq.errors import JobError
from chunkq.geometry.box import Box
from chunkq.job.job_file import Job
from chunkq.job.job_parsing import parse_job
from chunkq.job.resolve import common_multiple, resolve
from chunkq.job.user_code import load_blend_weights
from chunkq.plan.chunk import Index, Piece
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume
from tests import reference as ref
from tests.harness.memory_run import window
from tests.strategies import JobPlan, divisors, job_values

Array = npt.NDArray[Any]
FACTORS = (Fraction(1), Fraction(1), Fraction(2), Fraction(1, 2), Fraction(3))
OUTPUTS: tuple[dict[str, Any], ...] = (
    {"channels": "0:2", "combine": "weighted_avg"},
    {"channels": [2, 0, 1], "combine": "soft", "activation": "softmax"},
    {"channels": 1, "combine": "hard"},
    {"combine": "hard", "activation": "sigmoid"},
)
CHANNELS = 3
WEIGHTS = ("weight_uniform", "weight_gaussian", "weight_bump")


def sizes(p: int, factor: Fraction, unit: int) -> list[int]:
    """Return how many voxels of an output with this scale can be centered in p voxels."""
    lengths = range(1, 13)
    return [q for q in lengths if q * factor <= p and (p - q * factor) % (2 * unit) == 0]


@dataclass(frozen=True)
class Case:
    """A job with several outputs, each of a head of its own.

    `sizes` has the shape of each output patch, `scales` the factors of each output.
    """

    volume: tuple[int, ...]
    patch: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    unit: tuple[int, ...]
    scales: tuple[tuple[Fraction, ...], ...]
    outputs: tuple[dict[str, Any], ...]
    keys: dict[str, Any]

    @property
    def job(self) -> Job:
        shapes = {f"h{n}": [CHANNELS, *size] for n, size in enumerate(self.sizes)}
        model = {"model_output_shape": shapes, "max_batch_size": 2}
        outputs = {
            f"o{n}": output | {"head": f"h{n}", "scale": [str(f) for f in scale]}
            for n, (output, scale) in enumerate(zip(self.outputs, self.scales, strict=True))
        }
        return parse_job(job_values(self.patch, **self.keys, outputs=outputs, model=model))

    @property
    def plan(self) -> Plan:
        return resolve(self.job, Volume(self.volume, "uint8"))

    def setup(self, number: int) -> ref.Setup:
        pads = self.keys["pad_width"]
        return ref.Setup(
            volume=self.volume,
            input_patch=self.patch,
            output_patch=self.sizes[number],
            stride=tuple(self.keys["strides"]),
            pad_width=tuple(pads),
            margin=(0,) * len(pads),
            edge=self.keys["edge"],
            pad_mode="reflect",
            scale=self.scales[number],
            unit=self.unit,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw scales, patches, strides, pads, chunks and storage chunks."""
    rank = draw(st.integers(1, 2))
    outputs = draw(st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=3))
    scales = [
        tuple(draw(st.sampled_from(FACTORS)) for _ in outputs) for _ in range(rank)
    ]  # by axis
    lengths: dict[str, list[int]] = {
        key: [] for key in ("volume", "patch", "strides", "pad_width", "chunksize")
    }
    patches = []
    for factors in scales:
        unit = common_multiple(factors)
        lengths_p = [p for p in range(1, 37) if all(sizes(p, f, unit) for f in factors)]
        assume(lengths_p)
        p = draw(st.sampled_from(lengths_p))
        chosen = tuple(draw(st.sampled_from(sizes(p, f, unit))) for f in factors)
        spans = [int(q * f) for q, f in zip(chosen, factors, strict=True)]
        patches.append(chosen)
        volume = draw(st.integers(1, 40))
        lead = (p - min(spans)) // 2
        widest = max(spans)
        lengths["volume"].append(volume)
        lengths["patch"].append(p)
        lengths["strides"].append(unit * draw(st.integers(1, max(1, min(spans) // unit))))
        lengths["pad_width"].append(lead + unit * draw(st.integers(0, 2)))
        smallest = max(widest, -(-volume // 4))
        lengths["chunksize"].append(unit * (-(-smallest // unit) + draw(st.integers(0, 2))))
    by_output = tuple(zip(*scales, strict=True))
    stored = []
    for output, factors in zip(outputs, by_output, strict=True):
        own = [int(c / f) for c, f in zip(lengths["chunksize"], factors, strict=True)]
        stored.append(
            output | {"storage_chunks": [draw(st.sampled_from(divisors(n))) for n in own]}
        )
    units = tuple(map(common_multiple, scales))
    keys: dict[str, Any] = {
        "inference_type": "sliding_window",
        "edge": draw(st.sampled_from(("shift", "pad"))),
        "pad_mode": "reflect",
        "weight_function": [draw(st.sampled_from(WEIGHTS))],
        **{key: lengths[key] for key in ("strides", "pad_width", "chunksize")},
    }
    if draw(st.booleans()):
        keys["roi"] = [
            [unit * draw(st.integers(0, (size - 1) // unit)), None]
            for unit, size in zip(units, lengths["volume"], strict=True)
        ]
    return Case(
        tuple(lengths["volume"]),
        tuple(lengths["patch"]),
        tuple(zip(*patches, strict=True)),
        units,
        by_output,
        tuple(stored),
        keys,
    )


def network(x: Array, output: tuple[int, ...], scale: tuple[Fraction, ...]) -> Array:
    """Return (C, *output): what the patch has at the center of each voxel of the output.

    It depends on the position in the patch, so borders between patches are visible.
    """
    indices = []
    for p, q, f in zip(x.shape, output, scale, strict=True):
        first = (p - q * f) / 2
        indices.append([int(first + (n + Fraction(1, 2)) * f) for n in range(q)])
    values = x[np.ix_(*indices)]
    u = np.mean([(i + 0.5) / n for i, n in zip(np.indices(output), output, strict=True)], 0)
    return np.stack([values / 3 * (1 + np.cos(2 * np.pi * u + c) / 2) - c for c in range(CHANNELS)])


def run(case: Case, volume: Array) -> list[Array]:
    """Return the outputs of a job; assert that every voxel is written exactly once."""
    job, plan = case.job, case.plan
    windows = JobPlan(plan.volume, plan.grid, plan.outputs, job)
    results: list[dict[Index, Contribution]] = [{} for _ in plan.views]
    weights = [
        PatchWeights(view, load_blend_weights(job.weight_function, view), np.asarray)
        for view in plan.views
    ]
    for index in plan.active_indices():
        patches = list(plan.patches(plan.chunk(index)))
        inputs = [window(windows, volume, patch.source).astype(np.float64) for patch in patches]
        for number, view in enumerate(plan.views):
            output, chunk = view.output, view.chunk(index)
            zeros = np.zeros((output.channels, *chunk.region.shape), np.float32)
            sums = Accumulator(view, chunk, weights[number], zeros)
            for patch, x in zip(patches, inputs, strict=True):
                y = network(x, case.sizes[number], case.scales[number])
                y = y[slice(None) if output.picks is None else list(output.picks)]
                y = activate(y[np.newaxis].astype(np.float32), output.activation)
                y = to_votes(y) if output.combine == "hard" else y
                sums.add(view.own_patches(plan, [patch]), y)
            results[number][index] = sums.contribution()
    blocks = list(plan.to_finalize())
    pairs = {
        (piece.source, piece.target)
        for index in plan.active_indices()
        for piece in plan.outgoing_pieces(plan.chunk(index))
    }
    return [stored(view, results[number], blocks, pairs) for number, view in enumerate(plan.views)]


def stored(
    view: Plan,
    results: dict[Index, Contribution],
    blocks: list[Index],
    pairs: set[tuple[Index, Index]],
) -> Array:
    """Return an output from the contributions of all chunks; `blocks` are finalized."""
    out = np.zeros(view.output_shape, view.output_dtype)
    writes = np.zeros(view.region.shape, dtype=int)

    def write(box: Box, values: Array) -> None:
        writes[box.slices(view.region.start)] += 1
        out[view.output_box(box).slices((0,) * out.ndim)] = values

    pieces: dict[Piece, Array] = {p: s for r in results.values() for p, s in r.pieces}
    assert {(piece.source, piece.target) for piece in pieces} <= pairs
    for index, result in results.items():
        write(view.chunk(index).core, result.core)
    for index in blocks:
        chunk = view.chunk(index)
        own_block = results[index].own_block if index in results else None
        incoming = {piece: pieces.pop(piece) for piece in view.incoming_pieces(chunk)}
        for box, values in finalize_sums(view, chunk, own_block, incoming):
            write(box, values)
    assert pieces == {}
    assert (writes == 1).all()
    return out


@settings(max_examples=60)
@given(cases(), st.integers(0, 99))
def test_every_output_equals_the_reference(case: Case, seed: int) -> None:
    volume = np.random.default_rng(seed).integers(0, 6, case.volume).astype(np.uint8)
    for number, (out, view) in enumerate(zip(run(case, volume), case.plan.views, strict=True)):
        picks = view.output.picks

        def predict(x: Array, _start: Any, number: int = number, picks: Any = picks) -> Array:
            y = network(x, case.sizes[number], case.scales[number])
            return y[slice(None) if picks is None else list(picks)]

        expected = ref.reference(
            case.setup(number),
            volume,
            predict,
            view.output.combine,
            case.keys["weight_function"][0],
            activation=view.output.activation,
        )
        region = view.region.index((0,) * view.rank)
        if view.output.is_average:
            average = expected.average[region]
            difference = np.abs(out.reshape(average.shape) - average).max()
            assert difference < 1e-5 * max(1.0, float(np.abs(average).max()))
        else:
            is_clear = expected.margin_of_decision[region] > 1e-5
            assert np.array_equal(out[is_clear], expected.labels[region][is_clear])


@settings(max_examples=60)
@given(cases())
def test_all_outputs_have_the_same_chunks_and_patches(case: Case) -> None:
    plan = case.plan
    for view in plan.views:
        assert list(view.active_indices()) == list(plan.active_indices())
        assert view.block_indices == plan.block_indices
        assert set(view.to_finalize()) <= set(plan.to_finalize())
        for index in plan.indices():
            one, other = plan.chunk(index), view.chunk(index)
            assert (one.owned, one.runs, one.is_active) == (
                other.owned,
                other.runs,
                other.is_active,
            )
            assert one.has_band or not other.has_band
            for patch in plan.patches(one):
                own = view.patch(patch.grid, patch.numbers)
                scale = view.grid.scale or (Fraction(1),) * plan.rank
                assert [n * f for n, f in zip(own.source.start, scale, strict=True)] == list(
                    patch.source.start
                )
                assert own.target.size == 0 or own.target in other.region


@settings(max_examples=60)
@given(cases())
def test_costs_are_the_sums_over_outputs_and_chunks(case: Case) -> None:
    plan = case.plan
    pieces = output = 0
    for view in plan.views:
        sums, stored_bytes = view.output.sums_bytes, view.output.voxel_bytes
        output += view.region.size * stored_bytes
        for index in plan.indices():
            chunk = view.chunk(index)
            pieces += sums * sum(piece.box.size for piece in view.outgoing_pieces(chunk))
            if chunk.is_active and chunk.has_band:
                pieces += sums * sum(box.size for box in chunk.band_boxes)
                pieces += stored_bytes * sum(box.size for box in chunk.rest_boxes)
    assert (plan.costs.output_bytes, plan.costs.piece_bytes) == (output, pieces)
    assert plan.costs.patches == sum(plan.chunk(i).patches for i in plan.indices())


BASE: dict[str, Any] = {
    "inference_type": "sliding_window",
    "strides": [4],
    "chunksize": [16],
    "pad_width": [2],
}
IMPOSSIBLE: dict[str, tuple[dict[str, Any], int, str]] = {
    "strides between voxels of the output": ({"strides": [3]}, 4, "strides"),
    "a chunk that is no multiple": ({"chunksize": [15]}, 4, "chunksize"),
    "a pad that is no multiple": ({"pad_width": [3]}, 4, "pad_width"),
    "a region that is no multiple": ({"roi": [[3, None]]}, 4, "roi.0"),
    "an output that is too large": ({}, 8, "outputs.a.scale"),
    "an output that is not centered on voxels": ({}, 5, "outputs.a.scale"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_lengths_that_do_not_fit_a_scale_are_one_line_that_names_the_key(case: str) -> None:
    changes, size, key = IMPOSSIBLE[case]
    outputs = {"a": {"scale": [2]}}
    values = job_values(
        (12,), **BASE | changes, outputs=outputs, model={"model_output_shape": [size]}
    )
    with pytest.raises(JobError) as error:
        resolve(parse_job(values), Volume((40,), "uint8"))
    assert [line.partition(": ")[0] for line in error.value.problems] == [key]
