"""Where a simulation's figures come from: other benchmarks' files, options, assumptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scale_model import BUCKET, Inputs

MEASURED_PATCH, COPIED_VOXEL_BYTES = 64, 4 + 4
"""network.py's patches, and the bytes of a voxel of its copy: of the input and of the output."""


@dataclass(frozen=True)
class Fed:
    """The inputs, and where each of them comes from."""

    inputs: Inputs
    sources: dict[str, str]


def feed(folder: Path, *, bucket: bool, patch: int, cpu: bool, given: dict[str, float]) -> Fed:
    """Collect the figures: defaults, then the store's kind, then files, then options."""
    values: dict[str, float] = {}
    sources = {f.name: str(f.metadata["source"]) for f in fields(Inputs)}

    def take(found: dict[str, float], source: str) -> None:
        values.update(found)
        sources.update(dict.fromkeys(found, source))

    if bucket:
        take(BUCKET, "ASSUMED")
    readers: dict[str, Callable[[Any], dict[str, float]]] = {
        "planning.json": from_planning,
        "queues.json": from_queues,
        "network.json": lambda found: from_network(found, patch if cpu else None),
    }
    for name, reader in readers.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            take(reader(json.loads(path.read_text())), name)
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise SystemExit(
                f"{path} is not what its benchmark writes ({type(error).__name__}: {error}); "
                "run that benchmark again, or remove the file"
            ) from None
    if cpu and sources["patches_per_s"] != "network.json" and "patches_per_s" not in given:
        raise SystemExit(
            f"--device cpu: {folder} has no network.json with the part `bare`; run `python "
            "benchmarks/network.py bare --json benchmarks/network.json`, or give --patches-per-s"
        )
    take(given, "option")
    return Fed(Inputs(**values), sources)


def from_queues(figures: list[dict[str, Any]]) -> dict[str, float]:
    """Take queues.py's figures."""
    names = {"drain": "tasks_per_s", "enqueue": "enqueue_per_s", "memory": "task_bytes"}
    found: dict[str, float] = {}
    for figure in figures:
        name = names.get(figure["part"])
        disk = figure["part"] == "memory" and figure["what"].startswith("disk")
        if name is None or (disk and figure["queue"] != "sqlite"):
            continue
        found[f"{figure['queue']}_{name}"] = float(figure["value"])
    return found


def from_planning(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """Take planning.py's figures."""
    planned, listed = figures["plan 10 million chunks"], figures["status of 100 000 chunks"]
    return {
        "plan_chunks_per_s": planned["chunks"] / planned["seconds"],
        "list_records_per_s": listed["chunks"] / listed["seconds"],
    }


def from_network(figures: dict[str, Any], patch: int | None) -> dict[str, float]:
    """Take network.py's figures; those of its processor only for patches of a given edge.

    Seconds are taken to grow with a patch's voxels.
    """
    found = {}
    if copied := figures.get("copy"):
        voxels = copied["patches"]["chunkq"] * MEASURED_PATCH**3
        found["codec_bytes_per_s"] = voxels * COPIED_VOXEL_BYTES / copied["seconds"]["chunkq"]
    if patch is not None and (bare := figures.get("bare")):
        rate = bare["patches"]["chunkq"] / bare["seconds"]["chunkq"]
        found["patches_per_s"] = rate * (MEASURED_PATCH / patch) ** 3
    return found
