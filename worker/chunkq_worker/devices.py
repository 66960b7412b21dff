"""The devices on which the worker processes of this machine run."""

from __future__ import annotations

from dataclasses import dataclass

from chunkq.errors import JobError
from chunkq.system.gpus import visible_gpus


@dataclass(frozen=True, slots=True)
class Slot:
    """The device of one worker process: a name from `CUDA_VISIBLE_DEVICES`, or None for the CPU."""

    gpu: str | None


def slots(gpus: str, per_device: int, per_node: int | None = None) -> list[Slot]:
    """Return one slot per worker process.

    `gpus` is `all`, `none` or a comma-separated list of visible GPUs, by position or name.
    Return `per_device` slots per GPU, or `per_device` CPU slots without a GPU. If `per_node` is
    not None, return that many slots in total, distributed over the GPUs. Raise JobError for a GPU
    that is not visible.
    """
    visible = [] if gpus == "none" else visible_gpus()
    if gpus not in ("all", "none"):
        visible = [_resolve_gpu(name.strip(), visible) for name in gpus.split(",")]
    if per_node is not None:
        return [Slot(visible[n % len(visible)] if visible else None) for n in range(per_node)]
    if not visible:
        return [Slot(None)] * per_device
    return [Slot(gpu) for gpu in visible for _ in range(per_device)]


def _resolve_gpu(name: str, visible: list[str]) -> str:
    if name in visible:
        return name
    if name.isdigit() and int(name) < len(visible):
        return visible[int(name)]
    listing = ", ".join(visible) or "none"
    raise JobError(f"--gpus: invalid value {name!r}; expected one of the visible GPUs ({listing})")
