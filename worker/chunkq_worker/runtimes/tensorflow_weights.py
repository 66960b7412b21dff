"""Load weights into a Keras model from HDF5 files, .keras files and TensorFlow checkpoints."""

from __future__ import annotations

import glob
import io
import os
import zipfile
from typing import Any

from chunkq.errors import ErrorCode, ModelError
from chunkq.system.scratch import scratch_folder
from chunkq_worker.runtimes import hdf5_files
from chunkq_worker.runtimes.formats import format_of
from chunkq_worker.runtimes.stand_ins import describe, first_stand_in
from chunkq_worker.runtimes.tensorflow_import import h5py, tf
from chunkq_worker.runtimes.tensorflow_reading import (
    content_of,
    local_copy,
    reason,
    suppressed_warnings,
    with_suffix,
)

STATE_KEYS = ("model", "net", "network")
"""Usual attributes of the network in the `tf.train.Checkpoint` of training scripts."""
INDEX = ".index"
WEIGHTS = "model.weights.h5"
"""Member of a .keras file that contains the weights."""
NO_WEIGHTS = "not a Keras weights file; save one with model.save_weights('name.weights.h5')"
NOT_WEIGHTS = ("optimizer", "seed_generator", "save_counter", "OBJECT_GRAPH", "OPTIMIZER_SLOT")
"""Parts of the names of other variables in checkpoints."""


class ExternalWeightsError(Exception):
    """A part of a weights file is in another file. The argument is the name of the part."""


def load_checkpoint(model: Any, path: str) -> None:
    """Load the weights of a file into a built model. Raise ModelError unless all of them fit.

    `path` is a file of `save_weights` (Keras 3, or HDF5 of Keras 2), a .keras file, or a
    checkpoint of `tf.train.Checkpoint`: its folder, its .index file or the prefix of its files.
    """
    key = f"model_config.checkpoint: {path}"
    with local_copy(path, key) as local:
        prefix = _prefix(local, key)
        if prefix is not None:
            _restore(model, prefix, key)
            return
        content = content_of(local, key)
        name = format_of(content)
        if name not in ("keras", "keras_h5"):
            raise ModelError(f"{key} is {describe(content) or NO_WEIGHTS}")
        try:
            saved, expected = _read(model, local, content, zipped=name == "keras")
        except ExternalWeightsError as error:
            raise ModelError(
                f"{key} keeps {error} in another file; save the weights again as one file",
                code=ErrorCode.MODEL_UNTRUSTED,
            ) from error
        except Exception as error:  # of any class if the file is damaged
            raise ModelError(_misfit(key, error)) from error
    _check_all_used(saved, expected, key)


def _read(model: Any, path: str, content: bytes, *, zipped: bool) -> tuple[set[str], set[str]]:
    """Load weights from HDF5. Return the names of the weights in the file and of the model.

    Both sets are empty for the format of Keras 2, for which Keras itself compares all layers.
    """
    with scratch_folder("weights") as folder:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                path = archive.extract(WEIGHTS, folder)
                content = archive.read(WEIGHTS)
        with h5py.File(io.BytesIO(content)) as file:
            if (external := hdf5_files.external_part(file)) is not None:
                raise ExternalWeightsError(external)
            is_keras_2 = "layer_names" in file.attrs or "model_weights" in file
            saved = set() if is_keras_2 else _datasets(file)
        suffix = ".h5" if is_keras_2 else ".weights.h5"
        with suppressed_warnings(), with_suffix(path, suffix) as name:
            model.load_weights(name)
        if is_keras_2:
            return set(), set()
        with suppressed_warnings():
            model.save_weights(f"{folder}/model.weights.h5")
        with h5py.File(f"{folder}/model.weights.h5") as file:
            return saved, _datasets(file)


def _datasets(file: Any) -> set[str]:
    names: set[str] = set()
    file.visititems(lambda name, item: names.add(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _check_all_used(saved: set[str], expected: set[str], key: str) -> None:
    """Raise ModelError if the file has weights that the model lacks; Keras ignores them."""
    names = sorted(n for n in saved - expected if not any(part in n for part in NOT_WEIGHTS))
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise ModelError(
            f"{key} does not fit the network, which lacks {len(names)} of its weights "
            f"({', '.join(names[:3])}{more}); use the checkpoint of this network"
        )


def _prefix(path: str, key: str) -> str | None:
    """Return the file prefix of a TensorFlow checkpoint, None for any other file."""
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "saved_model.pb")):
            raise ModelError(
                f"{key} is a SavedModel, which contains the whole network; use type: file with it "
                "as model_file"
            )
        prefixes = [name.removesuffix(INDEX) for name in glob.glob(f"{glob.escape(path)}/*{INDEX}")]
        latest = os.path.basename(tf.train.latest_checkpoint(path) or "")
        if len(prefixes) > 1:
            prefixes = [name for name in prefixes if os.path.basename(name) == latest]
        if not prefixes:
            raise ModelError(
                f"{key} is a folder without a TensorFlow checkpoint; set it to a folder with "
                f"files *{INDEX}"
            )
        return prefixes[0]
    if path.endswith(INDEX):
        return path.removesuffix(INDEX)
    if not os.path.exists(path) and os.path.exists(path + INDEX):
        return path
    return None


def _restore(model: Any, prefix: str, key: str) -> None:
    if (problem := first_stand_in(glob.glob(f"{glob.escape(prefix)}.*"))) is not None:
        raise ModelError(f"{key}: {problem}")
    try:
        saved = _variables(prefix)
        attributes = {name.partition("/")[0] for name in saved}
        attribute = next((k for k in STATE_KEYS if k in attributes and not hasattr(model, k)), None)
        checkpoint = tf.train.Checkpoint(**{attribute: model} if attribute else {"root": model})
        with suppressed_warnings():
            status = checkpoint.read(prefix)
            status.assert_existing_objects_matched()
            status.expect_partial()
            with scratch_folder("weights") as folder:
                expected = _variables(checkpoint.write(os.path.join(folder, "model")))
    except Exception as error:  # of any class if a file is damaged
        raise ModelError(_misfit(key, error)) from error
    start = f"{attribute}/" if attribute else ""
    _check_all_used({name for name in saved if name.startswith(start)}, expected, key)


def _variables(prefix: str) -> set[str]:
    return {name for name, _ in tf.train.list_variables(prefix)}


def _misfit(key: str, error: BaseException) -> str:
    message = reason(error)
    if "A total of" in message:  # Keras's first line is a count, its second one an example
        lines = [line for line in str(error).splitlines() if line.strip()]
        message = " ".join([message, *lines[1:2]])[:400]
    return (
        f"{key} does not fit the network ({type(error).__name__}: {message}); use the checkpoint "
        "of this network"
    )
