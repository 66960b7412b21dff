"""The lowest versions in pyproject.toml are those that `make prove PART=oldest` tests."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOUND = re.compile(r"([A-Za-z0-9_-]+)>=([\d.]+)")


def bounds() -> dict[str, str]:
    """Name -> lower bound, of the dependencies and of the extras that load model files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needs = [
        *project["dependencies"],
        *(n for e in ("torch", "onnx", "tensorflow") for n in extras[e]),
    ]
    return {found[1]: found[2] for need in needs if (found := BOUND.fullmatch(need))}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pairs = [line.partition("==") for line in lines if not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, _, version in pairs}


@pytest.mark.parametrize("name", sorted(bounds()))
def test_the_proof_installs_the_lower_bound_itself(name: str) -> None:
    pinned = pins()["tensorflow-cpu" if name == "tensorflow" else name]
    lowest, tested = (
        [int(n) for n in v.split("+")[0].split(".")] for v in (bounds()[name], pinned)
    )
    assert tested[: len(lowest)] == lowest
    assert not any(tested[len(lowest) :])
