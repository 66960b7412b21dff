"""A job file rewritten by `chunkq tune`: the values and the table change, nothing else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from chunkq_worker.tune.file import BEGIN, END, JobFile
from chunkq_worker.tune.space import Changes
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import ChunkqError, JobError

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


TOP = f"{BEGIN}today\n#   a table\n{END}\n"


def test_comments_blanks_and_the_order_of_keys_stay(tmp_path: Path) -> None:
    assert changed(tmp_path, BLOCK, CHANGES) == TOP + EXPECTED


def test_the_table_replaces_the_one_of_the_time_before(tmp_path: Path) -> None:
    once = changed(tmp_path, BLOCK, CHANGES)
    assert changed(tmp_path, once, {}) == once
    assert changed(tmp_path, once.replace("a table", "an old one\n#"), {}) == once


def test_a_comment_that_only_begins_like_a_table_is_kept(tmp_path: Path) -> None:
    text = f"{BEGIN}is what I ran\n{BLOCK}"
    assert changed(tmp_path, text, {}) == TOP + text


def test_line_ends_and_a_byte_order_mark_stay(tmp_path: Path) -> None:
    dos = "\ufeff" + BLOCK.replace("\n", "\r\n")
    assert changed(tmp_path, dos, CHANGES) == "\ufeff" + (TOP + EXPECTED).replace("\n", "\r\n")


def test_keys_in_braces_are_changed_and_added_there(tmp_path: Path) -> None:
    text = "model_config: {runtime: torch, model_input_shape: [8, 8],\n  max_batch_size: 4}  # x\n"
    changes: Changes = {
        ("model_config", "max_batch_size"): 8,
        ("model_config", "compile"): True,
        ("chunksize",): [8, 8],
    }
    assert changed(tmp_path, text, changes) == TOP + (
        "chunksize: [8, 8]\nmodel_config: {runtime: torch, compile: true, "
        "model_input_shape: [8, 8],\n  max_batch_size: 8}  # x\n"
    )


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_stays_json_and_keeps_its_layout(tmp_path: Path, indent: Any) -> None:
    values = yaml.safe_load(BLOCK)
    text = json.dumps(values, indent=indent)
    found = changed(tmp_path, text, CHANGES, "job.json")
    expected = yaml.safe_load(EXPECTED)
    assert json.loads(found) == expected
    kept = [line for line in text.splitlines() if "runtime" in line and indent]
    assert all(line in found for line in kept)


@given(
    st.dictionaries(
        st.sampled_from(["max_batch_size", "compile", "dtype", "autocast"]),
        st.one_of(st.integers(1, 4096), st.booleans(), st.sampled_from(["float16", "bfloat16"])),
    ),
    st.sampled_from([None, True, False]),
    st.sampled_from([2, 4]),
)
def test_what_the_new_text_means_is_the_old_values_with_the_changes(
    tmp_path_factory: pytest.TempPathFactory, model: dict[str, Any], flow: bool | None, indent: int
) -> None:
    folder = tmp_path_factory.mktemp("job")
    text = yaml.safe_dump(yaml.safe_load(BLOCK), default_flow_style=flow, indent=indent)
    found = changed(folder, text, {("model_config", key): value for key, value in model.items()})
    expected = yaml.safe_load(BLOCK)
    expected["model_config"] |= model
    assert yaml.safe_load(found) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a: &n 4\nmodel_config: {model_input_shape: [8], max_batch_size: *n}\n",
        "a: &n [4, 4]\nother: *n\nmodel_config: {model_input_shape: [8], max_batch_size: 4}\n",
    ],
    ids=["number", "list"],
)
def test_a_value_that_an_anchor_shares_with_another_key_is_refused_and_said(
    tmp_path: Path, text: str
) -> None:
    changes: Changes = {("model_config", "max_batch_size"): 8, ("a",): [3, 3]}
    words = r"anchors\?.*; set them by hand: model_config.max_batch_size: 8; a: \[3, 3\]"
    with pytest.raises(ChunkqError, match=words):
        changed(tmp_path, text, changes)


def test_the_file_appears_at_once_with_its_permissions_and_the_old_one_beside_it(
    tmp_path: Path,
) -> None:
    file = job_file(tmp_path, BLOCK)
    file.path.chmod(0o640)
    backup = file.replace(b"new")
    assert (file.path.read_bytes(), backup.read_bytes()) == (b"new", BLOCK.encode())
    assert [oct(path.stat().st_mode & 0o777) for path in (file.path, backup)] == ["0o640"] * 2
    assert sorted(os.listdir(tmp_path)) == ["job.yaml", "job.yaml.before-tune"]


def test_a_file_that_was_edited_meanwhile_is_left_alone(tmp_path: Path) -> None:
    file = job_file(tmp_path, BLOCK)
    file.path.write_text("edited: true\n")
    with pytest.raises(ChunkqError, match="was changed meanwhile"):
        file.replace(b"new")
    assert os.listdir(tmp_path) == ["job.yaml"]
    assert file.path.read_text() == "edited: true\n"


def test_links_folders_and_read_only_files_are_refused(tmp_path: Path) -> None:
    file = job_file(tmp_path, BLOCK)
    link = tmp_path / "link.yaml"
    link.symlink_to(file.path)
    with pytest.raises(JobError, match=rf"link.yaml: is a link to {file.path}; .* --dry-run"):
        JobFile.read(link)
    with pytest.raises(JobError, match="is no file"):
        JobFile.read(tmp_path)
    file.path.chmod(0o444)
    with pytest.raises(JobError, match="is read-only; make it writable, or look with --dry-run"):
        JobFile.read(file.path)
    with pytest.raises(JobError, match="cannot be read: No such file"):
        JobFile.read(tmp_path / "nowhere.yaml")
