"""The stages that this process knows, in the order in which a job passes them."""

from __future__ import annotations

from functools import cache
from graphlib import CycleError, TopologicalSorter

from chunkq.errors import ErrorCode, JobError
from chunkq.extensions import ExtensionPoint
from chunkq.stages.base import Stage
from chunkq.stages.downsample import DownsampleStage
from chunkq.stages.export import ExportStage
from chunkq.stages.finalize import FinalizeStage
from chunkq.stages.infer import InferStage
from chunkq.stages.ingest import IngestStage

BUILT_IN: tuple[type[Stage], ...] = (
    IngestStage,
    InferStage,
    FinalizeStage,
    DownsampleStage,
    ExportStage,
)
EXTENSIONS = ExtensionPoint(
    "chunkq.stages",
    Stage,
    "stage",
    JobError,
    frozenset(stage.kind for stage in BUILT_IN),
)
"""Stages of other packages; the name of each is its kind of task."""

_replacements: dict[str, Stage] = {}
"""Kind -> the stage that this process uses in place of the one that was found."""


@cache
def _built_in() -> dict[str, Stage]:
    return {stage.kind: stage() for stage in BUILT_IN}


@cache
def _by_kind() -> dict[str, Stage]:
    """Return the stages of chunkq and of other packages, each behind the one that it follows.

    Raises JobError if a stage of another package cannot be used.
    """
    by_kind = dict(_built_in())
    extensions = EXTENSIONS.find()
    for name, entry_point in extensions.items():
        by_kind[name] = stage = EXTENSIONS.create(entry_point)
        if stage.kind != name:
            raise EXTENSIONS.unusable(entry_point, f"its kind is {stage.kind!r}")
    for name, entry_point in extensions.items():
        if by_kind[name].after not in (None, *by_kind):
            raise EXTENSIONS.unusable(
                entry_point, f"it follows the stage {by_kind[name].after!r}, which is not installed"
            )
    order = TopologicalSorter[str]()
    built_in = [stage.kind for stage in BUILT_IN if not stage.is_final]
    final = [kind for kind, stage in by_kind.items() if stage.is_final]
    for kind, stage in by_kind.items():
        earlier = built_in[: built_in.index(kind)] if kind in built_in else built_in
        if stage.is_final:
            earlier = [other for other in by_kind if other not in final]
        order.add(kind, *earlier, *([stage.after] if stage.after else []))
    try:
        return {kind: by_kind[kind] for kind in order.static_order()}
    except CycleError as error:
        kinds = error.args[1]
        raise EXTENSIONS.unusable(
            extensions[next(kind for kind in kinds if kind in extensions)],
            f"stages follow each other in a circle: {', '.join(reversed(kinds))}",
        ) from None


def replace_stage(stage: Stage) -> None:
    """Use a stage in place of the one of the same kind in this process."""
    _replacements[stage.kind] = stage


def stages() -> list[Stage]:
    """Return all stages in the order in which a job passes them."""
    return [_replacements.get(kind, stage) for kind, stage in _by_kind().items()]


def stage_of(kind: str) -> Stage:
    """Return the stage of a kind of task. Raises JobError if this process does not know it."""
    if kind in _replacements:
        return _replacements[kind]
    if kind in _built_in():  # without a search for packages, a tenth of `chunkq status`
        return _built_in()[kind]
    if kind not in _by_kind():
        raise JobError(
            f"tasks of the kind {kind!r} are unsupported, expected {', '.join(_by_kind())}; "
            "install the version of chunkq, or the package, that queued them",
            code=ErrorCode.TASK_INVALID,
        )
    return _by_kind()[kind]
