"""Names that are imported on first use: commands, and the public names of the package.

This table is the only place where the core names functions of the producer and of the worker. It
holds strings for two reasons: `chunkq --help` and `import chunkq` take a fraction of a second
because they import neither NumPy nor a framework, and the core can be imported without either side.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import MappingProxyType
from typing import Any, TypeVar

Base = TypeVar("Base")
COMMANDS: MappingProxyType[str, tuple[str, str]] = MappingProxyType(
    {
        "init": ("chunkq_producer.commands.init:init", "Write a commented job file."),
        "plan": ("chunkq_producer.commands.plan:plan", "Check a job, estimate memory and storage."),
        "tune": ("chunkq_worker.commands.tune:tune", "Find a job's fastest settings."),
        "produce": (
            "chunkq_producer.commands.produce:produce",
            "Check a job and queue its chunks.",
        ),
        "work": ("chunkq_worker.commands.work:work", "Compute the chunks on a queue."),
        "status": ("chunkq_producer.commands.status:status", "Show job progress."),
        "finalize": (
            "chunkq_producer.commands.finalize:finalize",
            "Merge overlaps and mark the output complete.",
        ),
        "report": ("chunkq_producer.commands.report:report", "Show timings of a finished job."),
        "verify": (
            "chunkq_producer.commands.verify:verify",
            "Compare an output with its checksums; repair it.",
        ),
        "view": (
            "chunkq_producer.commands.view:view",
            "Show an output and its input in Neuroglancer.",
        ),
        "preview": (
            "chunkq_worker.commands.preview:preview",
            "Draw images with their labels or keypoints.",
        ),
        "run": ("chunkq_producer.commands.run:run", "Run a whole job on this machine."),
        "convert": (
            "chunkq_producer.commands.convert:convert",
            "Write an image in another format.",
        ),
        "retry": ("chunkq_producer.commands.retry:retry", "Queue failed chunks again."),
        "cancel": ("chunkq_producer.commands.cancel:cancel", "Remove a job from the queue."),
        "jobs": ("chunkq_producer.commands.jobs:jobs", "List the jobs on a queue."),
        "redis": ("chunkq_producer.commands.redis:redis", "Start a Redis server for a queue."),
        "export": ("chunkq_worker.commands.export:export", "Write a network as ONNX or .pt2."),
        "explain": ("chunkq_producer.commands.explain:explain", "Explain a key of the job file."),
        "schema": ("chunkq_producer.commands.schema:schema", "Print the job file's JSON schema."),
        "completion": (
            "chunkq_producer.commands.completion:completion",
            "Complete commands with the Tab key.",
        ),
    }
)
"""Command -> (`module:function`, help line)."""

INTERNAL_COMMANDS: MappingProxyType[str, str] = MappingProxyType(
    {"check-model": "chunkq_worker.model_check:check_model"}
)
"""Command that chunkq starts as a separate process, not shown to users -> `module:function`."""

API: MappingProxyType[str, str] = MappingProxyType(
    {
        "Predictor": "chunkq_worker.predictor:Predictor",
        "Prediction": "chunkq.blend.prediction:Prediction",
        "plan": "chunkq_producer.api:plan",
        "run": "chunkq_producer.api:run",
        "produce": "chunkq_producer.api:produce",
        "status": "chunkq_producer.api:status",
        "report": "chunkq_producer.api:report",
        "finalize": "chunkq_producer.api:finalize",
        "verify": "chunkq_producer.api:verify",
        "ChunkqError": "chunkq.errors:ChunkqError",
        "JobError": "chunkq.errors:JobError",
        "ModelError": "chunkq.errors:ModelError",
        "IncompleteError": "chunkq.errors:IncompleteError",
        "PredictionWarning": "chunkq.errors:PredictionWarning",
    }
)
"""Public name of the package `chunkq` -> `module:attribute`. `__init__.pyi` has the types."""


def load(target: str) -> Any:
    """Import and return `module:attribute`."""
    module, _, attribute = target.partition(":")
    with without_collection():
        return getattr(import_module(module), attribute)


class LazyClasses(Mapping[str, type[Base]]):
    """Classes by name, each imported from `module:attribute` when it is asked for."""

    def __init__(self, targets: Mapping[str, str]) -> None:
        self._targets = targets

    def __getitem__(self, name: str) -> type[Base]:
        loaded: type[Base] = load(self._targets[name])
        return loaded

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


@contextmanager
def without_collection() -> Iterator[None]:
    """Import libraries without garbage collection, which would take a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
