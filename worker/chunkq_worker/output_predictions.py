"""Turn what a network returns for a batch into the predictions of each output of a plan.

An output takes channels of a head. They are checked, activated, and counted as votes where the
output combines votes. Outputs that need the same values share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from chunkq.blend.combine import (
    Array,
    activate,
    as_float32,
    is_finite,
    label_votes,
    namespace,
    to_numpy,
    to_votes,
)
from chunkq.casts import misfit
from chunkq.errors import ErrorCode, PredictionError
from chunkq.geometry.box import Box
from chunkq.plan.chunk import Patch
from chunkq.plan.outputs import OutputSpec
from chunkq_worker.label_outputs import invalid_labels
from chunkq_worker.network_heads import head_names, head_of, source_of_output

if TYPE_CHECKING:
    from chunkq_worker.runtimes.device_chunk import FiniteFlag

Explain = Callable[[OutputSpec, int], str]
"""Returns the start of an error for an output that is not finite in an item of the batch."""


class OutputPredictions:
    """The predictions of some outputs, made of the heads (n, C, *Q) of a batch.

    `heads` are in the order of `head_names`. Predictions are one array (n, channels, *Q) per
    output, float32; some can be the same object.
    """

    def __init__(self, outputs: Sequence[OutputSpec]) -> None:
        self._names = head_names(outputs)
        self._keyed = [(one, _values_key(one), _predictions_key(one)) for one in outputs]

    def checked(
        self, heads: Sequence[Array], batch: Sequence[Patch], explain: Explain
    ) -> tuple[Array, ...]:
        """Return predictions; raise PredictionError for values that the job does not allow."""
        values: dict[Any, tuple[Array, Array | None]] = {}
        activated: dict[Any, Array] = {}
        for output, key, name in self._keyed:
            if key not in values:
                values[key] = _checked(self._of(output, heads), output, batch, explain)
            if output.from_labels:
                _check_labels(*values[key], output, batch)
            if name not in activated:
                activated[name] = _activate(*values[key], output)
        return tuple([activated[name] for _, _, name in self._keyed])

    def unchecked(self, heads: Sequence[Array], flag: FiniteFlag) -> tuple[Array, ...]:
        """Return predictions without waiting for the device, of any dtype promoted to float32.

        What `checked` would refuse sets the flag.
        """
        values: dict[Any, tuple[Array, Array | None]] = {}
        activated: dict[Any, Array] = {}
        for output, key, name in self._keyed:
            if key not in values:
                values[key] = _unchecked(self._of(output, heads), output, flag)
            if name not in activated:
                if output.from_labels:
                    _flag_invalid(*values[key], output, flag)
                activated[name] = _activate(*values[key], output)
        return tuple([activated[name] for _, _, name in self._keyed])

    def _of(self, output: OutputSpec, heads: Sequence[Array]) -> Array:
        return head_of(output, heads, self._names)


def _values_key(output: OutputSpec) -> Any:
    """Return what the values of an output depend on before its activation."""
    return output.head, output.picks, output.nan


def _predictions_key(output: OutputSpec) -> Any:
    votes = output.channels if output.from_labels else output.combine == "hard"
    return _values_key(output), output.activation, output.from_labels, votes


def _checked(
    raw: Array, output: OutputSpec, batch: Sequence[Patch], explain: Explain
) -> tuple[Array, Array | None]:
    """Return values as float32, and which of them are finite; None if all are."""
    xp, values = namespace(raw), as_float32(raw)
    if is_finite(values):
        return values, None
    finite = xp.isfinite(values)
    _check_overflow(xp.isfinite(raw) & ~finite, raw, output, batch)
    if output.nan == "fail" and not bool(xp.all(finite)):
        row = next(row for row, good in enumerate(finite) if not bool(good.all()))
        raise PredictionError(
            f"{explain(output, row)} NaN or infinity for the patch that reads "
            f"{format_box(batch[row].source)}; fix it, or set nan: zero"
        )
    return values, finite


def _unchecked(values: Array, output: OutputSpec, flag: FiniteFlag) -> tuple[Array, Array | None]:
    """Return values, and which of them are finite; None unless the job replaces the others."""
    xp, finite = namespace(values), None
    is_wide = values.dtype == xp.float64
    if output.nan == "zero":
        finite = xp.isfinite(values)
        if is_wide:
            values = as_float32(xp.where(finite, values, xp.zeros_like(values)))
            flag.add(values)  # the conversion can overflow
        return as_float32(values), finite
    if is_wide:
        values = as_float32(values)  # the conversion can overflow
    flag.add(values)
    return values, None


def _flag_invalid(
    values: Array, finite: Array | None, output: OutputSpec, flag: FiniteFlag
) -> None:
    """Set the flag if some finite values of an output with labels are none."""
    xp, labels = namespace(values), as_float32(values)
    invalid = invalid_labels(labels, output.channels)
    if finite is not None:
        invalid = invalid & finite
    flag.add(xp.where(invalid, xp.full_like(labels, xp.nan), xp.zeros_like(labels)))


def _activate(values: Array, finite: Array | None, output: OutputSpec) -> Array:
    """Return activated predictions, or votes; zeros where `finite` is not None and False."""
    xp = namespace(values)
    if finite is not None:
        values = xp.where(finite, values, xp.zeros_like(values))
    if output.from_labels:
        votes = label_votes(as_float32(values), output.channels)
        return votes if finite is None else votes * xp.astype(finite, votes.dtype)
    predictions = activate(values, output.activation)
    if finite is not None:
        predictions = xp.where(finite, predictions, xp.zeros_like(predictions))
    if output.combine == "hard":
        predictions = to_votes(predictions)
    return predictions


def _check_overflow(
    overflow: Array, raw: Array, output: OutputSpec, batch: Sequence[Patch]
) -> None:
    """Raise PredictionError for the first patch with finite values that float32 cannot hold."""
    row = next((row for row, part in enumerate(overflow) if bool(part.any())), None)
    if row is None:
        return
    values = to_numpy(raw[row])
    of_output = f" for output {output.name}" if output.name else ""
    raise PredictionError(
        f"the output of the network{of_output} ({values.dtype}) has "
        f"{misfit(values, 'float32')} for the patch that reads "
        f"{format_box(batch[row].source)}, beyond the range of dtype float32, in which "
        "predictions are combined; return smaller values",
        code=ErrorCode.DTYPE_UNSUITABLE,
    )


def _check_labels(
    labels: Array, finite: Array | None, output: OutputSpec, batch: Sequence[Patch]
) -> None:
    """Raise PredictionError for the first patch with values that are no labels."""
    classes = output.channels
    invalid = invalid_labels(labels, classes)
    if finite is not None:
        invalid &= finite
    row = next((row for row, part in enumerate(invalid) if bool(part.any())), None)
    if row is None:
        return
    value = to_numpy(labels[row])[to_numpy(invalid[row])][0]
    raise PredictionError(
        f"{source_of_output(output)} returned {value:.6g} for the patch that reads "
        f"{format_box(batch[row].source)}; expected labels from 0 to {classes - 1}, because "
        f"classes is {classes}; fix classes, or remove it if the output has no labels",
        code=ErrorCode.OUTPUT_IS_LABELS,
    )


def format_box(box: Box) -> str:
    """Return a box of voxels for a message."""
    return f"voxels {list(box.start)} to {list(box.stop)}"
