"""Dataclasses as JSON: nothing is lost, and nothing that does not match is accepted."""

import json
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkq import json_values


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    index: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    seconds: dict[str, float]
    kind: Literal["a", "b"]
    limit: float | None = None
    named: dict[str, Part] = field(default_factory=dict)


ANY = "(?s).+"
"""The message belongs to the library."""
texts = st.text()  # has no lone surrogates
parts = st.builds(Part, texts, st.lists(st.integers()).map(tuple))
wholes = st.builds(
    Whole,
    st.lists(parts, max_size=3).map(tuple),
    st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
    st.sampled_from(["a", "b"]),
    st.none() | st.floats(allow_nan=False),
    st.dictionaries(texts, parts, max_size=3),
)
VALUES: dict[str, Any] = {"parts": [{"name": "x", "index": [1, 2]}], "seconds": {}, "kind": "a"}
WHOLE = Whole((Part("x", (1, 2)),), {}, "a")


@settings(max_examples=50)
@given(wholes)
def test_a_dataclass_survives_the_way_to_json_and_back(whole: Whole) -> None:
    text = json_values.encode(whole)
    assert b"\n" not in text
    assert json_values.decode(Whole, text) == whole
    assert json_values.decode(Whole, text.decode()) == whole
    values = json_values.to_values(whole)
    assert json.loads(json.dumps(values)) == values == json.loads(text)
    assert json_values.from_values(Whole, values) == whole


def test_missing_keys_take_the_default_and_integers_are_valid_numbers() -> None:
    assert json_values.from_values(Whole, VALUES) == WHOLE
    assert json_values.from_values(Whole, VALUES | {"limit": 3}) == Whole(WHOLE.parts, {}, "a", 3.0)
    assert json_values.decode(Whole, json_values.encode(Whole((), {}, "a", inf))).limit == inf


def test_tuples_are_accepted_like_the_arrays_that_they_become() -> None:
    values = VALUES | {"parts": ({"name": "x", "index": (1, 2)},)}
    assert json_values.from_values(Whole, values) == WHOLE


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "c"},
        {"limit": "3"},
        {"limit": True},
        {"seconds": {"read": "0.5"}},
        {"seconds": []},
        {"parts": None},
        {"parts": [{"name": "x", "index": [1.0]}]},
        {"parts": [{"name": "x", "index": ["1"]}]},
        {"parts": [{"name": "x", "index": [True]}]},
        {"parts": [{"name": 1, "index": []}]},
        {"parts": [{"name": "x"}]},
        {"parts": [{"name": "x", "index": [], "unknown": 0}]},
        {"parts": [["x", [1]]]},
        {"parts": [{"name": "\ud800", "index": []}]},
        {"unknown": 0},
    ],
    ids=str,
)
def test_a_value_that_does_not_match_is_a_value_error(changes: dict[str, Any]) -> None:
    values = VALUES | changes
    with pytest.raises(ValueError, match=ANY):
        json_values.from_values(Whole, values)
    with pytest.raises(ValueError, match=ANY):
        json_values.decode(Whole, json.dumps(values))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}", b"\xff", "{},{}", "[" * 10_000])
def test_a_text_without_the_dataclass_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=ANY):
        json_values.decode(Whole, text)
