"""Networks that return several arrays, in every runtime and container; see HEAD_FORMS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.runtimes.returned_values import HeadReader, unused_note
from chunkq_worker.runtimes.torch import TorchRuntime
from chunkq_worker.runtimes.torch_files import LoadedNetwork
from chunkq_worker.steps import Steps

from chunkq.blend.combine import to_numpy
from chunkq.errors import ErrorCode, ModelError
from chunkq.job.model_config import ModelConfig
from tests.harness import head_networks
from tests.harness.head_networks import HEAD_FORMS, PATCH, HeadForm, Written, keys_of, predict
from tests.simulated_device import SimulatedDevice

each_form = pytest.mark.parametrize("form", HEAD_FORMS, ids=str)
WITH_LABELS = ("torch dict", "numpy dict", "onnx", "saved model")
one_per_runtime = pytest.mark.parametrize(
    "form", [form for form in HEAD_FORMS if form.name in WITH_LABELS], ids=str
)
SHAPES = {"main": (3, *PATCH), "edge": (1, *PATCH), "label": (1, *PATCH)}


Writer = Callable[[HeadForm], Written]


@pytest.fixture
def write(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    return lambda form: keys_of(form, tmp_path_factory.mktemp)


def batch(count: int = 4) -> npt.NDArray[Any]:
    return np.random.default_rng(3).integers(1, 9, (count, 1, *PATCH)).astype(np.float32)


def config(keys: dict[str, Any], names: dict[str, str | int]) -> ModelConfig:
    shapes = {str(head): SHAPES[name] for name, head in names.items()}
    values = {"model_input_shape": (1, *PATCH), "max_batch_size": 4, "model_output_shape": shapes}
    return ModelConfig.model_validate(values | keys)


def load(
    keys: dict[str, Any],
    names: dict[str, str | int],
    heads: Sequence[Any],
    steps: Steps | None = None,
) -> Runtime:
    model = config(keys, names)
    shapes = ItemShapes.of(model, len(PATCH), heads=heads)
    return load_runtime(model, (steps or Steps()).for_heads(heads), 1, shapes)


def arrays(runtime: Runtime, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    return [np.array(to_numpy(output)) for output in runtime(values)]


@each_form
def test_heads_are_returned_in_the_order_in_which_they_are_asked_for(
    write: Writer, form: HeadForm
) -> None:
    keys, names = write(form)
    expected = predict(batch())
    runtime = load(keys, names, list(names.values())[::-1])
    for name, output in zip(reversed(names), arrays(runtime, batch()), strict=True):
        assert output.tobytes() == expected[name].tobytes(), name
    assert runtime.unused_heads == ()
    assert len(runtime.output_dtypes) == len(names)


@each_form
def test_a_head_has_the_same_bytes_alone_and_the_others_are_listed(
    write: Writer, form: HeadForm
) -> None:
    keys, names = write(form)
    together = arrays(load(keys, names, [names["main"], names["edge"]]), batch())
    for name, output in zip(("main", "edge"), together, strict=True):
        alone = load(keys, names, [names[name]])
        assert [one.tobytes() for one in arrays(alone, batch())] == [output.tobytes()]
        others = [head for one, head in names.items() if one != name]
        [line] = unused_note(alone.unused_heads)
        assert all(repr(head) in line for head in others)
        assert repr(names[name]) not in line


@one_per_runtime
def test_integer_heads_keep_the_name_of_their_dtype(write: Writer, form: HeadForm) -> None:
    keys, names = write(form)
    runtime = load(keys, names, [names["edge"], names["label"]])
    edge, label = arrays(runtime, batch())
    assert runtime.output_dtypes == ("float32", "int64")
    assert edge.dtype == label.dtype == np.float32


@each_form
def test_a_missing_head_is_refused_with_the_names_there_are(write: Writer, form: HeadForm) -> None:
    keys, names = write(form)
    with pytest.raises(ModelError) as caught:
        load(keys, names, [names["main"], "distance"])(batch())
    assert caught.value.code is ErrorCode.HEAD_MISSING
    line = str(caught.value)
    assert "'distance'" in line
    assert all(repr(head) in line for head in names.values())
    assert "\n" not in line


@each_form
def test_several_arrays_without_a_head_are_refused(write: Writer, form: HeadForm) -> None:
    keys, names = write(form)
    with pytest.raises(ModelError, match="head"):
        load(keys | {"model_output_shape": SHAPES["main"]}, names, [None])(batch())


@one_per_runtime
def test_a_protected_step_gets_all_that_the_network_returns_and_returns_the_heads(
    write: Writer, form: HeadForm
) -> None:
    keys, names = write(form)
    steps = Steps(postprocessing_protected=lambda all: {"far": all["edge"] + 1, "rest": all})
    [output] = arrays(load(keys | {"model_output_shape": None}, names, ["far"], steps), batch())
    assert output.tobytes() == (predict(batch())["edge"] + 1).tobytes()
    with pytest.raises(ModelError) as caught:
        load(keys, names, ["main"], steps)(batch())
    assert caught.value.code is ErrorCode.HEAD_MISSING
    assert "'far' and 'rest'" in str(caught.value)


def test_a_network_with_channels_last_has_each_head_moved(tmp_path: Path) -> None:
    keys, names = head_networks.keras_file(tmp_path)
    shapes = {"main": (*PATCH, 3), "edge": PATCH}
    values = {"model_input_shape": (*PATCH, 1), "model_output_shape": shapes}
    main, edge = arrays(load(keys | values, names, ["main", "edge"]), batch())
    assert main.tobytes() == predict(batch())["main"].tobytes()
    assert edge.tobytes() == predict(batch())["edge"].tobytes()
    assert edge.shape == (4, *PATCH)


def test_heads_of_a_captured_graph_stay_valid_until_they_are_used() -> None:
    keys = {"runtime": "torch", "type": "torchscript", "ts_file": "/", "cuda_graph": True}
    model = config(keys | {"device": "cuda"}, head_networks.named())
    network = LoadedNetwork(head_networks.Net().eval())
    device = SimulatedDevice()
    runtime = TorchRuntime(network, model, Steps(), 1, device, heads=("edge", "main"))
    first = runtime(batch())
    second = runtime(batch() + 1)
    for outputs, values in ((first, batch()), (second, batch() + 1)):
        for name, output in zip(("edge", "main"), outputs, strict=True):
            assert to_numpy(output).tobytes() == predict(values)[name].tobytes()


@dataclass
class Data:
    seg: Any
    aux: Any = None


class Tensor:
    """Stands for an array of a framework."""

    shape = (2, 1, 4)


FULL, HALF = Tensor(), Tensor()


def reader(*heads: Any) -> HeadReader:
    return HeadReader(heads, lambda value: isinstance(value, Tensor), "tensor", has_step=False)


def test_a_list_of_deep_supervision_is_read_at_full_resolution() -> None:
    deep = reader(0)
    assert deep.from_network([FULL, HALF, Tensor(), Tensor()]) == (FULL,)
    assert deep.unused == (1, 2, 3)


@pytest.mark.parametrize(
    ("returned", "head"),
    [
        (Data(FULL), "seg"),
        ({0: HALF, "seg": FULL}, "seg"),
        ({"seg": {"out": FULL, "loss": 1.0}}, "seg"),
        ((None, FULL), 1),
        (torch.return_types.max((FULL, HALF)), 0),
    ],
)
def test_a_head_is_a_key_a_field_or_an_index(returned: Any, head: Any) -> None:
    assert reader(head).from_network(returned) == (FULL,)


@pytest.mark.parametrize(
    ("returned", "head", "parts"),
    [
        (FULL, 0, ("one tensor", "remove head")),
        ([FULL], 1, ("no head 1", "0")),
        ({"seg": None, "aux": FULL}, "seg", ("no head 'seg'", "'aux'")),
        (3.5, "seg", ("float",)),
        ({"0": FULL}, 0, ("no head 0", "'0'")),
    ],
)
def test_the_error_for_a_missing_head_says_what_there_is(
    returned: Any, head: Any, parts: tuple[str, ...]
) -> None:
    with pytest.raises(ModelError) as caught:
        reader(head).from_network(returned)
    assert caught.value.code is ErrorCode.HEAD_MISSING
    assert all(part in str(caught.value) for part in parts)


def test_a_head_with_several_arrays_is_refused() -> None:
    with pytest.raises(ModelError, match="head 'seg'") as caught:
        reader("seg").from_network({"seg": [FULL, HALF]})
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
