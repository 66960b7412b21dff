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
        "chunkq/tables.py",
        "if self.fits(options.max_width):",
        "if options.max_width:",
        "a narrow terminal splits words",
        named(TERMINAL, "splits_no_word_on"),
    ),
    Fault(
        "zarr-folder-named-like-a-tiff-file",
        "chunkq/job/output_name.py",
        "format_name = SCHEMES.get(scheme) or FORMATS.get(last)",
        "format_name = SCHEMES.get(scheme)",
        "`output: labels.tif` becomes a folder",
        named("tests/unit/test_output_name.py", "another_format"),
    ),
    Fault(
        "last-of-two-equal-keys",
        "chunkq/job/yaml_values.py",
        "if key.value in lines:",
        "if False and key.value in lines:",
        "the first of two equal keys has no effect",
        named("tests/unit/test_yaml_values.py", "twice"),
    ),
    Fault(
        "output-shape-without-its-source",
        "worker/chunkq_worker/shape_texts.py",
        "if self.model.output_shape is not None:\n            reason",
        "if self.model is not None:\n            reason",
        "a message says that the job has a shape that it does not have",
        named("tests/unit/test_shape_texts.py", "source_of_the_expected_shape"),
    ),
)
