"""Create input volumes and read outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def random_volume(shape: tuple[int, ...], dtype: npt.DTypeLike = "uint8") -> npt.NDArray[Any]:
    """Return a fixed random volume: integers in 0 to 100, floats in 0 to 1."""
    values = np.random.default_rng(7).random(shape)
    return (values * (1 if np.dtype(dtype).kind == "f" else 100)).astype(dtype)


def write_zarr(
    path: Path, values: npt.NDArray[Any], chunks: tuple[int, ...] | None = None, **options: Any
) -> Path:
    """Store an array as Zarr v3; `zarr_format` and other options go to `zarr.create_array`."""
    import zarr

    chunks = chunks or values.shape
    array = zarr.create_array(
        path, shape=values.shape, chunks=chunks, dtype=values.dtype, **options
    )
    array[...] = values
    return path


def read_output(path: str | Path) -> npt.NDArray[Any]:
    """Return the complete output volume, read with zarr-python."""
    import zarr

    group = zarr.open_group(str(path), mode="r")
    return np.asarray(group[group.attrs["chunkq"]["array"]][...])
