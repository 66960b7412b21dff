"""Tests of the SQLite queue: local disks only, one file, errors of one line with a code."""

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from chunkq.errors import ErrorCode, JobError, QueueError
from chunkq.job.tasks import Task
from chunkq.queue.backends import sqlite
from chunkq.queue.backends.sqlite import NETWORK_FILESYSTEMS, SqliteExecutor
from chunkq.queue.backends.tables import schema as table_schema
from chunkq.queue.backends.tables.task_table import TaskTable
from chunkq.queue.contract.executor import Contribution, WorkerOptions
from chunkq.queue.registry import default_url, open_executor
from tests.harness.queue_workers import JOB
from tests.harness.waiting import wait_until

Mounts = Callable[[list[tuple[str, str]]], None]


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> Mounts:
    """Return a function that replaces the mounts: (mount point, file system) in order."""

    def set_mounts(mounts: list[tuple[str, str]]) -> None:
        monkeypatch.setattr(sqlite, "_mounts", lambda: mounts)

    return set_mounts


def open_error(path: Path) -> QueueError:
    """Return the error of opening a queue: one line that contains the file or its folder."""
    with pytest.raises(QueueError) as error:
        open_executor(f"sqlite://{path}")
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert line.startswith("queue: ")
    assert str(path.name) in line or str(path.parent) in line
    return error.value


@pytest.mark.parametrize("kind", sorted(NETWORK_FILESYSTEMS))
def test_a_file_on_a_network_file_system_is_rejected(
    tmp_path: Path, mounts: Mounts, kind: str
) -> None:
    mounts([("/", "ext4"), (str(tmp_path), kind)])
    error = open_error(tmp_path / "queue.db")
    assert error.code is ErrorCode.QUEUE_UNSUPPORTED
    assert f" {kind};" in str(error)
    assert "--queue sqlite:///" in str(error)
    assert not (tmp_path / "queue.db").exists()


def test_the_innermost_mount_is_used(tmp_path: Path, mounts: Mounts) -> None:
    (tmp_path / "local").mkdir()
    mounts([(str(tmp_path / "local"), "xfs"), (str(tmp_path), "lustre"), ("/", "ext4")])
    SqliteExecutor(f"sqlite://{tmp_path / 'local' / 'queue.db'}").close()
    open_error(tmp_path / "queue.db")
    # A path that only starts with the same characters is on another file system.
    SqliteExecutor(f"sqlite://{tmp_path}-more/queue.db").close()


def test_of_two_mounts_on_one_point_the_later_one_is_used(tmp_path: Path, mounts: Mounts) -> None:
    mounts([("/", "ext4"), (str(tmp_path), "autofs"), (str(tmp_path), "nfs4")])
    open_error(tmp_path / "queue.db")


def test_the_mounts_of_this_machine_are_those_that_psutil_finds() -> None:
    found = psutil.disk_partitions(all=True)
    assert sqlite._mounts() == [(one.mountpoint, one.fstype) for one in found]


def test_paths_of_mounts_can_have_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mounts"
    table.write_text(r"server:/a\040b /mnt/my\040data\134x nfs4 rw 0 0" + "\n")
    monkeypatch.setattr(sqlite, "MOUNTS", table)
    assert sqlite._mounts() == [("/mnt/my data\\x", "nfs4")]


def test_a_link_into_a_network_file_system_is_followed(tmp_path: Path, mounts: Mounts) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "far")
    mounts([("/", "ext4"), (str(tmp_path / "far"), "gpfs")])
    open_error(tmp_path / "home" / "queue.db")


def test_missing_folders_are_created(tmp_path: Path) -> None:
    SqliteExecutor(f"sqlite://{tmp_path / 'a' / 'b' / 'queue.db'}").close()
    assert (tmp_path / "a" / "b" / "queue.db").is_file()


def test_a_folder_that_cannot_be_created_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    open_error(tmp_path / "file" / "queue.db")


def test_a_folder_in_place_of_the_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "queue.db").mkdir()
    assert open_error(tmp_path / "queue.db").code is ErrorCode.QUEUE_UNAVAILABLE


def test_a_file_that_is_no_database_is_rejected_and_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "queue.db"
    content = b"my thesis, the only copy\n" * 100
    file.write_bytes(content)
    assert open_error(file).code is ErrorCode.QUEUE_DAMAGED
    assert file.read_bytes() == content


def test_a_damaged_queue_is_an_error_of_one_line(tmp_path: Path) -> None:
    file = tmp_path / "queue.db"
    queue = SqliteExecutor(f"sqlite://{file}")
    queue.submit(Task("infer", *JOB, 0, (n,)) for n in range(2000))
    queue.close()
    size, threads = file.stat().st_size, threading.active_count()
    with file.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * (size - 4096))
    with closing(open_executor(f"sqlite://{file}")) as queue:
        with pytest.raises(QueueError) as error:
            queue.run_tasks(lambda task, attempt: None, WorkerOptions("w", burst=True))
        wait_until(lambda: threading.active_count() == threads, "its threads end")
    assert error.value.code is ErrorCode.QUEUE_DAMAGED
    assert len(str(error.value).splitlines()) == 1


def test_a_database_with_other_tables_is_rejected(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "queue.db")
    database.execute("CREATE TABLE tasks (title TEXT)")
    database.commit()
    database.close()
    open_error(tmp_path / "queue.db")


def test_readers_and_writers_do_not_block_each_other(tmp_path: Path) -> None:
    queue = SqliteExecutor(f"sqlite://{tmp_path / 'queue.db'}")
    queue.submit([Task("infer", *JOB, 0, (0,))])
    outside = sqlite3.connect(tmp_path / "queue.db", timeout=0)
    assert outside.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    outside.execute("BEGIN")
    assert outside.execute("SELECT count(*) FROM tasks").fetchone() == (1,)
    # In the default journal mode the open reader would block this commit.
    assert queue.submit([Task("infer", *JOB, 0, (1,))]) == 1
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
def test_an_unknown_scheme_is_an_error_that_lists_the_known_schemes(url: str) -> None:
    with pytest.raises(JobError, match="sqlite://") as error:
        open_executor(url)
    assert error.value.code is ErrorCode.QUEUE_ADDRESS_INVALID
    assert len(str(error.value).splitlines()) == 1


# Several processes, versions and users.

OPEN = """
import sys
import threading
from chunkq.queue.registry import open_executor
from chunkq.job.tasks import Task
from tests.harness.waiting import wait_until

JOB = "/data/brain.zarr.chunkq", "0a1b2c3d"
first, count, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
for line in sys.stdin:
    queue = open_executor(f"sqlite://{folder}/{line.strip()}.db")
    queue.submit(Task("infer", *JOB, 0, (first, n)) for n in range(count))
    queue.close()
    print("done", flush=True)
"""


def test_processes_that_open_a_new_queue_at_once_wait_for_each_other(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, str(number), "3", str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    pipes = [(process.stdin, process.stdout) for process in processes]
    for _, stdout in pipes:
        assert stdout is not None
        assert stdout.readline() == "ready\n"
    for queue in range(20):
        for stdin, _ in pipes:
            assert stdin is not None
            stdin.write(f"{queue}\n")
            stdin.flush()
        answers = [stdout.readline() for _, stdout in pipes if stdout is not None]
        if answers != ["done\n"] * 4:
            pytest.fail("".join(process.communicate()[1] for process in processes))
        executor = SqliteExecutor(f"sqlite://{tmp_path}/{queue}.db")
        assert executor.counts(JOB).queued == 12
        executor.close()
    for process in processes:
        assert process.communicate() == ("", "")


def test_a_queue_that_is_locked_for_too_long_is_reported_as_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_schema, "BUSY_SECONDS", 0.1)
    holder = sqlite3.connect(tmp_path / "queue.db")
    holder.execute("BEGIN EXCLUSIVE")
    assert open_error(tmp_path / "queue.db").code is ErrorCode.QUEUE_BUSY
    holder.close()


def old_queue(file: Path, version: int, *rows: str) -> None:
    """Write a queue file as older versions of chunkq did."""
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE tasks (id TEXT NOT NULL UNIQUE, job TEXT NOT NULL)")
        database.execute("CREATE TABLE blocks (job TEXT NOT NULL, block TEXT NOT NULL)")
        database.executemany("INSERT INTO tasks VALUES (?, 'job')", ((row,) for row in rows))
        database.execute(f"PRAGMA user_version = {version}")
        database.commit()


def test_an_empty_queue_of_an_older_version_is_replaced(tmp_path: Path) -> None:
    old_queue(tmp_path / "queue.db", 1)
    with closing(SqliteExecutor(f"sqlite://{tmp_path}/queue.db")) as queue:
        assert queue.submit([Task("infer", *JOB, 0, (1,))]) == 1
        contribution = Contribution(Task("finalize", *JOB, 0, (1,)), 0, 1)
        assert queue.record_contributions(JOB, [contribution]) == [contribution.task]
    assert version_of(tmp_path / "queue.db") == table_schema.VERSION


@pytest.mark.parametrize(("version", "rows"), [(1, ["a task"]), (0, []), (0, ["a task"])])
def test_a_queue_of_an_older_version_with_tasks_is_rejected_and_unchanged(
    tmp_path: Path, version: int, rows: list[str]
) -> None:
    old_queue(tmp_path / "queue.db", version, *rows)
    assert open_error(tmp_path / "queue.db").code is ErrorCode.QUEUE_UNSUPPORTED
    assert version_of(tmp_path / "queue.db") == version
    with closing(sqlite3.connect(tmp_path / "queue.db")) as database:
        assert [name for (name,) in database.execute("SELECT id FROM tasks")] == rows


def version_of(file: Path) -> int:
    database = sqlite3.connect(file)
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    database.close()
    return version


def test_a_queue_of_a_newer_version_is_rejected_and_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "queue.db"
    SqliteExecutor(f"sqlite://{file}").close()
    newer = sqlite3.connect(file)
    newer.execute(f"PRAGMA user_version = {table_schema.VERSION + 1}")
    newer.close()
    assert open_error(file).code is ErrorCode.QUEUE_UNSUPPORTED
    assert version_of(file) == table_schema.VERSION + 1


def test_leases_end_in_time_after_the_clock_was_put_back(tmp_path: Path) -> None:
    now = 1e9
    table = TaskTable(str(tmp_path / "queue.db"), lambda: now)
    table.submit([("/job", "0a1b2c3d", name, name) for name in ("a", "b")])
    assert table.reserve("dead", 20, None, []) is not None
    now -= 3600
    assert table.reserve("heir", 20, None, []) is not None
    now += 19
    assert table.reserve("heir", 20, None, []) is None
    now += 2
    row = table.reserve("heir", 20, None, [])
    assert row is not None
    assert row[2:] == ("a", "a", 2)
    table.close()


def test_only_the_owner_can_open_a_new_queue(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        queue = SqliteExecutor(f"sqlite://{tmp_path}/queue.db")
        queue.submit([Task("infer", *JOB, 0, (1,))])
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        queue.close()
    finally:
        os.umask(before)
    assert modes == {"queue.db": 0o600, "queue.db-wal": 0o600, "queue.db-shm": 0o600}


@contextmanager
def file_system(folder: Path, options: str) -> Iterator[None]:
    """Mount a tmpfs on a folder while the context is open."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = f"only root can mount a file system: {result.stderr}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_queue_on_a_read_only_file_system_is_rejected(tmp_path: Path) -> None:
    with file_system(tmp_path, "size=4m"):
        SqliteExecutor(f"sqlite://{tmp_path}/queue.db").close()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        for name in ("queue.db", "new.db", "new/queue.db"):
            assert open_error(tmp_path / name).code is ErrorCode.QUEUE_READ_ONLY


def test_a_full_disk_is_an_error_of_one_line_and_queued_tasks_remain(tmp_path: Path) -> None:
    tasks = [Task("infer", *JOB, 0, (n,)) for n in range(20_000)]
    with file_system(tmp_path, "size=1m"):
        queue = SqliteExecutor(f"sqlite://{tmp_path}/queue.db")
        with pytest.raises(QueueError) as error:
            queue.submit(tasks)
        assert error.value.code is ErrorCode.QUEUE_FULL
        assert len(str(error.value).splitlines()) == 1
        assert queue.counts(JOB).queued % 1000 == 0
        queue.close()
        (tmp_path / "filler").write_bytes(b"")
        with suppress(OSError):
            (tmp_path / "filler").write_bytes(b"0" * (1 << 20))
        assert open_error(tmp_path / "another.db").code is ErrorCode.QUEUE_FULL
