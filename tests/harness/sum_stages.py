"""Two stages that follow the network: the sum of each block, then one total of the job.

They show what a stage needs. `sum` tasks run where their block was completed. The `total` task is
queued and waits until every sum is committed.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from chunkq.job.job_handle import ItemHandle
from chunkq.job.task_records import Commit
from chunkq.plan.chunk import Index
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.base import Stage, TaskKey


class SumStage(Stage):
    kind: ClassVar[str] = "sum"

    @override
    def chunks(self, item: ItemHandle) -> Iterator[Index]:
        return item.plan.indices()

    @override
    def count(self, item: ItemHandle) -> int:
        return item.plan.costs.blocks

    @override
    def waits_for(self, item: ItemHandle, chunk: Index) -> Sequence[TaskKey]:
        return [TaskKey("finalize" if item.plan.has_band(chunk) else "infer", chunk)]

    @override
    def awaiting(self, item: ItemHandle, committed: TaskKey) -> Sequence[Index]:
        if committed.kind not in ("infer", "finalize"):
            return []
        return [committed.chunk] if committed in self.waits_for(item, committed.chunk) else []

    @override
    def run(self, item: ItemHandle, chunk: Index, attempt: Attempt) -> bool:
        started, box = time.time(), item.plan.chunk(chunk).block
        values = item.outputs[0].target.read(item.plan.output_box(box)).astype(np.float64)
        store(item, self.kind, chunk, float(values.sum()), attempt, started)
        return False


class TotalStage(Stage):
    kind: ClassVar[str] = "total"
    is_queued: ClassVar[bool] = True
    after: ClassVar[str | None] = "sum"

    @override
    def chunks(self, item: ItemHandle) -> Iterator[Index]:
        return iter([(0,)] if item.number == 0 else [])

    @override
    def count(self, item: ItemHandle) -> int:
        return int(item.number == 0)

    @override
    def run(self, item: ItemHandle, chunk: Index, attempt: Attempt) -> bool:
        started, total = time.time(), 0.0
        for other in item.job.items:
            for block in other.plan.indices():
                total += stored(other, "sum", block)
        store(item, self.kind, chunk, total, attempt, started)
        return False


def store(
    item: ItemHandle, kind: str, chunk: Index, value: float, attempt: Attempt, started: float
) -> None:
    """Store a value as a document, then commit the task."""
    item.job.ledger.objects.put(_name(item, kind, chunk), json.dumps(value).encode())
    item.ledger.commit(
        Commit(kind, item.number, chunk, attempt.number, attempt.worker, started, time.time())
    )


def stored(item: ItemHandle, kind: str, chunk: Index) -> float:
    """Return the value that `store` has stored."""
    content = item.job.ledger.objects.get(_name(item, kind, chunk))
    assert content is not None
    return float(json.loads(content))


def _name(item: ItemHandle, kind: str, chunk: Index) -> str:
    return f"values/{kind}/{item.number}/{'.'.join(map(str, chunk))}"
