"""Faults in jobs over images: which rows fail, and what the tables contain."""

from tests.prove.fault import Fault, named

READING, DECODING = "tests/unit/images/test_reading.py", "tests/unit/images/test_decoding.py"
ROWS, BUDGET = "tests/unit/images/test_image_rows.py", "tests/unit/images/test_pixel_budget.py"
VIDEOS, VIDEO_JOBS = "tests/unit/images/test_videos.py", "tests/integration/test_video_jobs.py"
DAMAGED = "tests/integration/test_damaged_images.py"

FAULTS = (
    Fault(
        "frames-mirrored-by-a-quarter-turn",
        "chunkq/images/videos.py",
        "pixels, row, column = pixels.swapaxes(0, 1), b, c",
        "pixels, row, column = pixels.swapaxes(0, 1), c, b",
        "videos of phones are turned by a quarter the other way",
        named(VIDEOS, "turned_as_the_file"),
    ),
    Fault(
        "classes-named-na-are-missing",
        "chunkq/images/result_table.py",
        "quoted_strings_can_be_null=False",
        "quoted_strings_can_be_null=True",
        "an empty label of a CSV table is none, and its images are left out of the accuracy",
        named("tests/unit/images/test_scores.py", "look_like_missing"),
    ),
    Fault(
        "signed-bytes-of-a-tiff-are-unsigned",
        "chunkq/images/decoding.py",
        "(kind == SIGNED and depth == 8) or ",
        "",
        "negative pixels are large ones",
        named(DECODING, "keeps_its_values"),
    ),
    Fault(
        "dead-server-is-an-error-of-the-image",
        "chunkq/images/reading.py",
        "error.errno in OF_PATHS or (is_local",
        "error.errno is not None or (is_local",
        "an outage makes thousands of rows of errors, and the job ends as if it were complete",
        named(READING, "storage_that_fails"),
    ),
    Fault(
        "lack-of-memory-is-an-error-of-the-image",
        "chunkq/images/decoding.py",
        "except (ImageError, MemoryError):",
        "except ImageError:",
        "a worker with too little memory loses rows",
        named(DECODING, "lack_of_memory"),
    ),
    Fault(
        "messages-contain-addresses",
        "chunkq/images/decoding.py",
        'ADDRESS.sub("", f"{error}")',
        'f"{error}"',
        "the table of errors has other bytes each time",
        named(DECODING, "same_in_each_process"),
    ),
    Fault(
        "decoding-begins-after-the-frame",
        "chunkq/images/videos.py",
        "(first is not None and first.pts <= time)",
        "first is not None",
        "frames at the start of a chunk are errors, depending on the chunks",
        named(VIDEOS, "first_of_a_chunk"),
    ),
    Fault(
        "guessed-pixels-are-predicted",
        "chunkq/images/videos.py",
        "if frame.is_corrupt:",
        "if False:",
        "frames of a damaged video have keypoints of pixels that nobody recorded",
        named(VIDEOS, "damage_reaches"),
    ),
    Fault(
        "results-merged-backwards",
        "chunkq/stages/tables.py",
        "list(item.tasks.chunks())",
        "list(item.tasks.chunks())[::-1]",
        "rows of the table are not in the order of the list",
        named(DAMAGED, "plain_loop"),
    ),
    Fault(
        "errors-numbered-by-chunk",
        "chunkq/images/result_table.py",
        '"row": [first + row for row, _ in failed]',
        '"row": [row for row, _ in failed]',
        "errors name other rows of the list",
        named(DAMAGED, "plain_loop"),
    ),
    Fault(
        "rows-of-the-next-group",
        "chunkq/job/stored_rows.py",
        "first = bisect_right(self._starts, start) - 1",
        "first = bisect_left(self._starts, start)",
        "a chunk computes images of another chunk",
        named(ROWS, "groups_of_rows"),
    ),
    Fault(
        "large-images-decoded-together",
        "worker/chunkq_worker/images/pixel_budget.py",
        "not self._held or self._held + pixels <= self._limit",
        "not self._held or self._held <= self._limit",
        "a worker runs out of memory on large images",
        named(BUDGET, "until_there_is_room"),
    ),
    Fault(
        "video-replaced-while-it-is-read",
        "worker/chunkq_worker/images/frames.py",
        "if state is None or (current := video_state(path, access)) == state:",
        "if (current := video_state(path, access)) is not None or state is None:",
        "keypoints of another video are stored",
        named(VIDEO_JOBS, "replaced"),
    ),
)
