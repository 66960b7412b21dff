"""The TensorFlow runtime: every form of a network, what it is given, and what is refused."""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes import tensorflow as tensorflow_runtime
from chunkq_worker.runtimes import tensorflow_import
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.runtimes.tensorflow_import import keras, tf, without_log_output
from chunkq_worker.steps import Steps

from chunkq.errors import ModelError
from chunkq.job import ModelConfig, load_job, parse_job
from chunkq.paths import file_hash
from chunkq.plan import Volume
from chunkq.record import JobRecord
from chunkq.resolve import resolve
from chunkq.stores import find_source
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace, run_inline

# TensorFlow takes the number of its threads only before it starts.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)

NETS = '''\
import keras
import tensorflow as tf

layers = keras.layers


class Net(keras.Model):
    """Takes and gives channels last."""

    def __init__(self, width=3):
        super().__init__()
        self.conv = layers.Conv2D(width, 3, padding="same")
        self.drop = layers.Dropout(0.5)
        self.norm = layers.BatchNormalization()

    def call(self, x):
        return self.norm(self.drop(self.conv(x)))


class Larger(Net):
    def __init__(self):
        super().__init__()
        self.more = layers.Conv2D(3, 1)

    def call(self, x):
        return self.more(super().call(x))


def functional(width=3):
    given = keras.Input((8, 8, 1))
    x = layers.Dropout(0.5)(layers.Conv2D(width, 3, padding="same")(given))
    return keras.Model(given, layers.BatchNormalization()(x))


def sequential():
    """Without an input: its variables come with the first batch."""
    return keras.Sequential([layers.Conv2D(3, 3, padding="same"), layers.BatchNormalization()])


class Late(keras.Model):
    """Makes its layers when it is built."""

    def build(self, shape):
        self.conv = layers.Conv2D(3, 3, padding="same")
        self.conv.build(shape)

    def call(self, x):
        return self.conv(x)


class Plain(layers.Layer):
    """A layer that Keras does not know."""

    def call(self, x):
        return x * 2


def with_plain():
    return keras.Sequential([keras.Input((8, 8, 1)), Plain(), layers.Conv2D(3, 1)])


def with_lambda():
    return keras.Sequential([keras.Input((8, 8, 1)), layers.Lambda(lambda x: x * 2)])


def two_inputs():
    given = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
    return keras.Model(given, layers.Concatenate()(given))


def two_outputs():
    given = keras.Input((8, 8, 1))
    return keras.Model(given, {"mask": layers.ReLU()(given), "edge": layers.ELU()(given)})


def list_of_one():
    given = keras.Input((8, 8, 1))
    return keras.Model(given, [layers.ReLU()(given)])


class Raises(keras.Model):
    def call(self, x):
        raise KeyError("mean")


class Seen(keras.Model):
    """Refuses what is not of `dtype`; gives it back, halved, three times."""

    def __init__(self, dtype):
        super().__init__()
        self.wanted = dtype

    def call(self, x):
        assert x.dtype == self.wanted, (x.dtype, self.wanted)
        return keras.ops.concatenate([keras.ops.cast(x, "float32") / 2] * 3, axis=-1)


class Counts(keras.Model):
    """Adds how many items its graph is for."""

    def call(self, x):
        return x + x.shape[0]


class Greedy(keras.Model):
    """Wants more memory than there is for more than two items."""

    def call(self, x):
        if x.shape[0] > 2:
            x = x + tf.reduce_sum(tf.random.uniform([1 << 46]))
        return keras.ops.concatenate([x] * 3, axis=-1)


def norms():
    given = keras.Input((8, 8, 4))
    x = layers.GroupNormalization(2, name="by_group")(given)
    x = layers.LayerNormalization(axis=(1, 2), name="by_tile")(x)
    x = layers.BatchNormalization(name="by_batch")(layers.LayerNormalization(name="by_voxel")(x))
    inner = keras.Sequential([layers.GroupNormalization(-1, name="inside")], name="block")
    return keras.Model(given, inner(x))


def no_network():
    return 3
'''
PATCH = (8, 8)
Item = tuple[int, ...]


@pytest.fixture(scope="module")
def nets() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "nets"}
    exec(NETS, names)
    return names


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, nets: dict[str, Any]) -> Path:
    """Files of networks, written once; the networks are all but their weights the same."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "nets.py").write_text(NETS)
    made, subclass, larger = trained(nets["functional"]()), trained(nets["Net"]()), nets["Larger"]()
    with warnings.catch_warnings(), without_log_output():
        for category in (DeprecationWarning, FutureWarning):  # of Keras, to itself
            warnings.simplefilter("ignore", category)
        made.save(folder / "net.keras")
        made.save(folder / "net.h5")
        made.save_weights(folder / "net.weights.h5")
        made.export(str(folder / "exported"), verbose=False)
        tf.saved_model.save(made, str(folder / "saved"))
        tf.saved_model.save(tf.Module(), str(folder / "unsigned"))
        (folder / "net.json").write_text(made.to_json())
        subclass.save_weights(folder / "subclass.weights.h5")
        tf.train.Checkpoint(subclass).write(str(folder / "bare"))
        tracked = tf.train.Checkpoint(model=subclass, step=tf.Variable(3))
        for _ in range(2):
            tracked.save(str(folder / "run" / "ckpt"))
        trained(larger).save_weights(folder / "larger.weights.h5")
        tf.train.Checkpoint(model=larger).write(str(folder / "larger"))
        trained(nets["Net"](4)).save_weights(folder / "wider.weights.h5")
        for name in ("with_plain", "with_lambda", "two_inputs", "two_outputs", "list_of_one"):
            nets[name]().save(folder / f"{name}.keras")
            (folder / f"{name}.json").write_text(nets[name]().to_json())
        nets["with_lambda"]().save(folder / "with_lambda.h5")
        nets["two_inputs"]().export(str(folder / "two_inputs"), verbose=False)
        nets["two_outputs"]().export(str(folder / "two_outputs"), verbose=False)
        layer = keras.saving.serialize_keras_object(keras.layers.ReLU())
    (folder / "layer.json").write_text(json.dumps(layer))
    torch.save({"weight": torch.zeros(3)}, folder / "weights.pt")
    (folder / "empty").mkdir()
    return folder


def trained(model: Any) -> Any:
    """The model with the weights that all of its shape have here."""
    model(np.zeros((1, *PATCH, 1), np.float32), training=False)
    drawn = np.random.default_rng(4)
    # By shape and order of the parts, which is one in all forms.
    values = [drawn.normal(0, 0.5, tuple(v.shape)) for v in model.weights]
    model.set_weights([abs(v) if "variance" in w.path else v for v, w in _with(model, values)])
    return model


def _with(model: Any, values: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values, model.weights, strict=True))


def config(shelf: Path, shape: Item = (*PATCH, 1), **keys: Any) -> ModelConfig:
    """A model_config with files of the shelf; those below the shelf by their names there."""
    files = {"class_file", "kwargs_file", "checkpoint", "model_file", "json_file"}
    values = {k: str(shelf / v) if k in files and "://" not in v else v for k, v in keys.items()}
    job = {"input": "/in.zarr", "output": "/out.zarr"}
    rest = {"runtime": "tensorflow", "model_input_shape": list(shape), "max_batch_size": 4}
    return parse_job({**job, "model_config": {**rest, **values}}).model


def load(
    shelf: Path, shape: Item = (*PATCH, 1), steps: Steps | None = None, **keys: Any
) -> Runtime:
    return load_runtime(config(shelf, shape, **keys), steps or Steps(), 1)


def refused(shelf: Path, *words: str, shape: Item = (*PATCH, 1), **keys: Any) -> str:
    """The one line with which a network is refused when it is loaded or first used."""
    with pytest.raises(ModelError) as caught:
        load(shelf, shape, **keys)(np.zeros((4, *shape), np.float32))
    line = str(caught.value)
    for word in words:
        assert word in line, (word, line)
    assert "\n" not in line
    assert "\x1b" not in line
    assert "Traceback" not in line
    return line


def batch(shape: Item = (*PATCH, 1), count: int = 4) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).random((count, *shape), np.float32)


@pytest.fixture(scope="module")
def expected(nets: dict[str, Any]) -> npt.NDArray[np.float32]:
    """What the trained network makes of `batch()`."""
    found: npt.NDArray[np.float32] = trained(nets["functional"]()).predict(batch(), verbose=0)
    assert found.std() > 0.1
    return found


def close_to(found: Any, expected: npt.NDArray[Any], within: float = 1e-6) -> None:
    assert type(found) is np.ndarray
    np.testing.assert_allclose(found, expected, rtol=0, atol=within)


def class_of(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "class", "class_file": "nets.py", "class_name": name, **more}


def file_of(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "file", "model_file": name, **more}


# ------------------------------------------------------------------------------ forms


@pytest.mark.parametrize(
    "keys",
    [
        file_of("net.keras"),
        file_of("net.h5"),
        file_of("exported"),
        file_of("saved"),
        {"type": "json", "json_file": "net.json", "checkpoint": "net.weights.h5"},
        {"type": "json", "json_file": "net.json", "checkpoint": "net.keras"},
        class_of("functional", checkpoint="net.weights.h5"),
        class_of("functional", checkpoint="net.keras"),
        class_of("functional", checkpoint="net.h5"),
        class_of("Net", checkpoint="subclass.weights.h5"),
        class_of("Net", checkpoint="bare"),
        class_of("Net", checkpoint="bare.index"),
        class_of("Net", checkpoint="run"),
        class_of("Net", checkpoint="run/ckpt-1"),
    ],
    ids=lambda keys: " ".join(str(v) for v in keys.values()),
)
def test_one_network_predicts_the_same_in_every_form(
    shelf: Path, expected: npt.NDArray[Any], keys: dict[str, Any]
) -> None:
    runtime = load(shelf, **keys)
    close_to(runtime(batch()), expected)
    close_to(runtime(batch()), expected)


def test_a_network_that_is_built_late_takes_weights_all_the_same(
    shelf: Path, expected: npt.NDArray[Any], nets: dict[str, Any], tmp_path: Path
) -> None:
    made = trained(nets["sequential"]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made.save_weights(tmp_path / "late.weights.h5")
    keys = class_of("sequential", checkpoint=str(tmp_path / "late.weights.h5"))
    close_to(load(shelf, **keys)(batch()), expected)


@pytest.mark.parametrize("name", ["net.keras", "net.h5", "saved"])
def test_a_network_behind_a_url_is_fetched(
    shelf: Path, expected: npt.NDArray[Any], memory: Callable[[Path], str], name: str
) -> None:
    url = memory(shelf / name)
    close_to(load(shelf, **file_of(url))(batch()), expected)


@pytest.fixture
def memory() -> Iterator[Callable[[Path], str]]:
    """Copies a file or folder to a URL that it returns."""
    filesystem = fsspec.filesystem("memory")

    def copy(path: Path) -> str:
        filesystem.put(str(path), f"/shelf/{path.name}", recursive=path.is_dir())
        return f"memory://shelf/{path.name}"

    yield copy
    filesystem.rm("/shelf", recursive=True)


def test_a_file_is_known_by_its_content_whatever_its_name(
    shelf: Path, expected: npt.NDArray[Any], tmp_path: Path
) -> None:
    for name, plain in (("net.keras", "best"), ("net.h5", "best.model"), ("net.h5", "a.keras")):
        (tmp_path / plain).write_bytes((shelf / name).read_bytes())
        close_to(load(shelf, **file_of(str(tmp_path / plain)))(batch()), expected)
    weights = (shelf / "net.weights.h5").read_bytes()
    (tmp_path / "epoch 7.hdf5").write_bytes(weights)
    keys = class_of("functional", checkpoint=str(tmp_path / "epoch 7.hdf5"))
    close_to(load(shelf, **keys)(batch()), expected)


def test_without_a_checkpoint_a_class_keeps_the_weights_it_is_made_with(shelf: Path) -> None:
    assert load(shelf, **class_of("Net"))(batch()).std() > 0


def test_layers_of_the_users_own_are_found_in_class_file(shelf: Path) -> None:
    for keys in (file_of("with_plain.keras"), {"type": "json", "json_file": "with_plain.json"}):
        line = refused(shelf, "uses Plain, which Keras does not know", "class_file", **keys)
        assert line.startswith("model_config.")
        found = load(shelf, **keys, class_file="nets.py")(batch())
        assert found.shape == (4, *PATCH, 3)


def test_code_inside_a_file_runs_only_if_it_is_trusted(shelf: Path) -> None:
    for keys in (
        file_of("with_lambda.keras"),
        file_of("with_lambda.h5"),
        {"type": "json", "json_file": "with_lambda.json"},
    ):
        refused(shelf, "Lambda layer", "model_config.trusted: missing", **keys)
        close_to(load(shelf, **keys, trusted=True)(batch()), batch() * 2)


# ------------------------------------------------------------------ what it is given and gives


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "int16", "int32", "int64"]
)
def test_the_network_is_given_the_jobs_dtype(shelf: Path, tmp_path: Path, dtype: str) -> None:
    (tmp_path / "kwargs.py").write_text(f"kwargs = {{'dtype': {dtype!r}}}\n")
    keys = class_of("Seen", kwargs_file=str(tmp_path / "kwargs.py"), dtype=dtype)
    given = np.random.default_rng(2).integers(0, 100, (4, *PATCH, 1))
    runtime = load(shelf, **keys)
    for kind in ("uint8", "int16", "uint16", "uint32", "float32", ">i2", ">f4"):
        found = runtime(given.astype(kind))
        assert found.dtype == np.float32
        close_to(found, np.repeat(given / 2, 3, axis=-1))


@pytest.mark.parametrize(("dtype", "given"), [("float64", np.float64), ("float16", np.float32)])
@pytest.mark.parametrize("name", ["Net", "Late", "functional"])
def test_layers_of_a_class_compute_in_the_jobs_dtype(
    shelf: Path, name: str, dtype: str, given: type
) -> None:
    runtime = load(shelf, **class_of(name, dtype=dtype))
    assert runtime(batch()).dtype == given  # float32 or better
    assert {v.dtype for v in runtime._network._model.weights} == {dtype}  # type: ignore[attr-defined]
    assert keras.config.dtype_policy().name == "float32"


def test_a_dtype_that_a_saved_model_does_not_take_is_refused_with_the_right_one(
    shelf: Path,
) -> None:
    line = refused(shelf, **file_of("saved", dtype="float64"))
    assert (
        line == "model_config.dtype: float64, but the network takes float32; write dtype: float32"
    )


def test_a_network_of_one_channel_last_takes_patches_without_channels(
    shelf: Path, expected: npt.NDArray[Any]
) -> None:
    for name in ("net.keras", "saved"):
        close_to(load(shelf, PATCH, **file_of(name))(batch()[..., 0]), expected)


def test_channels_first_given_to_a_network_that_wants_them_last_say_what_to_do(
    shelf: Path,
) -> None:
    for name in ("net.keras", "saved"):
        refused(
            shelf,
            "on a batch of shape [4, 1, 8, 8]",
            "it takes ['any', 8, 8, 1], channels last: move them there with "
            "preprocessing_protected of model_config.processing_steps",
            "leave the 1 out of model_input_shape",
            shape=(1, *PATCH),
            **file_of(name),
        )


def test_protected_steps_may_move_the_channels(
    shelf: Path, expected: npt.NDArray[Any], tmp_path: Path
) -> None:
    (tmp_path / "steps.py").write_text(
        "import tensorflow as tf\n"
        "def preprocessing_protected(x):\n"
        "    assert x.numpy().shape == (4, 1, 8, 8), x.shape\n"
        "    assert x.dtype == tf.float32\n"
        "    return tf.transpose(x, [0, 2, 3, 1])\n"
        "def postprocessing_protected(y):\n"
        "    return tf.transpose(y, [0, 3, 1, 2])\n"
    )
    steps = Steps.load(str(tmp_path / "steps.py"))
    for keys in (file_of("net.keras"), file_of("saved"), class_of("Net", checkpoint="bare")):
        found = load(shelf, (1, *PATCH), steps, **keys)(batch().transpose(0, 3, 1, 2))
        close_to(found, expected.transpose(0, 3, 1, 2))


def test_a_class_is_built_on_what_steps_before_it_make_of_the_batch(
    shelf: Path, expected: npt.NDArray[Any]
) -> None:
    """The shape that a step gives is known only with the first batch; so is that of join_dim."""
    keys = class_of("Net", checkpoint="subclass.weights.h5")
    steps = Steps(preprocessing=lambda x: x[..., None])
    runtime = load(shelf, PATCH, steps, **keys)  # the batcher takes that step
    close_to(runtime(batch()), expected)
    joined = load(shelf, (*PATCH, 1), join_dim=3, **class_of("Net"))
    assert joined(batch((*PATCH, 2))).shape == (4, *PATCH, 3)


def test_results_share_tensorflows_memory_unless_a_step_may_write_to_them(shelf: Path) -> None:
    shared = load(shelf, **file_of("net.keras"))(batch())
    assert not shared.flags.owndata
    steps = Steps(postprocessing=lambda y: y)
    own = load(shelf, steps=steps, **file_of("net.keras"))(batch())
    assert own.flags.writeable
    np.testing.assert_array_equal(shared, own)


def test_steps_may_give_numpy_arrays(shelf: Path, expected: npt.NDArray[Any]) -> None:
    steps = Steps(
        preprocessing_protected=lambda x: x.numpy(),
        postprocessing_protected=lambda y: y.numpy() + 1,
    )
    close_to(load(shelf, steps=steps, **file_of("net.keras"))(batch()), expected + 1)


def test_another_batch_size_is_another_graph(shelf: Path) -> None:
    runtime = load(shelf, **class_of("Counts"))
    for count in (4, 2, 1, 4):
        close_to(runtime(batch()[:count]), batch()[:count] + np.float32(count))


def test_an_output_that_stands_alone_in_a_list_is_taken(shelf: Path) -> None:
    close_to(load(shelf, **file_of("list_of_one.keras"))(batch()), batch())


def test_layers_that_normalise_by_the_tile_are_named(shelf: Path) -> None:
    runtime = load(shelf, (*PATCH, 4), **class_of("norms"))
    assert runtime.tile_norms() == (
        "by_group (GroupNormalization)",
        "by_tile (LayerNormalization)",
        "inside (GroupNormalization)",
    )
    assert load(shelf, **file_of("net.keras")).tile_norms() == ()


def batcher_of(shelf: Path, steps: Steps, keys: dict[str, Any]) -> Batcher:
    """For patches of one channel, given without it, and three channels of predictions."""
    model = config(shelf, PATCH, **keys, model_output_shape=[3, *PATCH])
    values = {"input": "/in.zarr", "output": "/out.zarr", "model_config": model.model_dump()}
    plan = resolve(parse_job(values), Volume((16, 16), "float32"))
    return Batcher(plan, load_runtime(model, steps, 1), steps)


channels_first = Steps(
    preprocessing_protected=lambda x: x[..., None],
    postprocessing_protected=lambda y: tf.transpose(y, [0, 3, 1, 2]),
)


def test_channels_that_come_last_are_refused_with_the_step_that_moves_them(shelf: Path) -> None:
    with pytest.raises(ModelError) as caught:
        batcher_of(shelf, Steps(), file_of("net.keras")).warm_up()
    assert str(caught.value) == (
        "the network returned shape [4, 8, 8, 3] for a batch of [4, 8, 8], but "
        "model_config.model_output_shape declares [4, 3, 8, 8]; move its last axis first in "
        "postprocessing_protected of model_config.processing_steps"
    )
    batcher_of(shelf, channels_first, class_of("Net")).warm_up()


def test_running_out_of_memory_halves_the_batch(
    shelf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real error of TensorFlow's; it asks for ten seconds before it gives up."""
    batcher = batcher_of(shelf, channels_first, class_of("Greedy"))
    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        batcher.warm_up()
    assert batcher.size == 2
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: batches have 2 patches from here on"
    ]


def test_only_errors_of_memory_count_as_such(shelf: Path) -> None:
    runtime, errors = load(shelf, **file_of("net.keras")), tf.errors
    of_memory = "OOM when allocating tensor with shape[4,8] and type float on GPU:0 by allocator"
    for error, told in (
        (errors.ResourceExhaustedError(None, None, of_memory), True),
        (errors.ResourceExhaustedError(None, None, "the queue is full"), False),
        (errors.InternalError(None, None, "Dst tensor is not initialized."), True),
        (errors.InternalError(None, None, "cuDNN launch failure"), False),
        (errors.InvalidArgumentError(None, None, of_memory), False),
        (ValueError("out of memory"), False),
        (MemoryError(), True),
    ):
        assert runtime.is_out_of_memory(error) is told, error


# --------------------------------------------------------------------------- bad networks


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (class_of("Nope"), ["model_config.class_name:", "has no 'Nope'", "Larger, Late, Net"]),
        (class_of("no_network"), ["model_config.class_name: no_network of", "gave int", "keras.M"]),
        (class_of("Plain"), ["gave Plain, which is no keras.Model"]),
        (
            class_of("Raises"),
            ["the network raised KeyError on a batch of shape [1, 8, 8, 1]: mean"],
        ),
        (class_of("two_inputs"), ["model_config.class_name: two_inputs", "has 2 inputs"]),
        (file_of("two_inputs.keras"), ["two_inputs.keras has 2 inputs; a network takes one batch"]),
        (file_of("two_inputs"), ["serving_default takes 2 inputs (keras_tensor"]),
        (file_of("two_outputs.keras"), ["returned dict of edge, mask, not one tensor"]),
        (file_of("two_outputs"), ["serving_default gives 2 outputs (edge, mask)"]),
        (file_of("unsigned"), ["unsigned has no serving signature", "model.export(path)"]),
        (file_of("empty"), ["empty is a directory without saved_model.pb"]),
        (file_of("saved/saved_model.pb"), ["a part of a SavedModel; name the directory"]),
        (file_of("net.weights.h5"), ["holds weights only; use type: class or json"]),
        (file_of("weights.pt"), ["a file of torch.save; use runtime: torch"]),
        (file_of("net.json"), ["a Keras JSON file", "type: json and json_file"]),
        (file_of("nets.py"), ["is no .keras or HDF5 file", "model.save('name.keras')"]),
        (file_of("nowhere.keras"), ["nowhere.keras cannot be read"]),
        (
            {"type": "json", "json_file": "layer.json"},
            ["describes a ReLU, which is no keras.Model"],
        ),
        ({"type": "json", "json_file": "nets.py"}, ["is no architecture", "model.to_json()"]),
        ({"type": "json", "json_file": "net.keras"}, ["a Keras file", "type: file"]),
        (file_of("net.keras", device="cuda"), ["model_config.device: cuda", "sees no GPU here"]),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_bad_network_is_one_line(shelf: Path, keys: dict[str, Any], words: list[str]) -> None:
    refused(shelf, *words, **keys)


@pytest.mark.parametrize(
    ("name", "checkpoint", "words"),
    [
        ("Net", "larger.weights.h5", ["no place for 2 of its weights", "another network"]),
        ("Net", "larger", ["no place for 2 of its weights (model/more/_kernel", "another network"]),
        ("Larger", "subclass.weights.h5", ["does not fit the network", "A total of 1 objects"]),
        ("Larger", "bare", ["does not fit the network"]),
        ("Net", "wider.weights.h5", ["does not fit the network"]),
        ("Larger", "net.h5", ["does not fit the network", "Layer count mismatch"]),
        ("Net", "weights.pt", ["a file of torch.save; use runtime: torch"]),
        ("Net", "saved", ["is a SavedModel, which holds the network too; use type: file"]),
        ("Net", "empty", ["is a directory without a checkpoint"]),
        ("Net", "nets.py", ["is no weights of Keras", "model.save_weights('name.weights.h5')"]),
        ("Net", "nowhere", ["nowhere cannot be read"]),
    ],
)
def test_a_checkpoint_of_another_network_is_one_line(
    shelf: Path, name: str, checkpoint: str, words: list[str]
) -> None:
    line = refused(shelf, *words, **class_of(name, checkpoint=checkpoint))
    assert line.startswith(f"model_config.checkpoint: {shelf / checkpoint}")


def test_kwargs_that_do_not_fit_are_one_line(shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "kwargs.py"
    for text, words in (
        ("kwargs = {'wdth': 3}", ["raised TypeError", "'wdth'", "kwargs were ['wdth']"]),
        ("kwargs = [3]", ["model_config.kwargs_file: `kwargs` in", "is no dict"]),
        ("width = 3", ["model_config.kwargs_file:", "has no 'kwargs'; it defines width"]),
    ):
        path.write_text(text)
        refused(shelf, *words, **class_of("Net", kwargs_file=str(path)))


def test_an_architecture_of_keras_2_is_refused_with_a_way_out(shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    config = {"name": "sequential", "layers": []}
    values = {"class_name": "Sequential", "config": config, "keras_version": "2.15.0"}
    path.write_text(json.dumps(values))
    line = refused(shelf, type="json", json_file=str(path))
    assert line.startswith(f"model_config.json_file: {path} was written by Keras 2.15.0, which")
    assert line.endswith("write a SavedModel with model.export(path), and use type: file")


def test_a_damaged_file_is_one_line(shelf: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "saved_model.pb").write_bytes((shelf / "saved/saved_model.pb").read_bytes()[:99])
    refused(shelf, f"model_config.model_file: {saved}: TensorFlow", **file_of(str(saved)))
    cut = (shelf / "net.h5").read_bytes()
    (tmp_path / "net.h5").write_bytes(cut[: len(cut) // 2])
    refused(shelf, f"model_config.model_file: {tmp_path}/net.h5", **file_of(f"{tmp_path}/net.h5"))
    index = (shelf / "bare.index").read_bytes()
    (tmp_path / "bare.index").write_bytes(index[: len(index) // 2])
    refused(shelf, "does not fit", **class_of("Net", checkpoint=f"{tmp_path}/bare"))


def test_a_network_that_was_closed_is_not_run(shelf: Path) -> None:
    runtime = load(shelf, **file_of("net.keras"))
    runtime.close()
    with pytest.raises(ModelError, match="closed"):
        runtime(batch())


# ---------------------------------------------------------------------- the process it lives in


def test_other_threads_than_the_process_began_with_are_told_of(
    shelf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(shelf, **file_of("net.keras"))(batch())
    assert caplog.records == []
    load_runtime(config(shelf, **file_of("net.keras")), Steps(), 3)
    [record] = caplog.records
    assert (
        "TensorFlow keeps the 1 threads that this process began with, not 3" in record.getMessage()
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Pretends that there is a visible GPU; lists what TensorFlow is told, which never starts."""
    told: list[tuple[Any, ...]] = []
    visible = ["gpu 0"]

    def set_visible(devices: list[str], kind: str) -> None:
        told.append(("visible", *devices))
        visible[:] = devices

    fakes = {
        "list_physical_devices": lambda kind: ["gpu 0"],
        "get_visible_devices": lambda kind: list(visible),
        "set_visible_devices": set_visible,
        "experimental.set_memory_growth": lambda device, on: told.append(("growth", device, on)),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(f"tensorflow.config.{name}", fake)
    return told


def test_a_network_on_the_cpu_hides_gpus_and_one_on_a_gpu_takes_memory_as_it_needs_it(
    gpu: list[tuple[Any, ...]],
) -> None:
    start = tensorflow_runtime._start
    start("cuda", None)
    assert gpu == [("growth", "gpu 0", True)]
    start("cpu", None)
    assert gpu[1:] == [("visible",)]
    start("cuda", None)
    assert gpu[2:] == [("visible", "gpu 0"), ("growth", "gpu 0", True)]


def test_a_network_on_a_gpu_after_one_on_the_cpu_is_refused_in_one_line(
    gpu: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tensorflow_runtime._start
    start("cpu", None)

    def started(devices: list[str], kind: str) -> None:
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr("tensorflow.config.set_visible_devices", started)
    with pytest.raises(ModelError, match=r"^model_config.device: cuda, but this process began"):
        start("cuda", None)
    start("cpu", None)


ALONE = """\
import sys
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.steps import Steps
from chunkq.job import ModelConfig
model = ModelConfig(runtime="tensorflow", type="file", model_file=sys.argv[1],
                    model_input_shape=(8, 8, 1))
import numpy as np
from chunkq.errors import ModelError
try:
    runtime = load_runtime(model, Steps(), 2)
except ModelError as error:
    sys.exit(str(error))
assert runtime(np.zeros((4, 8, 8, 1))).shape == (4, 8, 8, 3)
import os, keras, tensorflow as tf
threading = tf.config.threading
print(threading.get_intra_op_parallelism_threads(), threading.get_inter_op_parallelism_threads(),
      keras.backend.backend())
"""


def alone(shelf: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Load and run a network in a process of its own, born with this environment."""
    set_here = ("TF_", "KERAS_BACKEND")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(set_here)}
    return subprocess.run(
        [sys.executable, "-c", ALONE, str(shelf / "net.keras")],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_is_quiet_and_takes_the_threads_it_is_given(shelf: Path) -> None:
    done = alone(shelf)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "2 1 tensorflow\n")


def test_only_tensorflows_own_lines_are_held_back_and_only_if_no_level_is_set(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chatter = (
        b"I0000 00:00:1795241221.078388    8965 port.cc:153] oneDNN custom operations are on.\n"
    )
    with without_log_output():
        os.write(2, chatter + b"chunkq: something of another thread\n")
    assert capfd.readouterr().err == "chunkq: something of another thread\n"
    monkeypatch.setattr(tensorflow_import, "WANTS_CHATTER", True)
    with without_log_output():
        os.write(2, chatter)
    assert capfd.readouterr().err == chatter.decode()


def test_another_backend_of_keras_is_refused(shelf: Path) -> None:
    done = alone(shelf, KERAS_BACKEND="jax")
    assert done.stderr == (
        "model_config.runtime: tensorflow, but Keras is set to its backend jax here; unset "
        "KERAS_BACKEND, or set it to tensorflow\n"
    )


@pytest.mark.parametrize("missing", ["tensorflow", "keras"])
def test_where_tensorflow_is_missing_the_extra_is_named(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if "runtimes.tensorflow" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelError, match=r"pip install 'chunkq\[tensorflow\]'"):
        load(shelf, **file_of("net.keras"))


# ------------------------------------------------------------------------- jobs with it


def test_a_directory_is_hashed_by_the_names_and_contents_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "data").write_bytes(b"weights")
    first = file_hash(str(folder))
    assert first == file_hash(str(folder))
    assert len(first) == 64
    (folder / "variables" / "data").write_bytes(b"Weights")
    second = file_hash(str(folder))
    (folder / "variables" / "data").write_bytes(b"weights")
    assert file_hash(str(folder)) == first
    (folder / "variables" / "data").rename(folder / "variables" / "date")
    third = file_hash(str(folder))
    assert len({first, second, third}) == 3
    with pytest.raises(FileNotFoundError):
        file_hash(str(tmp_path / "nothing"))


def test_a_directory_behind_a_url_has_the_hash_of_its_copy(
    shelf: Path, memory: Callable[[Path], str]
) -> None:
    for name in ("saved", "net.keras"):
        assert file_hash(memory(shelf / name)) == file_hash(str(shelf / name))
    with pytest.raises(FileNotFoundError):
        file_hash("memory://shelf/nothing")


def test_a_checkpoint_of_several_files_is_hashed_whole(shelf: Path, tmp_path: Path) -> None:
    for path in shelf.glob("bare.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert file_hash(str(tmp_path / "bare")) == file_hash(str(shelf / "bare"))
    [data] = tmp_path.glob("bare.data-*")
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    assert file_hash(str(tmp_path / "bare")) != file_hash(str(shelf / "bare"))


def test_a_saved_model_that_was_changed_since_is_noticed(shelf: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    fsspec.filesystem("file").get(str(shelf / "saved"), str(saved), recursive=True)
    write_zarr(tmp_path / "in.zarr", random_volume((16, 16)))
    model = {"runtime": "tensorflow", **file_of(str(saved)), "model_input_shape": list(PATCH)}
    values = {"input": f"{tmp_path}/in.zarr", "output": f"{tmp_path}/out.zarr"}
    job = load_job({**values, "model_config": model})
    record = JobRecord.create(job, [find_source(job.input[0])])
    assert record.changed_files() == []
    [data] = (saved / "variables").glob("variables.data-*")
    data.write_bytes(data.read_bytes() + b" ")
    assert record.changed_files() == ["model_config.model_file"]


CONV = """\
import torch

class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.last = torch.nn.Conv3d(4, 3, 3, padding=1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x / 100)))
"""
WITNESS = """\
import os

def preprocessing(batch):
    with open(os.environ["WITNESS"], "ab") as file, open("/proc/self/cmdline", "rb") as line:
        file.write(line.read().replace(bytes(1), b" ") + b"\\n")
    return batch

def postprocessing_protected(y):
    import tensorflow as tf
    return tf.transpose(y, [0, 4, 1, 2, 3])
"""
SHAPE, CUBE = (20, 18, 14), (8, 8, 8)


def job_values(folder: Path, output: str, model: dict[str, Any]) -> dict[str, Any]:
    shapes = {"model_input_shape": [1, *CUBE], "model_output_shape": [3, *CUBE]}
    return {
        "input": str(folder / "in.zarr"),
        "output": str(folder / output),
        "inference_type": "sliding_window",
        "strides": [5, 6, 6],
        "weight_function": ["weight_gaussian"],
        "chunksize": [10, 9, 8],
        "storage_chunks": [5, 3, 4],
        "threads": 1,
        "model_config": shapes | {"max_batch_size": 4} | model,
    }


def same_in_torch(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One network twice: as torch's class, and in Keras, channels last, as a .keras file."""
    names: dict[str, Any] = {"__name__": "conv"}
    exec(CONV, names)
    torch.manual_seed(1)
    module = names["Conv"]()
    (folder / "conv.py").write_text(CONV)
    torch.save(module.state_dict(), folder / "conv.pt")
    layers = keras.layers
    given = keras.Input((*CUBE, 1))
    x = layers.Conv3D(4, 3, padding="same", activation="relu")(layers.Rescaling(1 / 100)(given))
    made = keras.Model(given, layers.Conv3D(3, 3, padding="same")(x))
    parts = [module.first.weight, module.first.bias, module.last.weight, module.last.bias]
    values = [part.detach().numpy() for part in parts]
    made.set_weights([v.transpose(2, 3, 4, 1, 0) if v.ndim == 5 else v for v in values])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made.save(folder / "conv.keras")
    (folder / "steps.py").write_text(WITNESS)
    in_torch = {
        "runtime": "torch",
        "type": "class",
        "class_file": str(folder / "conv.py"),
        "class_name": "Conv",
        "checkpoint": str(folder / "conv.pt"),
    }
    in_keras = {
        "runtime": "tensorflow",
        **file_of(str(folder / "conv.keras")),
        "model_input_shape": list(CUBE),
        "processing_steps": str(folder / "steps.py"),
    }
    return in_torch, in_keras


def test_a_whole_job_with_workers_equals_the_same_network_in_torch(tmp_path: Path) -> None:
    """Two workers, for real: quiet, and born as programs of their own, not by forking."""
    write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (8, 8, 8))
    in_torch, in_keras = same_in_torch(tmp_path)
    run_inline(job_values(tmp_path, "torch.zarr", in_torch))
    workspace = Workspace(tmp_path, job_values(tmp_path, "out.zarr", in_keras))
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    witness = tmp_path / "witness"
    crew = ("work", "--burst", "--gpus", "none", "-w", "2")
    done = workspace.run(*crew, WITNESS=str(witness)).ok()
    workspace.call("finalize", "out.zarr").ok()
    assert all(noise not in done.err for noise in ("oneDNN", "absl", "I0000")), done.err
    found, expected = read_output(workspace.output), read_output(tmp_path / "torch.zarr")
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    seen = set(witness.read_text().splitlines())
    assert {line.partition(" -m ")[2].split()[0] for line in seen} == {
        "chunkq_worker.worker_process"
    }


def test_a_class_with_outer_steps_goes_through_the_whole_pipeline(tmp_path: Path) -> None:
    """All four steps, a checkpoint that waits for the first batch, and a SavedModel of it."""
    write_zarr(tmp_path / "in.zarr", random_volume((24, 20)), (8, 8))
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "steps.py").write_text(
        "import numpy as np\n"
        "import tensorflow as tf\n"
        "def preprocessing(x):\n    assert type(x) is np.ndarray\n    return (x / 50)[:, :, ::-1]\n"
        "def preprocessing_protected(x):\n    return tf.transpose(x, [0, 2, 3, 1]) - 1\n"
        "def postprocessing_protected(y):\n    return tf.transpose(y, [0, 3, 1, 2]) * 3\n"
        "def postprocessing(y):\n    y += 1\n    return y[:, ::-1]\n"
    )
    names: dict[str, Any] = {"__name__": "nets"}
    exec(NETS, names)
    made = trained(names["Net"]())
    with warnings.catch_warnings(), without_log_output():
        warnings.simplefilter("ignore", DeprecationWarning)
        made.save_weights(tmp_path / "net.weights.h5")
        made.export(str(tmp_path / "saved"), verbose=False)
    model = {
        "runtime": "tensorflow",
        "model_input_shape": [1, *PATCH],
        "model_output_shape": [3, *PATCH],
        "max_batch_size": 4,
        "processing_steps": str(tmp_path / "steps.py"),
    }
    values = {"input": str(tmp_path / "in.zarr"), "chunksize": [8, 8], "threads": 1}
    outputs = []
    named = {"class_file": f"{tmp_path}/nets.py", "checkpoint": f"{tmp_path}/net.weights.h5"}
    for name, keys in (
        ("class", class_of("Net") | named),
        ("saved", file_of(f"{tmp_path}/saved")),
    ):
        job = {**values, "output": f"{tmp_path}/{name}.zarr", "model_config": model | keys}
        run_inline(job)
        outputs.append(read_output(tmp_path / f"{name}.zarr"))
    patch = random_volume((24, 20))[:8, :8].astype(np.float32)
    given = ((patch[None, None] / 50)[:, :, ::-1]).transpose(0, 2, 3, 1) - 1
    expected = (made.predict(given, verbose=0).transpose(0, 3, 1, 2) * 3 + 1)[:, ::-1]
    for found in outputs:
        np.testing.assert_allclose(found[:, :8, :8], expected[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-5)
