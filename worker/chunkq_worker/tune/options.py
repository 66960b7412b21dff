"""Decide which options of a job's network the search tries, and say why others are left out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from chunkq.job.model_config import ModelConfig
from chunkq.job.model_problems import model_problems
from chunkq_worker.tune.search import Options

SWITCHES = ("channels_last", "cuda_graph", "compile")
"""Keys of `model_config` that the search switches on, in its order."""
PRECISIONS = {
    "cpu": ("float32", "bfloat16"),  # CPUs have no fast arithmetic for float16
    "cuda": ("float16", "bfloat16", "tf32", "float32"),
}
"""Device -> precisions that are tried, the fastest first."""
ON_REQUEST = ("channels_last", "precision")
"""Options that are tried on a CPU only with `--all-options`: few networks gain there."""
NOT_REQUESTED = "tried on a CPU only with --all-options"
CHANNELS_LAST_AXES = (4, 5)
"""Axes of the batches (N, C, *P) for which torch has the layout."""


def with_network_options(
    options: Options,
    model: ModelConfig,
    allowed: Sequence[str],
    kept: Collection[str],
    *,
    has_all: bool,
) -> tuple[Options, tuple[str, ...]]:
    """Add the options that apply to a network; return one line for each reason to leave some out.

    Precisions in `allowed` can be chosen, others are shown only. With `has_all`, a CPU tries
    the options ON_REQUEST.
    """
    is_limited = model.device == "cpu" and not has_all
    reasons: dict[str, list[str]] = {}
    switches, shown = [], []
    for key in SWITCHES:
        if key in kept or getattr(model, key):
            continue
        reason = _problem(model, key, True)
        if reason is None and is_limited and key in ON_REQUEST:
            reason = NOT_REQUESTED
        if reason is None:
            switches.append(key)
        else:
            reasons.setdefault(reason, []).append(key)
    for name in () if "precision" in kept else PRECISIONS[model.device]:
        if name == model.effective_precision or name in allowed:
            continue
        reason = NOT_REQUESTED if is_limited else None
        reason = _problem(model, "precision", name) or reason
        if reason is None:
            shown.append(("precision", name))
        else:
            reasons.setdefault(reason, []).append(f"precision {name}")
    options = replace(
        options,
        switches=tuple(switches),
        precisions=_requested(model, allowed),
        shown_precisions=tuple(shown),
    )
    return options, tuple(f"{', '.join(keys)}: {reason}" for reason, keys in reasons.items())


def _requested(model: ModelConfig, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the keys of `model_config` for requested precisions: torch's autocast, and `dtype`."""
    pairs = [(key, name) for name in names for key in ("precision", "dtype")]
    return tuple(
        (key, name)
        for key, name in pairs
        if name not in (model.dtype, model.precision)
        and not (key == "dtype" and (model.precision is not None or name == "tf32"))
    )


def _problem(model: ModelConfig, key: str, value: object) -> str | None:
    """Return why the value of a key is unsupported by the job's network; None if it is not."""
    known = set(model_problems(model))
    problems = model_problems(model.model_copy(update={key: value}))
    reasons = [problem for problem in problems if problem not in known]
    if reasons:
        return reasons[0].partition(": ")[2].partition(";")[0]
    if key == "compile" and model.type == "torchscript":
        return "unsupported for type torchscript, which is compiled already"
    axes = len(model.model_input_shape) + 1
    if key == "channels_last" and axes not in CHANNELS_LAST_AXES:
        return f"unsupported for batches with {axes} axes"
    return None
