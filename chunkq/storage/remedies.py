"""What messages about the axes of an input tell the user to do, in a job file or in Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Remedies:
    """Remedies for a user of the job file, or of a `Predictor` if `in_python`."""

    in_python: bool = False

    def set_axes(self, letters: str = "") -> str:
        """Return how to name the axes of the input, with these letters."""
        if self.in_python:
            return f'pass axes="{letters}"' if letters else "pass axes="
        return f"set axes: {letters} in input" if letters else "set axes in input"

    def set_channels(self) -> str:
        """Return how to select channels of the input."""
        return "pass channels=" if self.in_python else "set channels in input"

    def set_channels_or_axes(self) -> str:
        """Return how to select channels of the input, or to name its axes."""
        return "pass channels= or axes=" if self.in_python else "set channels or axes in input"


JOB_FILE, PYTHON = Remedies(), Remedies(in_python=True)
