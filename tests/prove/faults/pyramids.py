"""Faults in pyramids: reductions, levels, what their tasks wait for, and how they are sealed."""

from tests.prove.fault import Fault, named

DOWNSAMPLING, LEVELS = "chunkq/blend/downsampling.py", "chunkq/geometry/levels.py"
STAGE, COMPLETION = "chunkq/stages/downsample.py", "chunkq/stages/completion.py"
OUTPUT, GRID = "chunkq/job/image_output.py", "chunkq/geometry/grid_spec.py"
PYRAMIDS, SHARDS = "tests/integration/test_pyramids.py", "tests/integration/test_shards.py"
SIZES = "tests/integration/test_stored_sizes.py"
UNIT = "tests/unit/test_downsampling.py"

FAULTS = (
    Fault(
        "the-largest-of-equally-frequent-labels",
        DOWNSAMPLING,
        "is_longer = run > best_run",
        "is_longer = run >= best_run",
        "levels depend on the order of labels in another way than is documented",
        (UNIT,),
    ),
    Fault(
        "halves-are-rounded-up",
        DOWNSAMPLING,
        "((rest == half) & ((quotient & 1) == 1))",
        "(rest == half)",
        "means of integers are too large on average",
        (UNIT,),
    ),
    Fault(
        "upper-halves-of-64-bits-shifted-too-far",
        DOWNSAMPLING,
        "(high << (32 - len(axes)))",
        "(high << 32)",
        "means of large 64-bit integers overflow",
        named(UNIT, "64_bits"),
    ),
    Fault(
        "axes-of-one-and-a-half-times-the-voxel-size-stay",
        LEVELS,
        "size <= MAX_RATIO * smallest",
        "size < MAX_RATIO * smallest",
        "an axis is reduced one level later than documented",
        ("tests/unit/test_levels.py",),
    ),
    Fault(
        "levels-of-blocks-that-are-not-final",
        STAGE,
        'return TaskKey("finalize", block)',
        'return TaskKey("infer", block)',
        "levels are made of blocks whose overlaps are not merged yet",
        named(PYRAMIDS, "workers_write"),
    ),
    Fault(
        "levels-made-before-those-below",
        COMPLETION,
        "if stage.is_layered or kind != stage.kind",
        "if kind != stage.kind",
        "the finalizer makes all levels at once, from levels that are empty",
        named(PYRAMIDS, "whole_array"),
    ),
    Fault(
        "level-0-renamed-first",
        OUTPUT,
        "in reversed(list(zip(self._names, names, strict=True))):",
        "in zip(self._names, names, strict=True):",
        "a suspended process reads nothing, and writes that into a level of the sealed output",
        named(PYRAMIDS, "cut_off"),
    ),
    Fault(
        "bands-of-storage-chunks-in-shards",
        GRID,
        "return self.shard or self.storage\n",
        "return self.storage\n",
        "two tasks write one shard",
        named(SHARDS, "one_task_writes"),
    ),
    Fault(
        "shards-are-predicted-without-their-index",
        "chunkq/job/output_layouts.py",
        "shard_index_bytes(per_shard) if per_shard else 0",
        "0",
        "a plan predicts less than shards of small storage chunks take",
        named(SIZES, "shards"),
    ),
    Fault(
        "labels-of-volumes-are-predicted-with-one-byte",
        "chunkq/storage/formats/precomputed_metadata.py",
        "return 8 + voxels * bits // 8 + 4 * different",
        "return voxels",
        "a plan predicts more or less than labels of a precomputed volume can take",
        named("tests/unit/test_object_sizes.py", "labels"),
    ),
)
