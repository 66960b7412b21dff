"""Rounds in which other processes used the CPUs are refused."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import turns
from benchmarks.turns import MOST_OTHERS, quiet_rounds

QUIET, NOISY = MOST_OTHERS, MOST_OTHERS + 0.01


def rounds_of(monkeypatch: pytest.MonkeyPatch, shares: list[float], rounds: int) -> list[int]:
    """Return the numbers of the rounds that count, if others use these shares of the CPUs."""
    left, numbers = list(shares), iter(range(len(shares)))

    def watched(run: Callable[[], Any]) -> tuple[Any, float]:
        return run(), left.pop(0)

    monkeypatch.setattr(turns, "watched", watched)
    results = quiet_rounds(rounds, lambda: next(numbers))
    assert not left
    return results


@pytest.mark.parametrize(
    ("shares", "counted"),
    [
        ([QUIET, QUIET, QUIET, QUIET], [0, 1, 2, 3]),
        ([QUIET, NOISY, QUIET, QUIET, QUIET], [0, 2, 3, 4]),
        ([NOISY, QUIET, NOISY, QUIET, NOISY, QUIET], [1, 3, 5]),
        ([NOISY, QUIET, NOISY, QUIET, NOISY, NOISY], [1, 3]),
    ],
)
def test_refused_rounds_are_run_again_half_as_often_as_rounds_are_wanted(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], counted: list[int]
) -> None:
    assert rounds_of(monkeypatch, shares, 4) == counted


def test_a_busy_machine_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="5 of 6 rounds were refused"):
        rounds_of(monkeypatch, [NOISY, QUIET, NOISY, NOISY, NOISY, NOISY], 4)
