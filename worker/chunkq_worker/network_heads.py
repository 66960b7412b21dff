"""The heads of a network that the outputs of a plan name, and the channels that they use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkq.blend.combine import Array, pick_channels
from chunkq.errors import ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.plan.outputs import HeadName, OutputSpec
from chunkq.plan.plan import Plan
from chunkq_worker.label_outputs import check_output_dtype
from chunkq_worker.runtimes.item_shapes import output_shapes
from chunkq_worker.shape_texts import ShapeTexts
from chunkq_worker.steps import Steps


def head_names(outputs: Sequence[OutputSpec]) -> tuple[HeadName, ...]:
    """Return the distinct heads of outputs, in the order of the outputs."""
    return tuple(dict.fromkeys(output.head for output in outputs))


def head_of(output: OutputSpec, heads: Sequence[Array], names: Sequence[HeadName]) -> Array:
    """Return the channels that an output uses of its head, (n, C, *Q).

    `names` are those of the heads, from `head_names`.
    """
    return pick_channels(heads[names.index(output.head)], output.picks)


def source_of_output(output: OutputSpec) -> str:
    """Return what returns the values of an output, for messages: `the network`."""
    if not output.name:
        return "the network"
    head = "" if output.head is None else f" in head {output.head!r}"
    return f"the network,{head} for output {output.name},"


@dataclass(frozen=True)
class NetworkHead:
    """One array that the network returns for a batch.

    `outputs` are those that use it, `declared` the allowed shapes of an item with channels first,
    and `shape` the one with all axes, (C, *Q). `texts` are messages about its shapes.
    """

    name: HeadName
    outputs: tuple[OutputSpec, ...]
    declared: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    texts: ShapeTexts

    def items(self, values: Array, dtype: str, count: int, used: int) -> Array:
        """Return the first `used` of `count` items of the head, (used, C, *Q).

        `dtype` is the dtype that the network returned. Raise ModelError for another shape or
        number of items, and for values that the outputs cannot be made of.
        """
        shape = tuple(values.shape)
        if shape not in {(count, *declared) for declared in self.declared}:
            raise ModelError(self.texts.wrong_output(count, shape))
        for output in self.outputs:
            check_output_dtype(dtype, output, source_of_output(output))
        return values.reshape((count, *self.shape))[:used]


def network_heads(
    plan: Plan, model: ModelConfig, written: ModelConfig, item: tuple[int, ...], steps: Steps
) -> tuple[NetworkHead, ...]:
    """Return the heads of a network in the order in which its runtime returns them.

    `model` has its shapes with channels first, `written` as the job has them. `item` is the shape
    of an item of a batch.
    """
    heads = []
    for head in plan.heads:
        outputs = tuple(output for output in plan.outputs if output.head == head.name)
        declared = output_shapes(model.of_head(head.name), plan.rank)
        texts = ShapeTexts(written.of_head(head.name), plan, item, declared, steps, head.name)
        shape = (head.channels, *head.patch)
        heads.append(NetworkHead(head.name, outputs, declared, shape, texts))
    return tuple(heads)
