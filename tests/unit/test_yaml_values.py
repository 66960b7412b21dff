"""Values of YAML job files."""

import math
from typing import Any

import pytest
import yaml

from chunkq.job import yaml_values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("1E+3", 1000.0),
        ("-1e-3", -0.001),
        ("2.5e-3", 0.0025),
        (".5e1", 5.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("64", 64),
        ("-1", -1),
        ("064", 64),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", 1000),
        ("true", True),
        ("no", False),
        ("null", None),
        ("", None),
        ("~", None),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1.2.3", "1.2.3"),
        ("-", [None]),
        ("1e-3.zarr", "1e-3.zarr"),
        ("'1e-3'", "1e-3"),
    ],
)
def test_a_plain_value_has_the_type_of_yaml_1_2(text: str, value: Any) -> None:
    loaded = yaml_values.load(text)
    assert loaded == value
    assert type(loaded) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(yaml_values.load(".nan"))


def test_merged_mappings_are_read() -> None:
    assert yaml_values.load("a: &a {x: 1}\nb: {<<: *a, y: 2}")["b"] == {"x": 1, "y": 2}
    assert yaml_values.load("a: &a {x: 1}\nb: {<<: *a, x: 2}")["b"] == {"x": 2}


@pytest.mark.parametrize("text", ["a: 1\na: 1", "- {b: 1, b: 2}", "x: {a: {c: 1, c: 2}}"])
def test_a_key_that_appears_twice_is_refused(text: str) -> None:
    with pytest.raises(yaml_values.DuplicateKeyError, match="line"):
        yaml_values.load(text)


@pytest.mark.parametrize("text", ["!!python/object:os.system {}", "a: [1"])
def test_code_and_wrong_syntax_are_yaml_errors(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        yaml_values.load(text)
