"""`plan --check-model` finds out what a network does before a job is started with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace

NETWORK = '''
"""Networks with one habit each."""
import torch


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.conv(x / 100)


class Normed(Plain):
    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList([torch.nn.InstanceNorm3d(2), torch.nn.GroupNorm(1, 2)])

    def forward(self, x):
        for norm in self.norms:
            x = norm(super().forward(x))[:, :1]
        return super().forward(x)


class BatchNormInTraining(Plain):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm3d(2, track_running_stats=False)

    def forward(self, x):
        return self.norm(super().forward(x))


class MixesItems(Plain):
    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(0, keepdim=True)


class MindsItsPlace(Plain):
    def forward(self, x):
        return super().forward(x) + torch.arange(len(x)).reshape(-1, 1, 1, 1, 1)


class NotANumber(Plain):
    def forward(self, x):
        return super().forward(x).log()


class Wide(Plain):
    def forward(self, x):
        return super().forward(x)[..., 1:]
'''


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    write_zarr(tmp_path / "in.zarr", random_volume((20, 22, 24)), (8, 8, 8))
    (tmp_path / "net.py").write_text(NETWORK)
    values: dict[str, Any] = {
        "input": "in.zarr",
        "output": "out.zarr",
        "chunksize": [16, 16, 16],
        "threads": 1,
        "model_config": {
            "runtime": "torch",
            "type": "class",
            "class_file": "net.py",
            "model_input_shape": [1, 8, 8, 8],
            "model_output_shape": [2, 8, 8, 8],
            "max_batch_size": 4,
        },
    }
    return Workspace(tmp_path, values)


def probed(workspace: Workspace, name: str, **model: Any) -> dict[str, Any]:
    workspace.write_job(model={"class_name": name, **model})
    found: dict[str, Any] = json.loads(
        workspace.call("plan", "job.json", "--check-model", "--json").ok().out
    )
    assert not workspace.output.exists()
    probe: dict[str, Any] = found["model_check"]
    return probe


def test_an_honest_network_is_timed_and_nothing_is_held_against_it(workspace: Workspace) -> None:
    found = probed(workspace, "Plain")
    assert found["error"] is None
    assert found["warnings"] == []
    assert found["batch"] == found["patches"] == 4
    assert 0 < found["batch_seconds"] < found["load_seconds"]
    assert found["lowest"] < found["highest"]
    assert found["finite"] is True
    assert found["by_position"] < 1e-6
    assert found["by_batch_size"] < 1e-6
    assert found["other_size"] == 2
    assert found["peak_bytes"] > 100e6
    assert found["device"] == "cpu"
    shown = workspace.call("plan", "job.json", "--check-model").ok().out
    for label in ("one patch", "network alone", "peak memory", "output range"):
        assert f"\n{label}" in shown
    assert "warning" not in shown


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Normed", ["2 layers normalise", "norms.0", "norms.1"]),
        ("BatchNormInTraining", ["normalise by the patch's own statistics", "norm"]),
        ("MixesItems", ["results depend on the size of a batch"]),
        ("MindsItsPlace", ["depends on its place in the batch"]),
        ("NotANumber", ["NaN or infinity"]),
    ],
)
def test_a_habit_that_shows_in_results_is_told_in_one_line(
    workspace: Workspace, name: str, words: list[str]
) -> None:
    lines = probed(workspace, name)["warnings"]
    assert any(all(word in line for word in words) for line in lines), lines
    shown = workspace.call("plan", "job.json", "--check-model").ok().out
    assert sum(line.startswith("warning") for line in shown.splitlines()) == len(lines)


def test_a_shape_that_breaks_the_declaration_is_refused(workspace: Workspace) -> None:
    workspace.write_job(model={"class_name": "Wide"})
    answer = workspace.call("plan", "job.json", "--check-model")
    answer.refused(1, "returned shape [4, 2, 8, 8, 7]", "model_output_shape")


def test_a_network_in_single_batches_is_probed_too(workspace: Workspace) -> None:
    found = probed(workspace, "Plain", max_batch_size=1)
    assert found["warnings"] == []
    assert (found["by_position"], found["by_batch_size"], found["other_size"]) == (None, None, None)
