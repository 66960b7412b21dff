"""Temporary folders are private, and disappear with the process that owns them."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkq.system import scratch
from chunkq.system.scratch import scratch_folder

OWNER = """
import pathlib, sys, time
from chunkq.system.scratch import scratch_folder
with scratch_folder("test", pathlib.Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns a folder and prints its path."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def folder_of(owner: subprocess.Popen[str]) -> Path:
    assert owner.stdout is not None
    return Path(owner.stdout.readline().strip())


def test_only_the_user_can_enter_a_folder_and_it_is_removed_at_the_end(tmp_path: Path) -> None:
    with scratch_folder("test", tmp_path) as folder:
        (folder / "file").touch()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == []


def test_the_next_command_removes_the_folder_of_a_killed_process(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    folder = folder_of(owner)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    assert folder.is_dir()
    with scratch_folder("test", tmp_path):
        assert not folder.exists()


def test_the_folder_of_a_running_process_stays(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    folder = folder_of(owner)
    with scratch_folder("test", tmp_path):
        assert folder.is_dir()


def test_a_folder_without_an_owner_file_stays(tmp_path: Path) -> None:
    other = tmp_path / "chunkq-notes"
    other.mkdir()
    with scratch_folder("test", tmp_path):
        assert other.is_dir()


def test_a_removal_that_was_cut_off_is_completed(
    tmp_path: Path, owner: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(owner)
    (folder / "part").mkdir()
    (folder / "file").touch()
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    with monkeypatch.context() as patch:
        patch.setattr(scratch.shutil, "rmtree", _cut_off)
        with pytest.raises(KeyboardInterrupt):
            scratch.delete_abandoned(tmp_path)
    scratch.delete_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _cut_off(folder: Path, *, ignore_errors: bool) -> None:
    """Delete the first entries of a folder as a killed process does."""
    for entry in sorted(folder.iterdir()):
        entry.unlink()
        break
    raise KeyboardInterrupt
