"""The user's own steps around the network, from the file that `processing_steps` names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from chunkq.errors import JobError, ModelError
from chunkq.user_code import load_names

KEY = "model_config.processing_steps"
Step = Callable[[Any], Any]


@dataclass(frozen=True)
class Steps:
    """Functions of a batch that give a batch of as many items; None where there is none.

    In this order: `preprocessing` takes and gives a NumPy array (N, *model_input_shape) in the
    input's dtype, on the host; the rest of the way in, its result is cast to the model's dtype and
    moved. `preprocessing_protected` and `postprocessing_protected` stand right around the network
    and see what it sees: the runtime's own arrays on the device. `postprocessing` takes and gives
    a NumPy array, on the host. What comes out last has `model_output_shape`.
    """

    preprocessing: Step | None = None
    preprocessing_protected: Step | None = None
    postprocessing_protected: Step | None = None
    postprocessing: Step | None = None

    @classmethod
    def load(cls, path: str | None) -> Steps:
        """Run the user's file and take its steps; raises ModelError in one line."""
        if path is None:
            return cls()
        try:
            names = load_names(path, KEY)
        except JobError as error:
            raise ModelError(str(error)) from error
        legal = [field.name for field in fields(cls)]
        found = {name: names[name] for name in legal if name in names}
        if not found:
            raise ModelError(f"{KEY}: {path} defines none of {', '.join(legal)}")
        for name, step in found.items():
            if not callable(step):
                raise ModelError(f"{KEY}: {name} in {path} is no function")
        return cls(**{name: _checked(name, step) for name, step in found.items()})


def _checked(name: str, step: Step) -> Step:
    """Refuse a step that changes how many items a batch has, or gives no array."""

    def run(batch: Any) -> Any:
        result = step(batch)
        shape = tuple(getattr(result, "shape", ()))  # a scalar tensor's is true, and empty
        if not shape:
            raise ModelError(f"{KEY}: {name} gave {type(result).__name__}, not a batch")
        if shape[0] != batch.shape[0]:
            raise ModelError(
                f"{KEY}: {name} was given {batch.shape[0]} items and gave {shape[0]}; a step must "
                "keep the number of items in a batch"
            )
        return result

    return run
