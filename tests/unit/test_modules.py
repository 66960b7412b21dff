"""Tests of the list of modules: each says in its first sentence what it contains."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("chunkq", "chunkq_user", "producer/chunkq_producer", "worker/chunkq_worker")


def test_no_two_modules_have_the_same_contents() -> None:
    summaries: Counter[str] = Counter()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert docstring, path
            summaries[" ".join(docstring.partition("\n\n")[0].split())] += 1
    assert [text for text, count in summaries.items() if count > 1] == []
    assert len(summaries) > 200
