"""`python -m tests.fuzz`: mutated job files and damaged jobs, seeded; exits with 1 on a finding."""

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
SHOWN = 3
"""Cases of one cause that the summary names."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--part", choices=list(COUNTS), help="one part; both by default")
    parser.add_argument("--seed", type=int, help="run this one case alone")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, help="how many seeds of each part")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--details", type=Path, help="where to write every finding in full")
    asked = parser.parse_args()
    parts = [asked.part] if asked.part else list(COUNTS)
    if asked.seed is not None and asked.part is None:
        parser.error("--seed needs --part")
    guardian = SessionGuardian()
    tempfile.tempdir = str(guardian.folder)
    folder = Path(tempfile.mkdtemp(prefix="chunkq-fuzz-"))
    for path in (guardian.folder, folder):
        path.chmod(0o755)  # some cases run as another user
    begun, results, cases = time.monotonic(), {}, []
    try:
        for part in parts:
            first = asked.first if asked.seed is None else asked.seed
            count = 1 if asked.seed is not None else asked.count or COUNTS[part]
            found, seconds = _run(part, range(first, first + count), folder)
            cases += found
            results[part] = {"cases": count, "failed": len(found), "seconds": round(seconds)}
    finally:
        remove(folder)
    _show(cases, details=asked.seed is not None)
    if asked.details:
        asked.details.write_text(json.dumps([asdict(case) for case in cases], indent=1))
    if asked.json:
        causes = {cause: len(group) for cause, group in by_cause(cases).items()}
        values = results | {"seconds": round(time.monotonic() - begun), "causes": causes}
        asked.json.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return 1 if cases else 0


def _run(part: str, seeds: range, folder: Path) -> tuple[list[Case], float]:
    begun, cases = time.monotonic(), []

    def progress(done: int) -> None:
        if done % max(1, len(seeds) // 10) == 0:
            _say(f"{part}: {done} of {len(seeds)}, {time.monotonic() - begun:.0f} s")

    with Pool(folder, min(AT_ONCE, len(seeds))) as pool:
        for case in pool.run(part, seeds, progress):
            cases.append(case)
            _say(f"  {case.part} --seed {case.seed}: {case.what}\n    {case.finding.cause}")
    return cases, time.monotonic() - begun


def _show(cases: list[Case], *, details: bool) -> None:
    for cause, group in by_cause(cases).items():
        _say(f"\n{len(group)} x {cause}")
        for case in group[:SHOWN]:
            _say(f"  python -m tests.fuzz --part {case.part} --seed {case.seed}   # {case.what}")
            if details:
                _say(case.finding.detail)
    _say(f"\n{len(cases)} cases failed")


def _say(line: str) -> None:
    sys.stdout.write(line.encode(errors="backslashreplace").decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
