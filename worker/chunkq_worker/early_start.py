"""Load and check the network in a worker process whose job does not exist yet."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

from chunkq.lazy_imports import without_collection
from chunkq.worker_start import Step, decode_line


def prepare(receive: Callable[[], bytes], report: int | None) -> float:
    """Follow the lines of a run until the work begins; return the time in the last one.

    `report` is the descriptor to which the result of the check is written, and then closed. Without
    it, another process reports. An error is then raised with the first chunk.
    """
    while True:
        step, argument = decode_line(receive())
        if step is Step.WORK:
            return float(argument)
        if step is Step.IMPORT:
            _import_libraries(argument)
        elif step is Step.CHECK and report is not None:
            from chunkq_worker.model_check import report_check

            report_check(argument.encode(), keeps_batch=True).write(report)
            os.close(report)
        elif step is Step.CHECK:
            _load(argument)


def _import_libraries(runtime: str) -> None:
    """Import a runtime on the device thread; leave an error to the check."""
    with without_collection():
        from chunkq_worker.device import get_device
        from chunkq_worker.runtimes.base import import_runtime

        get_device().run(lambda: import_runtime(runtime)).exception()
        gc.freeze()  # a first collection would search a framework for garbage


def _load(record: str) -> None:
    """Load the network, which the first chunk uses; leave an error to that chunk.

    Run it on zeros while the first process checks it, since a first batch takes longer: libraries
    prepare for its shape, and the memory is new.
    """
    from chunkq.job.record import JobRecord
    from chunkq_worker.device import get_device

    decoded, device = JobRecord.from_json(record.encode()), get_device()
    if decoded.job.is_image:
        device.load_images(decoded).exception()
        return
    loaded = device.load(decoded)
    if loaded.exception() is None:
        device.run(loaded.result().batcher.prepare).exception()
