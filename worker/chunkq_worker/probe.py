"""Tries a job's network on one batch, in a process of its own.

`python -m chunkq_worker.probe` reads a job record on standard input and writes one line of
JSON: `{"error": null or one line, "seconds": of one batch, "batch": patches in it}`.
"""

from __future__ import annotations

import json
import sys
import time

from chunkq.errors import ChunkqError
from chunkq.ledger import JobRecord
from chunkq_worker.engine import Engine


def main() -> None:
    """Load the network, check what it returns, time a second batch."""
    answer: dict[str, object] = {"error": None}
    try:
        record = JobRecord.from_json(sys.stdin.buffer.read())
        engine = Engine(record, record.plan())
        before = time.perf_counter()
        engine.batcher.warm_up()
        answer |= {"seconds": time.perf_counter() - before, "batch": engine.batcher.size}
    except ChunkqError as error:
        answer["error"] = str(error)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
