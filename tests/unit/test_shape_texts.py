"""Messages about the shape that a network returns name the keys and the order of the job."""

from dataclasses import replace
from typing import Any

import pytest
from chunkq_worker.batch_layout import BatchLayout
from chunkq_worker.runtimes.item_shapes import output_shapes
from chunkq_worker.shape_texts import ShapeTexts
from chunkq_worker.steps import Steps

from chunkq.job.axis_order import channels_first, input_channels
from tests.strategies import plan_for

Shape = tuple[int, ...]
FILES = {
    "torch": {"type": "torchscript", "ts_file": "/n.ts"},
    "numpy": {"type": "class", "class_file": "/n.py", "class_name": "net"},
    "onnx": {"type": "file", "model_file": "/n.onnx"},
}


def texts(
    runtime: str, patch: Shape, output: Shape | None, steps: Steps | None = None, **model: Any
) -> ShapeTexts:
    """Return the texts for a network over a volume of 16×16 voxels."""
    keys = {"runtime": runtime, **FILES[runtime], "ts_file": None, "model_input_shape": patch}
    keys |= FILES[runtime] | model | ({} if output is None else {"model_output_shape": output})
    plan = plan_for((16, 16), (8, 8), model={k: v for k, v in keys.items() if v is not None})
    written = plan.job.model
    first = channels_first(written, 2, input_channels(written, plan.volume))
    layout = BatchLayout.of(first, 1)
    return ShapeTexts(written, plan, layout.item, output_shapes(first, 2), steps or Steps())


@pytest.mark.parametrize(
    ("runtime", "patch", "output", "returned", "parts"),
    [
        # without model_output_shape: the default is named, and what the network returned is set
        ("torch", (1, 8, 8), None, (4, 3, 8, 8), ("expected [4, 1, 8, 8]", "[3, 8, 8]")),
        ("torch", (8, 8), None, (4, 6, 6), ("expected [4, 8, 8]", "[6, 6]")),
        ("torch", (1, 8, 8), (4, 8, 8), (4, 3, 8, 8), ("expected [4, 4, 8, 8]", "[3, 8, 8]")),
        # an output that cannot be centered in the patch is no shape to set
        ("torch", (1, 8, 8), None, (4, 3, 7, 7), ("smaller by an even number",)),
        ("torch", (1, 8, 8), None, (4, 10), ("smaller by an even number",)),
        ("torch", (1, 8, 8), None, (1, 3, 8, 8), ("batch axis",)),
        ("torch", (1, 8, 8), None, (), ("batch axis",)),
        # channels last in a runtime whose shapes have them first
        ("torch", (1, 8, 8), None, (4, 8, 8, 3), ("postprocessing_protected", "[3, 8, 8]")),
        ("torch", (1, 8, 8), (3, 8, 8), (4, 8, 8, 3), ("postprocessing_protected",)),
        # the order of the job is kept
        ("onnx", (8, 8, 1), None, (4, 8, 8, 3), ("expected [4, 8, 8, 1]", "[8, 8, 3]")),
        ("onnx", (1, 8, 8), None, (4, 8, 8, 3), ("expected [4, 1, 8, 8]", ": [3, 8, 8]")),
        ("onnx", (8, 8, 1), None, (4, 3, 8, 8), ("expected [4, 8, 8, 1]", ": [8, 8, 3]")),
        ("onnx", (8, 8, 1), (8, 8, 2), (4, 8, 8, 3), ("expected [4, 8, 8, 2]", ": [8, 8, 3]")),
        ("onnx", (8, 8), None, (4, 6, 6), ("expected [4, 8, 8]", ": [6, 6]")),
    ],
)
def test_a_wrong_output_is_reported_with_the_source_of_the_expected_shape(
    runtime: str, patch: Shape, output: Shape | None, returned: Shape, parts: tuple[str, ...]
) -> None:
    line = texts(runtime, patch, output).wrong_output(4, returned)
    assert f"returned shape {list(returned)} for a batch of {[4, *patch]}" in line
    assert ("model_config.model_output_shape is missing" in line) == (output is None)
    for part in parts:
        assert part in line
    proposed = line.rpartition("set model_output_shape: ")[2]
    if "set model_output_shape" in line:
        assert proposed.startswith(parts[-1].removeprefix(": "))


def test_the_proposed_shape_is_accepted() -> None:
    found = texts("onnx", (8, 8, 1), None).wrong_output(1, (1, 8, 8, 3))
    assert "set model_output_shape: [8, 8, 3]" in found
    fixed = texts("onnx", (8, 8, 1), (8, 8, 3))
    assert (3, 8, 8) in fixed.outputs


def test_steps_see_channels_first_and_so_does_the_message() -> None:
    steps = replace(Steps(), postprocessing=lambda batch: batch)
    line = texts("onnx", (8, 8, 1), None, steps).wrong_output(4, (4, 8, 8, 3))
    assert "expected [4, 1, 8, 8], as the input with channels first" in line
    assert "steps get channels first" in line


def test_the_default_of_a_network_with_lost_dim_is_explained() -> None:
    line = texts("numpy", (5, 8), None, lost_dim=0).wrong_output(2, (2, 3, 8))
    assert "expected [2, 1, 8], as the input with 1 at lost_dim" in line


def test_a_batch_of_several_inputs_names_their_number() -> None:
    made = texts("torch", (1, 8, 8), None)
    joined = made.model.model_copy(update={"join_dim": 1})
    both = replace(made.plan.volume, dtypes=("uint8", "uint8"))
    plan = replace(made.plan, volume=both)
    joint = ShapeTexts(joined, plan, (2, 8, 8), made.outputs, Steps())
    line = joint.wrong_input(4, ValueError("shapes"))
    assert "[4, 2, 8, 8] (4 × model_config.model_input_shape of 2 inputs)" in line


def test_advice_about_the_patch_follows_from_its_lengths_and_the_kind_of_error() -> None:
    odd = texts("torch", (1, 10, 16), (1, 10, 16))
    assert "try patches of [16, 16]" in odd.wrong_input(4, ValueError("sizes"))
    assert "try patches of [16, 16]" in odd.wrong_output(4, (4, 1, 12, 16))
    assert "patches" not in odd.wrong_input(4, NameError("name"))
    even = texts("torch", (1, 16, 16), (1, 16, 16)).wrong_input(4, ValueError("sizes"))
    assert "try patches" not in even
    slices = texts("torch", (1, 1, 16), (1, 1, 16)).wrong_input(4, ValueError("sizes"))
    assert "remove axis 2 of the batch in preprocessing_protected" in slices
