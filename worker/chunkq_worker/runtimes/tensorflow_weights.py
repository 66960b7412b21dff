"""Weights for a Keras model, from any file that training leaves them in."""

from __future__ import annotations

import glob
import io
import os
import zipfile
from typing import Any

from chunkq.errors import ErrorCode, ModelError
from chunkq.scratch import scratch_folder
from chunkq_worker.runtimes import hdf5_files
from chunkq_worker.runtimes.formats import USES, format_of
from chunkq_worker.runtimes.tensorflow_import import h5py, tf
from chunkq_worker.runtimes.tensorflow_reading import (
    content_of,
    local_copy,
    reason,
    suppressed_warnings,
    with_suffix,
)

STATE_KEYS = ("model", "net", "network")
"""Where training scripts usually put the network inside a `tf.train.Checkpoint`."""
INDEX = ".index"
WEIGHTS = "model.weights.h5"
"""Member of a .keras file that holds the weights."""
NO_WEIGHTS = "no weights of Keras; write them with model.save_weights('name.weights.h5')"
NOT_WEIGHTS = ("optimizer", "seed_generator", "save_counter", "OBJECT_GRAPH", "OPTIMIZER_SLOT")
"""What stands in checkpoints beside the weights, by a part of its name."""


class ForeignWeightsError(Exception):
    """A weights file leads to another file; the argument is the name of that part."""


def load_checkpoint(model: Any, path: str) -> None:
    """Give a built model the weights of a file; raises ModelError unless all of them fit.

    Takes what `save_weights` writes (also Keras 2's HDF5), a .keras file, or a checkpoint of
    `tf.train.Checkpoint`: its directory, its .index file or the start that its names share.
    """
    key = f"model_config.checkpoint: {path}"
    with local_copy(path, key) as local:
        prefix = _prefix(local, key)
        if prefix is not None:
            _restore(model, prefix, key)
            return
        content = content_of(local, key)
        found = format_of(content)
        if found not in ("keras", "keras_h5"):
            raise ModelError(f"{key} is {USES[found] if found else NO_WEIGHTS}")
        try:
            saved, own = _read(model, local, content, zipped=found == "keras")
        except ForeignWeightsError as error:
            raise ModelError(
                f"{key} keeps {error} in another file; save the weights again as one file",
                code=ErrorCode.MODEL_UNTRUSTED,
            ) from error
        except Exception as error:  # of any kind, where the file is damaged
            raise ModelError(_misfit(key, error)) from error
    _expect_all_used(saved, own, key)


def _read(model: Any, path: str, content: bytes, *, zipped: bool) -> tuple[set[str], set[str]]:
    """Load weights from HDF5; return the names of those saved, and of the model's own.

    Both are empty for the format of Keras 2, of which Keras compares all layers itself.
    """
    with scratch_folder("weights") as folder:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                path = archive.extract(WEIGHTS, folder)
                content = archive.read(WEIGHTS)
        with h5py.File(io.BytesIO(content)) as file:
            if (foreign := hdf5_files.foreign_part(file)) is not None:
                raise ForeignWeightsError(foreign)
            old = "layer_names" in file.attrs or "model_weights" in file
            saved = set() if old else _datasets(file)
        with suppressed_warnings(), with_suffix(path, ".h5" if old else ".weights.h5") as name:
            model.load_weights(name)
        if old:
            return set(), set()
        with suppressed_warnings():
            model.save_weights(f"{folder}/own.weights.h5")
        with h5py.File(f"{folder}/own.weights.h5") as file:
            return saved, _datasets(file)


def _datasets(file: Any) -> set[str]:
    names: set[str] = set()
    file.visititems(lambda name, item: names.add(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _expect_all_used(saved: set[str], own: set[str], key: str) -> None:
    """Raise ModelError for weights that the model has no place for: Keras leaves them out."""
    left = sorted(n for n in saved - own if not any(part in n for part in NOT_WEIGHTS))
    if left:
        more = ", ..." if len(left) > 3 else ""
        raise ModelError(
            f"{key} does not fit the network, which has no place for {len(left)} of its weights "
            f"({', '.join(left[:3])}{more}); it belongs to another network"
        )


def _prefix(path: str, key: str) -> str | None:
    """Return the shared start of a TensorFlow checkpoint's names, None for any other file."""
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "saved_model.pb")):
            raise ModelError(
                f"{key} is a SavedModel, which holds the network too; use type: file with it as "
                "model_file"
            )
        found = [name.removesuffix(INDEX) for name in glob.glob(f"{glob.escape(path)}/*{INDEX}")]
        latest = os.path.basename(tf.train.latest_checkpoint(path) or "")
        if len(found) > 1:
            found = [name for name in found if os.path.basename(name) == latest]
        if not found:
            raise ModelError(f"{key} is a directory without a checkpoint of TensorFlow")
        return found[0]
    if path.endswith(INDEX):
        return path.removesuffix(INDEX)
    if not os.path.exists(path) and os.path.exists(path + INDEX):
        return path
    return None


def _restore(model: Any, prefix: str, key: str) -> None:
    try:
        saved = _variables(prefix)
        tops = {name.partition("/")[0] for name in saved}
        inside = next((k for k in STATE_KEYS if k in tops and not hasattr(model, k)), None)
        checkpoint = tf.train.Checkpoint(**{inside: model} if inside else {"root": model})
        with suppressed_warnings():
            status = checkpoint.read(prefix)
            status.assert_existing_objects_matched()
            status.expect_partial()
            with scratch_folder("weights") as folder:
                own = _variables(checkpoint.write(os.path.join(folder, "own")))
    except Exception as error:  # of any kind, where a file is damaged
        raise ModelError(_misfit(key, error)) from error
    below = f"{inside}/" if inside else ""
    _expect_all_used({name for name in saved if name.startswith(below)}, own, key)


def _variables(prefix: str) -> set[str]:
    return {name for name, _ in tf.train.list_variables(prefix)}


def _misfit(key: str, error: BaseException) -> str:
    said = reason(error)
    if "A total of" in said:  # Keras counts first, and tells of an example two lines on
        rest = [line for line in str(error).splitlines() if line.strip()]
        said = " ".join([said, *rest[1:2]])[:400]
    return f"{key} does not fit the network ({type(error).__name__}: {said})"
