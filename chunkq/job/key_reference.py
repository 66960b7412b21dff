"""Reference of the keys of a job file, read from its JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

import yaml

from chunkq.errors import JobError
from chunkq.job.fields import GROUP, MAX_INTEGER, OMITTED, SEE, UNIT, Group
from chunkq.job.hints import meant_key
from chunkq.job.job_file import job_schema
from chunkq.job.output_config import NAME_PLACEHOLDER

_WORDS = {
    "object": "mapping by name",
    "string": "text",
    "number": "number",
    "boolean": "true or false",
}
_PLURALS = {"integer": "integers", "text": "texts", "list": "lists", "mapping": "mappings"}


@dataclass(frozen=True)
class Key:
    """One key of the job file.

    path         dotted path, such as `model_config.dtype`
    group        heading under which lists show the key
    description  sentences with code in backticks
    type         its values in words, such as `list of integers > 0`
    default      what applies without the key; None if the key is required
    unit         unit of its numbers, None without one
    example      lines of YAML with the key and a value
    see          page below docs/, with an anchor; None without one
    is_section   whether it contains other keys
    """

    path: str
    group: str
    description: str
    type: str
    default: str | None
    unit: str | None
    example: str
    see: str | None
    is_section: bool

    @property
    def summary(self) -> str:
        """The first sentence of the description, without its last full stop."""
        sentence = re.split(r"(?<=[^.][.])\s", self.description, maxsplit=1)[0]
        return re.split(r": |; ", sentence, maxsplit=1)[0].removesuffix(".")


def all_keys() -> tuple[Key, ...]:
    """Return all keys: those of the top level by group, then those of each section by group."""
    schema = job_schema()
    return tuple(_section(schema, schema, ""))


def grouped(entries: tuple[Key, ...]) -> dict[tuple[str, str], list[Key]]:
    """Return the keys by the path of their section ('' for the top level) and their group."""
    groups: dict[tuple[str, str], list[Key]] = {}
    for entry in entries:
        groups.setdefault((entry.path.rpartition(".")[0], entry.group), []).append(entry)
    return groups


def find_key(name: str) -> Key:
    """Return the key with a dotted path, or with a last part that only one key has.

    Raises JobError with the nearest paths if there is none.
    """
    entries = {entry.path: entry for entry in all_keys()}
    if name in entries:
        return entries[name]
    last_parts = [path for path in entries if path.rpartition(".")[2] == name]
    if len(last_parts) == 1:
        return entries[last_parts[0]]
    if nearest := last_parts or _meant_path(name, entries) or nearest_paths(name, list(entries)):
        raise JobError(f"{name}: unknown key; did you mean {' or '.join(nearest)}?")
    raise JobError(f"{name}: unknown key; run `chunkq explain` to list all keys")


def _meant_path(name: str, entries: Mapping[str, Key]) -> list[str]:
    """Return the path of the key with another spelling or section, or the name of other tools."""
    names: dict[str, list[str]] = {}
    for path in entries:
        section, _, last = path.rpartition(".")
        names.setdefault(section, []).append(last)
    section, _, last = name.rpartition(".")
    section_and_key = meant_key(last, section, names, exact=True)
    return [] if section_and_key is None else [".".join(filter(None, section_and_key))]


def nearest_paths(name: str, paths: list[str]) -> list[str]:
    """Return at most three paths like a misspelled name, which may lack its section."""
    if "." in name:
        return get_close_matches(name, paths, n=3, cutoff=0.75)
    parts = [path.rpartition(".")[2] for path in paths]
    begins = [part for part in parts if len(name) > 2 and part.startswith(name)]
    alike = dict.fromkeys([*begins, *get_close_matches(name, sorted({*parts}), n=3, cutoff=0.7)])
    return [path for part in alike for path in paths if path.rpartition(".")[2] == part][:3]


def _section(schema: Mapping[str, Any], content: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    """Yield the keys of a section, and then those of its own sections."""
    required = content.get("required", ())
    values = sorted(content["properties"].items(), key=lambda item: _position(item[1]))
    for name, value in values:
        inner = _definition(schema, value)
        yield _key(f"{prefix}{name}", value, inner, is_required=name in required)
    for name, value in values:
        if (inner := _definition(schema, value)) is not None:
            yield from _section(schema, inner, f"{prefix}{name}.")
        if (inner := _definition(schema, _named(value))) is not None:
            yield from _section(schema, inner, f"{prefix}{name}.{NAME_PLACEHOLDER}.")


def _position(value: Mapping[str, Any]) -> int:
    """Return the position of a key's group; keys without metadata are last."""
    groups = get_args(Group)
    return groups.index(value[GROUP]) if GROUP in value else len(groups)


def _key(
    path: str, value: Mapping[str, Any], inner: Mapping[str, Any] | None, *, is_required: bool
) -> Key:
    is_section = _reference(value) is not None
    return Key(
        path=path,
        group=value.get(GROUP, ""),
        description=value.get("description", ""),
        type="section" if is_section else _type(value),
        default=None if is_required else _default(value, is_section=is_section),
        unit=value.get(UNIT),
        example=_example(path, value.get("examples", []), inner),
        see=value.get(SEE),
        is_section=is_section,
    )


def _definition(schema: Mapping[str, Any], value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the schema of a section that a value is, or can be, or can be a list of."""
    if (name := _reference(value)) is not None:
        definition: Mapping[str, Any] = schema["$defs"][name]
        return definition
    inner = [*value.get("anyOf", ()), *value.get("oneOf", ()), value.get("items", {})]
    return next(filter(None, (_definition(schema, part) for part in inner if part)), None)


def _named(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of the values of a mapping whose keys are names; empty for others."""
    branches = [value, *value.get("anyOf", ())]
    values = (branch.get("additionalProperties") for branch in branches)
    return next((one for one in values if isinstance(one, Mapping)), {})


def _reference(value: Mapping[str, Any]) -> str | None:
    """Return the name of the definition that a schema refers to, None for other schemas."""
    reference = value.get("$ref") or next((o.get("$ref") for o in value.get("allOf", ())), None)
    return None if reference is None else reference.rpartition("/")[2]


def _type(value: Mapping[str, Any]) -> str:
    """Return the values that a schema accepts, in words."""
    if choices := value.get("enum", [value["const"]] if "const" in value else []):
        return " | ".join(f"`{_text(choice)}`" for choice in choices)
    if _reference(value) is not None:
        return "mapping"
    if branches := value.get("anyOf") or value.get("oneOf"):
        options = [_type(option) for option in branches if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    if value.get("type") == "array":
        entry: Mapping[str, Any] = value.get("items") or next(
            iter(value.get("prefixItems", ())), {}
        )
        return f"list of {_plural(_type(entry))}"
    if value.get("type") == "integer":
        return _integer(value)
    return _WORDS.get(value.get("type", ""), "anything")


def _integer(value: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in value:
        return f"integer > {value['exclusiveMinimum']}"
    least = value.get("minimum", -MAX_INTEGER)
    return "integer" if least == -MAX_INTEGER else f"integer ≥ {least}"


def _plural(kind: str) -> str:
    first, space, rest = kind.partition(" ")
    return f"{_PLURALS.get(first, first)}{space}{rest}"


def _default(value: Mapping[str, Any], *, is_section: bool) -> str:
    if is_section:
        return "the defaults of its keys"
    default = value.get("default")
    return str(value.get(OMITTED, "none")) if default is None else f"`{_text(default)}`"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _example(path: str, examples: list[Any], inner: Mapping[str, Any] | None) -> str:
    """Return the first example as YAML, with the sections that contain the key."""
    if not examples:
        return ""
    value = examples[0]
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(path.split("."))]
    if isinstance(value, dict) and all(isinstance(one, dict) for one in value.values()):
        nested = yaml.safe_dump(value, default_flow_style=False).splitlines()
        return "\n".join([*lines, *(f"{'  ' * len(lines)}{line}" for line in nested)])
    if inner is None or not isinstance(value, dict):
        return "\n".join([*lines[:-1], f"{lines[-1]} {_yaml(value)}"])
    indent = "  " * len(lines)
    names = [name for name in inner["properties"] if name in value]
    return "\n".join([*lines, *(f"{indent}{name}: {_yaml(value[name])}" for name in names)])


def _yaml(value: object) -> str:
    """Return a value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
