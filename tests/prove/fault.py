"""A hand-made fault in chunkq's code, and the tests that have to catch it."""

from dataclasses import dataclass

CONTRACT = "tests/contract/test_executor_contract.py"
MODEL = "tests/contract/test_executor_model.py"


@dataclass(frozen=True)
class Fault:
    """One edit of one file.

    `old` occurs exactly once in `file` and is replaced by `new`. `harm` says what goes wrong for a
    user. `tests` are arguments of pytest, a file or a file and `-k` with words: the smallest
    selection that must fail with the fault.
    """

    id: str
    file: str
    old: str
    new: str
    harm: str
    tests: tuple[str, ...]


def contract(queue: str, words: str) -> tuple[str, ...]:
    """The contract tests of one kind of queue whose name has these words."""
    return CONTRACT, "-k", f"{queue} and {words}"


def named(file: str, words: str) -> tuple[str, ...]:
    """The tests of a file whose name has these words."""
    return file, "-k", words
