"""Text for narrow terminals, for few colors and for logs."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from chunkq.progress_bar import Bar, is_live
from chunkq.tables import FittingTable
from chunkq.terminal import rows, without_colors, wrap, wrapped

COMMAND = "`pip install 'chunkq[redis]'`"
LINE = f"chunkq: queue: redis:// needs the package rq; run {COMMAND} [package_missing]"


def render(renderable: object, **options: object) -> str:
    stream = io.StringIO()
    Console(file=stream, **options).print(renderable)  # type: ignore[arg-type]
    return stream.getvalue()


@given(st.lists(st.text("abc-/.", min_size=1, max_size=30), min_size=1), st.integers(1, 50))
def test_lines_break_between_words_and_fit_unless_one_word_does_not(
    words: list[str], width: int
) -> None:
    lines = wrap(" ".join(words), width)
    assert " ".join(lines).split() == words
    assert all(len(line) <= width or " " not in line for line in lines)


def test_a_log_has_one_line_per_message() -> None:
    assert wrapped(LINE, None) == LINE


def test_code_in_backticks_stays_on_one_line_if_it_fits() -> None:
    assert any(COMMAND in line for line in wrap(LINE, 40))
    assert [line for line in wrap(LINE, 20) if COMMAND in line] == []


def test_further_lines_keep_the_indent() -> None:
    assert wrap("  one two three", 9) == ["  one two", "  three"]


def test_values_are_beside_their_labels_or_below() -> None:
    pairs = [("input", "a few words"), ("path", "/a/long/path")]
    assert rows(pairs, None, label=8) == ["input   a few words", "path    /a/long/path"]
    assert rows(pairs, 14, label=8) == ["input   a few", "        words", "path", "  /a/long/path"]
    assert rows(pairs, 14, label=None)[:2] == ["input", "  a few words"]


@pytest.mark.parametrize("system", [None, "standard", "truecolor"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_full_bar_differs_from_an_empty_one_without_its_colors(
    system: str | None, encoding: str
) -> None:
    def text(done: int) -> str:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        console = Console(file=stream, color_system=system, force_terminal=True, width=20)  # type: ignore[arg-type]
        with console.capture() as capture:
            console.print(Bar(done, 10, 10))
        return "".join(c for c in capture.get() if c in "#-█░")

    full, half, empty = text(10), text(5), text(0)
    assert len(full) == len(half) == len(empty) == 10
    assert len(set(full)) == len(set(empty)) == 1
    assert half == full[:5] + empty[5:]
    assert full[0] != empty[0]


@pytest.mark.parametrize(
    ("terminal", "variables", "live"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
    ],
)
def test_only_terminals_that_can_move_the_cursor_show_a_changing_display(
    terminal: bool, variables: dict[str, str], live: bool
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    assert is_live(Console(file=Stream(), _environ=variables)) == live


def test_codes_for_colors_are_removed_from_texts_of_other_programs() -> None:
    assert without_colors("\x1b[36mray::Net.serve()\x1b[39m \x1b[1;31mfailed\x1b[0m") == (
        "ray::Net.serve() failed"
    )


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120])
def test_a_table_splits_no_word_on_any_terminal(width: int) -> None:
    headings = ("host", "device", "running", "stages")
    row = ("node17.example", "GPU 0", "0/1/2, 0/1/3", "read 26% compute 41% write 31%")
    text = render(FittingTable(headings, [row], left=range(4), wraps=(3,)), width=width)
    assert {word for cell in row for word in cell.split()} <= set(text.split())
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert ("device" in text.splitlines()[0]) == (width >= 60)
