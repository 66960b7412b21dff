"""Whether a TorchScript network can return different outputs for one batch, judged by its graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

CONTAINERS = frozenset({"ListType", "DictType"})
"""Types of attributes that a network can change without writing a tensor."""
UNKNOWN = (
    "empty", "new_empty", "_empty", "resize", "set_", "SetAttr", "Call", "PythonOp",
    "IgnoredPythonOp", "TimePoint", "fork", "wait",
)  # fmt: skip
"""Starts of the names of nodes that read memory without a value, store state, or run other code."""


def is_repeatable(module: Any) -> bool:
    """Return whether a module returns the same for a batch unless it draws from torch's generator.

    This holds on a CPU. It is False for modules that are no TorchScript, whose code is unknown, and
    for graphs that can write to an attribute, such as scripted batch norms; traced ones cannot.
    """
    graph = getattr(module, "inlined_graph", None)
    if graph is None:
        return False
    nodes = list(_nodes(graph))
    if not all(map(_is_known, nodes)):
        return False
    aliases = graph.alias_db()
    attributes = (node.output() for node in nodes if node.kind() == "prim::GetAttr")
    return not any(
        value.type().kind() in CONTAINERS
        or (value.type().kind() == "TensorType" and aliases.has_writers(value))
        for value in attributes
    )


def _nodes(block: Any) -> Iterator[Any]:
    """Yield the nodes of a graph or a block, also those of inner blocks."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _is_known(node: Any) -> bool:
    namespace, _, name = node.kind().partition("::")
    is_fixed = not name.startswith(UNKNOWN) and not node.isNondeterministic()
    return namespace in ("aten", "prim") and is_fixed
