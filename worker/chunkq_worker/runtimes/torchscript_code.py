"""Check the code of a TorchScript file for operators that reach files or the network.

`torch.jit.load` compiles this code and runs the `__setstate__` methods in it.
"""

from __future__ import annotations

import ast
import io
import re
import zipfile
from collections.abc import Iterator

from chunkq_worker.runtimes.torch_archive import UNSAFE_OPERATORS, member_names

NAMESPACES = frozenset({"aten", "prim", "prepacked", "quantized", "sparse", "torchvision"})
"""Namespaces of operators that only compute. Others are RPC, communication and extensions."""
CLASSES = frozenset({"quantized", "sparse", "xnnpack"})
"""Namespaces of C++ classes that store weights in a special layout."""
CLASS_NAME = re.compile(rb"torch\.classes\.(\w*)")


def unsafe_part(content: bytes) -> str | None:
    """Return a description of code that can reach files or the network, None if there is none.

    Raise zipfile.BadZipFile, zlib.error or ValueError for a damaged TorchScript file.
    """
    names = member_names(content)
    if names is None:
        return "is an ambiguous zip file: two readers can read different contents"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in names:
            lower = name.lower()
            if lower.endswith("/model.json"):
                return f"contains {name}, a format that cannot be checked"
            if lower.endswith((".py", ".pkl")):
                problem = _unsafe_member(lower, archive.read(name))
                if problem is not None:
                    return problem
    return None


def _unsafe_member(name: str, content: bytes) -> str | None:
    for namespace in CLASS_NAME.findall(content):
        if namespace.decode() not in CLASSES:
            return f"uses the class torch.classes.{namespace.decode()}, which can run any code"
    if not name.endswith(".py"):
        return None
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return f"contains {name}, code that cannot be checked"
    for operator in _operators(tree):
        if not _is_safe(operator):
            return f"calls {'.'.join(operator)}, which can reach files or the network"
    return None


def _operators(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Yield the full dotted names that start with `torch` or `ops`."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in ("torch", "ops"):
            yield (inner.id, *parts)
        else:
            pending.extend(ast.iter_child_nodes(node))


def _is_safe(operator: tuple[str, ...]) -> bool:
    if UNSAFE_OPERATORS.intersection(operator):
        return False
    if operator[0] == "torch":
        return len(operator) > 1  # code could pass on the module itself
    return len(operator) > 2 and operator[1] in NAMESPACES
