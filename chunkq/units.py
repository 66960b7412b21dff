"""Format quantities for people: bytes, rates, durations and counts."""

from __future__ import annotations

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, unit: str) -> str:
    """Return a value with three digits and an SI prefix: `3.2 GB`, `850 voxels/s`."""
    for factor, prefix in PREFIXES:
        if abs(value) >= 0.9995 * factor:
            return f"{_three_digits(value / factor)} {prefix}{unit}"
    return f"{_three_digits(value)} {unit}"


def duration(seconds: float) -> str:
    """Return whole seconds: `1 h 02 min`, `3 min 05 s`, `12 s`."""
    rounded = round(seconds)
    if rounded >= 3600:
        return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
    return f"{rounded // 60} min {rounded % 60:02d} s" if rounded >= 60 else f"{rounded} s"


def seconds(value: float) -> str:
    """Return a duration with up to three digits: `51 ms`, `0.25 s`, `12.3 s`, `3 min 05 s`."""
    if value >= 99.5:
        return duration(value)
    if 5e-5 <= value < 0.0995:
        return f"{max(0.1, value * 1000):.2g} ms"
    return f"{value if value >= 5e-5 else 0.0:.3g} s"


def count(value: float) -> str:
    """Return an integer with thousands separated."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def counted(number: int, one: str, many: str) -> str:
    """Return a number with its noun: `1 image`, `3 images`."""
    return f"{number} {one if number == 1 else many}"


def device_cost(seconds: float | None, price: float | None, devices: int = 1) -> float | None:
    """Return what a time (s) on each of some devices costs, at a price per device and hour.

    It is None if the time or the price is unknown.
    """
    return None if seconds is None or price is None else seconds / 3600 * devices * price


def money(value: float) -> str:
    """Return an amount of money, in the currency of the price: `3.27`, `0.004`."""
    if 0 < value < 1e-4:
        return "less than 0.0001"
    return f"{value:.2f}" if value >= 0.995 or value == 0 else f"{value:.2g}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
