"""Check the graph of a SavedModel for operations that reach files, the network or Python.

TensorFlow runs a SavedModel as a program: initializers when it is loaded, signatures when they are
called. Saving and restoring its own variables is left out, as is all that no signature reaches.
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
"""Parts of the names of operations without state that reach more than their inputs."""
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
"""Operations by which a SavedModel of TensorFlow 1 reads its own variables."""


def unsafe_part(path: str) -> str | None:
    """Return what in a SavedModel's folder can reach more than its inputs; None if nothing can.

    Raises google.protobuf.message.DecodeError for a damaged file.
    """
    model = import_module("tensorflow.core.protobuf.saved_model_pb2").SavedModel()
    with open(os.path.join(path, "saved_model.pb"), "rb") as file:
        model.ParseFromString(file.read())
    graphs = model.meta_graphs
    objects = len(graphs) == 1 and graphs[0].HasField("object_graph_def")
    for graph in graphs:
        functions = {f.signature.name: f.node_def for f in graph.graph_def.library.function}
        if objects:
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
    """Yield the nodes of functions, and of all functions that these call."""
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        for node in functions[name]:
            yield node
            waiting.extend(_callees(node))


def _callees(node: Any) -> Iterator[str]:
    yield node.op  # a function can be called like an operation
    for value in node.attr.values():
        yield value.func.name
        yield from (function.name for function in value.list.func)


def _needed(graph: Any, functions: dict[str, Any]) -> Iterator[Any]:
    """Yield what TensorFlow 1 runs to load a graph and to call its signatures."""
    nodes = {node.name: node for node in graph.graph_def.node}
    waiting = [graph.saver_def.restore_op_name]
    for signature in graph.signature_def.values():
        waiting += [tensor.name for tensor in signature.outputs.values()]
    for collection in graph.collection_def.values():
        waiting += collection.node_list.value
    seen: set[str] = set()
    while waiting:
        name = waiting.pop().removeprefix("^").partition(":")[0]
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        node = nodes[name]
        yield node
        yield from _called(_callees(node), functions)
        waiting.extend(node.input)
