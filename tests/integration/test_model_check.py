"""`plan --check-model` runs the network and reports its time, memory and properties."""

import json
from pathlib import Path
from typing import Any

import pytest

from chunkq.errors import ErrorCode
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace

NETWORK = '''
"""Networks with one property each."""
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


class DependsOnPosition(Plain):
    def forward(self, x):
        return super().forward(x) + torch.arange(len(x)).reshape(-1, 1, 1, 1, 1)


class NotANumber(Plain):
    def forward(self, x):
        return super().forward(x).log()


class TrainedOnShares(Plain):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm3d(2)
        self.norm.num_batches_tracked += 1
        self.norm.running_var *= 1e-6

    def forward(self, x):
        return self.norm(super().forward(x))


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


def check_model(workspace: Workspace, name: str, **model: Any) -> dict[str, Any]:
    """Return the result of checking the network class `name`."""
    workspace.write_job(model={"class_name": name, **model})
    text = workspace.call("plan", "job.json", "--check-model", "--json").ok().out
    assert not workspace.output.exists()
    check: dict[str, Any] = json.loads(text)["model_check"]
    return check


def test_a_well_behaved_network_is_measured_without_warnings(workspace: Workspace) -> None:
    check = check_model(workspace, "Plain")
    assert check["error"] is None
    assert check["warnings"] == []
    assert check["batch"] == check["patches"] == 4
    assert 0 < check["batch_seconds"] < check["load_seconds"]
    assert 0 <= check["input_range"][0] < check["input_range"][1]
    assert check["output_range"][0] < check["output_range"][1]
    assert check["finite"] is True
    assert check["by_position"] < 1e-6
    assert check["by_batch_size"] < 1e-6
    assert check["other_size"] == 2
    assert check["peak_bytes"] > 100e6
    assert check["device"] == "cpu"
    text = workspace.call("plan", "job.json", "--check-model").ok().out
    for label in ("one patch", "network alone", "peak memory", "input range", "output range"):
        assert f"\n{label}" in text
    assert "warning" not in text


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("Normed", ["2 layers normalize", "norms.0", "norms.1"]),
        ("BatchNormInTraining", ["layers normalize", "norm (BatchNorm3d)"]),
        ("MixesItems", ["depend on the batch size", "max_batch_size"]),
        ("DependsOnPosition", ["position in the batch"]),
        ("NotANumber", ["NaN", "nan: zero"]),
        ("TrainedOnShares", ["trained on", "layer norm has"]),
    ],
)
def test_a_property_that_affects_results_is_a_warning_of_one_line(
    workspace: Workspace, name: str, fragments: list[str]
) -> None:
    warnings = check_model(workspace, name)["warnings"]
    assert any(all(part in line for part in fragments) for line in warnings), warnings
    text = workspace.call("plan", "job.json", "--check-model").ok().out
    lines = text.splitlines()
    assert sum(line.startswith("warning") for line in lines) == len(warnings)


def test_an_output_shape_that_differs_from_the_declared_one_is_refused(
    workspace: Workspace,
) -> None:
    workspace.write_job(model={"class_name": "Wide"})
    result = workspace.call("plan", "job.json", "--check-model")
    result.refused(1, ErrorCode.MODEL_UNUSABLE, "[4, 2, 8, 8, 7]", "model_output_shape")


def test_a_network_with_batch_size_1_has_no_batch_deviations(workspace: Workspace) -> None:
    check = check_model(workspace, "Plain", max_batch_size=1)
    assert check["warnings"] == []
    assert (check["by_position"], check["by_batch_size"], check["other_size"]) == (None, None, None)
