"""Load the user's processing steps around the network from the file `processing_steps`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from chunkq.errors import JobError, ModelError
from chunkq.job.user_code import load_names

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
       returns several arrays, in any container, it gets all that the network returned.
    5. `postprocessing`: from and to NumPy arrays.

    The last result has shape (N, *model_output_shape).
    """

    preprocessing: Step | None = None
    preprocessing_protected: Step | None = None
    postprocessing_protected: Step | None = None
    postprocessing: Step | None = None

    @classmethod
    def load(cls, path: str | None) -> Steps:
        """Run the user's file and return its steps; raise ModelError in one line."""
        if path is None:
            return cls()
        try:
            names = load_names(path, KEY)
        except JobError as error:
            raise ModelError(str(error)) from error
        known = [field.name for field in fields(cls)]
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
        return cls(**{name: _with_check(name, step) for name, step in steps.items()})


def _with_check(name: str, step: Step) -> Step:
    """Wrap a step: raise ModelError if it returns no array or another number of items."""

    def run(batch: Any) -> Any:
        result = step(batch)
        shape = tuple(getattr(result, "shape", ()))  # the shape of a TensorFlow scalar is truthy
        if not shape:
            raise ModelError(
                f"{KEY}: {name} returned {type(result).__name__}, expected an array with the items "
                "of the batch"
            )
        expected = getattr(batch, "shape", shape)[0]  # a network can return several arrays
        if shape[0] != expected:
            raise ModelError(
                f"{KEY}: {name} returned {shape[0]} items, expected {expected}; keep the "
                "number of items in a batch"
            )
        return result

    return run
