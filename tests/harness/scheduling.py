"""Distribute groups of tests over the processes of pytest-xdist.

The `--dist loadgroup` of pytest-xdist needs a private attribute that pytest 9.2 removed. Without
it, every test is silently its own group. Instead, each process writes the group of every test
that it collects, and the scheduler reads these.
"""

from functools import cached_property
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.harness.groups import read_groups


class GroupScheduling(LoadScopeScheduling):
    """Assign whole groups to the processes, in collection order."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False  # the number of tests does not predict the time
        super().__init__(config, log)

    @cached_property
    def _groups(self) -> dict[str, str]:
        return read_groups()

    def _split_scope(self, nodeid: str) -> str:
        return self._groups[nodeid]
