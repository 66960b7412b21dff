"""Write what is made of the keys of the job file: a page of the reference, and the JSON schema.

Run `python docs/job_file_page.py` after a change of a key.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from chunkq.job.job_file import SCHEMA_FILE, job_schema
from chunkq.job.key_reference import Key, all_keys, grouped

DOCS = Path(__file__).parent
PAGE = DOCS / "reference" / "job-file.md"
BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->\n"
"""Lines of the page between which the keys are."""


def page(text: str) -> str:
    """Return the text of the page with the current keys."""
    head, _, rest = text.partition(BEGIN)
    return "\n".join([head + BEGIN, *_keys(), END]) + rest.partition(END)[2]


def schema() -> str:
    """Return the JSON schema as the text of its file."""
    return json.dumps(job_schema(), indent=1) + "\n"


def _keys() -> Iterator[str]:
    """Yield the lines of all keys by section and group."""
    groups = grouped(all_keys())
    sections = Counter(section for section, _ in groups)
    for (section, group), members in groups.items():
        title = f"`{section}`: {group.lower()}" if sections[section] > 1 else f"`{section}`"
        yield f"## {title if section else group}\n"
        for entry in members:
            yield from _key(entry)


def _key(entry: Key) -> Iterator[str]:
    yield f"### `{entry.path}`\n"
    see = "" if entry.see is None else f" See {_link(entry.see)}."
    yield f"{entry.description}{see}\n"
    values = "section, see below" if entry.is_section else entry.type
    default = "**required**" if entry.default is None else entry.default
    yield f"- Values: {values}\n- Default: {default}"
    if entry.unit is not None:
        yield f"- Unit: {entry.unit}"
    yield f"\n```yaml\n{entry.example}\n```\n"


def _link(target: str) -> str:
    """Return a link to a page or a heading; its text is the title of that."""
    path, _, anchor = target.partition("#")
    titles = re.findall(r"^#+ (.+)$", (DOCS / path).read_text(encoding="utf-8"), re.MULTILINE)
    title = titles[0] if not anchor else next(t for t in titles if _slug(t) == anchor)
    return f"[{title.replace('`', '')}](../{target})"


def _slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    SCHEMA_FILE.write_text(schema(), encoding="utf-8")
