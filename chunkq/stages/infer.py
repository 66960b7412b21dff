"""The stage that runs the network: one task per chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from typing_extensions import override

from chunkq.errors import ChunkqError
from chunkq.job.job_handle import ItemHandle
from chunkq.plan.chunk import Index
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.base import Stage


class InferStage(Stage):
    """The chunks that own a patch and are not known to be empty.

    Worker processes replace this stage by one that can run them. A block whose own chunk is no task
    has only a task of the stage `finalize`.
    """

    kind: ClassVar[str] = "infer"
    is_queued: ClassVar[bool] = True
    after: ClassVar[str | None] = "ingest"

    @override
    def chunks(self, item: ItemHandle) -> Iterator[Index]:
        return item.tasks.chunks()

    @override
    def count(self, item: ItemHandle) -> int:
        return item.tasks.costs.chunks

    @override
    def stored_objects(self, item: ItemHandle, chunk: Index) -> Iterator[str]:
        for output in item.outputs:
            yield from output.object_names(output.plan.chunk(chunk).core)

    @override
    def run(self, item: ItemHandle, chunk: Index, attempt: Attempt) -> bool:
        raise ChunkqError("only a worker process runs the network; start `chunkq work`")
