"""Select what a job reads of a stored array: meaning of its axes, channels and time points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkq.errors import ErrorCode, JobError, suggestion
from chunkq.geometry.axes import (
    LETTERS,
    Axis,
    color_letters,
    lettered_axes,
    looks_like_color,
)
from chunkq.geometry.position_range import positions_within
from chunkq.storage.formats.base import ArrayInfo
from chunkq.storage.remedies import JOB_FILE, Remedies

Picks = int | str | tuple[int | str, ...]
"""One index, a half-open range `START:STOP:STEP` of which all parts are optional, or a list of
indices and labels."""
NAMED_BY_JOB = "the job file"


@dataclass(frozen=True)
class Selection:
    """What a job says of an input; None where it says nothing.

    axes       one letter of t, c, z, y, x per axis of the array
    level      resolution level, by number or name
    channels   channels in the order of the network
    time       time points in the order of the output
    order      letters of the spatial axes in the order of the network
    orientation  directions in which x, y and z are presented, such as RAS
    """

    axes: str | None = None
    level: int | str | None = None
    channels: Picks | None = None
    time: Picks | None = None
    order: str | None = None
    orientation: str | None = None


EVERYTHING = Selection()


@dataclass(frozen=True)
class SelectedAxes:
    """The axes of an array, and what is read along them.

    `axes` are all axes in stored order. `channels` and `time` are indices along the channel and the
    time axis, empty if there is no such axis. `order` has the numbers of the spatial axes in the
    order of the network.
    """

    axes: tuple[Axis, ...]
    channels: tuple[int, ...]
    time: tuple[int, ...]
    order: tuple[int, ...]
    named_by: str


def select(
    array: ArrayInfo, selection: Selection, path: str, remedies: Remedies = JOB_FILE
) -> SelectedAxes:
    """Return the selected axes of an array. `path` is the user's name of it, for messages.

    Raises JobError, with the code AXES_AMBIGUOUS if the meaning of the axes is not clear.
    """
    prefix = f"input: {path}"
    if selection.orientation is not None and not array.orientation:
        raise JobError(
            f"{prefix}: orientation is for NIfTI files only; remove it",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    axes, named_by = _named(array, selection.axes, prefix, remedies)
    numbers = {
        kind: [n for n, axis in enumerate(axes) if axis.kind == kind]
        for kind in ("space", "channel", "time")
    }
    for kind in ("channel", "time"):
        if len(numbers[kind]) > 1:
            raise JobError(
                f"{prefix} has {len(numbers[kind])} axes of type {kind} ({_listed(axes)}); "
                f"{remedies.set_axes()}, one letter of {LETTERS} per axis",
                code=ErrorCode.AXES_AMBIGUOUS,
            )
    if axes and not numbers["space"]:
        raise JobError(
            f"{prefix} has no spatial axis ({_listed(axes)}); {remedies.set_axes()}, one letter of "
            f"{LETTERS} per axis",
            code=ErrorCode.AXES_AMBIGUOUS,
        )
    for key, picks, kind in (
        ("channels", selection.channels, "channel"),
        ("time", selection.time, "time"),
    ):
        if picks is not None and not numbers[kind]:
            raise JobError(
                f"{prefix} has no {kind} axis ({_listed(axes)}); remove {key}, or "
                f"{remedies.set_axes()}"
            )
    return SelectedAxes(
        axes,
        _picks("channels", selection.channels, axes, numbers["channel"], array.labels, prefix),
        _picks("time", selection.time, axes, numbers["time"], (), prefix),
        _order(selection.order, axes, numbers["space"], prefix, remedies),
        named_by,
    )


def _named(
    array: ArrayInfo, letters: str | None, prefix: str, remedies: Remedies
) -> tuple[tuple[Axis, ...], str]:
    """Return the axes with the names of the job file, if it has any, and what names them."""
    shape = [axis.size for axis in array.axes]
    if letters is not None:
        if len(letters) != len(shape):
            raise JobError(
                f"{prefix} has shape {shape}; expected {len(shape)} letters in axes, found "
                f"{letters!r}; set one letter of {LETTERS} per axis"
            )
        return lettered_axes(letters, array.axes), NAMED_BY_JOB
    if not array.named_by and looks_like_color(shape):
        color = color_letters(len(shape), first=False)
        other = f"other letters of {LETTERS}"
        if len(shape) == 3:
            other = ('axes="zyx"' if remedies.in_python else "axes: zyx") + " for a volume"
        example = "" if remedies.in_python else f", as in input: {{path: FILE, axes: {color}}}"
        raise JobError(
            f"{prefix} has shape {shape}, whose last axis can be colour; "
            f"{remedies.set_axes(color)} for channels{example}, or {other}",
            code=ErrorCode.AXES_AMBIGUOUS,
        )
    return array.axes, array.named_by


def _picks(
    key: str,
    picks: Picks | None,
    axes: Sequence[Axis],
    numbers: Sequence[int],
    labels: Sequence[str],
    prefix: str,
) -> tuple[int, ...]:
    """Return the indices that `picks` mean along the axis of a kind."""
    if not numbers:
        return ()
    size = axes[numbers[0]].size
    if picks is None:
        return tuple(range(size))
    if isinstance(picks, str):
        return _range(key, picks, size, prefix)
    entries = (picks,) if isinstance(picks, int) else picks
    indices = tuple(_index(key, entry, size, labels, prefix) for entry in entries)
    if len(set(indices)) < len(indices):
        raise JobError(f"{prefix}: {key}: {list(entries)} names a position twice; remove one")
    return indices


def _range(key: str, text: str, size: int, prefix: str) -> tuple[int, ...]:
    positions = positions_within(text, size)
    if positions is None:
        raise JobError(
            f"{prefix}: {key}: expected a range such as '0:3', found {text!r}; use a list for "
            "single positions"
        )
    if not positions:
        raise JobError(f"{prefix}: {key}: {text!r} is not in 0:{size}; use positions of the axis")
    return tuple(positions)


def _index(key: str, entry: int | str, size: int, labels: Sequence[str], prefix: str) -> int:
    if isinstance(entry, int):
        if not 0 <= entry < size:
            raise JobError(
                f"{prefix}: {key}: expected positions from 0 to {size - 1}, found {entry}"
            )
        return entry
    matches = [n for n, label in enumerate(labels[:size]) if label == entry]
    if len(matches) != 1:
        known = ", ".join(label for label in labels if label) or "no labels"
        count = "several channels are" if matches else "no channel is"
        hint = "" if matches else suggestion(entry, [label for label in labels if label])
        raise JobError(
            f"{prefix}: {key}: {count} labelled {entry!r}; found {known}{hint or '; use the index'}"
        )
    return matches[0]


def _order(
    order: str | None,
    axes: Sequence[Axis],
    spatial: Sequence[int],
    prefix: str,
    remedies: Remedies,
) -> tuple[int, ...]:
    if order is None:
        return tuple(spatial)
    number_of = {axes[number].name: number for number in spatial}
    if sorted(order) != sorted(number_of):
        raise JobError(
            f"{prefix}: order: expected the spatial axes {', '.join(number_of)} in another order, "
            f"found {order!r}; use their letters, or {remedies.set_axes()}"
        )
    return tuple(number_of[name] for name in order)


def _listed(axes: Sequence[Axis]) -> str:
    return ", ".join(f"{axis.name} {axis.size}" for axis in axes)
