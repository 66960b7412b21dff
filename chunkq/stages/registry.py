"""The stages that this process knows, in the order in which a job passes them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from chunkq.errors import ErrorCode, JobError
from chunkq.stages.base import Stage
from chunkq.stages.finalize import FinalizeStage
from chunkq.stages.infer import InferStage

GROUP = "chunkq.stages"
"""Entry points of other packages, each the class of a stage. They follow the built-in stages."""


@cache
def _registry() -> dict[str, Stage]:
    stages: list[Stage] = [InferStage(), FinalizeStage()]
    stages += [point.load()() for point in sorted(entry_points(group=GROUP))]
    return {stage.kind: stage for stage in stages}


def register(stage: Stage) -> None:
    """Add a stage to this process, or replace the one of the same kind."""
    _registry()[stage.kind] = stage


def stages() -> list[Stage]:
    """Return all stages in the order in which a job passes them."""
    return list(_registry().values())


def stage_of(kind: str) -> Stage:
    """Return the stage of a kind of task. Raises JobError if this process does not know it."""
    try:
        return _registry()[kind]
    except KeyError:
        raise JobError(
            f"not a task of this version: kind {kind!r}, expected one of "
            f"{', '.join(_registry())}; install the version of chunkq that queued it",
            code=ErrorCode.TASK_INVALID,
        ) from None
