"""Faults in what is read of TIFF and HDF5 files."""

from tests.prove.fault import Fault, named

TIFF_FILE = "chunkq/storage/formats/tiff_file.py"
TIFF_AXES = "chunkq/storage/formats/tiff_axes.py"
PAGES = "chunkq/storage/formats/tiff_pages.py"
STACK = "chunkq/storage/formats/tiff_stack.py"
HDF5 = "chunkq/storage/formats/hdf5.py"
TIFF_TESTS = "tests/integration/test_tiff_inputs.py"
HDF5_TESTS = "tests/integration/test_hdf5_inputs.py"

FAULTS = (
    Fault(
        "missing-pages-are-zeros",
        TIFF_FILE,
        "        if missing:\n",
        "        if missing < 0:\n",
        "the slices in a file that was not copied are predicted as zeros",
        named(TIFF_TESTS, "several_files_is_one_array"),
    ),
    Fault(
        "cut-chain-of-pages-accepted",
        TIFF_FILE,
        "if any(CUT_OFF.search(message) for message in warnings):",
        "if not warnings and warnings:",
        "a truncated stack is predicted as a stack of fewer slices",
        named(TIFF_TESTS, "truncated_file"),
    ),
    Fault(
        "stack-in-the-order-of-characters",
        STACK,
        "key=natural_key)\n    filesystem",
        "key=str)\n    filesystem",
        "slice 10 lies between slices 1 and 2",
        named(TIFF_TESTS, "natural_order"),
    ),
    Fault(
        "gaps-of-stacks-are-silent",
        STACK,
        "    if step < 1 or set(steps) == {step}:",
        "    if step:",
        "a stack from which a slice is missing is computed without a warning",
        named(TIFF_TESTS, "number_is_missing"),
    ),
    Fault(
        "samples-are-slices",
        TIFF_AXES,
        '{"S": "c", "I": None',
        '{"I": None',
        "the colours of an image are a spatial axis",
        named(TIFF_TESTS, "samples"),
    ),
    Fault(
        "byte-order-of-the-machine",
        TIFF_FILE,
        "newbyteorder(frame.parent.byteorder)",
        'newbyteorder("=")',
        "voxels of a big-endian TIFF are other numbers",
        named(TIFF_TESTS, "every_dtype"),
    ),
    Fault(
        "decoded-segments-mixed-up",
        PAGES,
        "cached = CACHE.get((self._token, pick, segment.number))",
        "cached = CACHE.get((self._token, 0, segment.number))",
        "a slice is that of another slice that was read before",
        named(TIFF_TESTS, "every_dtype"),
    ),
    Fault(
        "links-to-other-files-followed",
        HDF5,
        "if isinstance(link, h5py.ExternalLink):",
        "if link is None:",
        "an input reads any file of the machine, and is not noticed when that is replaced",
        named(HDF5_TESTS, "another_file"),
    ),
    Fault(
        "virtual-datasets-over-other-files",
        HDF5,
        'if source.file_name != ".":',
        "if not source.file_name:",
        "files that are missing are predicted as zeros",
        named(HDF5_TESTS, "another_file"),
    ),
    Fault(
        "hdf5-files-are-locked",
        HDF5,
        '"r", locking=False)',
        '"r", locking=True)',
        "file systems without locks, and files that are open elsewhere, cannot be read",
        named(HDF5_TESTS, "locked"),
    ),
)
