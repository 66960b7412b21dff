"""`chunkq report` tells where a job's time went, in words, for scripts and on a page."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.harness.networks import toy_model
from tests.harness.processes import CommandResult
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace, run_inline

VOID = {"meta", "br", "link", "img", "input", "hr"}


def made(folder: Path) -> Workspace:
    """A job of 12 chunks whose patches overlap."""
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
    workspace = made(tmp_path_factory.mktemp("sealed"))
    run_inline(workspace.values)
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return made(tmp_path)


def report(workspace: Workspace, *arguments: str | Path, columns: int = 60) -> CommandResult:
    """Run the command in a terminal of some width."""
    environment = workspace.environment | {"COLUMNS": str(columns)}
    return Workspace(workspace.folder, workspace.values, environment).call(
        "report", "out.zarr", *arguments
    )


def values(workspace: Workspace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report(workspace, "--json").ok().out)
    return found


class Page(HTMLParser):
    """Everything of a page that a test asks for; unbalanced tags are errors."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.counts: dict[str, int] = {}
        self.said: list[str] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_the_plan_foresaw_what_was_measured(sealed: Workspace) -> None:
    found = values(sealed)
    depth = str(found["chunks_in_flight"])
    plan = json.loads(sealed.call("plan", "job.json", "--depth", depth, "--json").ok().out)
    assert found["patches"] == found["planned_patches"] == plan["patches"]
    planned = (plan["input_bytes"], plan["output_bytes"], plan["piece_bytes"], plan["piece_bytes"])
    for key, foreseen in zip(found["bytes"], planned, strict=True):
        assert found["planned_bytes"][key] == foreseen
        assert found["bytes"][key] == pytest.approx(foreseen, rel=0.1), key
    assert found["planned_array_bytes"] == plan["array_bytes"]


def test_json_is_the_report_that_was_sealed(sealed: Workspace) -> None:
    found = values(sealed)
    stored = sealed.report()
    assert found == {"output": str(sealed.output), "sealed": True, **stored}
    assert found["chunks"] == found["planned_chunks"] == 12
    assert found["voxels"] == 192 * 256
    assert sum(found["worker_time_shares"].values()) == pytest.approx(1)
    (worker,) = found["workers"].values()
    assert sum(worker["shares"].values()) == pytest.approx(1)
    commits = sealed.commits()
    for stage in ("read", "compute", "write"):
        total = math.fsum(c.seconds[stage] for c in commits)
        assert found["seconds"][stage] == pytest.approx(total)


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_text_fits_the_terminal(sealed: Workspace, columns: int) -> None:
    shown = report(sealed, columns=columns).ok().out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= columns
    one_line = " ".join(shown.split())
    assert "The devices computed" in one_line
    assert "complete" in shown
    for words in ("stage", "workers", "stragglers", "planned", "memory"):
        assert words in shown


def test_the_page_stands_alone(sealed: Workspace, tmp_path: Path) -> None:
    said = report(sealed, "--html", tmp_path / "page.html").ok().out
    assert str(tmp_path / "page.html") in said
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
    text = " ".join(page.said)
    for words in ("The devices computed", "share of the worker's time (%)", "Stragglers"):
        assert words in text


def test_names_on_the_page_are_no_markup(tmp_path: Path) -> None:
    folder = tmp_path / "a <b> & c"
    folder.mkdir()
    workspace = made(folder)
    run_inline(workspace.values)
    report(workspace, "--html", "page.html").ok()
    content = (folder / "page.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; &amp; c" in content
    assert "b" not in Page(content).counts


def test_an_unfinished_job_is_told_so_far(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    shown = report(workspace).ok().out
    assert "so far: 0 of 12 chunks done" in shown
    assert "No chunk is computed yet." in shown
    report(workspace, "--html", "none.html").ok()
    Page((workspace.folder / "none.html").read_text(encoding="utf-8"))

    workspace.compute_inline(only={(0, 0), (0, 1), (1, 0)}.__contains__)
    found = values(workspace)
    assert (found["sealed"], found["chunks"], len(found["missing"])) == (False, 3, 9)
    assert 0 < found["bytes"]["input"] < found["planned_bytes"]["input"]
    assert "so far: 3 of 12 chunks done" in report(workspace).ok().out
    report(workspace, "--html", "some.html").ok()
    page = Page((workspace.folder / "some.html").read_text(encoding="utf-8"))
    assert "so far: 3 of 12 chunks done" in " ".join(page.said)
    assert not (workspace.epoch_folder / "report.json").exists()


def test_a_report_of_an_older_version_is_taken_from_the_records(sealed: Workspace) -> None:
    stored = sealed.report()
    kept = ("chunkq_version", "digest", "chunks", "missing", "patches", "seconds", "workers")
    try:
        sealed.ledger.write_report({key: stored[key] for key in kept})
        found = values(sealed)
    finally:
        sealed.ledger.write_report(stored)
    assert found == {"output": str(sealed.output), "sealed": True, **stored}


@pytest.mark.parametrize("damage", ["gone", "other-number", "cut-off"])
def test_a_damaged_report_of_a_sealed_job_is_taken_from_the_records(
    sealed: Workspace, damage: str
) -> None:
    path, stored = sealed.epoch_folder / "report.json", sealed.report()
    text = path.read_text()
    try:
        if damage == "gone":
            path.unlink()
        elif damage == "other-number":
            assert text.count('"planned_chunks": 12') == 1
            path.write_text(text.replace('"planned_chunks": 12', '"planned_chunks": 13'))
        else:
            path.write_text(text[:-20])
        found = values(sealed)
    finally:
        path.write_text(text)
    assert found == {"output": str(sealed.output), "sealed": True, **stored}


def test_a_folder_without_a_job_is_one_line(tmp_path: Path) -> None:
    answer = Workspace(tmp_path).call("report", "out.zarr")
    answer.refused(answer.code, "no job at this path")
    assert answer.code in (1, 2)
    assert len(answer.err.splitlines()) == 1


def test_without_matplotlib_the_page_is_refused_in_one_line(
    sealed: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    answer = sealed.run(
        "report", "out.zarr", "--html", tmp_path / "page.html", PYTHONPATH=str(tmp_path)
    )
    answer.refused(1, "chunkq[plot]")
    assert len(answer.err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()
    sealed.run("report", "out.zarr", PYTHONPATH=str(tmp_path)).ok()  # the text needs none of it


def test_a_page_that_cannot_be_written_is_one_line(sealed: Workspace, tmp_path: Path) -> None:
    answer = report(sealed, "--html", tmp_path / "none" / "page.html")
    answer.refused(1, "page.html")
    assert len(answer.err.splitlines()) == 1
