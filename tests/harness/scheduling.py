"""How pytest-xdist distributes the groups of tests over its processes.

pytest-xdist's own `--dist loadgroup` needs a private attribute of pytest's items that pytest 9.2
has no longer; without it every test is silently a group of its own. Here each process writes down
the group of every test that it has collected, and the scheduler reads that.
"""

from functools import cached_property
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.harness.groups import read_groups


class GroupScheduling(LoadScopeScheduling):
    """Give whole groups to the processes, in the order in which they are collected."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False  # by number of tests, which says nothing here
        super().__init__(config, log)

    @cached_property
    def _groups(self) -> dict[str, str]:
        return read_groups()

    def _split_scope(self, nodeid: str) -> str:
        return self._groups[nodeid]
