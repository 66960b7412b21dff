"""Which options of a network `chunkq tune` tries, and why it leaves others out."""

from typing import Any

import pytest
from chunkq_worker.tune.options import with_network_options
from chunkq_worker.tune.search import Options

from chunkq.job.model_config import ModelConfig


def model(**keys: Any) -> ModelConfig:
    values = {
        "runtime": "torch",
        "type": "class",
        "class_file": "/net.py",
        "class_name": "Net",
        "model_input_shape": [1, 8, 8, 8],
        "device": "cuda",
    }
    return ModelConfig.model_validate(values | keys)


def tried(
    *allowed: str, kept: tuple[str, ...] = (), has_all: bool = False, **keys: Any
) -> tuple[list[str], list[tuple[str, str]], list[str], list[str]]:
    """Return switches, precisions that can be chosen, those that are shown, and the lines."""
    options, lines = with_network_options(Options(), model(**keys), allowed, kept, has_all=has_all)
    shown = [name for _, name in options.shown_precisions]
    return list(options.switches), list(options.precisions), shown, list(lines)


def test_on_a_gpu_all_options_of_torch_are_tried() -> None:
    assert tried() == (
        ["channels_last", "cuda_graph", "compile"],
        [],
        ["float16", "bfloat16", "float32"],  # tf32 is the default
        [],
    )


def test_options_that_the_job_has_or_keeps_are_not_tried_again() -> None:
    switches, _, shown, lines = tried(compile=True, precision="float16", kept=("channels_last",))
    assert (switches, shown, lines) == (["cuda_graph"], ["bfloat16", "tf32", "float32"], [])
    assert tried(kept=("precision",))[2] == []


def test_a_requested_precision_can_be_chosen_and_is_not_only_shown() -> None:
    _, precisions, shown, _ = tried("float16")
    assert precisions == [("precision", "float16"), ("dtype", "float16")]
    assert shown == ["bfloat16", "float32"]


def test_on_a_cpu_only_compile_is_tried_unless_all_options_are_requested() -> None:
    switches, _, shown, lines = tried(device="cpu")
    assert (switches, shown) == (["compile"], [])
    assert [line.partition(":")[0] for line in lines] == [
        "channels_last, precision bfloat16",
        "cuda_graph",
    ]
    switches, _, shown, lines = tried(device="cpu", has_all=True)
    assert (switches, shown) == (["channels_last", "compile"], ["bfloat16"])
    assert [line.partition(":")[0] for line in lines] == ["cuda_graph"]


@pytest.mark.parametrize(
    ("keys", "left_out"),
    [
        # The graph is compiled already.
        ({"type": "torchscript", "ts_file": "/net.ts"}, "compile"),
        # torch has the layout for 4 and 5 axes only.
        ({"model_input_shape": [8, 8]}, "channels_last"),
        # Options of torch; TF32 is one of ONNX Runtime, too.
        (
            {"runtime": "onnx", "type": "file", "model_file": "/net.onnx"},
            "channels_last, cuda_graph, compile",
        ),
        # A network in 16 bits has no other precision.
        ({"dtype": "float16"}, "precision bfloat16"),
    ],
)
def test_options_that_do_not_apply_are_left_out_with_a_reason(
    keys: dict[str, Any], left_out: str
) -> None:
    lines = tried(**keys)[3]
    assert any(line.startswith(f"{left_out}: ") for line in lines), lines


def test_onnx_runtime_on_a_gpu_is_shown_with_tf32() -> None:
    keys = {"runtime": "onnx", "type": "file", "model_file": "/net.onnx"}
    assert tried(**keys)[2] == ["tf32"]
