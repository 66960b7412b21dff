"""Check the network in a separate process, so that this one does not load its libraries."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

from chunkq.parent_process import with_parent_death_signal
from chunkq.record import JobRecord
from chunkq.scratch import scratch_folder

CHECK_MODULE = "chunkq_worker.model_check"
MAX_DEVIATION = 1e-5
"""Largest normal change of a result with its batch, as a fraction of the largest output value."""


class ModelCheck(SimpleNamespace):
    """Result of a model check: the fields of `chunkq_worker.model_check.ModelCheckResult`."""


def check_model(record: JobRecord, *, depth: int | None = None) -> ModelCheck:
    """Load a job's network on this machine and run a batch of zeros.

    With `depth`, also run patches of the volume and whole chunks, `depth` chunks in flight.
    """
    # The folder is created here: the system may kill the other process for its memory use.
    with scratch_folder("model-check") as folder:
        options = ["--depth", str(depth), "--folder", str(folder)] if depth else []
        completed = subprocess.run(
            with_parent_death_signal(
                [sys.executable, "-m", CHECK_MODULE, *options], signal.SIGKILL
            ),
            input=record.to_json(),
            capture_output=True,
            check=False,
        )
    lines = completed.stdout.decode(errors="replace").strip().splitlines()
    if completed.returncode or not lines:
        last_line = completed.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return ModelCheck(
            error=f"model_config: the check of the network ended with exit code "
            f"{completed.returncode}: {' '.join(last_line) or 'no output'}"
        )
    return ModelCheck(**json.loads(lines[-1]))


def warnings(check: ModelCheck) -> list[str]:
    """Return one line for each property of the network that can spoil the output."""
    lines = []
    limit = MAX_DEVIATION * max(abs(check.highest), abs(check.lowest), 1e-30)
    if not check.finite:
        lines.append(
            "the network returns NaN or infinity for patches of this volume; fix the network, or "
            "set nan: zero"
        )
    if check.by_position is not None and check.by_position > limit:
        lines.append(
            f"a patch's result depends on its position in the batch (by {check.by_position:.3g}): "
            "a layer mixes the items of a batch, such as batch norm in training mode; fix the "
            "network"
        )
    if check.by_batch_size is not None and check.by_batch_size > limit:
        lines.append(
            f"results depend on the batch size (by {check.by_batch_size:.3g}): a layer mixes the "
            "items of a batch; fix the network, or do not change max_batch_size"
        )
    if check.tile_norms:
        names = ", ".join(check.tile_norms[:4]) + (" …" if len(check.tile_norms) > 4 else "")
        lines.append(
            f"{len(check.tile_norms)} layers normalize by the statistics of the patch ({names}): "
            "results depend on the size and position of the patch, so tiles may differ visibly; "
            "use large patches and small strides"
        )
    return lines
