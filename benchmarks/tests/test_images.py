"""Contestants over photographs do the same work as the job, and the page shows their figures."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import image_contestant as contestant
from benchmarks import images, results
from benchmarks.turns import Figures
from chunkq.images.decoding import decode
from chunkq.images.transform import transform
from chunkq.job.job_parsing import parse_job
from tests.harness.workspace import run_inline

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

COUNT = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    images.write_photographs(folder / "images", COUNT)
    images.write_network(folder / "network.ts", 0)
    return folder


def test_the_network_of_each_contestant_gets_the_same_input(folder: Path) -> None:
    values = images.job_values(folder / "images", folder / "network.ts", folder / "out.parquet")
    spec = parse_job(values).image_spec
    for path in (folder / "images").iterdir():
        expected, _ = transform(decode(path.read_bytes(), "RGB"), spec)
        np.testing.assert_allclose(contestant.network_input(str(path)), expected, rtol=0, atol=1e-6)


def test_the_loop_and_the_job_predict_the_same(folder: Path) -> None:
    output = folder / "out.parquet"
    run_inline(images.job_values(folder / "images", folder / "network.ts", output))
    settings = {
        "folder": str(folder / "images"),
        "network": str(folder / "network.ts"),
        "batch": 2,
        "loader_workers": 0,
    }
    assert contestant.loader(settings, str(folder / "loop.parquet"))["images"] == COUNT
    columns = ["path", "prediction", "score"]
    rows, expected = (
        pq.read_table(path, columns=columns).to_pydict()
        for path in (output, folder / "loop.parquet")
    )
    assert (rows["path"], rows["prediction"]) == (expected["path"], expected["prediction"])
    np.testing.assert_allclose(rows["score"], expected["score"], rtol=0, atol=1e-6)


def test_rates_leave_the_start_of_commands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = object.__new__(images.Contest)
    contest.counts, contest.loader_workers = {"few": 10, "many": 110}, 0
    start = {"chunkq": 5.0, "loader": 1.0, "ray": 9.0}
    speed = {"chunkq": 20, "loader": 25, "ray": 10}

    def run(name: str, size: str) -> Figures:
        seconds = start[name] + contest.counts[size] / speed[name]
        return {"seconds": seconds, "rate": [7, 9, 8][contest.loader_workers]}

    monkeypatch.setattr(contest, "run", run)
    figures = images.compare(contest, 2, 0)
    assert figures["rounds"] == 2
    assert figures["loader_workers"] == 1
    assert figures["rate"] == pytest.approx(speed)
    assert figures["ratios"] == {"loader": pytest.approx([0.8] * 2), "ray": pytest.approx([2] * 2)}
    assert figures["command_ratios"]["ray"] == pytest.approx([20 / 10.5] * 2)


def test_the_page_has_a_row_for_each_comparison(tmp_path: Path) -> None:
    names = ("chunkq", "loader", "ray")
    figures = {
        "rate": dict(zip(names, (9.4, 10.0, 5.0), strict=True)),
        "ratios": {"loader": [0.94], "ray": [1.88]},
        "command_ratios": {"loader": [0.9], "ray": [1.5]},
    }
    lines = results.images(dict.fromkeys(images.PARTS, figures), tmp_path)
    assert [line.rpartition(" | ")[2] for line in lines[2:]] == ["**missed** |", "met |"] * 2
