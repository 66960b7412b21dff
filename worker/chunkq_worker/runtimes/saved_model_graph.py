"""Check the graph of a SavedModel for operations that reach files, the network or Python.

TensorFlow runs a SavedModel as a program: initializers at load time, signatures when they are
called. Operations that save and restore its variables, and those that no signature reaches, are
not checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

UNSAFE = re.compile(
    r"Collective|^Copy|Checkpoint|Custom|Dataset|Debug|Dump|File|Host|ImmutableConst|Iterator|Proto|"
    r"PyFunc|Reader|Recv|Remap|Rpc|Send|Session|Snapshot|Summary"
)
"""Parts of the names of stateless operations that reach more than their inputs."""
SAFE_WITH_STATE = re.compile(
    r"_?(Arg|Case|If|Retval|While)|Assert|CheckNumerics(V2)?|Empty|GuaranteeConst|DeepCopy|Print|"
    r"(Stateful)?PartitionedCall|(Assign(Add|Sub)?|Destroy|Read|Temporary)?Variable(Op|V2|Shape)?|"
    r"VarHandleOp|VarIsInitializedOp|DestroyResourceOp|DisableCopyOnRead|"
    r"Resource(Gather|GatherNd|Scatter\w+|StridedSliceAssign|CountUpTo)|"
    r"Random(Uniform|UniformInt|StandardNormal|Shuffle|Gamma|Poisson|PoissonV2)|Multinomial|"
    r"TruncatedNormal|ParameterizedTruncatedNormal|NonDeterministicInts|"
    r"Stateful(Uniform|UniformInt|UniformFullInt|StandardNormal|StandardNormalV2|TruncatedNormal)|"
    r"StatelessRandomGetAlg|Rng(Skip|ReadAndSkip)|CudnnRNN\w*|"
    r"(Anonymous)?(Mutable)?(Dense)?HashTable(V2|OfTensors|OfTensorsV2)?|InitializeTableV2|"
    r"LookupTable(Find|Insert|Remove|Size|Export|Import)V2|TensorArray\w*|Stack(Push|Pop|Close)?V2"
)
RESTORE = frozenset({"Restore", "RestoreSlice", "RestoreV2"})
"""Operations with which a SavedModel of TensorFlow 1 reads its own variables."""


def unsafe_part(path: str) -> str | None:
    """Return a description of an unsafe operation of a SavedModel, None if there is none.

    An operation is unsafe if it can reach more than its inputs. `path` is the model's folder. Raise
    google.protobuf.message.DecodeError for a damaged file.
    """
    model = import_module("tensorflow.core.protobuf.saved_model_pb2").SavedModel()
    with open(os.path.join(path, "saved_model.pb"), "rb") as file:
        model.ParseFromString(file.read())
    graphs = model.meta_graphs
    is_version_2 = len(graphs) == 1 and graphs[0].HasField("object_graph_def")
    for graph in graphs:
        functions = {f.signature.name: f.node_def for f in graph.graph_def.library.function}
        if is_version_2:
            nodes = _called(graph.object_graph_def.concrete_functions, functions)
            allowed: frozenset[str] = frozenset()
        else:
            nodes, allowed = _needed(graph, functions), RESTORE
        for node in nodes:
            if node.op not in functions and node.op not in allowed and not _is_safe(node.op):
                return f"runs the operation {node.op}, which can reach files, the network or code"
    return None


def _is_safe(name: str) -> bool:
    definition = import_module("tensorflow.python.framework.op_def_registry").get(name)
    if definition is None or definition.is_stateful:
        return SAFE_WITH_STATE.fullmatch(name) is not None
    return UNSAFE.search(name) is None


def _called(names: Iterable[str], functions: dict[str, Any]) -> Iterator[Any]:
    """Yield the nodes of functions and of all functions that they call."""
    pending, seen = list(names), set[str]()
    while pending:
        name = pending.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        for node in functions[name]:
            yield node
            pending.extend(_callees(node))


def _callees(node: Any) -> Iterator[str]:
    """Yield the names of functions that a node can call."""
    yield node.op  # a function can be called like an operation
    for value in node.attr.values():
        yield value.func.name
        yield from (function.name for function in value.list.func)


def _needed(graph: Any, functions: dict[str, Any]) -> Iterator[Any]:
    """Yield the nodes that TensorFlow 1 runs to load a graph and to call its signatures."""
    nodes = {node.name: node for node in graph.graph_def.node}
    pending = [graph.saver_def.restore_op_name]
    for signature in graph.signature_def.values():
        pending += [tensor.name for tensor in signature.outputs.values()]
    for collection in graph.collection_def.values():
        pending += collection.node_list.value
    seen: set[str] = set()
    while pending:
        name = pending.pop().removeprefix("^").partition(":")[0]
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        node = nodes[name]
        yield node
        yield from _called(_callees(node), functions)
        pending.extend(node.input)
