"""The embedded queue's own promises: one host's disk, one file, one line when it cannot be."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from chunkq.errors import JobError, QueueError
from chunkq.executors import default_url, open_executor, sqlite
from chunkq.executors.base import Shift
from chunkq.executors.sqlite import NETWORK_FILESYSTEMS, SqliteExecutor
from chunkq.tasks import Task

Mounts = Callable[[list[tuple[str, str]]], None]


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> Mounts:
    """Make the machine look as if these (mount point, file system) were mounted, in order."""

    def pretend(found: list[tuple[str, str]]) -> None:
        monkeypatch.setattr(sqlite, "_mounts", lambda: found)

    return pretend


def refusal(path: Path) -> str:
    with pytest.raises(QueueError) as error:
        open_executor(f"sqlite://{path}")
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert line.startswith("queue: ")
    assert str(path.name) in line or str(path.parent) in line
    return line


@pytest.mark.parametrize("kind", sorted(NETWORK_FILESYSTEMS))
def test_a_file_on_a_network_file_system_is_refused_with_the_way_out(
    tmp_path: Path, mounts: Mounts, kind: str
) -> None:
    mounts([("/", "ext4"), (str(tmp_path), kind)])
    line = refusal(tmp_path / "queue.db")
    assert f"lies on {kind}" in line
    assert "--queue sqlite:///" in line
    assert not (tmp_path / "queue.db").exists()


def test_the_innermost_mount_decides(tmp_path: Path, mounts: Mounts) -> None:
    (tmp_path / "local").mkdir()
    mounts([(str(tmp_path / "local"), "xfs"), (str(tmp_path), "lustre"), ("/", "ext4")])
    SqliteExecutor(f"sqlite://{tmp_path / 'local' / 'queue.db'}").close()
    refusal(tmp_path / "queue.db")
    # A name that only begins alike lies elsewhere.
    SqliteExecutor(f"sqlite://{tmp_path}-more/queue.db").close()


def test_of_two_mounts_on_one_point_the_later_one_counts(tmp_path: Path, mounts: Mounts) -> None:
    mounts([("/", "ext4"), (str(tmp_path), "autofs"), (str(tmp_path), "nfs4")])
    refusal(tmp_path / "queue.db")


def test_a_link_into_a_network_file_system_is_seen_through(tmp_path: Path, mounts: Mounts) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "far")
    mounts([("/", "ext4"), (str(tmp_path / "far"), "gpfs")])
    refusal(tmp_path / "home" / "queue.db")


def test_missing_folders_are_made(tmp_path: Path) -> None:
    SqliteExecutor(f"sqlite://{tmp_path / 'a' / 'b' / 'queue.db'}").close()
    assert (tmp_path / "a" / "b" / "queue.db").is_file()


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refusal(tmp_path / "file" / "queue.db")


def test_a_place_that_cannot_be_written_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "queue.db").mkdir()
    assert "unable to open" in refusal(tmp_path / "queue.db")


def test_a_file_that_is_no_database_gives_one_line_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "queue.db"
    content = b"my thesis, the only copy\n" * 100
    file.write_bytes(content)
    refusal(file)
    assert file.read_bytes() == content


def test_a_queue_damaged_in_its_middle_gives_one_line(tmp_path: Path) -> None:
    file = tmp_path / "queue.db"
    queue = SqliteExecutor(f"sqlite://{file}")
    queue.submit(Task("infer", "/data/out.zarr.chunkq", (n,)) for n in range(2000))
    queue.close()
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * (size - 4096))
    with pytest.raises(QueueError) as error:
        SqliteExecutor(f"sqlite://{file}").work(lambda task, attempt: None, Shift("w", burst=True))
    assert len(str(error.value).splitlines()) == 1


def test_a_database_of_something_else_gives_one_line(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "queue.db")
    database.execute("CREATE TABLE tasks (title TEXT)")
    database.commit()
    database.close()
    refusal(tmp_path / "queue.db")


def test_readers_and_writers_do_not_block_each_other(tmp_path: Path) -> None:
    queue = SqliteExecutor(f"sqlite://{tmp_path / 'queue.db'}")
    queue.submit([Task("infer", "/data/out.zarr.chunkq", (0,))])
    outside = sqlite3.connect(tmp_path / "queue.db", timeout=0)
    assert outside.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    outside.execute("BEGIN")
    assert outside.execute("SELECT count(*) FROM tasks").fetchone() == (1,)
    # In the default mode the open reader would keep this from being committed.
    assert queue.submit([Task("infer", "/data/out.zarr.chunkq", (1,))]) == 1
    outside.close()
    queue.close()


def test_the_default_queue_is_a_file_in_the_users_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    queue = open_executor(default_url())
    queue.close()
    assert [path.name for path in tmp_path.rglob("*.db")] == ["queue.db"]


@pytest.mark.parametrize("url", ["sqllite:///q.db", "mongodb://host", "queue.db", ""])
def test_a_url_of_no_known_queue_gives_one_line_that_names_the_known_ones(url: str) -> None:
    with pytest.raises(JobError, match="sqlite://") as error:
        open_executor(url)
    assert len(str(error.value).splitlines()) == 1
