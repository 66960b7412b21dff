"""Find the weights of a network in a checkpoint by the names and shapes of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "network_weights",
)
"""Usual keys of the weights, or of the network, in the checkpoints of training scripts."""
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes in which DataParallel, torch.compile, FSDP and others keep the wrapped module."""
ATTRIBUTES = frozenset({"model", "net", "network", "_model", "_net", "_network"})
"""Usual attributes of the network in a module that also has losses and metrics."""
COUNTERS = ("num_batches_tracked", "n_averaged")
"""Last parts of the names of counters, which inference does not use."""
DEPTH = 3
"""Nested mappings of a checkpoint that are searched."""
MAX_LISTED = 3

Shapes = Mapping[str, tuple[int, ...] | None]
"""Names of the values of a network -> their shapes, None if any shape fits."""


@dataclass(frozen=True)
class Fit:
    """A part of a checkpoint that has all values of a network.

    `keys` lead to the part in the checkpoint. `state` has its values by the network's names.
    `wrappers` and `prefix` were removed from the names, and `unused` are the names of other values.
    `others` are the places of other parts that also fit.
    """

    keys: tuple[str, ...]
    state: Mapping[str, Any]
    wrappers: tuple[str, ...] = ()
    prefix: str = ""
    unused: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Return where the weights are: keys and prefix, or '' for the plain form."""
        parts = []
        if self.keys:
            parts.append(f"under {_path(self.keys)}")
        if self.prefix:
            parts.append(f"with the prefix {self.prefix!r}")
        return " ".join(parts)

    def describe(self) -> str:
        """Return one line about what was chosen and what was left out; '' for the plain form."""
        parts = [f"used weights {self.place}"] if self.place else []
        if self.wrappers:
            names = ", ".join(repr(f"{name}.") for name in self.wrappers)
            parts.append(f"removed {names} from their names")
        if self.unused:
            parts.append(f"left out {_listed(self.unused)}")
        if self.others:
            parts.append(f"the weights {_listed(self.others)} also fit, and were left out")
        return "; ".join(parts)


class AmbiguousWeightsError(Exception):
    """Several parts of a checkpoint fit the network. `fits` has two or more."""

    def __init__(self, fits: Sequence[Fit]) -> None:
        super().__init__(" and ".join(fit.place or "at the top level" for fit in fits))
        self.fits = tuple(fits)


@dataclass(frozen=True)
class NetworkNames:
    """The names of a network's values, with and without wrappers.

    `tied` maps each name to the names of the same tensor.
    """

    shapes: Shapes
    tied: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: torch.nn.Module) -> NetworkNames:
        """Return the names of a module's parameters and buffers."""
        values = module.state_dict(keep_vars=True)
        names_by_id: dict[int, set[str]] = {}
        for name, value in values.items():
            names_by_id.setdefault(id(value), set()).add(name)
        return cls(
            {name: _shape(value) for name, value in values.items()},
            {name: frozenset(names_by_id[id(value)]) for name, value in values.items()},
        )


def select_weights(content: Any, names: NetworkNames) -> Fit | None:
    """Return the part of a checkpoint that has the values of a network, None if no part fits.

    A part under one of STATE_KEYS, or at the top level, has priority over others. Raise
    AmbiguousWeightsError if the priority does not decide.
    """
    fits = [fit for keys, state in _states(content) for fit in _fits(keys, state, names)]
    usual = [fit for fit in fits if all(key in STATE_KEYS for key in fit.keys)]
    candidates = usual or fits
    if not candidates:
        return None
    first = candidates[0]
    rivals = [fit for fit in candidates if fit.keys == first.keys] if usual else candidates
    if len(rivals) > 1:
        raise AmbiguousWeightsError(rivals)
    return replace(first, others=tuple(fit.place for fit in fits if fit is not first))


def assemble_parts(content: Any, names: NetworkNames) -> tuple[dict[str, Any], str] | None:
    """Put the weights of a network together that a checkpoint has in one part per submodule.

    Return the state and a line about it, for example from keys `encoder_state` and `decoder_state`
    for the attributes `encoder` and `decoder`. It is None unless exactly one part fits each of
    them.
    """
    groups: dict[str, dict[str, tuple[int, ...] | None]] = {}
    for name, shape in names.shapes.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = shape
    places, state = dict[str, str](), dict[str, Any]()
    if len(groups) < 2:
        return None
    for first, shapes in groups.items():
        own = NetworkNames(shapes)
        fits = [fit for keys, part in _states(content) for fit in _fits(keys, part, own)]
        if len(fits) > 1:
            fits = [fit for fit in fits if any(first in key for key in fit.keys)]
        if len(fits) != 1 or "" in shapes or fits[0].place in places.values():
            return None
        state |= {f"{first}.{name}": value for name, value in fits[0].state.items()}
        places[first] = fits[0].place
    return state, f"used weights {', '.join(f'{place} for {n}' for n, place in places.items())}"


def describe_misfit(content: Mapping[str, Any], state: Mapping[str, Any], names: Shapes) -> str:
    """Return how a checkpoint differs from the network whose names it should have.

    `state` is its part that is nearest to the network.
    """
    missing = [name for name in names if name not in state and not name.endswith(COUNTERS)]
    extra = [name for name in state if name not in names]
    wrong = [name for name in names if name in state and not _has_shape(state[name], names[name])]
    parts = []
    if wrong:
        value, shape = state[wrong[0]], names[wrong[0]]
        stored = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        parts.append(f"{wrong[0]} has shape {stored}, but {list(shape or ())} in the class{more}")
    if missing:
        count = f"{len(missing)} of {len(names)} values are missing"
        parts.append(f"{count} ({_listed(missing)})")
    if extra:
        parts.append(f"{len(extra)} are not in the class ({_listed(extra)})")
    if not any(name in names for name in state):
        parts.append(f"the file has the keys {_listed([str(key) for key in content])}")
    return "; ".join(parts)


def nearest_state(content: Any, names: NetworkNames) -> dict[str, Any]:
    """Return the part of a checkpoint that shares most modules with a network, {} without a part.

    Wrappers, and a usual prefix that all names have, are removed from its names if that helps.
    """
    modules = {module for name in names.shapes for module in _modules(name)}
    nearest, most = dict[str, Any](), -1
    for _, state in _states(content):
        plain = _without_wrappers(state) or state
        first = next(iter(plain)).partition(".")[0]
        variants = [state, plain]
        if first in ATTRIBUTES and all(name.startswith(f"{first}.") for name in plain):
            variants.append({name.removeprefix(f"{first}."): plain[name] for name in plain})
        for variant in variants:
            shared = sum(name.rpartition(".")[0] in modules for name in variant)
            if shared > most:
                nearest, most = dict(variant), shared
    return nearest


def _states(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the mappings with tensors in a checkpoint, and the keys that lead to them.

    Those under STATE_KEYS are first.
    """
    if not isinstance(content, Mapping):
        return
    values = {key: value for key, value in content.items() if isinstance(key, str)}
    if any(isinstance(value, torch.Tensor) for value in values.values()):
        yield keys, values
    if len(keys) < DEPTH:
        rank = {key: number for number, key in enumerate(STATE_KEYS)}
        for key in sorted(values, key=lambda key: rank.get(key, len(rank))):
            yield from _states(values[key], (*keys, key))


def _fits(keys: tuple[str, ...], state: Mapping[str, Any], names: NetworkNames) -> list[Fit]:
    """Return the fits of one mapping: as it is, or with wrappers and each prefix removed."""
    own_names: Mapping[str, str] = {name: name for name in names.shapes}
    if (exact := _fit(keys, state, "", names, own_names)) is not None:
        return [exact]
    # The network can have wrappers that the checkpoint lacks.
    without = _without_wrappers(state), _without_wrappers(own_names)
    plain, name_of = state, own_names
    if without[0] is not None and without[1] is not None:
        plain, name_of = without[0], without[1]
    needed = [name for name in name_of if not name.endswith(COUNTERS)]
    if not needed:
        return []
    longest = max(needed, key=len)
    prefixes = [
        name.removesuffix(longest)
        for name in plain
        if name == longest or name.endswith(f".{longest}")
    ]
    wrappers = tuple(sorted(_wrappers(state) - _wrappers(plain)))
    fits = (_fit(keys, plain, prefix, names, name_of) for prefix in prefixes)
    return [replace(fit, wrappers=wrappers) for fit in fits if fit is not None]


def _fit(
    keys: tuple[str, ...],
    state: Mapping[str, Any],
    prefix: str,
    names: NetworkNames,
    name_of: Mapping[str, str],
) -> Fit | None:
    """Return the fit for the names after a prefix, or None.

    `name_of` maps names in the checkpoint, after the prefix, to the network's.
    """
    weights = {name: state[prefix + key] for key, name in name_of.items() if prefix + key in state}
    for name in names.shapes:
        others = [other for other in names.tied.get(name, ()) if other in weights]
        if name not in weights and others:
            weights[name] = weights[others[0]]
        elif name not in weights and not name.endswith(COUNTERS):
            return None
    if any(not _has_shape(value, names.shapes[name]) for name, value in weights.items()):
        return None
    used = {prefix + key for key in name_of}
    unused = [name for name in state if name not in used and not name.endswith(COUNTERS)]
    is_usual = all(part in ATTRIBUTES for part in prefix.split(".")[:-1])
    if any(name.startswith(prefix) for name in unused) or (unused and not is_usual):
        return None
    return Fit(keys, weights, (), prefix, tuple(unused))


def _without_wrappers(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return values with names without the parts in WRAPPERS, None if names become equal."""
    plain = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): value
        for name, value in values.items()
    }
    return plain if len(plain) == len(values) else None


def _modules(name: str) -> Iterator[str]:
    """Yield the module of a value and the modules that contain it; '' is the network."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _wrappers(names: Mapping[str, Any]) -> set[str]:
    return {part for name in names for part in name.split(".") if part in WRAPPERS}


def _shape(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, torch.Tensor) or torch.nn.parameter.is_lazy(value):
        return None
    return tuple(value.shape)


def _has_shape(value: Any, shape: tuple[int, ...] | None) -> bool:
    return shape is None or (isinstance(value, torch.Tensor) and tuple(value.shape) == shape)


def _path(keys: Sequence[str]) -> str:
    return ".".join(keys) if len(keys) > 1 else repr(keys[0])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
