"""`make prove PART=oldest` tests the lower bounds in pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOUND = re.compile(r"([A-Za-z0-9_-]+)>=([\d.]+)")


def bounds() -> dict[str, str]:
    """Return the lower bounds of the dependencies and of the model runtimes, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *(r for extra in ("torch", "onnx", "tensorflow") for r in extras[extra]),
    ]
    matches = [match for r in requirements if (match := BOUND.fullmatch(r))]
    return {match[1]: match[2] for match in matches}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pairs = [line.partition("==") for line in lines if not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, _, version in pairs}


@pytest.mark.parametrize("name", sorted(bounds()))
def test_the_oldest_tested_version_is_the_lower_bound(name: str) -> None:
    pinned = pins()["tensorflow-cpu" if name == "tensorflow" else name]
    lowest, tested = (
        [int(n) for n in v.split("+")[0].split(".")] for v in (bounds()[name], pinned)
    )
    assert tested[: len(lowest)] == lowest
    assert not any(tested[len(lowest) :])
