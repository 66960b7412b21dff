"""What a run tells its user to do in place of `chunkq produce --resume`."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from chunkq_producer import runner
from chunkq_producer.worker_command import RunOptions

from chunkq.errors import RESUME, ErrorCode, QueueError
from chunkq.job.events import Event, Message

OPTIONS = RunOptions()


@pytest.mark.parametrize(
    ("overwrite", "rerun"),
    [(False, "run the same command"), (True, "run the same command without --overwrite")],
)
def test_a_run_advises_to_repeat_the_command_that_the_user_has_used(
    monkeypatch: pytest.MonkeyPatch, overwrite: bool, rerun: str
) -> None:
    events: list[Event] = []
    job: Any = None
    other = QueueError("queue: x: unreachable")

    @contextmanager
    def workers(*arguments: Any) -> Iterator[None]:
        arguments[3](Message(f"chunkq: a worker lost it; {RESUME} to continue"))
        raise errors.pop(0)
        yield

    engine = SimpleNamespace(step=None, starts_early=True)
    monkeypatch.setattr(runner, "select_engine", lambda *_: engine)
    monkeypatch.setattr(runner, "early_workers", workers)
    errors = [QueueError(f"queue: x: lost; {RESUME}", code=ErrorCode.QUEUE_LOST), other]
    with pytest.raises(QueueError) as caught:
        runner.run_job(job, options=OPTIONS, overwrite=overwrite, emit=events.append)
    assert (str(caught.value), caught.value.code) == (f"queue: x: lost; {rerun}", "queue_lost")
    assert events == [Message(f"chunkq: a worker lost it; {rerun} to continue")]
    with pytest.raises(QueueError) as caught:
        runner.run_job(job, options=OPTIONS, overwrite=overwrite, emit=events.append)
    assert caught.value is other
