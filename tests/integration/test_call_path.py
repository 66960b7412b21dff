"""The path of a job through the code is short, and the design page shows it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "docs" / "design.md"
MAX_RETURNS = 14
"""How often a reader may go back to a module that was left before."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The path of a job, recorded in a process that has imported nothing yet."""
    file = tmp_path_factory.mktemp("path") / "path.json"
    subprocess.run(
        [sys.executable, "-m", "tests.prove.call_path", file],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def documented() -> list[str]:
    """Return the names of the functions in the picture of the design page."""
    section = DESIGN.read_text().split("### Path of a job")[1]
    picture = section.split("```")[1]
    return [line.split()[0] for line in picture.strip().splitlines()]


def test_a_job_calls_the_functions_of_the_design_page_in_their_order(path: dict[str, Any]) -> None:
    names = documented()
    assert len(names) > 20
    called = [name for name in path["names"] if name in names]
    assert called == names


def test_the_design_page_names_every_module_of_the_control_side(path: dict[str, Any]) -> None:
    modules = {name.partition(".")[2] for name in path["modules"]}
    text = "\n".join(documented())
    assert not [name for name in modules if not re.search(rf"^{re.escape(name)}\.", text, re.M)]


def test_a_reader_of_the_control_side_seldom_goes_back_to_a_module(path: dict[str, Any]) -> None:
    assert len(path["modules"]) > MAX_RETURNS
    assert path["returns"] <= MAX_RETURNS
