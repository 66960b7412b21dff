"""Write the template's T1 volume and its tissue labels as OME-Zarr 0.5.

    python prepare.py brain.zarr        writes brain.zarr and brain_truth.zarr beside it

A second run does nothing. A store gets its name only when it is complete, so an interrupted run
leaves no incomplete store behind.
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


def truth_path(out: Path) -> Path:
    """Return the path of the labels beside the volume."""
    return out.with_name(f"{out.stem}_truth{out.suffix}")


def is_finished(store: Path) -> bool:
    """Return whether this script wrote the store; raise FileExistsError if something else did."""
    if not os.path.lexists(store):
        return False
    try:
        has_mark = MARK in json.loads((store / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, LookupError, TypeError):
        has_mark = False
    if not has_mark:
        raise FileExistsError(f"{store}: exists and is not from this example; remove or rename it")
    return True


def attributes(name: str, description: str) -> dict[str, Any]:
    """Return OME-Zarr attributes of an image with 1 mm voxels."""
    scale = {"type": "scale", "scale": [1.0, 1.0, 1.0]}
    axes = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in template.AXES]
    dataset = {"path": "0", "coordinateTransformations": [scale]}
    image = {"name": name, "axes": axes, "datasets": [dataset]}
    return {"ome": {"version": "0.5", "multiscales": [image]}, MARK: description}


def write_image(store: Path, volume: template.Volume, attrs: dict[str, Any]) -> None:
    """Write a volume as OME-Zarr under a temporary name, and rename it."""
    import zarr

    store.parent.mkdir(parents=True, exist_ok=True)
    # In the target's folder, so on the same file system: the rename is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{store.name}.", dir=store.parent) as scratch:
        partial = Path(scratch) / "store"
        group = zarr.create_group(partial, zarr_format=3, attributes=attrs)
        group.create_array(
            "0", data=volume, chunks=(CHUNK,) * 3, fill_value=0, dimension_names=template.AXES
        )
        try:
            partial.rename(store)
        except OSError:  # another run may have written the store meanwhile
            if not is_finished(store):
                raise


def prepare(store: Path, load: Callable[[], template.Volume], name: str, description: str) -> str:
    """Write a store unless it is finished; return a line for the user."""
    if is_finished(store):
        return f"{store}: exists already"
    volume = load()
    write_image(store, volume, attributes(name, description))
    return f"{store}: {description}, {' x '.join(map(str, volume.shape))} voxels (z, y, x)"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the example's volume as OME-Zarr.")
    parser.add_argument("out", type=Path, metavar="OUT.zarr")
    out: Path = parser.parse_args().out
    try:
        print(prepare(out, template.load_t1, "MNI152 T1", "T1 intensities"))
        print(prepare(truth_path(out), template.load_labels, "MNI152 tissues", "tissue labels"))
    except (template.TemplateMissingError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
