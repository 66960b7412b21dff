"""Load functions and classes from the user's Python files."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.blend.weights import ArrayWeights, Weights, built_in_weights
from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.job.allowed_paths import AllowedPaths
from chunkq.job.job_path import printable_path
from chunkq.paths import is_url, read_bytes
from chunkq.plan.plan import Plan

MODULE_PREFIX = "chunkq_user_"


def load_names(path: str, key: str) -> dict[str, Any]:
    """Run a Python file and return its global names. `key` is the job key of the file.

    A local file can import modules from its own folder while it runs. Raises JobError if the file
    is missing or raises.
    """
    try:
        code = compile(read_bytes(path), path, "exec")
    except OSError:
        raise JobError(f"{key}: no file {path}; fix the path") from None
    except (SyntaxError, ValueError) as error:
        raise JobError(f"{key}: {path} is not Python: {error}; fix the file") from None
    # dataclasses, torch.jit and inspect look up the module of a class in sys.modules.
    module = ModuleType(f"{MODULE_PREFIX}{hashlib.sha256(path.encode()).hexdigest()[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        with sibling_imports(path):
            exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        error_code = error.code if isinstance(error, ChunkqError) else None
        raise JobError(f"{key}: {path} raised {_one_line(error)}", code=error_code) from error
    return dict(module.__dict__)


@contextmanager
def sibling_imports(path: str) -> Iterator[None]:
    """Import modules from the folder of a local file before all others while the context is open.

    Remove these modules from `sys.modules` at the end, because modules of another job may have the
    same names. An import raises JobError if the module is outside the allowed paths.
    """
    folder = os.path.dirname(path)
    if is_url(path):
        yield
        return
    before = set(sys.modules)
    guards = [_SiblingGuard(folder, a) for a in [AllowedPaths.from_environment()] if a]
    sys.meta_path[:0] = guards
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for guard in guards:
            sys.meta_path.remove(guard)
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and _is_sibling(name, origin, folder):
                del sys.modules[name]


def _is_sibling(name: str, origin: str, folder: str) -> bool:
    """Return whether a module was imported from the folder of a user's file."""
    if name.startswith(MODULE_PREFIX) or not origin.startswith(folder + os.sep):
        return False
    # A virtual environment inside the folder contains installed packages.
    return not {"site-packages", "dist-packages"}.intersection(origin.split(os.sep))


class _SiblingGuard(MetaPathFinder):
    """Import hook that rejects sibling modules whose resolved path is not allowed."""

    def __init__(self, folder: str, allowed: AllowedPaths) -> None:
        self._folder, self._allowed = folder, allowed

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Raise JobError for a module that is not allowed. Return None, so others find it."""
        spec = PathFinder.find_spec(fullname, path)
        origin = None if spec is None else spec.origin
        if origin is None or not _is_sibling(fullname, origin, self._folder):
            return
        if self._allowed.locate(origin) is None:
            raise JobError(
                f"{printable_path(origin)} -> {printable_path(os.path.realpath(origin))} "
                "is outside the paths from which this worker runs code; "
                "copy the module, or allow its folder",
                code=ErrorCode.PATH_NOT_ALLOWED,
            )


def select_name(names: dict[str, Any], name: str, path: str, key: str) -> Any:
    """Return one of the names of a file. Raises JobError that lists them if it is missing."""
    if name not in names:
        public = ", ".join(sorted(n for n in names if not n.startswith("_"))) or "nothing"
        raise JobError(f"{key}: {path} has no {name!r}; it defines {public}")
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
                "use a smaller model_output_shape"
            ) from None
    path, name = names
    function = select_name(load_names(path, "weight_function"), name, path, "weight_function")
    source = f"weight_function: {name} of {path}"
    try:
        weights = np.asarray(function(plan.output_patch), dtype=np.float64)
    except (Exception, SystemExit) as error:
        raise JobError(f"{source} raised {_one_line(error)}") from error
    return ArrayWeights(_check_weights(weights, source, plan.output_patch, plan.margin))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


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
            f"expected the output patch, {list(shape)}"
        )
    invalid = np.argwhere(~(np.isfinite(weights) & (weights > 0)))
    if len(invalid):
        first = tuple(int(i) for i in invalid[0])
        raise JobError(
            f"{source} returned {weights[first]} at {list(first)}; expected finite positive weights"
        )
    return weights[tuple(slice(m, q - m) for q, m in zip(shape, margin, strict=True))]
