"""Rows of options such that every pair of options occurs; needs the standard library only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def all_pairs(
    axes: Mapping[str, Sequence[Any]], is_possible: Callable[[Row], bool] = lambda _: True
) -> Iterator[Row]:
    """Yield rows with one value per axis such that every possible pair of values is in a row.

    `is_possible` says of a complete row whether the tool offers it. The rows are always the same.
    """
    rows = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    rows = [row for row in rows if is_possible(row)]
    pairs_of = [frozenset(combinations(row.items(), 2)) for row in rows]
    uncovered = set[Any]().union(*pairs_of)
    while uncovered:
        counts = [len(pairs & uncovered) for pairs in pairs_of]
        most = max(counts)
        # Rows with as many new pairs as the best one follow at once, which saves most of the time.
        for number, count in enumerate(counts):
            if count == most and len(pairs_of[number] & uncovered) == most:
                uncovered -= pairs_of[number]
                yield rows[number]
