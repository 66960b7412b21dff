"""Faults in what is said and shown of a finished output: damages, visible blocks, a viewer."""

from tests.prove.fault import Fault, named

VERIFY, REPAIR = "chunkq/verify.py", "chunkq/repair.py"
TESTS, SEAMS, VIEW = (f"tests/integration/test_{name}.py" for name in ("verify", "seams", "view"))

FAULTS = (
    Fault(
        "checksums-are-not-compared",
        VERIFY,
        "if object_checksum(fingerprint.crc32) != checksum:",
        "if not fingerprint.size:",
        "a changed or swapped object is called sound",
        named(TESTS, "random_damage_is_found"),
    ),
    Fault(
        "objects-under-other-names-are-not-foreign",
        VERIFY,
        "if index is None or not used[index]:",
        "if index is None:",
        "a foreign object is read as voxels, and the output is called sound",
        named(TESTS, "in_place_of_one_that_is_not_stored"),
    ),
    Fault(
        "contributors-are-not-computed-again",
        REPAIR,
        "in stage_of(kind).needs_again(job.items[number], chunk):",
        "in ():",
        "a repair takes two rounds, because the pieces of a damaged block are gone",
        named(TESTS, "contributors_of_a_damaged_block"),
    ),
    Fault(
        "repair-leaves-the-seal",
        REPAIR,
        "            job.ledger.unseal()\n",
        "",
        "chunks that are queued again are called damaged",
        named(TESTS, "incomplete_until"),
    ),
    Fault(
        "restored-metadata-lose-additions",
        "chunkq/job/output_documents.py",
        "            values = restored(stored, self.values)",
        "            values = self.values",
        "a repair deletes what users have added to the metadata",
        named(TESTS, "metadata_are_restored"),
    ),
    Fault(
        "an-array-is-written-by-reference",
        "chunkq/storage/formats/zarr_writing.py",
        "].write(values).result()",
        "].write(values, can_reference_source_data_indefinitely=True).result()",
        "voxels are missing in outputs with an axis of length 1",
        named("tests/unit/test_zarr_writing.py", "length_1"),
    ),
    Fault(
        "borders-are-compared-with-borders",
        "chunkq/plan/borders.py",
        "plane = start - quarter if",
        "plane = start if",
        "visible blocks are never reported",
        named(SEAMS, "reference"),
    ),
    Fault(
        "a-viewer-serves-files-outside",
        "producer/chunkq_producer/view/served.py",
        "return path if is_inside and os.path.isfile(path) else None",
        "return path if os.path.isfile(path) else None",
        "a page that has the link reads every file of the user",
        named(VIEW, "nothing_else"),
    ),
    Fault(
        "a-viewer-needs-no-token",
        "producer/chunkq_producer/view/server.py",
        "if source is None or not is_known:",
        "if source is None:",
        "every page in the browser reads the user's data",
        named(VIEW, "token"),
    ),
)
