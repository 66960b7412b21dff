"""The outputs of the batch of a check are used by the first chunk that reads the same voxels."""

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chunkq_worker.batching import Batcher
from chunkq_worker.steps import Steps

from tests.harness.torch_networks import FakeRuntime, create_plan


class SharedMemory(FakeRuntime):
    """A runtime that writes the results of all batches to the same memory."""

    def forward(self, batch: npt.NDArray[Any]) -> Any:
        result = super().forward(batch)
        if len(self.batches) == 1:
            self.memory = result.clone()
        return self.memory[: len(batch)].copy_(result)


class CheckedNetwork:
    """A batcher that has kept its first batch, and the input of its chunk."""

    def __init__(
        self,
        folder: Path,
        dtype: str = "uint8",
        runtime: type[FakeRuntime] = FakeRuntime,
        **model: Any,
    ) -> None:
        keys = {"inference_type": "sliding_window", "strides": [4, 4]}
        plan = create_plan(folder, dtype=dtype, model=model, **keys)
        chunk = plan.chunk((0, 0))
        self.runtime = runtime()
        self.batcher = Batcher(plan, plan.job.model, self.runtime, Steps())
        self.patches, self.origin = list(plan.patches(chunk)), chunk.halo.start
        self.voxels = np.random.default_rng(1).integers(0, 200, chunk.halo.shape).astype(dtype)
        with self.batcher.keeping_batch():
            self.outputs = self.run(self.patches[: self.batcher.size])

    def run(self, patches: Any = None) -> npt.NDArray[Any]:
        """Return the predictions of patches, by default all; forget the batches before."""
        self.runtime.batches.clear()
        pairs = self.batcher.predictions(patches or self.patches, [self.voxels], self.origin)
        return np.concatenate([values.numpy().copy() for _, (values,) in pairs])

    @property
    def batches(self) -> int:
        return len(self.runtime.batches)

    @property
    def all_batches(self) -> int:
        return ceil(len(self.patches) / self.batcher.size)


def test_a_chunk_runs_all_but_the_batch_of_the_check_with_the_same_predictions(
    tmp_path: Path,
) -> None:
    checked = CheckedNetwork(tmp_path)
    predictions = checked.run()
    assert checked.batches == checked.all_batches - 1 > 1
    assert np.array_equal(checked.run(), predictions)
    assert checked.batches == checked.all_batches  # the batch is used once


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_chunk_runs_a_batch_of_which_one_voxel_has_changed(tmp_path: Path, dtype: str) -> None:
    checked = CheckedNetwork(tmp_path, dtype)
    index = checked.patches[checked.batcher.size - 1].source.index(checked.origin)
    last = tuple(range(*part.indices(n))[-1] for part, n in zip(index[-2:], (99, 99), strict=True))
    checked.voxels[last] += 1
    checked.run()
    assert checked.batches == checked.all_batches


def test_a_chunk_with_other_patches_runs_all_and_releases_the_batch(tmp_path: Path) -> None:
    checked = CheckedNetwork(tmp_path)
    checked.run(checked.patches[::-1])
    assert checked.batches == checked.all_batches
    checked.run()
    assert checked.batches == checked.all_batches


def test_the_outputs_that_are_kept_are_copies(tmp_path: Path) -> None:
    checked = CheckedNetwork(tmp_path, runtime=SharedMemory)
    checked.batcher.raw(checked.patches[-4:], [checked.voxels], checked.origin)
    assert np.array_equal(checked.run()[: len(checked.outputs)], checked.outputs)


def test_nothing_is_kept_of_a_network_whose_outputs_may_differ(tmp_path: Path) -> None:
    checked = CheckedNetwork(tmp_path, stochastic=True)
    checked.run()
    assert checked.batches == checked.all_batches
