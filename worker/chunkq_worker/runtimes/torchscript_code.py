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
"""Namespaces of operators that compute; others belong to RPC, communication and extensions."""
CLASSES = frozenset({"quantized", "sparse", "xnnpack"})
"""Namespaces of classes written in C++ that hold weights in a layout of their own."""
CLASS_NAME = re.compile(rb"torch\.classes\.(\w*)")


def unsafe_part(content: bytes) -> str | None:
    """Return what in a TorchScript file can reach files or the network; None if nothing can.

    Raises zipfile.BadZipFile, zlib.error or ValueError for a damaged file.
    """
    names = member_names(content)
    if names is None:
        return "is a zip file that two readers can read differently"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in names:
            lower = name.lower()
            if lower.endswith("/model.json"):
                return f"carries {name}, a format that cannot be checked"
            if lower.endswith((".py", ".pkl")) and (found := _unsafe(lower, archive.read(name))):
                return found
    return None


def _unsafe(name: str, content: bytes) -> str | None:
    for namespace in CLASS_NAME.findall(content):
        if namespace.decode() not in CLASSES:
            return f"uses the class torch.classes.{namespace.decode()}, which can do anything"
    if not name.endswith(".py"):
        return None
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return f"carries {name}, code that cannot be checked"
    for operator in _operators(tree):
        if not _is_safe(operator):
            return f"calls {'.'.join(operator)}, which can reach files or the network"
    return None


def _operators(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Yield the dotted names that start at `torch` or `ops`, whole."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in ("torch", "ops"):
            yield (inner.id, *parts)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def _is_safe(operator: tuple[str, ...]) -> bool:
    if UNSAFE_OPERATORS.intersection(operator):
        return False
    if operator[0] == "torch":
        return len(operator) > 1  # not the module itself, which code could pass on
    return len(operator) > 2 and operator[1] in NAMESPACES
