"""Values of YAML files, with the numbers of YAML 1.2.

PyYAML follows YAML 1.1, in which `1e-3` and `1e3` are texts, `010` is 8, `1:30` is 90 and
`2024-01-31` is a date. In YAML 1.2, as in JSON, the first three are numbers with the usual value
and the others are texts. Truth values are those of both versions.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

INTEGER = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
"""Source: YAML 1.2.2, section 10.3.2, and `_` between digits as in YAML 1.1."""


_MERGE = "tag:yaml.org,2002:merge"
KEPT = ("bool", "null", "merge")


class DuplicateKeyError(ValueError):
    """A mapping has a key twice, of which YAML and JSON use the last one."""


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys, and whose resolvers are set below."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:  # before the pairs of merged mappings are added
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise DuplicateKeyError(
                    f"key {key.value!r} is in line {lines[key.value]} and again in line {line}; "
                    "remove one of them"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0) if text[1:2] in ("o", "x") else int(text)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (("int", INTEGER), ("float", FLOAT)):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789")
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load(text: str) -> Any:
    """Return the values of a YAML document. Raises yaml.YAMLError and the errors of numbers."""
    return yaml.load(text, _Loader)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its pairs. Raises DuplicateKeyError."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"key {twice!r} appears twice; remove one of them")
    return values
