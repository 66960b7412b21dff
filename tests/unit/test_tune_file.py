"""Editing a job file: only the changed values and the table differ from the old text."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from chunkq_worker.tune.file import FIRST_LINE, LAST_LINE, JobFile
from chunkq_worker.tune.space import Changes
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import ChunkqError, ErrorCode, JobError

BLOCK = """\
# a job of mine

input: in.zarr        # the volume
chunksize:            # work per task
- 16
-   16                # the middle
- 16

offsets: [[1, 2],
          [3, 4]]     # two
model_config:
  runtime: torch

  # one item
  model_input_shape: [1, 8, 8, 8]
  max_batch_size: 4   # small
  dtype: "float32"
"""
CHANGES: Changes = {
    ("chunksize",): [32, 16, 64],
    ("offsets",): [[5, 6], [7, 8]],
    ("model_config", "max_batch_size"): 128,
    ("model_config", "compile"): True,
    ("model_config", "dtype"): "bfloat16",
    ("storage_chunks",): [8, 8, 8],
}
EXPECTED = """\
# a job of mine

input: in.zarr        # the volume
chunksize:            # work per task
- 32
-   16                # the middle
- 64

offsets: [[5, 6],
          [7, 8]]     # two
storage_chunks: [8, 8, 8]
model_config:
  runtime: torch

  # one item
  compile: true
  model_input_shape: [1, 8, 8, 8]
  max_batch_size: 128   # small
  dtype: bfloat16
"""


def job_file(folder: Path, text: str, name: str = "job.yaml") -> JobFile:
    path = folder / name
    path.write_bytes(text.encode())
    return JobFile.read(path)


def changed(folder: Path, text: str, changes: Changes, name: str = "job.yaml") -> str:
    return job_file(folder, text, name).changed(changes, "today", ["a table"]).decode()


HEADER = f"{FIRST_LINE}today\n#   a table\n{LAST_LINE}\n"


def test_comments_blank_lines_and_the_order_of_keys_are_preserved(tmp_path: Path) -> None:
    assert changed(tmp_path, BLOCK, CHANGES) == HEADER + EXPECTED


def test_the_table_replaces_the_table_of_an_earlier_run(tmp_path: Path) -> None:
    once = changed(tmp_path, BLOCK, CHANGES)
    assert changed(tmp_path, once, {}) == once
    assert changed(tmp_path, once.replace("a table", "an old one\n#"), {}) == once


def test_a_comment_that_starts_like_a_table_but_has_no_end_is_kept(tmp_path: Path) -> None:
    text = f"{FIRST_LINE}is what I ran\n{BLOCK}"
    assert changed(tmp_path, text, {}) == HEADER + text


def test_line_ends_and_a_byte_order_mark_are_preserved(tmp_path: Path) -> None:
    dos = "\ufeff" + BLOCK.replace("\n", "\r\n")
    assert changed(tmp_path, dos, CHANGES) == "\ufeff" + (HEADER + EXPECTED).replace("\n", "\r\n")


def test_keys_in_flow_style_are_changed_and_inserted_in_flow_style(tmp_path: Path) -> None:
    text = "model_config: {runtime: torch, model_input_shape: [8, 8],\n  max_batch_size: 4}  # x\n"
    changes: Changes = {
        ("model_config", "max_batch_size"): 8,
        ("model_config", "compile"): True,
        ("chunksize",): [8, 8],
    }
    assert changed(tmp_path, text, changes) == HEADER + (
        "chunksize: [8, 8]\nmodel_config: {runtime: torch, compile: true, "
        "model_input_shape: [8, 8],\n  max_batch_size: 8}  # x\n"
    )


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_keeps_its_layout(tmp_path: Path, indent: Any) -> None:
    values = yaml.safe_load(BLOCK)
    text = json.dumps(values, indent=indent)
    new_text = changed(tmp_path, text, CHANGES, "job.json")
    assert json.loads(new_text) == yaml.safe_load(EXPECTED)
    unchanged = [line for line in text.splitlines() if "runtime" in line and indent]
    assert all(line in new_text for line in unchanged)


@given(
    st.dictionaries(
        st.sampled_from(["max_batch_size", "compile", "dtype", "precision"]),
        st.one_of(st.integers(1, 4096), st.booleans(), st.sampled_from(["float16", "bfloat16"])),
    ),
    st.sampled_from([None, True, False]),
    st.sampled_from([2, 4]),
)
def test_the_new_text_parses_to_the_old_values_with_the_changes(
    tmp_path_factory: pytest.TempPathFactory, model: dict[str, Any], flow: bool | None, indent: int
) -> None:
    folder = tmp_path_factory.mktemp("job")
    text = yaml.safe_dump(yaml.safe_load(BLOCK), default_flow_style=flow, indent=indent)
    changes: Changes = {("model_config", key): value for key, value in model.items()}
    new_text = changed(folder, text, changes)
    expected = yaml.safe_load(BLOCK)
    expected["model_config"] |= model
    assert yaml.safe_load(new_text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a: &n 4\nmodel_config: {model_input_shape: [8], max_batch_size: *n}\n",
        "a: &n [4, 4]\nother: *n\nmodel_config: {model_input_shape: [8], max_batch_size: 4}\n",
    ],
    ids=["number", "list"],
)
def test_a_value_that_an_anchor_shares_with_another_key_is_an_error_with_the_new_values(
    tmp_path: Path, text: str
) -> None:
    changes: Changes = {("model_config", "max_batch_size"): 8, ("a",): [3, 3]}
    with pytest.raises(ChunkqError) as error:
        changed(tmp_path, text, changes)
    assert error.value.code is ErrorCode.JOB_FILE_UNEDITABLE
    assert str(error.value).startswith(f"{tmp_path / 'job.yaml'}: ")
    assert "model_config.max_batch_size: 8; a: [3, 3]" in str(error.value)


def test_the_file_is_replaced_with_its_permissions_and_the_old_content_is_kept(
    tmp_path: Path,
) -> None:
    file = job_file(tmp_path, BLOCK)
    file.path.chmod(0o640)
    backup = file.replace(b"new")
    assert (file.path.read_bytes(), backup.read_bytes()) == (b"new", BLOCK.encode())
    assert [oct(path.stat().st_mode & 0o777) for path in (file.path, backup)] == ["0o640"] * 2
    assert sorted(os.listdir(tmp_path)) == ["job.yaml", "job.yaml.before-tune"]


def test_a_file_that_changed_since_it_was_read_is_not_replaced(tmp_path: Path) -> None:
    file = job_file(tmp_path, BLOCK)
    file.path.write_text("edited: true\n")
    with pytest.raises(ChunkqError) as error:
        file.replace(b"new")
    assert error.value.code is ErrorCode.JOB_FILE_CHANGED
    assert str(error.value).startswith(f"{file.path}: ")
    assert os.listdir(tmp_path) == ["job.yaml"]
    assert file.path.read_text() == "edited: true\n"


def test_links_folders_and_read_only_files_are_errors_that_name_the_file(tmp_path: Path) -> None:
    file = job_file(tmp_path, BLOCK)
    link = tmp_path / "link.yaml"
    link.symlink_to(file.path)
    assert f"is a link to {file.path}; " in problem(link)
    assert "a regular file" in problem(tmp_path)
    file.path.chmod(0o444)
    assert "read-only" in problem(file.path)
    assert "No such file" in problem(tmp_path / "nowhere.yaml")


def problem(path: Path) -> str:
    """Return the error line of a job file that cannot be tuned."""
    with pytest.raises(JobError) as error:
        JobFile.read(path)
    assert error.value.code is ErrorCode.JOB_INVALID
    [line] = error.value.problems
    assert line.startswith(f"{path}: ")
    return line
