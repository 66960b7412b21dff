"""One image in every form that tools write: the same voxels reach the network, the same bytes come
out.

The combinations are those of tests/harness/input_combinations.py. Each job reads many of them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from ome_zarr_models.v05 import Image

from chunkq.geometry.box import Box
from chunkq.storage.images import find_source
from chunkq.storage.padded_reading import read_padded
from chunkq.storage.selection import Selection
from tests.harness.files import files_below
from tests.harness.input_combinations import SHAPE, Combination, all_combinations, image
from tests.harness.workspace import run_inline

INPUTS_PER_JOB = 25
NETWORK = """
import numpy as np


def network(batch):
    return batch.astype(np.float32) * 0.5
"""
COMBINATIONS = all_combinations()
IS_BOOL = [combination.dtype == "bool" for combination in COMBINATIONS]
GROUPS = [
    numbers[start : start + INPUTS_PER_JOB]
    for kind in (False, True)
    for numbers in [[n for n, is_bool in enumerate(IS_BOOL) if is_bool == kind]]
    for start in range(0, len(numbers), INPUTS_PER_JOB)
]
GROUP_OF = {number: group for group, numbers in enumerate(GROUPS) for number in numbers}
Written = tuple[dict[int, str], Path]


def run_job(folder: Path, inputs: list[Any]) -> Path:
    """Run a job over inputs; return its output."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "network.py").write_text(NETWORK)
    model = {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(folder / "network.py"),
        "class_name": "network",
        "model_input_shape": [4, 4, 4],
        "max_batch_size": 64,
    }
    values = {
        "input": inputs if len(inputs) > 1 else inputs[0],
        "output": str(folder / "out.zarr"),
        "inference_type": "sliding_window",
        "strides": [3, 3, 3],
        "pad_width": [2, 2, 2],
        "pad_mode": "reflect",
        "chunksize": [8, 8, 8],
        "threads": 1,
        "model_config": model,
    }
    run_inline(values)
    return folder / "out.zarr"


def chunks_of(output: Path) -> dict[str, bytes]:
    """Return the storage chunks of an image by name."""
    files = files_below(output / "0")
    return {name: content for name, content in files.items() if not name.endswith("zarr.json")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, bytes]]:
    """The storage chunks of the output for bool and for numbers, from a plain .npy file."""
    chunks = {}
    for dtype in ("bool", "uint8"):
        folder = tmp_path_factory.mktemp(dtype)
        np.save(folder / "in.npy", image(dtype))
        chunks[dtype == "bool"] = chunks_of(run_job(folder, [str(folder / "in.npy")]))
    return chunks


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Written]:
    """Return the paths of the inputs of a group, and the output of the job that reads them."""
    groups: dict[int, Written] = {}

    def write(group: int) -> Written:
        if group not in groups:
            folder = tmp_path_factory.mktemp(f"group{group}")
            paths = {}
            for number in GROUPS[group]:
                combination = COMBINATIONS[number]
                path = folder / f"i{number}"
                paths[number] = combination.write(path, image(combination.dtype))
            inputs = [{"path": path, **COMBINATIONS[n].keys} for n, path in paths.items()]
            groups[group] = paths, run_job(folder, inputs)
        return groups[group]

    return write


def test_there_are_hundreds_of_different_combinations() -> None:
    assert len(set(map(str, COMBINATIONS))) == len(COMBINATIONS) >= 200


@pytest.mark.parametrize("number", range(len(COMBINATIONS)), ids=list(map(str, COMBINATIONS)))
def test_every_combination_has_the_voxels_and_the_output_of_the_image(
    number: int,
    written: Callable[[int], Written],
    expected: dict[bool, dict[str, bytes]],
) -> None:
    combination: Combination = COMBINATIONS[number]
    paths, output = written(GROUP_OF[number])
    values = image(combination.dtype)

    source = find_source(paths[number], Selection(**combination.keys))
    window = Box((-3, -3, -3), tuple(size + 3 for size in SHAPE))
    voxels = read_padded(source.present(source.open()), window, "reflect", 0)
    assert source.dtype == str(voxels.dtype) == values.dtype.newbyteorder("=").name
    np.testing.assert_array_equal(voxels, np.pad(values, 3, "reflect"))

    result = output / f"i{number}"
    assert chunks_of(result) == expected[combination.dtype == "bool"]
    Image.from_zarr(zarr.open_group(result, mode="r"))
