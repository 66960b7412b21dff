"""Every key of the job file says what it means, and what is made of that is current."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from chunkq_producer.commands.explain import explanation, overview
from click.testing import CliRunner

from chunkq.cli import cli
from chunkq.errors import ErrorCode, JobError, describe_code
from chunkq.job.fields import GROUP, OMITTED, UNIT
from chunkq.job.job_file import SCHEMA_FILE, job_schema
from chunkq.job.key_reference import Key, all_keys, find_key
from chunkq.job.output_config import NAME_PLACEHOLDER

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = job_schema()
KEYS = {entry.path: entry for entry in all_keys()}


def page_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("job_file_page", DOCS / "job_file_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def definition(path: str) -> dict[str, Any]:
    """Return the schema of a key, from the schemas of its sections."""
    content = SCHEMA
    value: dict[str, Any] = {}
    for part in path.split("."):
        if part == NAME_PLACEHOLDER:
            content = section_of(named(value)) or {}
            continue
        value = content["properties"][part]
        content = section_of(value) or {}
    return value


def named(value: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the values of a mapping by name."""
    branches = [value, *value.get("anyOf", ())]
    return next(b["additionalProperties"] for b in branches if "additionalProperties" in b)


def section_of(value: dict[str, Any]) -> dict[str, Any] | None:
    """Return the schema of a section that a value is, or can be, or can be a list of."""
    if "$ref" in value:
        definition: dict[str, Any] = SCHEMA["$defs"][value["$ref"].rpartition("/")[2]]
        return definition
    parts = [*value.get("anyOf", ()), *value.get("oneOf", ()), value.get("items", {})]
    return next(filter(None, map(section_of, filter(None, parts))), None)


@pytest.mark.parametrize("path", KEYS)
def test_every_key_has_a_description_a_default_a_unit_and_an_example(path: str) -> None:
    value = definition(path)
    assert value.get("description", "").endswith(".")
    assert value.get(GROUP)
    assert len(value["examples"]) == 1
    assert UNIT in value  # None says that there is none
    section, _, name = path.rpartition(".")
    content = definition_of_section(section)
    has_default = name in content.get("required", ()) or value.get("default") is not None
    assert has_default != (OMITTED in value), "a key with the default None says what applies"


def definition_of_section(path: str) -> dict[str, Any]:
    if path.endswith(f".{NAME_PLACEHOLDER}"):
        return section_of(named(definition(path))) or {}
    return section_of(definition(path)) or {} if path else SCHEMA


@pytest.mark.parametrize("path", KEYS)
def test_the_example_of_a_key_is_valid_and_differs_from_its_default(path: str) -> None:
    value = definition(path)
    [example] = value["examples"]
    if not KEYS[path].is_section:
        jsonschema.validate(example, value | {"$defs": SCHEMA["$defs"]})
        required = "required" if KEYS[path].default is None else value.get("default")
        assert example != required
    shown = yaml.safe_load(KEYS[path].example)
    for part in path.split("."):
        shown = shown[part]
    assert shown == example


def test_the_page_of_the_reference_and_the_schema_file_are_current() -> None:
    module = page_module()
    advice = "run `python docs/job_file_page.py`"
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.page(text) == text, advice
    assert module.schema() == SCHEMA_FILE.read_text(encoding="utf-8"), advice
    assert all(f"### `{path}`\n" in text for path in KEYS)


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("path", KEYS)
def test_an_explanation_splits_no_word(path: str, width: int) -> None:
    entry = KEYS[path]
    lines = list(explanation(entry, width))
    words = {word for line in lines for word in line.split()}
    plain = f"{entry.description} {entry.type} {entry.default or 'required'}".replace("`", "")
    assert set(plain.split()) <= {word.replace("`", "") for word in words}
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines[:-3])


@pytest.mark.parametrize("width", [40, 80])
def test_the_list_has_every_key_in_its_group(width: int) -> None:
    lines = list(overview(all_keys(), width))
    names = {line.split()[0] for line in lines if line[:2] == "  " and line[2:3] != " "}
    assert names == {path.rpartition(".")[2] for path in KEYS}
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("strides", "strides"),
        ("model_config.dtype", "model_config.dtype"),
        ("dtype", "model_config.dtype"),
        ("model_config", "model_config"),
    ],
)
def test_a_key_is_found_by_its_path_or_a_unique_name(name: str, path: str) -> None:
    assert find_key(name).path == path


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("strids", ["strides"]),
        ("model_config.dtpye", ["model_config.dtype"]),
        ("adress", ["dask_config.address", "ray_config.address"]),
        ("address", ["dask_config.address", "ray_config.address"]),  # two keys have this name
        ("zzz", []),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_ones(name: str, nearest: list[str]) -> None:
    with pytest.raises(JobError) as error:
        find_key(name)
    assert str(error.value).startswith(f"{name}: ")
    assert all(path in str(error.value) for path in nearest)
    assert ("chunkq explain" in str(error.value)) == (not nearest)


def test_the_summary_of_a_key_is_its_first_sentence() -> None:
    entry = Key("k", "Patches", "Path, as `a.b`. More.", "text", None, None, "", None, False)
    assert entry.summary == "Path, as `a.b`"


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_code_is_explained(code: ErrorCode) -> None:
    # Through the group: a command that is called alone would keep its options without `-h`.
    result = CliRunner().invoke(cli, ["explain", f"[{code}]"])
    words = " ".join(result.output.split())
    assert result.exit_code == 0
    assert words.startswith(f"{code} {describe_code(code)}")
