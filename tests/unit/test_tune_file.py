"""Editing a job file: only the changed values and the table differ from the old text."""

import json
import os
import re
from json import dumps
from pathlib import Path
from typing import Any

import pytest
import yaml
from chunkq_worker.tune.file import FIRST_LINE, LAST_LINE, JobFile
from chunkq_worker.tune.space import Changes
from hypothesis import given, settings
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


JOB: dict[str, Any] = {
    "input": "in.zarr",
    "note": "a 'quoted' # word",
    "offsets": [[1, 2], [3, 4]],
    "chunksize": [16, 16],
    "model_config": {
        "runtime": "torch",
        "model_input_shape": [1, 8, 8],
        "max_batch_size": 4,
        "dtype": "float32",
        "options": {"a": 1.5, "b": [True, None]},
    },
}
ALL_CHANGES: Changes = {
    ("offsets",): [[5, 6], [7, 8]],
    ("chunksize",): [32, 64],
    ("storage_chunks",): [8, 8],
    ("model_config", "max_batch_size"): 128,
    ("model_config", "dtype"): "bfloat16",
    ("model_config", "model_input_shape"): [1, 4, 4],
    ("model_config", "compile"): True,
}
LONGER: Changes = {("chunksize",): [1, 2, 3]}
LINE_COMMENTS = st.sampled_from(["", "", "  # small", " # [1, {2}: x", "    #", "   # 'a' # \"b\""])
LINES_BETWEEN = st.sampled_from(
    ["", "", "\n", "# on its own\n", "\n   # a: b\n\n#c\n", "    # - d\n"]
)


@st.composite
def job_texts(draw: st.DrawFn) -> str:
    """Return JOB as YAML in a random order and layout, with comments in all places."""

    def flow(value: Any, column: int) -> str:
        if isinstance(value, list):
            comma = st.sampled_from(
                [", ", ",", " , ", f",\n{' ' * column}", f", # x\n{' ' * column}"]
            )
            return f"[{draw(comma).join(flow(item, column + 1) for item in value)}]"
        quoted = isinstance(value, str) and draw(st.booleans())
        return value if isinstance(value, str) and value.isalnum() and not quoted else dumps(value)

    def entry(key: str, value: Any, column: int) -> str:
        indent, comment = " " * column, draw(LINE_COMMENTS)
        start = draw(LINES_BETWEEN) + indent + draw(st.sampled_from([key, f'"{key}"'])) + ":"
        if isinstance(value, dict):
            items = draw(st.permutations(list(value.items())))
            if draw(st.booleans()):
                inner = column + draw(st.sampled_from([1, 2, 4]))
                return f"{start}{comment}\n" + "".join(entry(k, v, inner) for k, v in items)
            items = [item for item in items if not isinstance(item[1], dict)]
            gap = draw(st.sampled_from([", ", f",\n  {indent}", f", # x\n  {indent}"]))
            inside = gap.join(f"{k}: {flow(v, column + 3)}" for k, v in items)
            return f"{start} {{{inside}}}{comment}\n"
        if isinstance(value, list) and draw(st.booleans()):
            dash = indent + draw(st.sampled_from(["- ", "  - ", "-   "]))
            lines = (draw(LINES_BETWEEN) + dash + flow(v, column + 9) for v in value)
            return f"{start}{comment}\n" + "".join(f"{x}{draw(LINE_COMMENTS)}\n" for x in lines)
        return f"{start}{draw(st.sampled_from([' ', '   ']))}{flow(value, column + 1)}{comment}\n"

    entries = [entry(key, value, 0) for key, value in draw(st.permutations(list(JOB.items())))]
    return draw(st.sampled_from(["", "---\n"])) + "".join(entries) + draw(LINES_BETWEEN)


@settings(max_examples=60)
@given(job_texts(), st.sets(st.sampled_from(sorted(ALL_CHANGES))), st.sampled_from(["\n", "\r\n"]))
def test_every_comment_and_every_other_value_survives(
    tmp_path_factory: pytest.TempPathFactory, text: str, keys: set[tuple[str, ...]], newline: str
) -> None:
    expected = yaml.safe_load(text)
    for *sections, key in keys:
        section = expected
        for name in sections:
            section = section[name]
        section[key] = ALL_CHANGES[*sections, key]
    changes = {key: ALL_CHANGES[key] for key in sorted(keys)}
    new_text = changed(tmp_path_factory.mktemp("job"), text.replace("\n", newline), changes)
    assert yaml.safe_load(new_text) == expected
    without_header = new_text.removeprefix(HEADER.replace("\n", newline)).replace(newline, "\n")
    assert layout(without_header) == layout(text)


def layout(text: str) -> str:
    """Return a text without what ALL_CHANGES inserts and with equal values for what it changes."""
    text = re.sub(r"(storage_chunks: \[8, 8\]|compile: true)(\n *|, )", "", text)
    return re.sub(r"\d+", "0", re.sub(r'"?b?float\d+"?', "float", text))


@pytest.mark.parametrize(
    "text",
    [
        "a: &n 4\nother: *n\nmodel_config: {model_input_shape: [8], max_batch_size: 4}\n",
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


def test_an_alias_is_replaced_without_changing_the_value_that_it_refers_to(tmp_path: Path) -> None:
    text = "a: &n 4\nmodel_config: {model_input_shape: [8], max_batch_size: *n}  # x\n"
    new_text = changed(tmp_path, text, {("model_config", "max_batch_size"): 8})
    assert new_text == HEADER + text.replace("*n", "8")


def test_a_list_is_replaced_by_one_of_another_length(tmp_path: Path) -> None:
    new_text = changed(tmp_path, "chunksize:  # work\n- 8\n- 8\n# next\nthreads: 1\n", LONGER)
    assert new_text == HEADER + "chunksize: [1, 2, 3]  # work\n# next\nthreads: 1\n"


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
