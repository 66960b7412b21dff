"""Which options of a run let its workers start before the job file is read."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from chunkq_producer import early_process
from chunkq_producer.early_process import EarlyStart, early_start
from chunkq_producer.runner import run_job
from chunkq_producer.worker_command import RunOptions
from chunkq_worker.child_process import ChildProcess

from chunkq.job.events import ignore
from chunkq.job.job_parsing import parse_job
from chunkq.queue.registry import QUEUE_VARIABLE
from tests.harness.networks import toy_model

REDIS = "redis://host/0"


@pytest.mark.parametrize(
    ("engine", "queue", "variable", "starts"),
    [
        (None, None, None, True),
        ("sqlite", None, None, True),
        (None, REDIS, None, True),
        (None, None, REDIS, True),
        ("rq", REDIS, None, True),
        (None, "inprocess://run", None, False),
        (None, None, "dask://host:1", False),
        ("dask", None, None, False),  # the option decides, whatever the queue of the job is
        ("ray", None, REDIS, False),
        (None, "other://host", None, False),
        (None, REDIS, "inprocess://run", True),  # the option has precedence
    ],
)
def test_workers_start_early_if_they_are_processes_of_this_machine(
    engine: str | None,
    queue: str | None,
    variable: str | None,
    starts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(QUEUE_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(QUEUE_VARIABLE, variable)
    with (
        mock.patch.object(early_process, "EarlyProcess") as process,
        early_start(engine, queue, 3),
    ):
        assert process.start.mock_calls == ([mock.call(3)] if starts else [])
    assert process.start.return_value.end.call_count == starts


def test_a_process_that_is_taken_is_not_ended_with_its_context() -> None:
    with mock.patch.object(early_process, "EarlyProcess") as process:
        with early_start("sqlite", "sqlite:///queue.db", None) as start:
            assert start is not None
            assert start.take() is process.start.return_value
            assert start.take() is None
        process.start.return_value.end.assert_not_called()


def test_a_process_ends_as_soon_as_the_job_names_another_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(QUEUE_VARIABLE, raising=False)
    values = {
        "input": "in.zarr", "output": "out.zarr", "queue": "inprocess://run",
        "model_config": toy_model(tmp_path, (8, 8)),
    }  # fmt: skip
    process = mock.Mock()

    def steps(*arguments: Any, **options: Any) -> None:
        process.end.assert_called_once_with()

    with mock.patch("chunkq_producer.run_steps.run_steps", steps):
        start = EarlyStart(process)
        run_job(parse_job(values), options=RunOptions(), emit=ignore, start=start)
    process.end.assert_called_once_with()


def test_a_process_changes_the_variables_that_differ() -> None:
    child = ChildProcess(mock.Mock(), {"A": "1", "B": "2", "C": "3"}, 0, 0, None)
    expected: dict[str, Any] = {"A": None, "B": "5", "D": "4"}
    assert child.changes({"B": "5", "C": "3", "D": "4"}) == expected
