"""Quantities as text: three digits, a prefix, and no rounding to an exponent."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.units import PREFIXES, count, device_cost, duration, money, seconds, si


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (5, "5 B"),
        (999, "999 B"),
        (999.6, "1 kB"),  # not 1e+03 B
        (1500, "1.5 kB"),
        (3.204e9, "3.2 GB"),
        (999.4e9, "999 GB"),
        (2.5e15, "2500 TB"),
    ],
)
def test_bytes_have_three_digits_and_an_si_prefix(value: float, text: str) -> None:
    assert si(value, "B") == text


@given(st.floats(1, 1e14))
def test_the_value_with_its_prefix_is_within_half_a_percent(value: float) -> None:
    factors = {prefix: factor for factor, prefix in PREFIXES} | {"": 1.0}
    match = re.fullmatch(r"([\d.]+) ([kMGT]?)voxels/s", si(value, "voxels/s"))
    assert match is not None
    assert float(match[1]) * factors[match[2]] == pytest.approx(value, rel=0.00501)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (7199, "1 h 59 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations_are_whole_seconds(value: float, text: str) -> None:
    assert duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (1e-5, "0 s"),
        (5e-5, "0.1 ms"),
        (0.0512, "51 ms"),
        (0.0996, "0.0996 s"),
        (0.25, "0.25 s"),
        (12.34, "12.3 s"),
        (99.6, "1 min 40 s"),
    ],
)
def test_short_durations_have_up_to_three_digits(value: float, text: str) -> None:
    assert seconds(value) == text


def test_thousands_of_a_count_are_separated() -> None:
    assert count(1234567) == "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"


def test_devices_cost_their_hours_and_nothing_is_known_without_a_price() -> None:
    assert device_cost(1800, 2.0, 3) == 3.0
    assert device_cost(None, 2.0) is None
    assert device_cost(1800, None) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.00412, "0.0041"), (12.34, "12.34"), (0.00002, "less than 0.0001")],
)
def test_small_amounts_of_money_have_two_digits(value: float, text: str) -> None:
    assert money(value) == text
