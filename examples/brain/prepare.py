"""Write the template's T1 volume and its tissue labels as OME-Zarr 0.5.

    python prepare.py brain.zarr        writes brain.zarr and, beside it, brain_truth.zarr

A second run finds both finished and does nothing. A store takes its name only once it is
complete, so an interrupted run leaves none that could be mistaken for a finished one.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import template

CHUNK = 64
MARK = "chunkq_example"


def truth_beside(out: Path) -> Path:
    return out.with_name(f"{out.stem}_truth{out.suffix}")


def is_finished(store: Path) -> bool:
    """True if this script wrote the store; an error if something else stands there."""
    if not os.path.lexists(store):
        return False
    try:
        mine = MARK in json.loads((store / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, LookupError, TypeError):
        mine = False
    if not mine:
        raise FileExistsError(f"{store} exists and is not this example's: remove it or rename it")
    return True


def attributes(name: str, what: str) -> dict[str, Any]:
    scale = {"type": "scale", "scale": [1.0, 1.0, 1.0]}
    axes = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in template.AXES]
    dataset = {"path": "0", "coordinateTransformations": [scale]}
    image = {"name": name, "axes": axes, "datasets": [dataset]}
    return {"ome": {"version": "0.5", "multiscales": [image]}, MARK: what}


def write_image(store: Path, volume: template.Volume, attrs: dict[str, Any]) -> None:
    import zarr

    store.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, hence on its file system: the rename is then atomic.
    with tempfile.TemporaryDirectory(prefix=f".{store.name}.", dir=store.parent) as scratch:
        partial = Path(scratch) / "store"
        group = zarr.create_group(partial, zarr_format=3, attributes=attrs)
        group.create_array(
            "0", data=volume, chunks=(CHUNK,) * 3, fill_value=0, dimension_names=template.AXES
        )
        try:
            partial.rename(store)
        except OSError:  # another run may have been faster
            if not is_finished(store):
                raise


def prepare(store: Path, load: Callable[[], template.Volume], name: str, what: str) -> str:
    if is_finished(store):
        return f"{store}: already there"
    volume = load()
    write_image(store, volume, attributes(name, what))
    return f"{store}: {what}, {' x '.join(map(str, volume.shape))} voxels (z, y, x)"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the example's volume as OME-Zarr.")
    parser.add_argument("out", type=Path, metavar="OUT.zarr")
    out: Path = parser.parse_args().out
    try:
        print(prepare(out, template.load_t1, "MNI152 T1", "T1 intensities"))
        print(prepare(truth_beside(out), template.load_labels, "MNI152 tissues", "tissue labels"))
    except (template.TemplateMissingError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
