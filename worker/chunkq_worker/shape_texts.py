"""Messages about shapes of batches, in the order of axes in which the job writes its shapes."""

from __future__ import annotations

from dataclasses import dataclass

from chunkq.job.axis_order import EITHER_ORDER, FIRST, LAST, WrittenOrders, input_channels
from chunkq.job.model_config import ModelConfig
from chunkq.plan.outputs import HeadName
from chunkq.plan.plan import Plan
from chunkq_worker.runtimes.axis_moves import Move
from chunkq_worker.steps import KEY, Steps

Shape = tuple[int, ...]
CODE_ERRORS = (NameError, AttributeError, ImportError, KeyError, OSError, AssertionError)
"""Errors that another shape seldom prevents."""
EVEN = 16
"""Patch lengths that are multiples of it can be halved four times."""


@dataclass(frozen=True)
class ShapeTexts:
    """What a job says about the shapes of its network.

    model     keys of the network as the job has them
    item      shape of an item of a batch, channels first
    outputs   allowed shapes of an item of the output, channels first, the likeliest one first
    steps     the steps around the network, which see channels first
    head      the part of the network's output of which the shapes are
    """

    model: ModelConfig
    plan: Plan
    item: Shape
    outputs: tuple[Shape, ...]
    steps: Steps
    head: HeadName = None

    def batch(self, count: int) -> str:
        """Return the shape of a batch, and where it comes from."""
        shape = [count, *self._written(self.item)]
        inputs = self.plan.volume.inputs if self.model.join_dim is not None else 1
        source = f" of {inputs} inputs" if inputs > 1 else ""
        return f"{shape} ({count} × model_config.model_input_shape{source})"

    def wrong_input(self, count: int, error: Exception) -> str:
        """Return the end of a message about a network that fails for a batch."""
        shape = f"the batch has shape {self.batch(count)}"
        if isinstance(error, CODE_ERRORS):
            return f"{shape}; fix the code"
        hint = self._channel_hint() + self._slice_hint() + self._size_hint()
        return f"{shape}; check it and the network{hint}"

    def wrong_output(self, count: int, shape: Shape) -> str:
        """Return the message for an output of a wrong shape for a batch of `count` items."""
        steps = "" if self.steps == Steps() else " with its processing_steps"
        written = self._written_output()
        of_head = "" if self.head is None else f" in head {self.head!r}"
        expected = self.outputs[0] if self._has_steps_after else written
        first = "" if expected == written else " with channels first"
        key = f"model_config.{self._key}"
        if self.model.output_shape is not None:
            reason = f"the batch and {key}{first}"
        else:
            lost = "" if self.model.lost_dim is None else " with 1 at lost_dim"
            reason = f"as the input{first}{lost}, because {key} is missing"
        return (
            f"the network{steps} returned shape {list(shape)}{of_head} for a batch of "
            f"{self.batch(count)}; expected {[count, *expected]}, {reason}; "
            f"{self._remedy(count, shape)}"
        )

    @property
    def _key(self) -> str:
        """The key with the shape of the head."""
        return "model_output_shape" + ("" if self.head is None else f".{self.head}")

    @property
    def _orders(self) -> WrittenOrders:
        channels = input_channels(self.model, self.plan.volume)
        return WrittenOrders.of(self.model, self.plan.rank, channels)

    @property
    def _has_steps_after(self) -> bool:
        return (self.steps.postprocessing, self.steps.postprocessing_protected) != (None, None)

    def _written(self, item: Shape) -> Shape:
        is_last = self._orders.input is LAST and len(item) > self.plan.rank
        return Move.TO_LAST.after(item) if is_last else item

    def _written_output(self) -> Shape:
        if self.model.output_shape is not None:
            return self.model.output_shape
        return self._written(self.outputs[0])

    def _remedy(self, count: int, shape: Shape) -> str:
        if shape[:1] != (count,):
            return f"fix the network, which must keep the batch axis of {count} items"
        is_either = self.model.runtime in EITHER_ORDER
        last_first = Move.TO_FIRST.after(shape[1:])
        if not is_either and self._fits(last_first) and not self._fits(shape[1:]):
            is_declared = last_first in self.outputs
            also = "" if is_declared else f", and set {self._key}: {list(last_first)}"
            return f"move its last axis first in postprocessing_protected of {KEY}{also}"
        hint = self._channel_hint() + (self._step_hint() if is_either else "")
        output = self._output_to_set(shape[1:])
        if output is None:
            return (
                "fix the network, whose output must be as large as the patch or smaller by an even "
                f"number{hint}{self._size_hint()}"
            )
        return f"set {self._key}: {list(output)}, or fix the network{hint}"

    def _output_to_set(self, item: Shape) -> Shape | None:
        """Return `model_output_shape` for an output item, None if the item cannot be one."""
        if self.model.runtime not in EITHER_ORDER or self._has_steps_after:
            return item if self._fits(item) else None
        last_first = Move.TO_FIRST.after(item)
        order = FIRST if self._fits(item) else LAST if self._fits(last_first) else None
        if order is None or len(item) == self.plan.rank or self._orders.input in (None, order):
            return None if order is None else item
        return last_first if order is LAST else Move.TO_LAST.after(item)

    def _fits(self, item: Shape) -> bool:
        """Return whether an item with channels first is an output centered in the input patch."""
        rank = self.plan.rank
        if len(item) not in (rank, rank + 1):
            return False
        lost = self.model.lost_dim is not None
        pairs = zip(item[-rank:], self.plan.input_patch, strict=True)
        return all((0 < q <= p and (p - q) % 2 == 0) or (lost and q == 1) for q, p in pairs)

    def _step_hint(self) -> str:
        """Return what to do if a step behind the network moves axes, which chunkq does."""
        if not self._has_steps_after:
            return ""
        return f"; steps get channels first, so remove one of {KEY} that moves axes"

    def _slice_hint(self) -> str:
        """Return what to do if a patch with an axis of one voxel is for a network of less axes."""
        patch, rank = self.plan.input_patch, self.plan.rank
        if self.model.lost_dim is not None or 1 not in patch or rank < 2:
            return ""
        axis = patch.index(1) + len(self.item) - rank + 1
        return (
            f"; if it has no axis for the patch's length of 1, remove axis {axis} of the batch in "
            f"preprocessing_protected of {KEY}, and insert it in postprocessing_protected"
        )

    def _size_hint(self) -> str:
        """Return which patch sizes to try if the network can halve the patch several times."""
        patch = self.plan.input_patch
        if not any(length > 1 and length % EVEN for length in patch):
            return ""
        sizes = [length if length == 1 else -(-length // EVEN) * EVEN for length in patch]
        return f"; if it halves the patch several times, try patches of {sizes}"

    def _channel_hint(self) -> str:
        """Return what to try if the declared input has no channel axis, else nothing."""
        shape = self.model.model_input_shape
        has_channels = len(shape) > self.plan.rank or self.model.lost_dim is not None
        if has_channels or self.model.runtime in EITHER_ORDER:  # one is added where necessary
            return ""
        return f"; if it has a channel axis, use model_input_shape {[1, *shape]}"
