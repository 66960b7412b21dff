"""Networks of gpu.py: the brain demo's U-Net, and one with the shape of nnU-Net's 3-D networks.

The programs copy this file beside `brain_network.py`, a copy of the demo's network, and use it as
`class_file`. So it imports nothing from the package `benchmarks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import cast

import torch
from torch import Tensor, nn

CLASSES = 3
NNUNET_WIDTHS = (32, 64, 128, 256, 320, 320)
SMALL_WIDTHS = (4, 8)


def demo_unet() -> nn.Module:
    """Return the demo's U-Net with folded batch norms, as `unet.ts` contains it; no weights."""
    network = import_module("brain_network").UNet3d().eval().fold()
    return cast(nn.Module, network)


def nnunet() -> nn.Module:
    """Return the nnU-Net-like network with random weights, equal in every process."""
    return _seeded(NNUNET_WIDTHS)


def small_nnunet() -> nn.Module:
    """Return the same network with two levels, for a test of the script on a CPU."""
    return _seeded(SMALL_WIDTHS)


def _seeded(widths: Sequence[int]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NnUNet(widths).eval()


def _level(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first, step in ((n_in, stride), (n_out, 1)):
        layers += [
            nn.Conv3d(first, n_out, 3, stride=step, padding=1),
            nn.InstanceNorm3d(n_out, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        ]
    return nn.Sequential(*layers)


class NnUNet(nn.Module):
    """A plain convolutional U-Net: (N, 1, D, H, W) intensities -> (N, CLASSES, D, H, W) logits."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = list(zip((1, *widths), widths, strict=False))
        self.down = nn.ModuleList(
            _level(a, b, 1 if number == 0 else 2) for number, (a, b) in enumerate(pairs)
        )
        upward = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, stride=2) for a, b in upward)
        self.join = nn.ModuleList(_level(2 * b, b) for _, b in upward)
        self.head = nn.Conv3d(widths[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = x / 128 - 1, []
        for level in self.down:
            x = level(x)
            skips.append(x)
        skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
        logits: Tensor = self.head(x)
        return logits
