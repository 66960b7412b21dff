"""A short version of `make fuzz`, and job files for which it once found errors."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunkq.create import check_job
from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.job import user_code
from chunkq.job.fields import MAX_INTEGER
from chunkq.job.job_document import MAX_FILE_BYTES
from chunkq.job.job_reading import load_job
from tests.fuzz.job_files import BASES, create_lab
from tests.fuzz.mutations import LAUGHS
from tests.fuzz.pool import Pool


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "lab"
    create_lab(folder)
    return folder


@pytest.mark.parametrize("number", range(len(BASES)))
def test_the_job_files_that_are_mutated_can_be_planned(lab: Path, number: int) -> None:
    path = lab / "base.yaml"
    path.write_text(yaml.safe_dump(BASES[number]))
    assert check_job(load_job(path)).costs.chunks >= 1


def test_mutated_job_files_and_damaged_jobs_end_in_a_plan_or_a_message(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with Pool(tmp_path, 2) as pool:
        cases = [*pool.run("job_files", range(300)), *pool.run("damages", range(1, 21))]
    assert cases == []


def problems(path: Path, code: ErrorCode = ErrorCode.JOB_INVALID) -> list[str]:
    """Prepare an invalid job; return the lines of its JobError, which must be printable."""
    with pytest.raises(JobError) as caught:
        check_job(load_job(path))
    assert caught.value.code is code
    assert all(line.isprintable() and 0 < len(line) < 2000 for line in caught.value.problems)
    return list(caught.value.problems)


YAML = [
    (LAUGHS + "input: *a11", ""),
    ("input: &a [*a]", ""),
    ("roi: &a {a: *a}", ""),
    ("roi: " + "[" * 1200, ""),
    ("threads: " + "9" * 5000, ""),
    ("threads: 0x" + "f" * 5000, "threads"),
    ("threads: 2001-99-99", "threads"),
    ("threads: !!timestamp 2001-99-99", ""),
    ("threads: !!int x", ""),
    ("? [a]\n: b", ""),
    ("? {a: b}\n: c", ""),
    ("1: 2", "1"),
    ('"a\\nb\\e[31m": 1', "a"),
    ("\x00", ""),
    (f"threads: {MAX_INTEGER + 1}", "threads"),
    ("input: /a\n" + "#" * MAX_FILE_BYTES, ""),
]
JSON = [
    ("[" * 100_000, ""),
    ('{"threads": ' + "9" * 5000 + "}", ""),
    ('{"\\ud800": 1}', "a key"),
    ('{"input": "\\ud800"}', "input"),
]
"""Texts and the invalid key, which is empty if the file as a whole is invalid."""


@pytest.mark.parametrize(
    ("suffix", "text", "key"),
    [(".yaml", *row) for row in YAML] + [(".json", *row) for row in JSON],
    ids=lambda value: repr(value[:24]),
)
def test_a_file_that_is_not_a_job_is_rejected_with_one_line_per_problem(
    tmp_path: Path, suffix: str, text: str, key: str
) -> None:
    path = tmp_path / f"job{suffix}"
    path.write_text(text)
    lines = problems(path, ErrorCode.JOB_INVALID if key else ErrorCode.JOB_FILE_UNREADABLE)
    if key:
        assert any(line.startswith(key) for line in lines)
    else:
        assert len(lines) == 1
        assert lines[0].startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/full", "folder", "a" * 300, "a\0b", "/"])
def test_a_path_that_is_not_a_file_is_rejected_as_a_job_file(lab: Path, name: str) -> None:
    problems(lab / name, ErrorCode.JOB_FILE_UNREADABLE)


def test_a_terminal_is_rejected_as_a_job_file() -> None:
    master, slave = os.openpty()  # a read would block until someone types
    assert problems(Path(os.ttyname(slave)), ErrorCode.JOB_FILE_UNREADABLE)
    os.close(master)
    os.close(slave)


def test_a_job_file_can_be_read_from_a_pipe(lab: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, yaml.safe_dump(BASES[0]).encode())
    os.close(writing)
    assert load_job(f"/dev/fd/{reading}").threads == 1
    os.close(reading)


@pytest.mark.parametrize("name", ["fifo", "/dev/zero", "/dev/null", "loop", "folder/../fifo"])
def test_a_network_file_that_never_ends_is_rejected(lab: Path, name: str) -> None:
    values: dict[str, Any] = dict(BASES[4]) | {"input": "in2.zarr"}
    values["model_config"] = values["model_config"] | {"ts_file": name}
    path = lab / "device.yaml"
    path.write_text(yaml.safe_dump(values))
    [line] = problems(path)
    assert line.startswith("model_config.ts_file: ")
    assert os.path.normpath(lab / name) in line


def test_a_network_folder_with_too_many_files_is_rejected(lab: Path, tmp_path: Path) -> None:
    from chunkq import paths

    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(12):
        (folder / str(number)).touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "MAX_FILES", 12)
        assert len(paths.file_hash(str(folder))) == 64
        patch.setattr(paths, "MAX_FILES", 11)
        with pytest.raises(OSError, match=r"\b11\b"):
            paths.file_hash(str(folder))


def test_a_patch_that_is_too_large_is_rejected(lab: Path) -> None:
    values = dict(BASES[0])
    values["model_config"] = values["model_config"] | {
        "model_input_shape": [1, 1 << 20, 1 << 20, 8]
    }
    path = lab / "huge.yaml"
    path.write_text(yaml.safe_dump(values))
    [line] = problems(path)
    assert line.startswith("model_config.model_input_shape: ")
    assert str(8 << 40) in line


def test_weights_that_do_not_fit_into_memory_are_rejected(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(user_code, "built_in_weights", fail)
    path = lab / "weights.yaml"
    path.write_text(yaml.safe_dump(BASES[0]))
    [line] = problems(path)
    assert line.startswith("weight_function: ")
    assert str(BASES[0]["model_config"]["model_output_shape"][1:]) in line


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31mred", "x" * 5000, "\ud800", "\u202e"])
def test_a_message_is_one_printable_line(text: str) -> None:
    for error in (ChunkqError(text), JobError([text])):
        line = str(error)
        assert line.isprintable()
        assert len(line) < 2000


def test_a_message_shows_no_password_of_a_url_in_an_invalid_key(lab: Path) -> None:
    path = lab / "password.yaml"
    url = "http://user:hunter2@host/a"
    path.write_text(yaml.safe_dump(BASES[0] | {"combine": url, "weight_function": url}))
    assert not any("hunter2" in line for line in problems(path))
