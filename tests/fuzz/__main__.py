"""Run mutated job files and damaged jobs with seeds; exit with 1 if a case fails."""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.findings import Case, by_cause
from tests.fuzz.pool import Pool
from tests.fuzz.stages import remove
from tests.harness.guardian import SessionGuardian

COUNTS = {"job_files": 10_000, "damages": 1_000}
AT_ONCE = 2
CASES_PRINTED = 3
"""Cases with the same cause that the summary prints."""


def main() -> int:
    """Run the cases that the command line selects; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--part", choices=list(COUNTS), help="run one part; default: both")
    parser.add_argument("--seed", type=int, help="run only the case of this seed")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, help="number of seeds of each part")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--details", type=Path, help="write all findings with details to this file")
    arguments = parser.parse_args()
    parts = [arguments.part] if arguments.part else list(COUNTS)
    if arguments.seed is not None and arguments.part is None:
        parser.error("--seed needs --part")
    guardian = SessionGuardian()
    tempfile.tempdir = str(guardian.folder)
    folder = Path(tempfile.mkdtemp(prefix="chunkq-fuzz-"))
    for path in (guardian.folder, folder):
        path.chmod(0o755)  # some cases run as another user
    started, results, cases = time.monotonic(), {}, []
    try:
        for part in parts:
            first = arguments.first if arguments.seed is None else arguments.seed
            count = 1 if arguments.seed is not None else arguments.count or COUNTS[part]
            failed, seconds = _run(part, range(first, first + count), folder)
            cases += failed
            results[part] = {"cases": count, "failed": len(failed), "seconds": round(seconds)}
    finally:
        remove(folder)
    _print_summary(cases, details=arguments.seed is not None)
    if arguments.details:
        arguments.details.write_text(json.dumps([asdict(case) for case in cases], indent=1))
    if arguments.json:
        causes = {cause: len(group) for cause, group in by_cause(cases).items()}
        values = results | {"seconds": round(time.monotonic() - started), "causes": causes}
        arguments.json.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return 1 if cases else 0


def _run(part: str, seeds: range, folder: Path) -> tuple[list[Case], float]:
    """Run the seeds of a part; return the failed cases and the seconds taken."""
    started, cases = time.monotonic(), []

    def progress(done: int) -> None:
        if done % max(1, len(seeds) // 10) == 0:
            _print(f"{part}: {done} of {len(seeds)}, {time.monotonic() - started:.0f} s")

    with Pool(folder, min(AT_ONCE, len(seeds))) as pool:
        for case in pool.run(part, seeds, progress):
            cases.append(case)
            _print(f"  {case.part} --seed {case.seed}: {case.text}\n    {case.finding.cause}")
    return cases, time.monotonic() - started


def _print_summary(cases: list[Case], *, details: bool) -> None:
    for cause, group in by_cause(cases).items():
        _print(f"\n{len(group)} x {cause}")
        for case in group[:CASES_PRINTED]:
            _print(f"  python -m tests.fuzz --part {case.part} --seed {case.seed}   # {case.text}")
            if details:
                _print(case.finding.detail)
    _print(f"\n{len(cases)} cases failed")


def _print(line: str) -> None:
    sys.stdout.write(line.encode(errors="backslashreplace").decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
