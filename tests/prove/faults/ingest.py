"""Faults in staging: copies of inputs that are incomplete, damaged or of a changed file."""

from tests.prove.fault import Fault, named

INGEST, TESTS = "chunkq/stages/ingest.py", "tests/integration/test_ingest.py"

FAULTS = (
    Fault(
        "missing-chunk-of-a-staged-input-is-zeros",
        "chunkq/storage/formats/zarr_arrays.py",
        '"fill_missing_data_reads": False',
        '"fill_missing_data_reads": True',
        "chunks that start too early, or after files were deleted, are computed from zeros",
        named("tests/unit/test_staged.py", "missing"),
    ),
    Fault(
        "chunks-do-not-wait-for-their-input",
        "chunkq/stages/infer.py",
        'after: ClassVar[str | None] = "ingest"',
        "after: ClassVar[str | None] = None",
        "workers reserve chunks that they cannot compute",
        named(TESTS, "chunks_wait"),
    ),
    Fault(
        "file-that-changes-is-staged",
        INGEST,
        "        item.check_inputs()\n        target.write(",
        "        target.write(",
        "the first half of the copy is of one file and the second half of another",
        named(TESTS, "changes_while"),
    ),
    Fault(
        "staging-starts-again",
        INGEST,
        "first = copy.slabs_written()",
        "first = 0",
        "a worker that is killed loses all slabs that it has written",
        named(TESTS, "killed_while"),
    ),
    Fault(
        "checksum-of-gzip-not-read",
        "chunkq/storage/formats/nifti.py",
        "boxes, to_end=True)",
        "boxes, to_end=False)",
        "damaged voxels of a compressed file are staged",
        named("tests/unit/test_nifti.py", "checksum"),
    ),
    Fault(
        "flipped-axis-is-read-from-its-other-end",
        "chunkq/storage/oriented.py",
        "(size - stop, size - start)",
        "(start, stop)",
        "blocks of an image that is presented in another orientation are exchanged",
        named("tests/unit/test_nifti.py", "voxels_and_affines"),
    ),
    Fault(
        "mask-of-another-orientation-is-used",
        "chunkq/job/mask_source.py",
        "    _check_orientations(source, image, prefix)\n",
        "",
        "a mask selects the mirrored half of an image",
        named("tests/unit/test_nifti.py", "coarser_mask"),
    ),
    Fault(
        "copy-has-the-presented-order",
        "chunkq/job/job_handle.py",
        "Slabs.of(source.stored_axes,",
        "Slabs.of(source.axes,",
        "a large compressed image in another orientation cannot be staged",
        named(TESTS, "in_an_orientation"),
    ),
    Fault(
        "sealed-job-stages-again",
        "chunkq/stages/completion.py",
        "if stage.is_temporary and not is_needed:",
        "if False:",
        "every command on a complete output copies its input again",
        named(TESTS, "sealed_job"),
    ),
)
