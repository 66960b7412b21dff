"""Faults in images that are written in the formats that others read."""

from tests.prove.fault import Fault, named

CONVERT = "tests/integration/test_convert.py"
EXPORTED = "tests/integration/test_exported_jobs.py"
WRITERS = "tests/contract/test_writer_contract.py"
IMAGES = "tests/integration/test_image_jobs.py"

FAULTS = (
    Fault(
        "table-of-more-errors-than-allowed",
        "chunkq/stages/tables.py",
        "    if errors > limit:",
        "    if errors > limit + 1:",
        "a job with too many broken images looks complete",
        named(IMAGES, "more_errors"),
    ),
    Fault(
        "lost-results-of-images-left-out",
        "chunkq/stages/tables.py",
        "            problems[chunk] = error\n",
        "",
        "images of a chunk whose results are lost are missing in the table, and nobody says so",
        named(IMAGES, "is_lost"),
    ),
    Fault(
        "raised-limit-of-errors-is-forgotten",
        "chunkq/create.py",
        'UPDATED_KEYS = ("queue", "max_errors", "price")',
        'UPDATED_KEYS = ("queue", "price")',
        "a job that ended with too many errors cannot be continued",
        named(IMAGES, "more_errors"),
    ),
    Fault(
        "flipped-axis-counted-from-the-wrong-end",
        "chunkq/writers/file_space.py",
        "center = size - 1 - center - (count - 1) * scale[number]",
        "center = center + 0.0",
        "labels of a region lie beside the scan if the job flips an axis",
        named(CONVERT, "region_of_the_scan"),
    ),
    Fault(
        "progress-of-another-image",
        "chunkq/writers/partial.py",
        'if values and values.get("identity") == identity else 0',
        "if values else 0",
        "a conversion continues in the voxels of another image",
        named(CONVERT, "another_image"),
    ),
    Fault(
        "volume-found-before-it-is-complete",
        "chunkq/writers/pyramid.py",
        "        self._create(path)\n        below",
        "        self._create(path)\n        self._finish(path)\n        below",
        "a reader opens a volume of which half is missing",
        named(WRITERS, "killed_writer"),
    ),
    Fault(
        "values-wrap-in-the-dtype-of-a-format",
        "chunkq/writers/copying.py",
        "if problem := misfit(values, writer.dtype.name):",
        'if problem := "":',
        "a label -1 becomes 4294967295",
        named(WRITERS, "do_not_fit"),
    ),
    Fault(
        "file-of-a-replaced-job",
        "chunkq/stages/export.py",
        "        job.check_unchanged()\n        replace_file",
        "        replace_file",
        "a finalizer of a replaced job writes its file over that of the new one",
        named(EXPORTED, "was_replaced"),
    ),
    Fault(
        "file-before-its-chunks",
        "chunkq/stages/completion.py",
        "return [] if any(others) else self.pending[stage.kind]",
        "return self.pending[stage.kind]",
        "a file appears although chunks are missing",
        named(EXPORTED, "chunks_are_missing"),
    ),
    Fault(
        "file-not-compared-with-its-record",
        "chunkq/job/exported_output.py",
        "return bool(commits) and commits[0].moved.get(FILE_SIZE) == size",
        "return bool(commits)",
        "a truncated file counts as complete",
        named(EXPORTED, "gone_or_changed"),
    ),
)
