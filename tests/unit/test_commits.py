"""A commit record is valid only if it is intact and belongs to its task and epoch."""

from collections.abc import Callable
from pathlib import Path

import pytest

from chunkq.job.ledger import ItemLedger, Ledger
from chunkq.job.task_records import Commit

EPOCH, LATER = "0a1b2c3d", "1b2c3d4e"
COMMIT = Commit("infer", 0, (0, 1), 2, "host-1", 1.0, 2.0, {"read": 0.5}, {"input": 64}, {"own": 7})


def record_path(ledger: ItemLedger, name: str, kind: str = "infer") -> Path:
    return Path(ledger.objects.path, "done", kind, str(ledger.item), name)


def truncate(record: Path) -> None:
    record.write_bytes(record.read_bytes()[:-1])


def change_a_digit(record: Path) -> None:
    text = record.read_text()
    assert text.count('"input": 64') == 1
    record.write_text(text.replace('"input": 64', '"input": 65'))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda record: record.write_bytes(b""),
    "truncated": truncate,
    "changed-digit": change_a_digit,
    "another-file": lambda record: record.write_bytes(b"{}"),
}


def test_a_commit_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    ledger.commit(COMMIT)
    assert ledger.is_committed("infer", (0, 1))
    assert ledger.commits("infer", [(0, 1)]) == [COMMIT]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_ignored_and_replaced_by_the_next_commit(
    tmp_path: Path, damage: str
) -> None:
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    ledger.commit(COMMIT)
    DAMAGE[damage](record_path(ledger, "0.1"))
    assert not ledger.is_committed("infer", (0, 1))
    assert list(ledger.read_commits("infer")) == []
    ledger.commit(COMMIT)
    assert list(ledger.read_commits("infer")) == [COMMIT]


def test_a_record_of_an_earlier_job_is_ignored(tmp_path: Path) -> None:
    earlier, ledger = (Ledger(str(tmp_path), epoch).item(0) for epoch in (EPOCH, LATER))
    earlier.commit(COMMIT)
    Path(earlier.objects.path).rename(ledger.objects.path)
    assert record_path(ledger, "0.1").exists()
    assert not ledger.is_committed("infer", (0, 1))
    assert list(ledger.read_commits("infer")) == []


@pytest.mark.parametrize(
    ("kind", "item", "chunk"),
    [("infer", 0, (1, 1)), ("finalize", 0, (0, 1)), ("infer", 1, (0, 1))],
    ids=["chunk", "kind", "item"],
)
def test_a_record_of_another_task_is_ignored(
    tmp_path: Path, kind: str, item: int, chunk: tuple[int, ...]
) -> None:
    ledger = Ledger(str(tmp_path), EPOCH)
    ledger.item(0).commit(COMMIT)
    moved = record_path(ledger.item(item), ".".join(map(str, chunk)), kind)
    moved.parent.mkdir(parents=True, exist_ok=True)
    record_path(ledger.item(0), "0.1").rename(moved)
    assert not ledger.item(item).is_committed(kind, chunk)
    assert list(ledger.item(item).read_commits(kind)) == []


def test_the_first_of_two_valid_records_is_kept(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), EPOCH).item(0)
    ledger.commit(COMMIT)
    ledger.commit(Commit("infer", 0, (0, 1), 3, "host-2", 5.0, 6.0))
    assert ledger.commits("infer", [(0, 1)]) == [COMMIT]
