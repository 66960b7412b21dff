"""Resolve the outputs of a job: which channels of the network each has, and how it is combined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod

from chunkq.geometry.position_range import positions_within
from chunkq.job.job_file import Job
from chunkq.job.output_config import OutputConfig, class_count, class_names
from chunkq.job.output_values import range_of
from chunkq.plan.outputs import KINDS, HeadName, OutputSpec

MAX_PATCH_VALUES = 1 << 31
"""Upper limit for the values of one patch, channels included."""


@dataclass(frozen=True)
class NetworkOutput:
    """One array that the network returns for a patch: ([channels,] *patch).

    `name` is its key or index; None if the network returns one array. `has_channels` says whether
    its first axis is the channels. `key` is the key of the job from which its shape comes.
    """

    name: HeadName
    channels: int
    patch: tuple[int, ...]
    has_channels: bool
    key: str


@dataclass(frozen=True)
class ResolvedOutput:
    """One output of a job, and the array of the network of which it is made.

    `name` is that of the output, `head` that array. If `by_channel`, the network sees one channel
    of an image at a time.
    """

    job: Job
    name: str
    config: OutputConfig
    head: NetworkOutput
    by_channel: bool = False

    @property
    def prefix(self) -> str:
        """Prefix of the paths of its keys in the job file."""
        return f"outputs.{self.name}." if self.name else ""

    @cached_property
    def picks(self) -> tuple[int, ...] | None:
        """Channels of the array that it uses, None for all. Raises ValueError if there are none."""
        picks, size = self.config.channels, self.head.channels
        if picks is None:
            return None
        if isinstance(picks, str):
            positions = positions_within(picks, size)
            if not positions:
                raise ValueError(f"{picks!r} is not in 0:{size}")
            return tuple(positions)
        for pick in (entries := (picks,) if isinstance(picks, int) else picks):
            if not isinstance(pick, int) or not 0 <= pick < size:
                raise ValueError(f"expected positions from 0 to {size - 1}, found {pick!r}")
        return tuple(int(pick) for pick in entries)

    @property
    def factors(self) -> tuple[Fraction, ...]:
        """Voxels of the input per voxel of the output along each spatial axis."""
        return self.config.factors or (Fraction(1),) * len(self.head.patch)

    @property
    def is_scaled(self) -> bool:
        """Whether its voxels have another size than those of the input."""
        return set(self.factors) != {1}

    @property
    def span(self) -> tuple[Fraction, ...]:
        """Shape of the output patch in voxels of the input."""
        return tuple(q * f for q, f in zip(self.head.patch, self.factors, strict=True))

    def in_input(self, lengths: Sequence[int]) -> tuple[Fraction, ...]:
        """Return lengths in voxels of the output in voxels of the input."""
        return tuple(n * f for n, f in zip(lengths, self.factors, strict=True))

    @property
    def network_channels(self) -> int:
        """Number of channels that it uses of the array."""
        return self.head.channels if self.picks is None else len(self.picks)

    @property
    def classes(self) -> int | None:
        """Number of classes that the job declares."""
        return class_count(self.config.classes)

    @property
    def from_labels(self) -> bool:
        """Whether the network returns labels in one channel."""
        return self.classes is not None and self.network_channels == 1 and not self._is_binary

    @property
    def _is_binary(self) -> bool:
        """Whether two class names are those of a single score, which sigmoid makes."""
        has_sigmoid = "sigmoid" in (self.config.activation, self.config.activation_after)
        has_two = len(class_names(self.config.classes)) == 2
        return self.network_channels == 1 and has_two and has_sigmoid

    @property
    def channels(self) -> int:
        """Number of channels of its predictions."""
        return self.classes if self.classes and self.from_labels else self.network_channels

    @property
    def channel_axis(self) -> bool:
        """Whether its stored values have a channel axis.

        As with NumPy, picking one channel by its number removes the axis.
        """
        has_channels = self.head.has_channels and not isinstance(self.config.channels, int)
        is_per_channel = KINDS[self.config.combine].is_per_channel
        return (has_channels or self.from_labels) and is_per_channel

    def problems(self) -> Iterator[str]:
        """Yield one line per mistake."""
        try:
            _ = self.picks
        except ValueError as error:
            yield (
                f"{self.prefix}channels: {error}, the channels that the network returns; fix it, "
                "or the shape of the output"
            )
            return
        yield from self._class_problems()
        yield from self._activation_problems()
        yield from self._fill_value_problems()

    def _class_problems(self) -> Iterator[str]:
        classes, prefix = self.classes, self.prefix
        if classes is None:
            return
        if not self.from_labels:
            if classes == self.network_channels or self._is_binary:
                return
            advice = f"use {self.network_channels}, or remove classes"
            if self.job.model.model_output_shape is None:
                advice = "set model_output_shape, which is model_input_shape by default"
            subject = f"model_config.{self.head.key}"
            if self.picks is not None:
                subject = f"{prefix}channels"
            yield (
                f"{prefix}classes: {classes}, but {subject} has {self.network_channels} channels; "
                f"{advice}"
            )
            return
        for key, activation in self._activations:
            yield (
                f"{prefix}{key}: {activation} is unsupported for labels in one channel, which "
                f"classes declares; remove {key}, or remove classes if the network returns logits"
            )
        if classes * prod(self.head.patch) > MAX_PATCH_VALUES:
            yield (
                f"{prefix}classes: {classes} votes for each of {prod(self.head.patch)} voxels of a "
                f"patch are unsupported; use at most {MAX_PATCH_VALUES} values per patch"
            )

    @property
    def _activations(self) -> list[tuple[str, str]]:
        """The keys of activations that do something, and their values."""
        keys = ("activation", "activation_after")
        values = [(key, getattr(self.config, key)) for key in keys]
        return [(key, value) for key, value in values if value not in (None, "none")]

    def _activation_problems(self) -> Iterator[str]:
        """Yield a line for an activation that does not fit the number of channels."""
        several = f"[CHANNELS, {', '.join(map(str, self.head.patch))}]"
        for key, activation in self._activations:
            if activation == "softmax" and self.channels == 1:
                yield (
                    f"{self.prefix}{key}: softmax of one channel is 1 everywhere; use sigmoid, or "
                    "if the network returns several channels, set "
                    f"model_config.model_output_shape: {several}"
                )
        has_shares = self.config.activation == "softmax" or self.channels == 1
        if self.config.combine == "entropy" and not has_shares:
            yield (
                f"{self.prefix}combine: entropy of {self.channels} channels after "
                f"{self.config.activation} is undefined, because they do not add up to 1; use "
                "softmax, or one channel"
            )

    def _fill_value_problems(self) -> Iterator[str]:
        """Yield a line if the fill value must be a class and is none."""
        value, classes = self.fill_value, max(2, self.channels)
        if not self.spec().nothing_is_class or value < classes:
            return
        yield (
            f"{self.prefix}fill_value: {value:g} is not a class; use an integer from 0 to "
            f"{classes - 1}, because the output has {classes} classes"
        )

    @property
    def fill_value(self) -> float:
        """Value of voxels without a prediction."""
        return self.config.fill_value or 0.0

    def spec(self) -> OutputSpec:
        """Return the output; it has no problems."""
        config, head = self.config, self.head
        uses_all = self.picks is None and head.channels == self.network_channels
        return OutputSpec(
            name=self.name,
            channels=self.channels,
            channel_axis=self.channel_axis and not self.by_channel,
            activation=config.activation,
            combine=config.combine,
            average_dtype=config.output_dtype or "float32",
            nan=self.job.nan,
            from_labels=self.from_labels,
            fill_value=self.fill_value,
            head=head.name,
            head_channels=0 if uses_all else head.channels,
            picks=self.picks,
            activation_after=config.activation_after or "none",
            range=range_of(config, self.channels),
            class_names=class_names(config.classes),
        )
