"""Values that a network receives and returns in a batch, and what they suggest about the job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array, as_float, to_numpy
from chunkq.model_check import ValueCheck
from chunkq.plan.chunk import Chunk
from chunkq.plan.outputs import OutputSpec
from chunkq.plan.plan import Plan
from chunkq.plan.sample_chunks import fullest_chunk
from chunkq_worker.network_heads import head_names, head_of, source_of_output

TOLERANCE = 1e-3
"""Distance from 0, 1 or a constant below which values count as equal to it."""
MAX_SHIFT = 10.0
"""Largest usual distance of means from those of the training, in standard deviations."""
SPREADS = (0.02, 10.0)
"""Usual standard deviations, as a fraction of those of the training."""


@dataclass(frozen=True)
class NormInput:
    """Input of the first layer that normalizes with statistics of the training.

    The numbers are medians over its channels: `shift` is the distance of the mean from that of the
    training, `spread` the standard deviation, both in standard deviations of the training.
    """

    layer: str
    shift: float
    spread: float


@dataclass(frozen=True)
class Suspicion:
    """A line about what values suggest. `cause` is equal for all values that suggest the same."""

    cause: str
    text: str


class ValueWatch:
    """Collects the ranges of the first batch that a network computes after `start`."""

    def __init__(self, outputs: Sequence[OutputSpec]) -> None:
        """`outputs` are those of the job."""
        self._outputs, self._heads = tuple(outputs), head_names(outputs)
        self._patches = 0
        self._has_received = False
        self._input: tuple[float, float] | None = None
        self._results: list[tuple[str, tuple[float, float] | None]] = []
        self._suspicions: list[Suspicion] = []
        self.norm_input: NormInput | None = None

    @property
    def has_run(self) -> bool:
        """Whether the network has computed a batch."""
        return any(span is not None for _, span in self._results)

    def start(self, patches: int) -> None:
        """Begin a batch with this number of patches; the items after them are padding."""
        self._patches = patches

    def receive(self, batch: Array) -> None:
        """Take note of the batch that the network receives, after all preprocessing."""
        if self._patches and not self._has_received:
            self._has_received = True
            self._input = _range(to_numpy(as_float(batch))[: self._patches])

    def send(self, heads: Sequence[Array]) -> None:
        """Take note of the raw outputs (n, C, *Q) of each head, after all postprocessing."""
        if self.has_run:
            return
        arrays = [to_numpy(as_float(head)) for head in heads]
        self._results, self._suspicions = [], []
        for output in self._outputs:
            values = head_of(output, arrays, self._heads)
            self._results.append((output.name, _range(values)))
            self._suspicions += _output_suspicions(values, output)

    def result(self) -> ValueCheck:
        """Return the ranges, with one line for each property that can be a mistake."""
        texts = tuple(suspicion.text for suspicion in self.suspicions())
        spans = [span for _, span in self._results if span is not None]
        span = (min(low for low, _ in spans), max(high for _, high in spans)) if spans else None
        by_output = tuple((name, one) for name, one in self._results if name)
        return ValueCheck(self._input, span, texts, by_output)

    def suspicions(self) -> list[Suspicion]:
        """Return what the values suggest; empty before a batch is computed."""
        suspicions = self._suspicions if self._has_varied_input() else []
        if self.norm_input is not None and self._input is not None:
            suspicions = [*suspicions, *_norm_suspicions(self.norm_input, self._input)]
        return suspicions

    def _has_varied_input(self) -> bool:
        if not self._has_received:
            return True
        return self._input is not None and self._input[0] < self._input[1]


class ChunkWatch:
    """Watches the network in one chunk: the one whose first batch the check of a job runs.

    Other chunks, such as those at the border of a volume, can have background only, for which
    usual outputs look like mistakes. If the job skips all patches of that chunk, the first one that
    runs patches is watched instead.
    """

    def __init__(self, plan: Plan, batch: int, *, can_skip: bool = False) -> None:
        """`plan` is that of each item; `batch` is the number of patches in a batch."""
        self._index = fullest_chunk(plan, enough=batch).index
        self._preferred, self._other = ValueWatch(plan.outputs), ValueWatch(plan.outputs)
        self._takes_other = can_skip

    def of(self, item: int, chunk: Chunk) -> ValueWatch | None:
        """Return the watch for a chunk of an item, by its number, of which patches run.

        It is None for other chunks.
        """
        if item == 0 and chunk.index == self._index:
            return self._preferred
        if self._takes_other:
            self._takes_other = False
            return self._other
        return None

    def suspicions(self, *, is_done: bool) -> list[Suspicion]:
        """Return what the values suggest; `is_done` says whether no chunk follows."""
        is_other = is_done and not self._preferred.has_run
        return (self._other if is_other else self._preferred).suspicions()


def _range(values: npt.NDArray[np.floating]) -> tuple[float, float] | None:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else None


def _output_suspicions(values: npt.NDArray[np.floating], output: OutputSpec) -> Iterator[Suspicion]:
    span = _range(values)
    if span is None or output.from_labels:
        return
    low, high = span
    source = source_of_output(output)
    is_share = low >= -TOLERANCE and high <= 1 + TOLERANCE
    is_one_channel = output.channels == 1
    if is_one_channel and output.has_labels and output.activation == "none" and not is_share:
        yield Suspicion(
            "logits",
            f"{source} returns {low:.4g} to {high:.4g} in one channel, and combine: "
            f"{output.combine} compares it with 0.5; if the values are logits, set activation: "
            "sigmoid",
        )
    sums = values.sum(1)
    if output.activation == "softmax" and is_share and bool((abs(sums - 1) <= TOLERANCE).all()):
        yield Suspicion(
            "second softmax",
            f"{source} returns probabilities, which activation: softmax makes almost equal; "
            "remove activation",
        )
    if output.activation == "sigmoid" and is_share and high > low:
        yield Suspicion(
            "second sigmoid",
            f"{source} returns {low:.4g} to {high:.4g}; if these are probabilities, activation: "
            "sigmoid moves them to 0.5 and above: remove activation",
        )
    channels = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    if bool((np.ptp(channels, 1) <= TOLERANCE * max(abs(low), abs(high))).all()):
        yield Suspicion(
            "constant outputs",
            f"{source} returns almost the same value, {high:.4g}, for all voxels of patches "
            "that differ; check the checkpoint and the normalization of the input",
        )


def _norm_suspicions(norm: NormInput, received: tuple[float, float]) -> Iterator[Suspicion]:
    least, most = SPREADS
    if norm.shift <= MAX_SHIFT and least <= norm.spread <= most:
        return
    yield Suspicion(
        "input not normalized",
        f"the network receives {received[0]:.4g} to {received[1]:.4g}, which is not what it was "
        f"trained on: the input of layer {norm.layer} has {norm.spread:.3g} times the standard "
        f"deviation of the training, and a mean {norm.shift:.3g} of its standard deviations away; "
        "normalize the input in a preprocessing step as in training",
    )
