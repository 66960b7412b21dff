"""A fault for the mutation proof: an edit of chunkq's code, and the tests that must detect it."""

from dataclasses import dataclass

MODEL = "tests/contract/test_executor_model.py"


@dataclass(frozen=True)
class Fault:
    """One edit of one file.

    `old` must occur exactly once in `file` and is replaced by `new`. `harm` describes the effect
    on a user. `tests` are arguments of pytest: a file, or a file, `-k` and an expression. They are
    the smallest selection that must fail with the fault.
    """

    id: str
    file: str
    old: str
    new: str
    harm: str
    tests: tuple[str, ...]


def contract(part: str, queue: str, name: str) -> tuple[str, ...]:
    """Select tests of one queue and one part of its contract, whose names contain `name`."""
    return f"tests/contract/test_executor_{part}.py", "-k", f"{queue} and {name}"


def named(file: str, expression: str) -> tuple[str, ...]:
    """Select the tests of a file that match an expression of `-k`."""
    return file, "-k", expression
