"""Trying the network in a process of its own, so that this one stays free of its libraries."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

from chunkq.parent_death_signal import with_parent_death_signal
from chunkq.record import JobRecord
from chunkq.scratch import scratch_folder

CHECK_MODULE = "chunkq_worker.model_check"
SUSPICIOUS = 1e-5
"""A patch's result may change by this much of the output's range with its place in a batch."""


class ModelCheck(SimpleNamespace):
    """What trying a network showed: the fields of `chunkq_worker.model_check.Finding`."""


def check_model(record: JobRecord, *, depth: int | None = None) -> ModelCheck:
    """Load a job's network here and run a batch of zeros.

    With `depth`, also patches of the volume, and chunks, so many at once.
    """
    # Here, as the system may kill a process that tries how much memory it needs.
    with scratch_folder("rehearsal") as folder:
        whole = ["--depth", str(depth), "--folder", str(folder)] if depth else []
        done = subprocess.run(
            with_parent_death_signal([sys.executable, "-m", CHECK_MODULE, *whole], signal.SIGKILL),
            input=record.to_json(),
            capture_output=True,
            check=False,
        )
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return ModelCheck(
            error=f"the network cannot be tried here: {' '.join(last) or 'no answer'}"
        )
    return ModelCheck(**json.loads(lines[-1]))


def warnings(found: ModelCheck) -> list[str]:
    """Return what a user should know before starting a job with this network, a line each."""
    lines = []
    spread = max(abs(found.highest), abs(found.lowest), 1e-30)
    if not found.finite:
        lines.append(
            "the network gives NaN or infinity for real patches; mend it, or set nan: zero"
        )
    if found.by_position is not None and found.by_position > SUSPICIOUS * spread:
        lines.append(
            f"a patch's result depends on its place in the batch (by {found.by_position:.3g}): "
            "something mixes the items of a batch, a batch norm in training mode for example"
        )
    if found.by_batch_size is not None and found.by_batch_size > SUSPICIOUS * spread:
        lines.append(
            f"results depend on the size of a batch (by {found.by_batch_size:.3g}): keep "
            "max_batch_size fixed, or find what mixes the items"
        )
    if found.tile_norms:
        names = ", ".join(found.tile_norms[:4]) + (" …" if len(found.tile_norms) > 4 else "")
        lines.append(
            f"{len(found.tile_norms)} layers normalise by the patch's own statistics ({names}): "
            "results depend on the patch's size and place, so expect differences between tiles; "
            "large patches and much overlap soften them"
        )
    return lines
