"""The table of `tune` fits every terminal, and no word of it is split."""

import io

import pytest
from chunkq_worker.tune.search import Cost, Measurement, Row, SearchResult, Setting, Stage
from chunkq_worker.tune.table import COMMENT_WIDTH, build_table, comment_lines
from rich.console import Console

from chunkq.plan.footprint import Footprint


def row(stage: Stage, setting: Setting, measurement: Measurement) -> Row:
    footprint = object.__new__(Footprint)
    return Row(setting, stage, Cost(27, 343, 0, footprint, 27, (128, 96, 128)), measurement)


def result() -> SearchResult:
    """Two stages; settings with every switch, a failure, and a note of a GPU's memory."""
    first = Measurement(
        "ok", 123.4, 2.0, 1 << 30, 3 << 30, (1.0, 1.02), difference=1e-6, agreement=0.99987
    )
    fast = Setting(16, 3, compile=True, channels_last=True, cuda_graph=True)
    failed = Measurement("failed", note="RuntimeError: the convolution algorithm was not found")
    rows = (
        row("network", Setting(1, 2), first),
        row("network", fast, failed),
        row("pipeline", Setting(16, 3, channels_last=True, chunk=(128, 96, 128)), first),
    )
    return SearchResult(rows, rows[2], rows[0])


def rendered(width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(build_table(result(), width))
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160])
def test_each_line_fits_the_terminal_and_no_word_is_split(width: int) -> None:
    text = rendered(width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    words = {"depth", "128×96×128,", "convolution", "(1.00-1.02)", "GPU"}
    assert words <= set(text.split())
    for stage in ("network only:", "entire chunks:"):
        assert stage in text


def test_columns_are_left_out_only_where_the_rest_fits() -> None:
    assert "99.987" in rendered(160)
    assert "99.987" not in rendered(80)
    assert "99.987" in rendered(40)  # one line per cell


def test_the_comment_in_the_job_file_has_the_whole_table() -> None:
    lines = comment_lines(result())
    assert max(map(len, lines[:10])) <= COMMENT_WIDTH
    assert all(name in lines[0] for name in ("setting", "job time", "labels", "remark"))
