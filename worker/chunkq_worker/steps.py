"""Load the user's processing steps around the network from the file `processing_steps`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import ArgumentError, JobError, ModelError
from chunkq.job.user_code import load_names
from chunkq.plan.outputs import HeadName

KEY = "model_config.processing_steps"
Step = Callable[[Any], Any]


@dataclass(frozen=True)
class Steps:
    """Functions from a batch to a batch with as many items, or None; applied in this order.

    1. `preprocessing`: from a NumPy array (N, *model_input_shape) in the input's dtype to a NumPy
       array. Its result is cast to the model's dtype and copied to the device.
    2. `preprocessing_protected`: from and to the runtime's arrays on the device.
    3. The network.
    4. `postprocessing_protected`: from and to the runtime's arrays on the device. If the network
       returns several arrays, in any container, or if outputs of the job name a `head`, it gets all
       that the network returned. The heads are then parts of what it returns.
    5. `postprocessing`: from and to NumPy arrays. If the outputs have several heads, from and to a
       dict with the array of each head.

    The last result has shape (N, *model_output_shape).
    """

    preprocessing: Step | None = None
    preprocessing_protected: Step | None = None
    postprocessing_protected: Step | None = None
    postprocessing: Step | None = None

    def for_heads(self, heads: Sequence[HeadName]) -> Steps:
        """Return the steps for a job whose outputs have these heads."""
        changes: dict[str, Step] = {}
        protected, last = self.postprocessing_protected, self.postprocessing
        if tuple(heads) != (None,) and isinstance(protected, CheckedStep):
            changes["postprocessing_protected"] = protected.with_heads()
        if len(heads) > 1 and isinstance(last, CheckedStep):
            changes["postprocessing"] = last.with_heads()
        return replace(self, **changes)

    @classmethod
    def load(cls, path: str | None) -> Steps:
        """Run the user's file and return its steps; raise ModelError in one line."""
        if path is None:
            return cls()
        try:
            names = load_names(path, KEY)
        except JobError as error:
            raise ModelError(str(error)) from error
        known = step_names()
        steps = {name: names[name] for name in known if name in names}
        if not steps:
            raise ModelError(
                f"{KEY}: no step found in {path}; define at least one of {', '.join(known)}"
            )
        for name, step in steps.items():
            if not callable(step):
                raise ModelError(
                    f"{KEY}: {name} in {path} is {type(step).__name__}, expected a function"
                )
        return cls(**{name: CheckedStep(f"{KEY}: {name}", step) for name, step in steps.items()})

    @classmethod
    def of(cls, functions: Mapping[str, Any]) -> Steps:
        """Return the steps that a caller passes as functions by their names; None is no step.

        Raise ArgumentError for one that is not a function.
        """
        steps = {name: step for name, step in functions.items() if step is not None}
        for name, step in steps.items():
            if not callable(step):
                raise ArgumentError(
                    f"{name}: expected a function from a batch to a batch, found "
                    f"{type(step).__name__}"
                )
        return cls(**{name: CheckedStep(name, step) for name, step in steps.items()})


def after_step(
    step: Step, heads: Sequence[HeadName], arrays: Sequence[npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    """Return the NumPy array of each head after the step `postprocessing`.

    Raise ModelError if the step returns other heads than it gets.
    """
    if len(heads) == 1:
        return [np.asarray(step(arrays[0]))]
    returned = step(dict(zip(heads, arrays, strict=True)))
    if not isinstance(returned, Mapping) or set(returned) != set(heads):
        names = list(returned) if isinstance(returned, Mapping) else type(returned).__name__
        raise ModelError(
            f"{KEY}: postprocessing returned {names}, expected a dict of the heads {list(heads)}"
        )
    return [np.asarray(returned[head]) for head in heads]


def step_names() -> list[str]:
    """Return the names of the steps in the order in which they are applied."""
    return [field.name for field in fields(Steps)]


class CheckedStep:
    """A step that raises ModelError if it returns no array or another number of items.

    What the steps behind a network with heads return is checked head by head, with the shapes of
    the heads. `source` names the step in messages.
    """

    def __init__(self, source: str, step: Step) -> None:
        self.source, self._step, self.has_heads = source, step, False

    def with_heads(self) -> CheckedStep:
        """Return a step that can get and return several arrays in a container."""
        other = copy(self)
        other.has_heads = True
        return other

    def __call__(self, batch: Any) -> Any:
        """Return the result of the step for a batch."""
        result = self._step(batch)
        if self.has_heads:
            return result
        shape = tuple(getattr(result, "shape", ()))  # the shape of a TensorFlow scalar is truthy
        if not shape:
            raise ModelError(
                f"{self.source} returned {type(result).__name__}, expected an array with the items "
                "of the batch"
            )
        expected = getattr(batch, "shape", shape)[0]  # a network can return several arrays
        if shape[0] != expected:
            raise ModelError(
                f"{self.source} returned {shape[0]} items, expected {expected}; keep the "
                "number of items in a batch"
            )
        return result
