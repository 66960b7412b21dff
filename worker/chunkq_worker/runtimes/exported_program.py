"""Check a torch.export file for parts that `torch.export.load` would run as Python code.

The loader unpickles some members and loads compiled libraries. It evaluates size expressions,
runs guards, inserts names into generated code, and calls any torch function that a node names.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import torch

from chunkq_worker.runtimes.torch_archive import UNSAFE_OPERATORS, member_names

PROGRAM = re.compile(r"([^/]+/models/[^/]+|serialized_exported_program)\.json")
TORCH_SAVED = re.compile(
    r"[^/]+/data/(sample_inputs|weights|constants)/[^/]+\.pt|"
    r"serialized_(state_dict|constants|example_inputs)\.(pt|json)"
)
"""Members that `torch.load` reads; safe if they load with `weights_only=True`."""
CONFIG = re.compile(r"[^/]+/data/(weights|constants)/[^/]+_config\.json")
PLAIN = re.compile(
    r"[^/]+/data/(weights/weight_\d+|constants/tensor_\d+)|"
    r"([^/]+/)?(version|byteorder|archive_format|archive_version|\.format_version|"
    r"\.storage_alignment|\.data/(serialization_id|version)|extra(_files)?/.*)"
)
"""Members that contain numbers, or text that is never evaluated."""
SIZE_FUNCTIONS = re.compile(
    r"Abs|Add|And|BitwiseFn_bitwise_(and|or)|CeilDiv|CeilToInt|CleanDiv|Eq|Equality|Float|FloatPow|"
    r"FloatTrueDiv|FloorDiv|FloorToInt|Ge|GreaterThan|Gt|Identity|IntTrueDiv|Integer|"
    r"IsNonOverlappingAndDenseIndicator|LShift|Le|LessThan|Lt|Max|Min|Mod|ModularIndexing|Mul|Ne|"
    r"Not|Or|Piecewise|Pow|PowByNatural|PythonMod|RShift|Rational|RoundDecimal|RoundToInt|"
    r"StrictGreaterThan|StrictLessThan|Symbol|ToFloat|TruncToFloat|TruncToInt|Unequality|Where|"
    r"ceiling|floor|int_oo|oo|sqrt|zoo"
)
"""Names that size expressions can use, in addition to symbols."""
SYMBOL = re.compile(r"[a-z]{1,4}\d+")
NUMBER = re.compile(r"[-+.\de]+")
GUARD_NAMES = re.compile(rf"{SIZE_FUNCTIONS.pattern}|L|args|float|inf|int|len|math|max|min")
GUARD_METHODS = frozenset({"dim", "ndim", "numel", "shape", "size", "storage_offset", "stride"})
MATH = frozenset({"ceil", "floor", "inf", "isnan", "sqrt", "trunc"})
NODES = (ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare)
OPERATOR_NODES = (ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context)
OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(\.\w+)?")
NAMESPACES = frozenset(
    {"aten", "prim", "prims", "quantized", "quantized_decomposed", "torchvision"}
)
HIGHER_ORDER = re.compile(
    r"associative_scan|cond|flex_attention|map|map_impl|out_dtype|scan|strict_mode|while_loop|"
    r"wrap_with_(autocast|set_grad_enabled)"
)
ARITHMETIC = re.compile(
    r"_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow|"
    r"rshift|sub|truediv|xor)|torch\.(_?sym_\w+|_check)|math\.(ceil|floor|sqrt|trunc|pow)"
)
"""Functions that a node can call, in addition to torch operators."""
WORD = re.compile(r"[\w.\-+:<=/ ]*")
"""Strings without quotes, brackets and line breaks; they run no code in any context."""
NAME = re.compile(r"[\w.\-]*")
TREE_TYPES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": ("tuple", "list", "dict"),
        "collections": ("OrderedDict",),
        "torch.fx.immutable_collections": ("immutable_list", "immutable_dict"),
    }.items()
    for name in names
)


def unsafe_part(content: bytes) -> str | None:
    """Return a description of a part that runs code when it is loaded, None if there is none.

    Raise ValueError, KeyError or zipfile.BadZipFile for a damaged .pt2 file.
    """
    names = member_names(content)
    if names is None:
        return "is an ambiguous zip file: two readers can read different contents"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in names:
            if (problem := _unsafe_member(name, archive.read(name))) is not None:
                return problem
    return None


def _unsafe_member(name: str, content: bytes) -> str | None:
    if PROGRAM.fullmatch(name):
        return _unsafe_program(json.loads(content))
    if CONFIG.fullmatch(name):
        parts = json.loads(content).get("config", {}).values()
        safe = not any(part.get("use_pickle") for part in parts)
    elif TORCH_SAVED.fullmatch(name):
        safe = _is_weights_only(content)
    else:
        safe = PLAIN.fullmatch(name) is not None
    return None if safe else f"contains {name}, which can run any code when it is loaded"


def _is_weights_only(content: bytes) -> bool:
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # of any class
        return not content
    return True


def _unsafe_program(program: Any) -> str | None:
    for key, text in _texts(program, ""):
        if not CHECKS.get(key, _is_name)(text):
            return f"contains the {key or 'name'} {text[:80]!r}, which can run any code when loaded"
    return None


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, string) for all strings of a program; key is '' for strings that are keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "metadata" and not CHECKS.keys() & item:  # torch only displays it
                continue
            if key != "range_constraints":
                yield "", name
            else:
                yield "expr_str", name
            yield from _texts(item, name)


def _is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None


def _is_word(text: str) -> bool:
    return WORD.fullmatch(text) is not None


def _is_target(text: str) -> bool:
    if (match := OPERATOR.fullmatch(text)) is None:
        return ARITHMETIC.fullmatch(text) is not None
    namespace, name = match[1], match[2]
    if namespace == "higher_order":
        return HIGHER_ORDER.fullmatch(name) is not None
    return namespace in NAMESPACES and name not in UNSAFE_OPERATORS


def _is_size(text: str) -> bool:
    """Return whether an expression consists only of numbers, symbols and allowed functions."""
    return _all_nodes(text, _is_size_node)


def _is_size_node(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=str() as value):  # sympy evaluates some strings
            return SYMBOL.fullmatch(value) is not None or NUMBER.fullmatch(value) is not None
        case ast.Constant(value=value):
            return isinstance(value, int | float)
        case ast.Name(id=name):
            return any(names.fullmatch(name) for names in (SIZE_FUNCTIONS, SYMBOL))
        case ast.Call(func=ast.Name()) | ast.keyword():
            return True
    return isinstance(node, NODES + OPERATOR_NODES)


def _is_guard(text: str) -> bool:
    """Return whether an expression only compares sizes of the inputs."""
    return _all_nodes(text, _is_guard_node)


def _is_guard_node(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            text = isinstance(value, str) and NAME.fullmatch(value)
            return bool(text) or isinstance(value, int | float | None)
        case ast.Name(id=name):
            return GUARD_NAMES.fullmatch(name) is not None
        case ast.Attribute(value=ast.Name(id=name), attr=function) if name == "math":
            return function in MATH
        case ast.Attribute(attr=name):
            return name in GUARD_METHODS
        case ast.Call(func=ast.Name() | ast.Attribute(), keywords=[]):
            return True
    return isinstance(node, (*NODES, *OPERATOR_NODES, ast.Subscript))


def _all_nodes(text: str, accepts: Callable[[ast.AST], bool]) -> bool:
    try:
        return all(accepts(node) for node in ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_tree(text: str) -> bool:
    """Return whether a description of nested arguments names only tuples, lists and dicts."""
    if not text:
        return True
    try:
        spec = json.loads(text)
        return all(_is_tree_text(key, value) for key, value in _texts(spec, ""))
    except (ValueError, RecursionError):
        return False


def _is_tree_text(key: str, text: str) -> bool:
    if key == "type":
        return text in TREE_TYPES
    if key != "context":
        return _is_name(text)
    inner = json.loads(text)
    return isinstance(inner, list | None) and all(_is_name(t) for _, t in _texts(inner, ""))


CHECKS: MappingProxyType[str, Callable[[str], bool]] = MappingProxyType(
    {
        "target": _is_target,
        "as_operator": _is_target,
        "expr_str": _is_size,
        "guards_code": _is_guard,
        "in_spec": _is_tree,
        "out_spec": _is_tree,
        "as_string": lambda text: True,  # an operator's argument
        "as_strings": lambda text: True,
        "torch_version": _is_word,
        "verifiers": _is_word,
        "type": _is_word,
        "class_fqn": _is_word,
    }
)
"""Key -> function that returns whether a string runs no code. Other keys contain names."""
