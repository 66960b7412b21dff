"""Groups of tests that run in the same pytest-xdist process; see tests/harness/scheduling.py."""

import json
import os
from pathlib import Path

import pytest

SECONDS = {
    "ray": 149,
    "redis_crashes": 80,
    "dask": 77,
    "slurm": 67,
    "replaced_jobs": 63,
    "device_chunks": 55,
    "tune": 54,
    "blend": 52,
    "redis_losses": 52,
    "empty_space": 52,
    "export": 50,
    "triton_order": 49,
    "crashes": 47,
    "forms": 47,
    "input_combinations": 46,
    "torch_runtime": 44,
    "engines": 44,
    "model_check": 42,
    "outputs": 41,
    "format_contract": 41,
    "cuts": 38,
    "redis_refusals": 37,
    "s3": 36,
    "tensorflow_runtime": 36,
    "documentation": 35,
    "precomputed_jobs": 34,
    "runtime_contract": 33,
    "n5_and_precomputed": 32,
    "reach": 32,
    "axes": 31,
    "pyramids": 31,
    "staged_jobs": 29,
    "damage": 28,
    "resume": 26,
    "key_reference": 25,
    "level_kills": 25,
    "cluster_signals": 24,
    "fleet": 24,
    "early_start": 24,
    "fuzz": 23,
    "redis_command": 23,
    "commands": 22,
    "predictor_results": 20,
    "dask_runs": 22,
    "ingest": 22,
    "stored_sizes": 22,
    "executor_model": 21,
    "fetched_chunks": 20,
    "heads": 20,
    "storage": 20,
}
"""Durations in seconds of the long groups, from `groups` in the file of --durations-file.

Only the order matters: the longest group starts first, groups without a number start last.
"""

SERVERS = frozenset(
    {"redis", "redis_of_session", "server", "dask", "ray", "slurm", "moto", "s3", "small_queue"}
)
"""Fixtures that start a server."""


def select_proof(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the proof that --proof names; without it, keep those of no proof."""
    selected = config.getoption("--proof")
    names = [
        marker.args[0] if (marker := item.get_closest_marker("proof")) else None for item in items
    ]
    config.hook.pytest_deselected(
        items=[item for item, name in zip(items, names, strict=True) if name != selected]
    )
    items[:] = [item for item, name in zip(items, names, strict=True) if name == selected]


def mark_servers(items: list[pytest.Item]) -> None:
    """Mark the tests that use a server's fixture; parameters carry the mark themselves."""
    for item in items:
        if SERVERS.intersection(getattr(item, "fixturenames", [])):
            item.add_marker(pytest.mark.server)


def group_of(item: pytest.Item) -> str:
    """Return the group of a test: its server if starting it is slow, otherwise its file.

    So a SLURM or Ray cluster, and the Dask scheduler that only the contract of the queues needs,
    start once per session, and the fixtures of a file run once.
    """
    fixtures: list[str] = getattr(item, "fixturenames", [])
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "slurm" in fixtures:
        return "slurm"
    if "ray" in fixtures or any(_name(value) == "ray" for value in params.values()):
        return "ray"
    if _name(params.get("backend")) == "dask":
        return "dask_queue"
    return Path(item.path).stem.removeprefix("test_")


def _name(value: object) -> object:
    """Return a parameter that is a string, or the `name` of one that has a name."""
    return value if isinstance(value, str) else getattr(value, "name", None)


def sort_groups(items: list[pytest.Item]) -> None:
    """Sort the tests by group, longest group first; keep the order within a group."""
    items.sort(key=lambda item: -SECONDS.get(group_of(item), 0))


def write_groups(items: list[pytest.Item]) -> None:
    """Write the group of every test; all processes of a session write the same file."""
    partial = _file().with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({item.nodeid: group_of(item) for item in items}))
    partial.replace(_file())


def read_groups() -> dict[str, str]:
    """Return the group of every test by node id; empty without pytest-xdist."""
    if not _file().exists():
        return {}
    groups: dict[str, str] = json.loads(_file().read_text())
    return groups


def _file() -> Path:
    return Path(os.environ["TEST_SESSION"]) / "groups.json"
