"""Run ten jobs and print a hash of each output, to compare two versions of chunkq.

Run in two checkouts, then compare: `python -m tests.prove.outputs before.json`, in the other one
`python -m tests.prove.outputs after.json --compare before.json`. The jobs cover all inference
types, combinations, runtimes and queues. The hash covers every file of the output, without the
epoch and the digest of the job, which differ between any two folders.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import models
from tests.harness.files import files_below
from tests.harness.guardian import SessionGuardian
from tests.harness.servers.redis import redis_server
from tests.harness.volumes import random_volume, write_zarr

SHAPE = (30, 26, 22)
NUMPY_NETWORK = """
import numpy as np

def net(batch):
    x = np.asarray(batch, np.float32) / 100
    return np.concatenate([x, 1 - x, x * x], axis=1)
"""
WEIGHTS = """
import numpy as np

def ramp(shape):
    return 1.0 + np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
"""


def slab_network(folder: Path) -> dict[str, Any]:
    """Return the keys of a network that takes one slice of the first axis with its neighbors."""
    source = "def net(batch):\n    return batch[:, 1:2].astype('float32') / 100\n"
    (folder / "slab.py").write_text(source)
    return {
        "runtime": "numpy", "type": "class", "class_file": str(folder / "slab.py"),
        "class_name": "net", "model_input_shape": [3, 8, 8], "model_output_shape": [1, 8, 8],
        "lost_dim": 0,
    }  # fmt: skip


def numpy_network(folder: Path) -> dict[str, Any]:
    """Return the keys of a NumPy function."""
    (folder / "net.py").write_text(NUMPY_NETWORK)
    path = str(folder / "net.py")
    return {"runtime": "numpy", "type": "class", "class_file": path, "class_name": "net"}


def form(name: str) -> Callable[[Path], dict[str, Any]]:
    """Return the function that writes one form of the test network."""
    write: Callable[[Path], dict[str, Any]] = getattr(models, name)
    return write


def write_jobs(folder: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Write the inputs and ten jobs; return each job's file and the options of `chunkq run`."""
    volume = str(write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8, 8)))
    (folder / "weights.py").write_text(WEIGHTS)
    overlap = {"inference_type": "sliding_window", "strides": [5, 6, 4]}
    gaussian = {"weight_function": ["weight_gaussian"]}
    jobs: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, Any], tuple[str, ...]]] = {
        "torch-class-soft": (form("torch_class"), overlap | gaussian | {"combine": "soft"}, ()),
        "torchscript-weighted": (form("torchscript"), overlap | gaussian, ("-w", "2")),
        "exported-hard": (form("exported"), overlap | {"combine": "hard"}, ()),
        "onnx-float16": (form("onnx_file"), overlap | {"output_dtype": "float16"}, ()),
        "keras-redis": (form("keras_file"), overlap | {"combine": "soft"}, ("--queue", "REDIS")),
        "numpy-patch-offsets": (
            numpy_network,
            {"inference_type": "patch", "offsets": [[0, 0, 0], [4, 4, 4]], "pad_mode": "reflect",
             "pad_width": [4, 4, 4]},
            ("-w", "2"),
        ),
        "numpy-crop-margin": (
            numpy_network,
            {"inference_type": "crop_margin", "margin": [2, 2, 2], "pad_mode": "symmetric",
             "pad_width": [2, 2, 2]},
            (),
        ),
        "numpy-own-weights-v2": (
            numpy_network,
            overlap | {"weight_function": [str(folder / "weights.py"), "ramp"], "zarr_format": 2,
                       "edge": "shift"},
            ("-e", "dask"),
        ),
        "slab-lost-dim": (
            slab_network, {"inference_type": "sliding_window", "strides": [1, 5, 4],
                           "chunksize": [15, 13, 11]}, ()
        ),
        "numpy-ray": (numpy_network, overlap | gaussian | {"combine": "soft"}, ("-e", "ray")),
    }  # fmt: skip
    written = {}
    for name, (network, keys, options) in jobs.items():
        parts = folder / name
        parts.mkdir()
        model = models.SHAPES | network(parts) | {"max_batch_size": 4}
        job = {
            "input": volume, "output": str(parts / "out.zarr"), "chunksize": [15, 13, 11],
            "threads": 1, "model_config": model,
        } | keys  # fmt: skip
        (parts / "job.json").write_text(json.dumps(job))
        written[name] = (parts / "job.json", options)
    return written


def output_hash(output: Path) -> str:
    """Return a SHA-256 of an output's files, without the epoch and the digest of its job."""
    files = files_below(output)
    for name in ("zarr.json", ".zattrs"):
        if name in files:
            values = json.loads(files[name])
            job = values.get("attributes", values).get("chunkq", {})
            for key in ("digest", "epoch"):
                job.pop(key, None)
            files[name] = json.dumps(values, sort_keys=True).encode()
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def run_jobs(folder: Path) -> dict[str, str]:
    """Run all jobs; return the hash of each output."""
    hashes = {}
    with redis_server() as server:
        for name, (job, options) in write_jobs(folder).items():
            queue = server.url if "REDIS" in options else f"sqlite://{folder}/queue.db"
            words = [server.url if word == "REDIS" else word for word in options]
            if "-e" not in options and "--queue" not in options:
                words += ["--queue", queue]
            command = [sys.executable, "-m", "chunkq", "run", str(job), *words]
            done = subprocess.run(
                command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{name}: exit code {done.returncode}: {done.stderr}")
            hashes[name] = output_hash(job.parent / "out.zarr")
            sys.stdout.write(f"{name}  {hashes[name]}\n")
            sys.stdout.flush()
    return hashes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.prove.outputs", description=__doc__)
    parser.add_argument("file", type=Path, help="where to write the hashes")
    parser.add_argument("--compare", type=Path, help="hashes of the other version")
    arguments = parser.parse_args()
    guardian = SessionGuardian()
    tempfile.tempdir = str(guardian.folder)
    hashes = run_jobs(Path(tempfile.mkdtemp()))
    guardian.close()
    arguments.file.write_text(json.dumps(hashes, indent=1) + "\n")
    if arguments.compare is None:
        return 0
    expected = json.loads(arguments.compare.read_text())
    differing = [name for name in expected if hashes.get(name) != expected[name]]
    sys.stdout.write(f"{len(expected) - len(differing)} of {len(expected)} outputs are identical\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
