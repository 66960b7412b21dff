"""Format numbers for people."""

from __future__ import annotations

from chunkq_producer.job_status import duration

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, unit: str) -> str:
    """Return a value with an SI prefix: `3.2 GB`, `850 voxels/s`."""
    for factor, prefix in PREFIXES:
        if abs(value) >= 0.9995 * factor:
            return f"{_three_digits(value / factor)} {prefix}{unit}"
    return f"{_three_digits(value)} {unit}"


def seconds(value: float) -> str:
    """Return a duration: `0.25 s`, `12.3 s`, `3 min 05 s`."""
    if value >= 99.5:
        return duration(value)
    if 5e-5 <= value < 0.0995:
        return f"{max(0.1, value * 1000):.2g} ms"
    return f"{value if value >= 5e-5 else 0.0:.3g} s"


def count(value: float) -> str:
    """Return an integer with thousands separated."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def percent_of_plan(measured: float, planned: float) -> str:
    """Return the measured value as a percentage of the planned one."""
    return f"{measured / planned:.1%}" if planned else "as planned" if not measured else "unplanned"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
