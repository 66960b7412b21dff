"""The code blocks of the project's pages, and a page that is run from its top."""

import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.processes import running
from tests.harness.waiting import TIMEOUT, wait_until

ROOT = Path(__file__).parents[2]
HEADING = re.compile(r"^##+ (.+)$")
FENCE = re.compile(r'^```(\w*)(?: title="(.+)")?$')
INTERRUPT = "^C"
"""A line of an output block where the reader presses Ctrl-C."""
PROGRESS = re.compile(
    r"[\w ]*:? ?\d+/\d+( chunks done.*)?$|chunkq: (checking|measuring|finding) [\w ]+$"
)
"""A line about the progress of a run, which a log has and a terminal shows as a bar."""
LONG = re.compile(r"\d+ (?:h \d+ min|min \d+ s)")
CHANGING = re.compile(
    r"\b\d[\d.]*(?:e-?\d+)?(?=%| ?(?:h|min|s|[kMGT]?B|[kMGT]? ?(?:voxels|patches)/s)\b)"
    r"|(?<=worker )\S+"
)
"""What differs from run to run: times, memory, shares, speeds, names of workers."""


@dataclass(frozen=True)
class Block:
    """One fenced block: the heading above it, its language, its title (a file name), its text."""

    heading: str
    language: str
    title: str | None
    text: str


def code_blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, by its path in the project, in order."""
    blocks, heading, lines = [], "", iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    for line in lines:
        if found := HEADING.match(line):
            heading = found[1]
        elif found := FENCE.match(line):
            text = "".join(f"{inner}\n" for inner in iter(lambda: next(lines), "```"))
            blocks.append(Block(heading, found[1], found[2], text))
    return blocks


def code_block(page: str, heading: str, language: str) -> str:
    """Return the first block of a language below a heading."""
    blocks = code_blocks(page)
    return next(b.text for b in blocks if (b.heading, b.language) == (heading, language))


def run_page(
    page: str,
    folder: Path,
    environment: Mapping[str, str],
    *,
    without: str,
    shown_as: str,
    has_begun: Callable[[], Any],
) -> int:
    """Follow a page in a folder; returns the number of commands that were run.

    A block with a title is written to the file of that name. An `sh` block is run; a `text` block
    after it is its output, apart from what changes between runs. Where that has a line `^C`, the
    command gets SIGINT once `has_begun` is true. The section `without` is left out. Outputs show
    the folder as `shown_as`.
    """
    blocks = [block for block in code_blocks(page) if block.heading != without]
    commands = 0
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.title is not None:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "sh":
            expected = after.text if after is not None and after.language == "text" else None
            output = _run(block.text, folder, environment, expected, has_begun)
            output = output.replace(str(folder), shown_as)
            assert expected is None or settled(output) == settled(expected), output
            commands += 1
    return commands


def settled(output: str) -> str:
    """Return an output with the same text for whatever changes between runs."""
    lines = [line.rstrip() for line in output.splitlines()]
    kept = [line for line in lines if line != INTERRUPT and not PROGRESS.match(line)]
    return CHANGING.sub("#", LONG.sub("0 s", "\n".join(kept)))


def _run(
    script: str,
    folder: Path,
    environment: Mapping[str, str],
    expected: str | None,
    has_begun: Callable[[], Any],
) -> str:
    """Run a block with the shell; return what it prints on both streams."""
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    interrupted = expected is not None and INTERRUPT in expected.splitlines()
    last = "exec " if interrupted else ""  # the signal is for the command, not for the shell
    command = ["bash", "-euc", f"exec 2>&1\n{last}{script}"]
    with running(command, folder, {**environment, "PATH": path}) as started:
        if interrupted:
            wait_until(has_begun, "the command has begun")
            started.process.send_signal(signal.SIGINT)
        return started.wait(TIMEOUT).err
