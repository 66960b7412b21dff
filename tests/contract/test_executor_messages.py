"""The contract of every queue backend, of messages on it that are not tasks."""

import json
from typing import Any

import pytest

from chunkq.errors import QueueError
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import Executor
from tests.harness.queue_backends import Backend
from tests.harness.queue_workers import JOB, Recorder, burst, tasks


def message(**changes: Any) -> str:
    """Return a message that is a task, except for the changes."""
    return json.dumps({**Task("infer", *JOB, 0, (0,)).as_dict(), **changes})


FOREIGN: dict[str, str | bytes] = {
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94.",
    "a dotted path": message(kind="os.system"),
    "an entry point": message(kind="chunkq_worker.infer:infer_chunk"),
    "no kind": '{"job": "j", "epoch": "00000000", "item": 0, "chunk": [0]}',
    "a kind that is a list": message(kind=["infer"]),
    "a chunk that is a word": message(chunk="0"),
    "no chunk": message(chunk=[]),
    "a negative chunk": message(chunk=[-1]),
    "a chunk of fractions": message(chunk=[0.5]),
    "a job that is a list": message(job=["j"]),
    "an epoch of another form": message(epoch="../../.."),
    "an epoch that is a number": message(epoch=12345678),
    "a negative item": message(item=-1),
    "an item that is a boolean": message(item=True),
    "null": "null",
    "half a message": '{"kind": "infer", "jo',
    "nothing": "",
    "deep nesting": "[" * 100_000,
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_message_that_is_not_a_task_is_rejected(text: str | bytes) -> None:
    Task.from_json(message())
    with pytest.raises(QueueError) as error:
        Task.from_json(text)  # type: ignore[arg-type]
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["a pickle", "a dotted path", "an entry point", "deep nesting"])
@pytest.mark.transport
def test_a_foreign_message_on_the_queue_is_deleted_and_never_run(
    queue: Executor, url: str, backend: Backend, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend.insert(url, FOREIGN[name])
    queue.submit(tasks(1))
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.tasks == tasks(1)
    assert queue.jobs() == {}
    [record] = [r for r in caplog.records if r.levelname == "ERROR"]
    assert len(record.getMessage()) < 1000
