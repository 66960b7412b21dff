"""Result of a trial of a network: what was measured, and what of it can spoil the output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from chunkq.errors import ErrorCode, JobError, ModelError

MAX_DEVIATION = 1e-5
"""Largest normal change of a result with its batch, as a fraction of the largest output value."""


@dataclass(frozen=True, slots=True)
class PatchCheck:
    """Batches of `patches` real patches, timed and compared.

    `batch_seconds` is the time of one batch. `largest` is the largest absolute value of the raw
    output, and `finite` whether all are. `by_position` is the largest difference of a patch's
    output between two positions in the batch, and `by_batch_size` between two batch sizes. The
    second size is `other_size`, or None if the network supports one size only.
    """

    patches: int
    batch_seconds: float
    finite: bool
    largest: float
    by_position: float | None = None
    by_batch_size: float | None = None
    other_size: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryCheck:
    """Peak resident memory (bytes) after computing `chunks` chunks with `depth` in flight.

    `error` is the reason why it could not be measured.
    """

    depth: int
    chunks: int | None = None
    worker_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ValueCheck:
    """Smallest and largest finite values of one batch of patches.

    `input_range` is that of what the network receives, after the steps of `has_preprocessing`, and
    `output_range` that of what it returns, before any activation. `output_ranges` has that of each
    output with a name. Ranges are None if there are no such values. `warnings` are lines about what
    the values suggest.
    """

    input_range: tuple[float, float] | None = None
    output_range: tuple[float, float] | None = None
    warnings: tuple[str, ...] = ()
    output_ranges: tuple[tuple[str, tuple[float, float] | None], ...] = ()
    has_preprocessing: bool = True

    def rows(self) -> list[tuple[str, str]]:
        """Return the ranges as pairs of a label and a text."""
        spans = [
            ("input range", "", self.input_range, ", after preprocessing" * self.has_preprocessing),
            *(
                ("output range", f"{name}: " if name else "", span, ", before any activation")
                for name, span in self.output_ranges or (("", self.output_range),)
            ),
        ]
        return [
            (label, f"{name}{span[0]:.4g} to {span[1]:.4g}{when}")
            for label, name, span, when in spans
            if span is not None
        ]


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """A network that was loaded and has run a batch of `batch` patches.

    `load_seconds` includes the check of the first batch. `loaded_bytes` is the peak resident memory
    with the network loaded, `peak_bytes` the one at the end, `device_bytes` the peak on the device.
    `tile_norms` are layers that normalize by statistics of the patch, `notes` how the files of the
    network were read, and `output_warnings` what the outputs suggest. `patches` and `memory` are
    None where the check was not run.
    """

    batch: int
    device: str
    load_seconds: float
    loaded_bytes: int
    peak_bytes: int
    device_bytes: int | None = None
    tile_norms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    output_warnings: tuple[str, ...] = ()
    values: ValueCheck = ValueCheck()
    patches: PatchCheck | None = None
    memory: MemoryCheck | None = None

    def value_warnings(self) -> list[str]:
        """Return one line for each warning about the values of the first batch."""
        return [*self.output_warnings, *self.values.warnings]

    def warnings(self) -> list[str]:
        """Return one line for each property of the network that can spoil the output."""
        lines = self.value_warnings()
        if self.patches is not None:
            lines += _patch_warnings(self.patches)
        if self.tile_norms:
            names = ", ".join(self.tile_norms[:4]) + (" …" if len(self.tile_norms) > 4 else "")
            lines.append(
                f"{len(self.tile_norms)} layers normalize by the statistics of the patch "
                f"({names}): results depend on the size and position of the patch, so tiles may "
                "differ visibly; use large patches and small strides"
            )
        return lines


@dataclass(frozen=True, slots=True)
class CheckReport:
    """How the check of a network ended: its result, an error, or the end of its process.

    `shapes` are those of the heads that the job does not declare, if only these were asked for.
    `error` and `code` are those of a ChunkqError. `exit_code` is that of a process that ended
    before it could report; it is negative if a signal killed the process.
    """

    check: ModelCheck | None = None
    error: str | None = None
    code: ErrorCode = ErrorCode.MODEL_UNUSABLE
    exit_code: int | None = None
    shapes: tuple[tuple[int, ...], ...] | None = None

    def result(self, output: Sequence[str]) -> ModelCheck:
        """Return the result of the check.

        Raises JobError if the network can be used but a `dtype` of the job cannot, ModelError if
        there is no result for another reason. `output` are the lines that a process without a
        report wrote to standard error.
        """
        if self.check is not None:
            return self.check
        if self.error is not None and self.code is ErrorCode.DTYPE_UNSUITABLE:
            raise JobError(self.error, code=self.code)
        if self.error is not None:
            raise ModelError(self.error, code=self.code)
        raise ModelError(
            f"model_config: the check of the network ended with exit code {self.exit_code}: "
            f"{' '.join(output[-1:]) or 'no output'}"
        )

    def write(self, descriptor: int) -> None:
        """Write the report as one line; do nothing if its reader has ended."""
        from chunkq import json_values  # imports pydantic, which takes long

        content = json_values.encode(self) + b"\n"
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        except BrokenPipeError:
            pass

    @classmethod
    def read(cls, line: bytes) -> CheckReport | None:
        """Decode a line; return None if its writer ended before it had written the whole line."""
        from chunkq import json_values

        return json_values.decode(cls, line) if line.endswith(b"\n") else None


def _patch_warnings(check: PatchCheck) -> list[str]:
    lines = []
    limit = MAX_DEVIATION * max(check.largest, 1e-30)
    if not check.finite:
        lines.append(
            "the network returns NaN or infinity for patches of this volume; fix the network, or "
            "set nan: zero"
        )
    if check.by_position is not None and check.by_position > limit:
        lines.append(
            f"a patch's result depends on its position in the batch (by {check.by_position:.3g}): "
            "a layer mixes the items of a batch, such as batch norm in training mode; fix the "
            "network"
        )
    if check.by_batch_size is not None and check.by_batch_size > limit:
        lines.append(
            f"results depend on the batch size (by {check.by_batch_size:.3g}): a layer mixes the "
            "items of a batch; fix the network, or do not change max_batch_size"
        )
    return lines
