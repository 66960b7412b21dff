"""A process that runs one case after another: requests on stdin, answers on stdout, as JSON lines.

An interpreter per case would cost a second each. A child that hangs or dies is replaced.
"""

import faulthandler
import json
import os
import resource
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from tests.fuzz import damaged, job_files
from tests.fuzz.findings import Finding, of_text

MEMORY = 3 << 30
"""Bytes of address space that a case may take beyond what the imports took."""


def main(folder: Path) -> None:
    """Answer requests until stdin ends. The log takes what is written to file descriptor 2."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    warnings.simplefilter("always")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = Path(f"/proc/self/fd/{2}").resolve()
    if not (folder / "lab").exists():
        job_files.create_lab(folder / "partial-lab")
        (folder / "partial-lab").rename(folder / "lab")
    stages = damaged.Stages(folder / "stages")
    for line in sys.stdin:
        part, seed = json.loads(line)
        start = log.stat().st_size
        if part == "job_files":
            limit_memory()
            what, finding = f"job file {seed}", job_files.judge(seed, folder / "lab")
        else:
            case = damaged.case_of(seed, stages)
            what, finding = case.text, damaged.judge(case, stages)
        sys.stderr.flush()
        text = log.read_bytes()[start:].decode(errors="replace")
        if finding is None and ("Traceback" in text or "Warning" in text):
            finding = of_text("said on stderr", text)
        answers.write(json.dumps([what, None if finding is None else asdict(finding)]) + "\n")
        answers.flush()


def limit_memory() -> None:
    """Let allocations fail that no job file should need."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def answer_of(line: str) -> tuple[str, Finding | None]:
    """Decode an answer: what was done, and what went wrong."""
    what, finding = json.loads(line)
    return what, None if finding is None else Finding(**finding)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
