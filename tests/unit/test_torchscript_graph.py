"""Graphs of TorchScript networks that can return different outputs for one batch."""

from typing import Any

import pytest
import torch
from chunkq_worker.runtimes.torchscript_graph import is_repeatable

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
BATCH = torch.ones(1, 1, 8)


class Pure(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(1, 2, 3, padding=1)
        self.norm = torch.nn.InstanceNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x) + self.norm(self.conv(x)).relu_()
        return torch.cat([y, y * 2], 1) if y.mean() > 0 else y


class Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.view(-1).add_(1)
        return x * self.calls


class Attribute(torch.nn.Module):
    calls: int

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Kept(torch.nn.Module):
    kept: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.kept = [torch.zeros(1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(x)
        return x * len(self.kept)


class Uninitialized(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.empty_like(x)


class UninitializedQuantized(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = torch._empty_affine_quantized([8], dtype=torch.quint8, scale=1.0, zero_point=0)
        return x + memory.dequantize()


class Noise(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() < 0:
            x = x + torch.randn_like(x)
        return x


def test_a_graph_of_known_operators_is_repeatable() -> None:
    module = Pure().eval()
    assert is_repeatable(torch.jit.script(module))
    assert is_repeatable(torch.jit.trace(module.conv, BATCH))


STATEFUL = (Counter, Attribute, Kept, Uninitialized, UninitializedQuantized, Noise)


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_graph_with_state_or_random_values_is_not_repeatable(kind: Any) -> None:
    assert not is_repeatable(torch.jit.script(kind().eval()))


def test_a_module_whose_code_is_unknown_is_not_repeatable() -> None:
    assert not is_repeatable(Pure().eval())
    dropout = torch.nn.Dropout(0.5).train()
    assert not is_repeatable(torch.jit.trace(dropout, BATCH, check_trace=False))
