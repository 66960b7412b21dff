"""Jobs and networks for a `Predictor`."""

from pathlib import Path
from typing import Any

import torch

from tests.harness.networks import toy_model

SHAPE = (17, 14, 19)
CHUNKS = 8
"""Chunks of 8³ voxels that own patches, of 18 blocks."""
SLIDING = {
    "inference_type": "sliding_window",
    "strides": [3, 4, 3],
    "weight_function": ["weight_gaussian"],
    "chunksize": [8, 8, 8],
    "storage_chunks": [4, 4, 4],
    "threads": 1,
}


POISONED = {"poison": 200.0}
FLAT = {"class_name": "Flat", "model_output_shape": [6, 6, 6]}
"""Keys of a network whose output has no channel axis."""
FLAT_CLASS = """

class Flat(Toy):
    def forward(self, batch):
        return super().forward(batch)[:, 0]
"""


def keys(folder: Path, toy: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return a job without input and output whose blocks have bands.

    `toy` has arguments of the network. `changes` replace keys, or remove them if None; `model`
    is merged into `model_config`.
    """
    toy_keys = toy_model(folder, **({"patch": (6, 6, 6), "scale": 100.0} | (toy or {})))
    model = toy_keys | changes.pop("model", {})
    network = folder / "network.py"
    network.write_text(network.read_text() + FLAT_CLASS)
    values = SLIDING | {"model_config": model} | changes
    return {key: value for key, value in values.items() if value is not None}


class Conv(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 3, 3, padding=1)
        with torch.no_grad():
            for number, values in enumerate(self.conv.parameters()):
                steps = torch.arange(values.numel(), dtype=torch.float32)
                values.copy_(torch.sin(steps + number).reshape(values.shape) / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return y


def save_script(path: Path) -> Path:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Conv()).save(path)
    return path
