"""A suspended writer blocks no other writer, and its temporary files are deleted."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import zarr

from chunkq.finalize import finalize_job
from chunkq.geometry.box import Box
from chunkq.job.image_output import LOCK_AGE, delete_stale_locks
from chunkq.storage.formats.zarr import ZarrFormat
from tests.harness.files import files_below
from tests.harness.volumes import write_zarr
from tests.harness.waiting import TIMEOUT, wait_until
from tests.integration.test_damage import make_workspace

WRITE_FOREVER = """
import sys
import numpy as np
from chunkq.geometry.box import Box
from chunkq.storage.formats.zarr import ZarrFormat

array = ZarrFormat().open_for_writing(sys.argv[1], {"zarr_format": 3})
values = np.ones(array.shape, array.dtype)
for _ in iter(int, 1):
    array.write(Box.of_shape(array.shape), values)
"""
STOPS = 25


def test_a_writer_that_is_suspended_while_it_writes_blocks_no_other_writer(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "out.zarr", np.zeros((64, 64, 64), np.uint8), (64, 64, 64))
    array = ZarrFormat().open_for_writing(str(path), {"zarr_format": 3})
    box = Box.of_shape((64, 64, 64))
    values = np.full((64, 64, 64), 2, np.uint8)
    with ThreadPoolExecutor(1) as pool:
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(path)])
        try:
            status = psutil.Process(writer.pid).status
            wait_until(lambda: array.read(box).any(), "it writes")
            for _ in range(STOPS):
                writer.send_signal(signal.SIGSTOP)
                wait_until(lambda: status() == psutil.STATUS_STOPPED, "it is suspended")
                pool.submit(array.write, box, values).result(TIMEOUT)
                np.testing.assert_array_equal(array.read(box), values)
                writer.send_signal(signal.SIGCONT)
                wait_until(lambda: array.read(box).max() == 1, "it writes again")
        finally:
            writer.kill()
            writer.wait()
    assert zarr.open_array(path, mode="r")[0, 0, 0] in (1, 2)


def test_sealing_deletes_temporary_files_of_killed_writers(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    folder = workspace.array / "c" / "0" / "0"
    for name in ("0.__lock", "0.__lock.1f2e"):
        (folder / name).write_bytes(b"half")
    finalize_job(workspace.job, worker="finalizer")
    assert not [name for name in files_below(workspace.output) if "__lock" in name]


def test_only_old_temporary_files_of_a_running_job_are_deleted(tmp_path: Path) -> None:
    for name in ("old.__lock", "recent.__lock", "0"):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / "old.__lock", (1, 1))
    delete_stale_locks(str(tmp_path), time.time() - LOCK_AGE)
    assert {path.name for path in tmp_path.iterdir()} == {"recent.__lock", "0"}
