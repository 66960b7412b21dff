"""Load functions and classes from the user's Python files."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from chunkq.blend.weights import ArrayWeights, Weights, built_in_weights
from chunkq.errors import ChunkqError, JobError, suggestion
from chunkq.job.user_modules import (
    UserModules,
    UserPackage,
    open_package,
    package_levels,
    without_package,
)
from chunkq.paths import read_bytes
from chunkq.plan.plan import Plan


def load_names(path: str, key: str) -> dict[str, Any]:
    """Run a Python file and return its global names. `key` is the job key of the file.

    Its code can import modules of its folder, see `chunkq.job.user_modules`. Raises JobError if
    the file is missing or raises.
    """
    try:
        tree = ast.parse(read_bytes(path), path)
        compile(tree, path, "exec")
    except OSError:
        raise JobError(f"{key}: no file {path}; fix the path") from None
    except (SyntaxError, ValueError) as error:
        raise JobError(f"{key}: {path} is not Python: {error}; fix the file") from None
    package = UserPackage(path, package_levels(path, tree))
    try:
        with package.importing():
            return dict(vars(importlib.import_module(package.main)))
    except (Exception, SystemExit) as error:
        package.remove()
        error_code = error.code if isinstance(error, ChunkqError) else None
        raise JobError(f"{key}: {path} raised {one_line(error)}", code=error_code) from error


@contextmanager
def sibling_imports(path: str) -> Iterator[None]:
    """Let libraries find the modules in the folder of a local file by name inside the context.

    For objects of the file that are created after it was loaded, and for pickles.
    """
    with open_package(path).importing():
        yield


def select_name(names: dict[str, Any], name: str, path: str, key: str) -> Any:
    """Return one of the names of a file. Raises JobError that lists them if it is missing."""
    if name not in names:
        public = ", ".join(sorted(n for n in names if not n.startswith("_"))) or "nothing"
        hint = suggestion(name, public.split(", "))
        raise JobError(f"{key}: {path} has no {name!r}; it defines {public}{hint}")
    return names[name]


def load_blend_weights(names: Sequence[str], plan: Plan) -> Weights:
    """Return the blend weights of the plan's patches: built in, or from the user's function.

    `names` are those of `Job.weight_function`.

    The user's function gets the shape of the output patch and returns an array of this shape.
    Raises JobError if it raises, or if the weights are not finite and positive.
    """
    if len(names) == 1:
        try:
            return built_in_weights(names[0], plan.output_patch, plan.margin)
        except MemoryError:
            shape = list(plan.output_patch)
            raise JobError(
                f"weight_function: blend weights of a patch of {shape} voxels exceed the memory; "
                "use a smaller patch in model_input_shape and model_output_shape"
            ) from None
    path, name = names
    source = f"weight_function: {name} of {path}"
    modules = UserModules()
    with modules.collect():
        function = select_name(load_names(path, "weight_function"), name, path, "weight_function")
        try:
            with sibling_imports(path):
                weights = np.asarray(function(plan.output_patch), dtype=np.float64)
        except (Exception, SystemExit) as error:
            error_code = error.code if isinstance(error, ChunkqError) else None
            raise JobError(f"{source} raised {one_line(error)}", code=error_code) from error
    modules.release()
    return ArrayWeights(_check_weights(weights, source, plan.output_patch, plan.margin))


def one_line(error: BaseException) -> str:
    """Return the class and the message of an error of the user's code as one line."""
    return without_package(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _check_weights(
    weights: np.ndarray[Any, np.dtype[np.float64]],
    source: str,
    shape: Sequence[int],
    margin: Sequence[int],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the weights without the margin. Raises JobError, which begins with `source`."""
    if weights.shape != tuple(shape):
        raise JobError(
            f"{source} returned shape {list(weights.shape)}; "
            f"expected the output patch, {list(shape)}, which model_config.model_output_shape, by "
            "default model_input_shape, has without channels"
        )
    invalid = np.argwhere(~(np.isfinite(weights) & (weights > 0)))
    if len(invalid):
        first = tuple(int(i) for i in invalid[0])
        raise JobError(
            f"{source} returned {weights[first]} at {list(first)}; expected finite positive weights"
        )
    return weights[tuple(slice(m, q - m) for q, m in zip(shape, margin, strict=True))]
