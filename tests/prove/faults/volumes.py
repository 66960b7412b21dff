"""Faults in what is read of N5 and Neuroglancer precomputed volumes."""

from tests.prove.fault import Fault, named

PRECOMPUTED = "chunkq/storage/formats/precomputed.py"
ARRAYS = "chunkq/storage/formats/tensorstore_arrays.py"
N5_METADATA = "chunkq/storage/formats/n5_metadata.py"
VOLUMES = "tests/integration/test_n5_and_precomputed.py"
LAYOUTS = "chunkq/job/output_layouts.py"
WRITTEN = "tests/integration/test_precomputed_jobs.py"
AXES = "tests/unit/test_n5_axes.py"

FAULTS = (
    Fault(
        "precomputed-offset-of-the-center",
        LAYOUTS,
        "return [first - (1 - 1 / scale) / 2 for",
        "return [first + 0 * scale for",
        "precomputed outputs of a finer resolution lie voxels beside their input",
        named(WRITTEN, "offset_of_its_corner"),
    ),
    Fault(
        "precomputed-fill-value-not-refused",
        LAYOUTS,
        "    if fill and (skips",
        "    if False and (skips",
        "blocks outside of a mask read as 0, voxels beside them as the fill value",
        named(WRITTEN, "refused_before_work"),
    ),
    Fault(
        "precomputed-scale-named-by-an-old-job",
        LAYOUTS,
        '        if re.fullmatch(f"{key}{EPOCH_SUFFIX}", folder):',
        "        if False:",
        "what a suspended worker of a replaced job wrote stays beside the volume for good",
        named(WRITTEN, "replaced_job_cannot"),
    ),
    Fault(
        "precomputed-continues-a-zarr-job",
        "chunkq/job/record.py",
        "        if self.job.is_precomputed:",
        "        if False:",
        "a Zarr job is continued as a precomputed volume, without its chunks",
        named(WRITTEN, "output_of_the_other_format"),
    ),
    Fault(
        "n5-x-first",
        "chunkq/storage/formats/n5.py",
        "            yield BLOCK_KEYS.name(index[::-1])",
        "            yield BLOCK_KEYS.name(index)",
        "blocks on a web server are read at mirrored positions, or as zeros",
        named(VOLUMES, "web_server_without_listing"),
    ),
    Fault(
        "n5-level-not-shifted",
        N5_METADATA,
        "middle = [s * (f - 1) / 2 for",
        "middle = [0 * s * f for",
        "outputs of downsampled levels are half a voxel beside the image",
        named(AXES, "each_convention"),
    ),
    Fault(
        "cosem-transform-reversed",
        N5_METADATA,
        'transform.get("order")) != "F":',
        'transform.get("order")) == "F":',
        "voxel sizes of z and x are exchanged",
        named(AXES, "each_convention"),
    ),
    Fault(
        "offset-in-voxels",
        "chunkq/storage/formats/precomputed_info.py",
        "resolution, offset * resolution)",
        "resolution, float(offset))",
        "outputs of volumes with voxel_offset lie at another place",
        named(VOLUMES, "scales_are_levels"),
    ),
    Fault(
        "refused-blocks-not-checked",
        ARRAYS,
        "if refused and self._check_access is not None:",
        "if False and self._check_access is not None:",
        "a server that starts to refuse everything gives zeros",
        named(VOLUMES, "starts_to_refuse"),
    ),
    Fault(
        "empty-shards-are-missing",
        PRECOMPUTED,
        "if not is_url(self._folder) and (name := self._empty_shard):",
        "if False and (name := self._empty_shard):",
        "a shard that a full disk cut to nothing is read as zeros",
        named(VOLUMES, "truncated_block"),
    ),
    Fault(
        "compressed-files-not-searched",
        PRECOMPUTED,
        'suffixes = ("",) if is_url(folder) else (*DECOMPRESSORS, *OTHER_SUFFIXES)',
        'suffixes = ("",)',
        "local volumes of cloud-volume are refused as empty",
        named(VOLUMES, "compressed_files"),
    ),
    Fault(
        "detection-ends-at-a-refusal",
        "chunkq/storage/formats/registry.py",
        "            if not is_forbidden(error):\n                break",
        "            break",
        "volumes in buckets that answer 403 for missing objects are not found",
        named(VOLUMES, "cannot_be_listed"),
    ),
)
