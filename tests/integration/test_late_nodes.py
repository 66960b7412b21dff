"""Nodes of a SLURM step that are late for the cluster of the leading node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chunkq_producer import run_steps
from chunkq_producer.slurm import Announcement, Step
from chunkq_producer.worker_command import RunOptions

from chunkq.errors import ChunkqError, ErrorCode, QueueError
from chunkq.job.events import ignore
from tests.harness.workspace import Workspace, run_inline


@contextmanager
def ended_cluster(*_: Any) -> Iterator[Any]:
    raise QueueError("the cluster has ended", code=ErrorCode.CLUSTER_UNAVAILABLE)
    yield


@pytest.mark.parametrize("engine", ["dask", "ray"])
@pytest.mark.parametrize("has_ended", [True, False])
def test_a_node_that_joins_after_the_end_of_the_run_has_nothing_to_do(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, engine: str, has_ended: bool
) -> None:
    workspace.write_job()
    job, report = run_inline(Path(workspace.folder / "job.json"))
    monkeypatch.setattr(run_steps, "wait_for_leader", lambda *_: Announcement("tcp://leader:1"))
    monkeypatch.setattr(run_steps, "join_cluster", ended_cluster)
    monkeypatch.setattr(run_steps, "has_ended", lambda *_: has_ended)
    step = Step(1, 2, "node2", "leader.json")
    arguments = (job.record.job, engine, step, RunOptions(), ignore)
    if has_ended:
        result = run_steps.follow(*arguments)
        assert (result.is_leader, result.report) == (False, report)
        return
    with pytest.raises(ChunkqError) as caught:
        run_steps.follow(*arguments)
    assert caught.value.code == ErrorCode.CLUSTER_UNAVAILABLE
