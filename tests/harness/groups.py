"""Groups of tests that run in the same process of pytest-xdist, the longest group first."""

from pathlib import Path

import pytest

SECONDS = {"ray": 300, "slurm": 250}
"""Measured durations of the long groups. Only their order counts; a shorter group has none."""


SERVERS = frozenset(
    {"redis", "redis_of_session", "server", "dask", "ray", "slurm", "moto", "s3", "small_queue"}
)
"""Fixtures that start a server."""


def select_proof(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the proof asked for by --proof; without it, those of no proof."""
    chosen = config.getoption("--proof")
    names = [
        marker.args[0] if (marker := item.get_closest_marker("proof")) else None for item in items
    ]
    config.hook.pytest_deselected(
        items=[item for item, name in zip(items, names, strict=True) if name != chosen]
    )
    items[:] = [item for item, name in zip(items, names, strict=True) if name == chosen]


def mark_servers(items: list[pytest.Item]) -> None:
    """Mark the tests that use a server's fixture; parameters that do are marked where they are."""
    for item in items:
        if SERVERS.intersection(getattr(item, "fixturenames", [])):
            item.add_marker(pytest.mark.server)


def group_of(item: pytest.Item) -> str:
    """Return the group of a test: its server if that is expensive, otherwise its file.

    A SLURM or Ray cluster starts once per session this way. Fixtures of a file are made once too.
    """
    fixtures: list[str] = getattr(item, "fixturenames", [])
    params = getattr(getattr(item, "callspec", None), "params", {}).values()
    if "slurm" in fixtures:
        return "slurm"
    if "ray" in fixtures or any(_name(value) == "ray" for value in params):
        return "ray"
    return Path(item.path).stem.removeprefix("test_")


def _name(value: object) -> object:
    """Return a parameter that is a text, or the name of one that has a name."""
    return value if isinstance(value, str) else getattr(value, "name", None)


def assign_groups(items: list[pytest.Item]) -> None:
    """Mark every test with its group and sort the groups, the longest first."""
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: -SECONDS.get(groups[item], 0))
