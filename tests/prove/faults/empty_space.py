"""Faults in what is skipped: patches outside a mask, empty patches, chunks without any other."""

from tests.prove.fault import Fault, named

SPACE, TASKS = "tests/integration/test_empty_space.py", "tests/unit/test_item_tasks.py"
SELECTION, FINALIZE = "chunkq/plan/patch_selection.py", "chunkq/stages/finalize.py"

FAULTS = (
    Fault(
        "empty-patches-have-no-weight",
        "chunkq/blend/sums.py",
        "self._rule.add_nothing(to_numpy(self._sums), share)",
        "pass",
        "the border between empty and full space depends on what was skipped",
        named(SPACE, "any_cut and below"),
    ),
    Fault(
        "empty-chunks-have-no-weight",
        "chunkq/blend/sums.py",
        "rule.merge(in_box, empty.sums(term.source, shared))",
        "pass",
        "results depend on the cut where a whole chunk is empty",
        named(SPACE, "any_cut and below"),
    ),
    Fault(
        "masks-elsewhere-are-silent",
        "chunkq/job/mask_source.py",
        "    if not any(doubtful):",
        "    if doubtful:",
        "a mask that has no position skips another part of an image that has one",
        named(SPACE, "without_a_position"),
    ),
    Fault(
        "masks-with-nothing-inside-are-silent",
        "producer/chunkq_producer/produce.py",
        "    if not result.chunks:",
        "    if result.chunks < 0:",
        "a job that runs no patch completes without a warning",
        named(SPACE, "nothing_inside"),
    ),
    Fault(
        "kept-voxels-decide-what-is-empty",
        SELECTION,
        "voxels[(patch.source & volume).slices(within.start)]",
        "voxels[(patch.target & volume).slices(within.start)]",
        "patches are skipped although the network would read something",
        named(SPACE, "any_cut and cropped"),
    ),
    Fault(
        "mask-does-not-fill",
        "chunkq/blend/rules.py",
        "result[:, ~inside] = outside",
        "pass",
        "predictions stand outside of the mask",
        named(SPACE, "any_cut and mask"),
    ),
    Fault(
        "a-lost-piece-counts-as-empty",
        FINALIZE,
        "            if commit.empty:\n",
        "            if commit:\n",
        "a block is finalized without the predictions of a chunk",
        named(SPACE, "lost_piece"),
    ),
    Fault(
        "storage-chunks-are-listed-again",
        "chunkq/create.py",
        "if not item.ledger.has_skipped()",
        "if True",
        "a job that is continued has other tasks than before",
        named(SPACE, "found_once"),
    ),
    Fault(
        "blocks-wait-for-skipped-chunks",
        "chunkq/plan/item_tasks.py",
        "if self.is_task(one)]",
        "]",
        "blocks are never finalized",
        (TASKS,),
    ),
    Fault(
        "cells-are-those-of-first-corners",
        "chunkq/geometry/cells.py",
        "(0.5 + self.shift)",
        "(0.0 + self.shift)",
        "a mask of another resolution is shifted by half a voxel",
        (TASKS,),
    ),
    Fault(
        "last-cell-of-a-window-left-out",
        "chunkq/plan/patch_counts.py",
        'side="right"',
        'side="left"',
        "patches that reach into the mask by one cell are no tasks",
        (TASKS,),
    ),
)
