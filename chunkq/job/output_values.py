"""Which keys of an output fit together: `combine`, activations, dtype, `range` and fill value."""

from __future__ import annotations

from collections.abc import Iterator

from chunkq.job.output_config import MAX_CLASSES, Classes, OutputConfig
from chunkq.plan.outputs import KINDS, default_range, is_integer

FLOAT32, FLOAT16 = float.fromhex("0x1.fffffep127"), 65504.0
"""Largest finite values."""


def value_problems(
    prefix: str, output: OutputConfig, *, has_mask: bool, skips_empty: bool
) -> list[str]:
    """Return a line for each key of an output that does not fit the others, whatever the network.

    `prefix` is that of the paths of its keys. The job has a mask, or skips empty patches, as the
    other parameters say.
    """
    problems = [
        *_activation_problems(output, skips_empty=skips_empty),
        *_dtype_problems(output),
        *class_problems(output.classes),
    ]
    if output.codec is not None and output.codec.name == "none" and output.codec.level is not None:
        problems.append("codec.level: unsupported for codec none; remove it")
    if not problems:
        problems += _fill_value_problems(output, fills=has_mask or skips_empty)
    return [f"{prefix}{problem}" for problem in problems]


def class_problems(classes: Classes | None) -> Iterator[str]:
    """Yield a line for a single class. Only a list of keypoints can have one name."""
    if isinstance(classes, tuple) and len(classes) < 2:
        yield "classes: found 1 name; expected at least 2; add a name such as background"


def range_of(output: OutputConfig, channels: int) -> tuple[float, float] | None:
    """Return the range of an output of so many channels, None if it has none or lacks it."""
    if KINDS[output.combine].has_labels or not is_integer(output.output_dtype):
        return None
    after = output.activation_after or "none"
    return output.range or default_range(output.combine, output.activation, after, channels)


def _activation_problems(output: OutputConfig, *, skips_empty: bool) -> Iterator[str]:
    combine, before, after = output.combine, output.activation, output.activation_after
    if combine == "entropy" and before == "none":
        yield (
            "combine: entropy is that of probabilities; set activation: softmax, or sigmoid for a "
            "network of one channel"
        )
    if after in (None, "none"):
        return
    if combine != "weighted_avg":
        yield (
            f"activation_after: unsupported for combine {combine}; use activation, or combine "
            "weighted_avg"
        )
    elif before != "none":
        yield (
            f"activation_after: {after} follows activation: {before}; remove one of them, "
            "activation is applied before predictions are averaged"
        )
    elif skips_empty:
        yield (
            "activation_after: unsupported beside skip_empty, because the scores of an empty patch "
            "are unknown; use activation, or a mask instead of skip_empty"
        )


def _dtype_problems(output: OutputConfig) -> Iterator[str]:
    combine, dtype = output.combine, output.output_dtype
    if KINDS[combine].has_labels:
        for key in ("output_dtype", "range"):
            if getattr(output, key) is not None:
                yield (
                    f"{key}: unsupported for combine {combine}, whose output has labels; remove "
                    "it, or use combine weighted_avg"
                )
    elif not is_integer(dtype):
        if output.range is not None:
            yield (
                f"range: unsupported for output_dtype {dtype or 'float32'}, which holds all "
                "values; remove it, or use an integer dtype such as uint8"
            )
    elif range_of(output, 1) is None:
        yield (
            f"range: missing for output_dtype {dtype}; set the values that become its smallest and "
            "largest integer, such as [0, 20]"
        )


def _fill_value_problems(output: OutputConfig, *, fills: bool) -> Iterator[str]:
    """Yield a line for a fill value that the output cannot hold, whatever its classes."""
    value, kind = float(output.fill_value or 0), KINDS[output.combine]
    if kind.has_labels or (kind.is_spread and output.activation != "none"):
        is_legal = value.is_integer() and 0 <= value < MAX_CLASSES
        legal = "a class, an integer from 0"
    elif not kind.is_spread and (span := range_of(output, 1)) is not None:
        is_legal = span[0] <= value <= span[1] or (value == 0 and not fills)
        legal = f"a value of range, from {span[0]:g} to {span[1]:g}"
    else:
        largest, dtype = FLOAT32, "float32"
        if output.output_dtype == "float16" and not kind.is_spread:
            largest, dtype = FLOAT16, "float16"
        is_legal = abs(value) <= largest
        legal = f"a value from {-largest:g} to {largest:g}, which {dtype} can hold"
    if not is_legal:
        yield f"fill_value: expected {legal}, found {value:g}"
