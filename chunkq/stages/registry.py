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


_replacements: dict[str, Stage] = {}
"""Kind -> the stage that this process uses in place of the one that was found."""


@cache
def _found() -> dict[str, Stage]:
    """Return the stages of chunkq and of other packages; those behind a gate follow the others."""
    added: list[Stage] = [point.load()() for point in sorted(entry_points(group=GROUP))]
    added.sort(key=lambda stage: stage.after is not None)
    return {stage.kind: stage for stage in (InferStage(), FinalizeStage(), *added)}


def replace_stage(stage: Stage) -> None:
    """Use a stage in place of the one of the same kind in this process."""
    _replacements[stage.kind] = stage


def stages() -> list[Stage]:
    """Return all stages in the order in which a job passes them."""
    return [_replacements.get(kind, stage) for kind, stage in _found().items()]


def stage_of(kind: str) -> Stage:
    """Return the stage of a kind of task. Raises JobError if this process does not know it."""
    if kind not in _found():
        raise JobError(
            f"tasks of the kind {kind!r} are unsupported, expected {', '.join(_found())}; install "
            "the version of chunkq, or the package, that queued them",
            code=ErrorCode.TASK_INVALID,
        )
    return _replacements.get(kind, _found()[kind])
