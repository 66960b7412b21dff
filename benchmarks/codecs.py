"""Bytes and seconds of each codec for labels, averages and averages stored as integers.

Run `python -m benchmarks.codecs`. Predictions are the shares of four classes whose regions are
about 16 voxels wide, with noise of 1 % as networks return it. Seconds are the smallest of three
repetitions, encoding alone, in one thread, 64³ voxels per storage chunk.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.plan.value_range import ValueRange
from chunkq.storage.codecs import Codec
from chunkq.storage.formats.zarr_writing import array_metadata

EDGE, CHUNK, CLASSES = 192, 64, 4
CODECS = (
    Codec("none"),
    *(Codec("lz4", level) for level in (1, 5, 9)),
    *(Codec("zstd", level) for level in (1, 3, 5)),
)


def shares(edge: int, classes: int) -> npt.NDArray[np.float32]:
    """Return smooth shares of classes (classes, edge, edge, edge) with a little noise."""
    random = np.random.default_rng(0)
    coarse = random.standard_normal((classes, *(edge // 16 + 2,) * 3)).astype(np.float32)
    for axis in (1, 2, 3):  # linear interpolation
        position = np.arange(edge) / 16
        low = position.astype(int)
        weight = (position - low).astype(np.float32).reshape([-1] + [1] * (3 - axis))
        first, second = np.take(coarse, low, axis), np.take(coarse, low + 1, axis)
        coarse = first * (1 - weight) + second * weight
    logits = 12 * coarse + 0.1 * random.standard_normal(coarse.shape).astype(np.float32)
    powers = np.exp(logits - logits.max(0))
    return np.asarray(powers / powers.sum(0), np.float32)


def encoded(values: npt.NDArray[Any], codec: Codec) -> tuple[int, float]:
    """Return the bytes of all storage chunks of an array ([C,] *S), and the seconds."""
    import tensorstore as ts

    leading = (1,) * (values.ndim - 3)
    chunks = (*leading, *(CHUNK,) * 3)
    documents = array_metadata(
        "0", shape=values.shape, chunks=chunks, dtype=values.dtype, fill_value=0, zarr_format=3,
        axes=None, codec=codec,
    )  # fmt: skip
    metadata = json.loads(documents["0/zarr.json"])
    fastest, size = float("inf"), 0
    for _ in range(3):
        context = ts.Context({"data_copy_concurrency": {"limit": 1}})
        store = ts.open(
            {"driver": "zarr3", "kvstore": {"driver": "memory"}, "metadata": metadata},
            create=True, context=context,
        ).result()  # fmt: skip
        start = time.perf_counter()
        store.write(values).result()
        fastest = min(fastest, time.perf_counter() - start)
        memory = store.kvstore
        size = sum(len(memory.read(key).result().value) for key in memory.list().result())
    return size, fastest


def main() -> None:
    """Print one row per codec."""
    averages = shares(EDGE, CLASSES)
    arrays = {
        "labels uint8": averages.argmax(0).astype(np.uint8),
        "averages float32": averages,
        "averages uint8": ValueRange(0, 1, "uint8").stored(averages),
    }
    print("| codec | " + " | ".join(arrays) + " |")
    for codec in CODECS:
        cells = []
        for values in arrays.values():
            size, seconds = encoded(values, codec)
            cells.append(f"{size / values.nbytes:.1%}, {values.nbytes / seconds / 1e6:.0f} MB/s")
        print(f"| {codec.name} {codec.level or ''} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
