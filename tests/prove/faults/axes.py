"""Faults in the axes of inputs: what is read along channels and time, and where it is written."""

from tests.prove.fault import Fault, named

SELECTION, AXES = "tests/unit/test_selection.py", "tests/integration/test_axes.py"

FAULTS = (
    Fault(
        "channels-in-stored-order",
        "chunkq/storage/axes_view.py",
        "part[picks[position] - channels.start]",
        "part[position - positions.start]",
        "the network gets its channels in another order",
        named(SELECTION, "equals_numpys"),
    ),
    Fault(
        "first-time-point-for-all",
        "chunkq/storage/images.py",
        "fixed[time_axis] = self.time[time]",
        "fixed[time_axis] = self.time[0]",
        "every time point of the output is the first one",
        named(SELECTION, "equals_numpys"),
    ),
    Fault(
        "all-items-written-to-one-point",
        "chunkq/job/output_handle.py",
        "Box((*point, *inner.start)",
        "Box((*(0 for _ in point), *inner.start)",
        "time points overwrite each other",
        named(AXES, "each_time_point"),
    ),
    Fault(
        "transformations-of-the-image-ignored",
        "chunkq/storage/ome.py",
        "transformations, *image.transformations)",
        "transformations,)",
        "the voxel size of the output is wrong",
        named("tests/unit/test_ome.py", "transformations_of_the_image"),
    ),
    Fault(
        "colour-read-as-a-volume",
        "chunkq/storage/selection.py",
        "if not array.named_by and looks_like_color(shape):",
        "if False:",
        "the colours of a photograph are the slices of a volume",
        named(SELECTION, "colour"),
    ),
    Fault(
        "inputs-overlap-in-a-batch",
        "worker/chunkq_worker/batch_layout.py",
        "slice(number * length, (number + 1) * length)",
        "slice(number, number + length)",
        "inputs with several channels overwrite each other",
        named(AXES, "joined_along_the_channels"),
    ),
)
