"""What is wrong with one image of a list."""

from __future__ import annotations

from typing import Literal

from chunkq.errors import ChunkqError, ErrorCode

ErrorStage = Literal["list", "read", "decode", "transform", "predict"]
"""The step in which an image failed."""


class ImageError(ChunkqError):
    """One image cannot be read or predicted. It costs its row of the result, not the job.

    `stage` is the step that failed. The message does not repeat the path.
    """

    code = ErrorCode.IMAGE_DAMAGED

    def __init__(self, stage: ErrorStage, message: str, *, code: ErrorCode | None = None) -> None:
        super().__init__(message, code=code)
        self.stage = stage
