"""`chunkq report` prints the timing of a job as text, JSON or an HTML page."""

import json
import math
import os
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chunkq_producer.reports.job_report import load_job_report
from chunkq_producer.reports.page import page as html_page

from chunkq.errors import ErrorCode
from chunkq.install_hint import install_command
from tests.harness.networks import toy_model
from tests.harness.processes import CommandResult
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace, run_inline

VOID_TAGS = {"meta", "br", "link", "img", "input", "hr"}


def create_workspace(folder: Path) -> Workspace:
    """Write a job of 12 chunks with overlapping patches."""
    write_zarr(folder / "in.zarr", random_volume((192, 256)), (32, 32))
    workspace = Workspace(
        folder,
        {
            "input": str(folder / "in.zarr"),
            "output": str(folder / "out.zarr"),
            "inference_type": "sliding_window",
            "strides": [16, 16],
            "chunksize": [64, 64],
            "storage_chunks": [32, 32],
            "threads": 1,
            "model_config": toy_model(folder, (32, 32), scale=100.0),
        },
    )
    workspace.write_job()
    return workspace


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = create_workspace(tmp_path_factory.mktemp("sealed"))
    run_inline(workspace.values)
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return create_workspace(tmp_path)


def report(workspace: Workspace, *arguments: str | Path, columns: int = 60) -> CommandResult:
    """Run the command in a terminal of `columns` columns."""
    environment = workspace.environment | {"COLUMNS": str(columns)}
    return Workspace(workspace.folder, workspace.values, environment).call(
        "report", "out.zarr", *arguments
    )


def values(workspace: Workspace) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(report(workspace, "--json").ok().out)
    return figures


class Page(HTMLParser):
    """Tags, attributes and text of an HTML page. Unbalanced tags fail an assertion."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.counts: dict[str, int] = {}
        self.texts: list[str] = []
        self.feed(content)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_measured_figures_match_the_plan(sealed: Workspace) -> None:
    figures = values(sealed)
    depth = str(figures["chunks_in_flight"])
    plan = json.loads(sealed.call("plan", "job.json", "--depth", depth, "--json").ok().out)
    assert figures["patches"] == figures["planned_patches"] == plan["patches"]
    planned_bytes = (
        plan["input_bytes"],
        plan["output_bytes"],
        plan["piece_bytes"],
        plan["piece_bytes"],
        sum(level["bytes"] for level in plan["pyramid"]),
        sum(level["bytes_read"] for level in plan["pyramid"]),
    )
    for key, expected in zip(figures["bytes"], planned_bytes, strict=True):
        assert figures["planned_bytes"][key] == expected
        assert figures["bytes"][key] == pytest.approx(expected, rel=0.1), key
    assert figures["planned_array_bytes"] == plan["array_bytes"]


def test_plan_and_report_name_the_precision(sealed: Workspace, tmp_path: Path) -> None:
    plan = json.loads(sealed.call("plan", "job.json", "--json").ok().out)
    assert plan["precision"] == values(sealed)["precision"] == "float32"
    assert ["precision", "float32,"] in [
        line.split()[:2] for line in sealed.call("plan", "job.json").ok().out.splitlines()
    ]
    assert "precision: float32" in report(sealed).ok().out.splitlines()
    report(sealed, "--html", tmp_path / "report.html").ok()
    assert "Precision: float32." in Page((tmp_path / "report.html").read_text()).texts


def test_json_equals_the_stored_report(sealed: Workspace) -> None:
    figures = values(sealed)
    stored = sealed.report()
    assert figures == {"output": str(sealed.output), "sealed": True, **stored}
    assert figures["chunks"] == figures["planned_chunks"] == 12
    assert figures["voxels"] == 192 * 256
    assert sum(figures["worker_time_shares"].values()) == pytest.approx(1)
    (worker,) = figures["workers"].values()
    assert sum(worker["shares"].values()) == pytest.approx(1)
    commits = sealed.commits()
    for stage in ("read", "compute", "write"):
        total = math.fsum(c.seconds[stage] for c in commits)
        assert figures["seconds"][stage] == pytest.approx(total)


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_text_fits_the_terminal(sealed: Workspace, columns: int) -> None:
    text = report(sealed, columns=columns).ok().out
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= columns
    assert sealed.report()["conclusion"] in " ".join(text.split())
    assert "complete" in text
    for heading in ("stage", "workers", "stragglers", "planned", "memory"):
        assert heading in text


def test_the_page_has_no_external_resources(sealed: Workspace, tmp_path: Path) -> None:
    output = report(sealed, "--html", tmp_path / "page.html").ok().out
    assert str(tmp_path / "page.html") in output
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(content)
    assert page.counts["svg"] == 4
    assert [value for name, value in page.attributes if name == "role"] == ["img"] * 4
    alternatives = [value for name, value in page.attributes if name == "aria-label"]
    assert all(text and text.endswith(".") for text in alternatives)
    assert "script" not in page.counts
    assert "://" not in content
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value is not None
            assert value.startswith("#"), value
    text = " ".join(page.texts)
    for expected in (
        sealed.report()["conclusion"],
        "share of the worker's time (%)",
        "Stragglers",
    ):
        assert expected in text


def test_the_page_escapes_the_name_of_the_output(tmp_path: Path) -> None:
    folder = tmp_path / "a <b> & c"
    folder.mkdir()
    workspace = create_workspace(folder)
    run_inline(workspace.values)
    report(workspace, "--html", "page.html").ok()
    content = (folder / "page.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; &amp; c" in content
    assert "b" not in Page(content).counts


def test_the_page_shows_code_in_the_advice_and_escapes_the_rest(sealed: Workspace) -> None:
    job_report = load_job_report(sealed.job)
    without_charts = replace(job_report.timing, chunks=0)
    values = job_report.values | {"advice": 'Set `a<b>` & "c" <d>.'}
    content = html_page(replace(job_report, values=values, timing=without_charts))
    Page(content)
    [advice] = re.findall('<p class="advice">(.*)</p>', content)
    assert advice.startswith("Set <code>a&lt;b&gt;</code> &amp; ")
    assert unescape(advice) == 'Set <code>a<b></code> & "c" <d>.'


def test_the_report_of_an_unfinished_job_covers_the_chunks_so_far(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    text = report(workspace).ok().out
    assert "so far: 0 of 12 chunks done" in text
    assert values(workspace)["conclusion"] in text
    report(workspace, "--html", "none.html").ok()
    Page((workspace.folder / "none.html").read_text(encoding="utf-8"))

    workspace.compute_inline(only={(0, 0), (0, 1), (1, 0)}.__contains__)
    figures = values(workspace)
    assert (figures["sealed"], figures["chunks"], len(figures["missing"])) == (False, 3, 9)
    assert 0 < figures["bytes"]["input"] < figures["planned_bytes"]["input"]
    assert "so far: 3 of 12 chunks done" in report(workspace).ok().out
    report(workspace, "--html", "some.html").ok()
    page = Page((workspace.folder / "some.html").read_text(encoding="utf-8"))
    assert "so far: 3 of 12 chunks done" in " ".join(page.texts)
    assert not (workspace.epoch_folder / "report.json").exists()


def test_a_report_of_an_older_version_is_computed_from_the_commit_records(
    sealed: Workspace,
) -> None:
    stored = sealed.report()
    old_keys = ("chunkq_version", "digest", "chunks", "missing", "patches", "seconds", "workers")
    try:
        sealed.job.ledger.write_report({key: stored[key] for key in old_keys})
        figures = values(sealed)
    finally:
        sealed.job.ledger.write_report(stored)
    assert figures == {"output": str(sealed.output), "sealed": True, **stored}


@pytest.mark.parametrize("damage", ["missing", "changed", "truncated"])
def test_a_damaged_report_of_a_sealed_job_is_computed_from_the_commit_records(
    sealed: Workspace, damage: str
) -> None:
    path, stored = sealed.epoch_folder / "report.json", sealed.report()
    text = path.read_text()
    try:
        if damage == "missing":
            path.unlink()
        elif damage == "changed":
            assert text.count('"planned_chunks": 12') == 1
            path.write_text(text.replace('"planned_chunks": 12', '"planned_chunks": 13'))
        else:
            path.write_text(text[:-20])
        figures = values(sealed)
    finally:
        path.write_text(text)
    assert figures == {"output": str(sealed.output), "sealed": True, **stored}


def test_the_report_of_a_missing_job_is_an_error_of_one_line(tmp_path: Path) -> None:
    result = Workspace(tmp_path).call("report", "out.zarr")
    result.refused(2, ErrorCode.JOB_MISSING, "out.zarr")
    assert len(result.err.splitlines()) == 1


def test_the_page_without_matplotlib_is_an_error_of_one_line(
    sealed: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not installed')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = sealed.run("report", "out.zarr", "--html", tmp_path / "page.html", PYTHONPATH=paths)
    result.refused(1, ErrorCode.PACKAGE_MISSING, install_command("plot"))
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()
    sealed.run("report", "out.zarr", PYTHONPATH=paths).ok()  # only the page needs matplotlib


def test_a_page_that_cannot_be_written_is_an_error_of_one_line(
    sealed: Workspace, tmp_path: Path
) -> None:
    result = report(sealed, "--html", tmp_path / "none" / "page.html")
    result.refused(1, ErrorCode.STORAGE_FAILED, "page.html")
    assert len(result.err.splitlines()) == 1
