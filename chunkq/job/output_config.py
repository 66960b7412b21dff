"""Temporary."""

from typing import Literal

from chunkq.job.fields import Section


class PyramidConfig(Section):
    levels: int | Literal["auto"] = "auto"
    method: Literal["mean", "mode", "nearest"] | None = None
