"""Faults in what is read of inputs that other systems store and serve."""

from tests.prove.fault import Fault, named

CHUNKS = "chunkq/storage/formats/zarr_chunks.py"
NODES = "chunkq/storage/formats/zarr_nodes.py"
NPY = "chunkq/storage/formats/npy.py"
REACH = "tests/integration/test_reach.py"

FAULTS = (
    Fault(
        "empty-input-accepted",
        "chunkq/storage/images.py",
        "if array.is_empty and not allow_empty:",
        "if array.is_empty and allow_empty is None:",
        "a wrong path or separator gives a sealed volume of one label",
        named(REACH, "without_any_chunk"),
    ),
    Fault(
        "only-declared-chunk-names",
        CHUNKS,
        "return next((keys for keys in candidates if keys in others), None)",
        "return None",
        "chunks that are nested although the metadata do not say so are not found",
        named(REACH, "other_separator"),
    ),
    Fault(
        "refused-chunks-not-checked",
        "chunkq/storage/formats/zarr_python.py",
        "if lenient.was_forbidden:",
        "if False:",
        "credentials that end during a job turn the rest of the input into fill values",
        named(REACH, "starts_to_refuse"),
    ),
    Fault(
        "forbidden-is-always-missing",
        NODES,
        "        return is_forbidden(error)\n    return False",
        "        return True\n    return False",
        "chunks that a server refuses are read as fill values",
        named(REACH, "no_missing_chunk"),
    ),
    Fault(
        "truncated-npy-accepted",
        NPY,
        "if size is not None and size < self._voxels.end:",
        "if size is not None and size < 0:",
        "a truncated input is found after hours of work",
        named(REACH, "truncated_npy"),
    ),
)
