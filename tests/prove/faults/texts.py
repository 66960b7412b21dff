"""Faults in what a user reads: the reference of the keys, and text on a terminal."""

from tests.prove.fault import Fault, named

KEYS, TERMINAL = "tests/unit/test_key_reference.py", "tests/unit/test_terminal.py"

FAULTS = (
    Fault(
        "a-key-without-its-unit",
        "chunkq/job/fields.py",
        "extra: dict[str, Any] = {GROUP: group, UNIT: unit}",
        "extra: dict[str, Any] = {GROUP: group}",
        "no place says the unit of a key",
        named(KEYS, "description_a_default"),
    ),
    Fault(
        "bar-by-color-only",
        "chunkq/progress_bar.py",
        'full, empty = ("#", "-") if options.ascii_only else ("█", "░")',
        'full, empty = ("#", "#") if options.ascii_only else ("█", "█")',
        "without colors a full bar looks like an empty one",
        named(TERMINAL, "full_bar"),
    ),
    Fault(
        "table-too-wide-for-its-words",
        "producer/chunkq_producer/tables.py",
        "if self._least_width() <= options.max_width:",
        "if options.max_width:",
        "a narrow terminal splits words",
        named(TERMINAL, "splits_no_word_on"),
    ),
)
