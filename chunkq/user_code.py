"""Functions and classes that a job takes from the user's own Python files."""

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

from chunkq.allowed_paths import AllowedPaths
from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.job_path import printable_path
from chunkq.paths import is_url, read_bytes
from chunkq.plan import Plan
from chunkq.weights import ArrayWeights, Weights, built_in

MODULE_PREFIX = "chunkq_user_"


def load_names(path: str, key: str) -> dict[str, Any]:
    """Run a Python file and return its names. `key` is the job key that named it.

    A local file may import its neighbours while it is run. Raises JobError in
    one line if the file is missing or raises.
    """
    try:
        code = compile(read_bytes(path), path, "exec")
    except OSError:
        raise JobError(f"{key}: no file {path}") from None
    except (SyntaxError, ValueError) as error:
        raise JobError(f"{key}: {path} is not Python: {error}") from None
    # Registered, because dataclasses, torch.jit and inspect look a class's module up.
    module = ModuleType(f"{MODULE_PREFIX}{hashlib.sha256(path.encode()).hexdigest()[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        with sibling_imports(path):
            exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        known = error.code if isinstance(error, ChunkqError) else None
        raise JobError(f"{key}: {path} raised {_in_one_line(error)}", code=known) from error
    return dict(module.__dict__)


@contextmanager
def sibling_imports(path: str) -> Iterator[None]:
    """Let what is run inside import modules beside a local file, before any of their name.

    Those are forgotten afterwards: another job's neighbours may have the same names. A neighbour
    that leads out of the allowed paths is refused with JobError.
    """
    folder = os.path.dirname(path)
    if is_url(path):
        yield
        return
    before = set(sys.modules)
    guards = [_NeighbourGuard(folder, a) for a in [AllowedPaths.from_environment()] if a]
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
            if origin and _is_neighbour(name, origin, folder):
                del sys.modules[name]


def _is_neighbour(name: str, origin: str, folder: str) -> bool:
    if name.startswith(MODULE_PREFIX) or not origin.startswith(folder + os.sep):
        return False
    # An environment inside the project's folder holds what is installed, not neighbours.
    return not {"site-packages", "dist-packages"}.intersection(origin.split(os.sep))


class _NeighbourGuard(MetaPathFinder):
    """Refuses modules beside a file that lie, after symbolic links, below no allowed path."""

    def __init__(self, folder: str, allowed: AllowedPaths) -> None:
        self._folder, self._allowed = folder, allowed

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Find no module: raise JobError for a refused one, leave the others to Python."""
        spec = PathFinder.find_spec(fullname, path)
        origin = None if spec is None else spec.origin
        if origin is None or not _is_neighbour(fullname, origin, self._folder):
            return
        if self._allowed.locate(origin) is None:
            raise JobError(
                f"{printable_path(origin)} -> {printable_path(os.path.realpath(origin))} "
                "leads out of the paths that this worker runs code from; "
                "copy the module or allow its folder",
                code=ErrorCode.PATH_NOT_ALLOWED,
            )


def select_name(names: dict[str, Any], name: str, path: str, key: str) -> Any:
    """Return one of a file's names, or raise JobError with those it has."""
    if name not in names:
        public = ", ".join(sorted(n for n in names if not n.startswith("_"))) or "nothing"
        raise JobError(f"{key}: {path} has no {name!r}; it defines {public}")
    return names[name]


def load_blend_weights(plan: Plan) -> Weights:
    """Return the weights of the plan's patches, running the user's file if there is one.

    Raises JobError if the user's function does not give finite positive numbers, one for each
    voxel of the output patch.
    """
    names = plan.job.weight_function
    if len(names) == 1:
        try:
            return built_in(names[0], plan.output_patch, plan.margin)
        except MemoryError:
            shape = list(plan.output_patch)
            raise JobError(
                f"weight_function: weights of a patch of {shape} voxels do not fit into the "
                "memory; use a smaller model_output_shape"
            ) from None
    path, name = names
    function = select_name(load_names(path, "weight_function"), name, path, "weight_function")
    where = f"weight_function: {name} of {path}"
    try:
        weights = np.asarray(function(plan.output_patch), dtype=np.float64)
    except (Exception, SystemExit) as error:
        raise JobError(f"{where} raised {_in_one_line(error)}") from error
    return ArrayWeights(_checked(weights, where, plan.output_patch, plan.margin))


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _checked(
    weights: np.ndarray[Any, np.dtype[np.float64]],
    where: str,
    shape: Sequence[int],
    margin: Sequence[int],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    if weights.shape != tuple(shape):
        raise JobError(
            f"{where} gave shape {list(weights.shape)}; the output patch is {list(shape)}"
        )
    bad = np.argwhere(~(np.isfinite(weights) & (weights > 0)))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise JobError(
            f"{where} gave {weights[first]} at {list(first)}; weights must be finite and positive"
        )
    return weights[tuple(slice(m, q - m) for q, m in zip(shape, margin, strict=True))]
