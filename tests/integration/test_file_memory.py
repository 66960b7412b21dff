"""Memory of assembling large files; `make prove PART=files`."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import zarr

EDGE, CHUNK = 1024, 128
MOST_BYTES = 500_000_000
MEASURED = """
import json, sys
from chunkq.cli import main
from chunkq.system.memory import peak_bytes
code = main()
print(json.dumps({"code": code, "peak": peak_bytes()}), file=sys.stderr)
"""


def write_volume(path: Path) -> None:
    """Write a Zarr array of 4.3 GB, whose storage chunks are links to a few files."""
    shape, rng = (EDGE,) * 3, np.random.default_rng(0)
    array = zarr.create_array(path, shape=shape, chunks=(CHUNK,) * 3, dtype="float32")
    array[:CHUNK, :CHUNK] = rng.integers(0, 9, (CHUNK, CHUNK, EDGE)).astype("float32")
    for z, y, x in product(range(EDGE // CHUNK), repeat=3):
        if (z, y) != (0, 0):
            (path / f"c/{z}/{y}").mkdir(parents=True, exist_ok=True)
            os.link(path / f"c/0/0/{(x + y + z) % 8}", path / f"c/{z}/{y}/{x}")


@pytest.mark.proof("files")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz", "out.tif", "out.h5"])
def test_a_file_of_4_gb_is_assembled_in_less_than_500_mb(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_volume(tmp_path / "in.zarr")
    command = [sys.executable, "-c", MEASURED, "convert", str(tmp_path / "in.zarr")]
    done = subprocess.run(
        [*command, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stderr.splitlines()[-1])
    size = (tmp_path / name).stat().st_size
    (tmp_path / name).unlink()
    with capsys.disabled():
        print(f"\n{name}: {size / 1e9:.1f} GB, peak memory {measured['peak'] / 1e6:.0f} MB")  # noqa: T201
    assert measured["code"] == 0
    assert measured["peak"] < MOST_BYTES
