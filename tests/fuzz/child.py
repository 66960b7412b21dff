"""Child process that runs cases: JSON requests on stdin, JSON answers on stdout, one per line.

Starting an interpreter for each case would take a second. The pool replaces a child process that
hangs or ends.
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
"""Address space in bytes that a case may use in addition to the imports."""


def main(folder: Path) -> None:
    """Answer requests until stdin ends. Output to file descriptor 2 goes to the log."""
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
            case_text, finding = f"job file {seed}", job_files.judge(seed, folder / "lab")
        else:
            case = damaged.create_case(seed, stages)
            case_text, finding = case.text, damaged.judge(case, stages)
        sys.stderr.flush()
        output = log.read_bytes()[start:].decode(errors="replace")
        if finding is None and ("Traceback" in output or "Warning" in output):
            finding = of_text("output on stderr", output)
        answer = [case_text, None if finding is None else asdict(finding)]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def limit_memory() -> None:
    """Limit the address space, so that allocations fail that no job file should need."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def parse_answer(line: str) -> tuple[str, Finding | None]:
    """Parse an answer; return the text of the case and its finding."""
    case_text, finding = json.loads(line)
    return case_text, None if finding is None else Finding(**finding)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
