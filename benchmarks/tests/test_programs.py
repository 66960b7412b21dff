"""Every benchmark program can be imported, and what it times exists."""

from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.hotpath import WATCHED, owner_of

PROGRAMS = sorted(path.stem for path in Path(__file__).parents[1].glob("*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_can_be_imported(name: str) -> None:
    assert import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize(("module", "name"), [row[2:] for row in WATCHED])
def test_every_timed_function_exists(module: str, name: str) -> None:
    owner, function = owner_of(module, name)
    assert callable(getattr(owner, function))
