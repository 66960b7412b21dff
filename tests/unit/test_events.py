"""Sinks of events: log, callbacks of users, progress display."""

import io
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
from chunkq_producer.run_display import RunDisplay
from rich.console import Console

from chunkq import progress_bar as progress
from chunkq.job.events import (
    Event,
    Message,
    StageProgress,
    TaskEnded,
    TaskFailed,
    fan_out,
    ignore,
    progress_sink,
    write_log,
)
from chunkq.job.tasks import Task
from chunkq.progress_bar import ProgressDisplay

TASK = Task("infer", "/data/out.zarr.chunkq", "0a1b2c3d", 0, (0, 3))
EVENTS = (
    Message("a warning"),
    StageProgress("loading"),
    StageProgress("queueing", 1, 2),
    TaskEnded(TASK, 1.25),
    TaskFailed(TASK, 2, "broken"),
)


def test_the_log_has_messages_and_tasks_at_their_levels_but_no_progress(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "chunkq")
    for event in EVENTS:
        write_log(event)
    records = [(r.name, r.levelno) for r in caplog.records]
    assert records == [
        ("chunkq.run", logging.WARNING),
        ("chunkq.worker", logging.INFO),
        ("chunkq.worker", logging.ERROR),
    ]
    message, ended, failed = caplog.messages
    assert message == "a warning"
    assert "0.3" in ended
    assert "0.3" in failed
    assert "broken" in failed


def test_a_user_receives_the_numbers_of_stages_that_count_items() -> None:
    received: list[tuple[int, int]] = []
    emit = progress_sink(lambda done, total: received.append((done, total)))
    for event in EVENTS:
        emit(event)
    assert received == [(1, 2)]


def test_each_sink_receives_every_event_in_order() -> None:
    received: list[tuple[str, Event]] = []
    emit = fan_out(
        lambda event: received.append(("a", event)),
        ignore,
        lambda event: received.append(("b", event)),
    )
    for event in EVENTS:
        emit(event)
    assert received == [(name, event) for event in EVENTS for name in "ab"]


def test_without_a_terminal_progress_is_a_line_per_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProgressDisplay() as display:
        display(StageProgress("queueing", 1, 3))  # within the first interval of the stage
        monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", 0.0)
        display(StageProgress("queueing", 2, 3))
        display(StageProgress("loading"))
        display(Message("[a] line"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["queueing: 2/3", "chunkq: loading", "[a] line"]


def test_a_line_says_how_long_the_stage_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with ProgressDisplay() as display:
        for done in (10, 20, 50, 90, 110):
            display(StageProgress("verifying", done, 110))
            now += 30.0
    assert capsys.readouterr().err.splitlines() == [
        "verifying: 20/110, about 4 min 30 s left",
        "verifying: 50/110, about 1 min 30 s left",
        "verifying: 90/110, about 22 s left",
        "verifying: 110/110",
    ]


@pytest.mark.parametrize("display_type", [ProgressDisplay, RunDisplay])
def test_a_terminal_shows_one_stage_at_a_time_and_nothing_at_the_end(
    display_type: type[ProgressDisplay],
) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    with display_type() as display:
        display.console = Console(file=screen, width=80, _environ={"TERM": "xterm"})
        display(StageProgress("loading"))
        display(StageProgress("queueing", 1, 3))
        display(StageProgress("finalizing", 0, 2))
        display(Message("a warning"))
    text = screen.getvalue()
    positions = [text.index(word) for word in ("loading", "queueing", "finalizing", "a warning")]
    assert positions == sorted(positions)
    assert "queueing" not in text[positions[2] :]
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 3  # the cursor is visible again


class FakeHandle:
    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def update(self, content: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(content)


@pytest.mark.parametrize("has_kernel", [True, False], ids=["notebook", "console"])
def test_a_notebook_has_a_bar_in_its_cell_that_disappears(
    has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, shell = FakeHandle(), SimpleNamespace()
    if has_kernel:
        shell.kernel = object()

    def display(content: dict[str, str], *, raw: bool, display_id: bool) -> FakeHandle:
        assert display_id
        handle.update(content, raw=raw)
        return handle

    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    submodule = ModuleType("IPython.display")
    submodule.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", submodule)
    assert progress.shows_bar() is has_kernel
    with ProgressDisplay() as sink:
        for done in range(3):
            sink(StageProgress("computing chunks", done, 2))
    if not has_kernel:
        assert handle.shown == []
        return
    assert [content["text/plain"].partition(",")[0] for content in handle.shown] == [
        *(f"computing chunks: {done}/2" for done in range(3)),
        "",
    ]
    assert 'value="2" max="2"' in handle.shown[2]["text/html"]
