"""`chunkq tune` with a real network and volume.

The fastest setting depends on the machine and is not asserted, only what holds for any choice.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chunkq_worker.commands.tune import _check_editable
from chunkq_worker.tune.file import JobFile
from chunkq_worker.tune.search import Setting
from chunkq_worker.tune.space import SearchSpace

from chunkq.errors import ErrorCode
from chunkq.job.job_reading import load_job
from chunkq.job.record import JobRecord
from chunkq.storage.images import find_source
from tests.harness.files import everything_below
from tests.harness.processes import is_alive
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace, run_inline

NETWORK = '''\
import os
import time
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 3, 3, padding=1)
        with torch.no_grad():
            for values in self.conv.parameters():
                values.copy_(torch.sin(torch.arange(values.numel()) * 1.0).reshape(values.shape))
        if os.environ.get("NET_HANGS"):
            open(os.environ["NET_HANGS"], "w").close()
            time.sleep(600)

    def forward(self, x):
        return self.conv(x / 100)


class LargeMemory(Net):
    """Allocates 2 GiB for more than two items."""

    def forward(self, x):
        if len(x) > 2:
            self.buffer = torch.ones(2 << 28)
        return self.conv(x / 100)


class FixedPatch(Net):
    """Supports patches of 8 voxels only."""

    def forward(self, x):
        return super().forward(x).reshape(len(x), 3, 8, 8)
'''
JOB = """\
# My job. Do not touch.

input: in.zarr            # the volume
output: out.zarr
inference_type: sliding_window
strides: [4, 4]
combine: soft
chunksize:                # work per task
- 8
- 8                       # two storage chunks
storage_chunks: [4, 4]
threads: 1

model_config:
  runtime: torch
  type: class
  class_file: 'net.py'
  class_name: Net
  model_input_shape: [1, 8, 8]
  model_output_shape: [3, 8, 8]
  max_batch_size: 4       # guessed
"""


LONG_TIME = ("--max-time", "3m")
ALL_SETTINGS = "batch,compile,channels_last,cuda_graph,precision,depth,chunksize"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A folder with a job of 9 chunks with up to 4 patches each."""
    write_zarr(tmp_path / "in.zarr", random_volume((24, 24)), (8, 8))
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "job.yaml").write_text(JOB)
    return Workspace(tmp_path)


def job_text(workspace: Workspace) -> str:
    return (workspace.folder / "job.yaml").read_text()


def assert_error(
    workspace: Workspace,
    exit_code: int,
    code: ErrorCode,
    *fragments: str,
    options: tuple[str, ...] = (),
) -> None:
    """Run the command; assert one error line with the code and fragments, and no changed file."""
    before, text = everything_below(workspace.folder), job_text(workspace)
    answer = workspace.call("tune", "job.yaml", *options)
    assert (answer.code, answer.out) == (exit_code, ""), answer
    [line] = answer.messages
    assert line.endswith(f" [{code}]"), line
    assert all(fragment in line for fragment in fragments), line
    assert "Traceback" not in answer.err
    assert everything_below(workspace.folder) == before
    assert job_text(workspace) == text


def test_the_best_setting_is_written_into_the_job_file_and_the_output_is_the_same(
    workspace: Workspace,
) -> None:
    """Comments are preserved, no temporary file remains, and the labels are the same.

    The precision bfloat16 is shown and cannot be chosen. CUDA graphs need a GPU.
    """
    before = everything_below(workspace.folder)
    old = load_job(workspace.folder / "job.yaml")
    options = ("--all-options", "--keep", "compile,channels_last", *LONG_TIME)
    answer = workspace.run("tune", "job.yaml", *options, timeout=200).ok()
    assert sorted({*before, "job.yaml.before-tune"}) == everything_below(workspace.folder)
    assert (workspace.folder / "job.yaml.before-tune").read_text() == JOB
    assert "patches/s" in answer.out
    assert "precision bfloat16" in answer.out
    assert "\nchanges results: by more than 0.0001 and " in answer.out
    assert "\ncuda_graph: unsupported for device cpu\n" in answer.out
    assert "\x1b" not in answer.out
    assert answer.out.splitlines()[-1].startswith("wrote job.yaml; ")
    assert answer.out.endswith("job.yaml.before-tune\n")

    text = job_text(workspace)
    assert text.startswith("# chunkq tune: 20")
    head, end, rest = text.partition("# end of chunkq tune\n")
    assert end
    assert all(line.startswith("#") for line in head.splitlines())
    assert "chosen" in head
    assert "batch 4" in head
    kept = [line for line in JOB.splitlines() if "max_batch" not in line and "- 8" not in line]
    assert [line for line in rest.splitlines() if line in kept] == kept
    assert "# two storage chunks" in rest
    assert "# guessed" in rest

    new = load_job(workspace.folder / "job.yaml")
    changed = {"chunksize": new.chunksize, "model": new.model}
    assert old.model_copy(update=changed) == new
    assert new.model.model_copy(update={"max_batch_size": 4}) == old.model
    outputs = []
    for name, job in (("old", old), ("new", new)):
        output = str(workspace.folder / f"{name}.zarr")
        run_inline(job.as_dict() | {"output": output})
        outputs.append(read_output(output))
    assert outputs[0].dtype == np.uint8
    assert len(np.unique(outputs[0])) == 3
    np.testing.assert_array_equal(*outputs)


def test_a_dry_run_with_json_prints_the_table_and_writes_nothing(workspace: Workspace) -> None:
    """With a patch size that the network does not support, and another precision."""
    before = everything_below(workspace.folder)
    text = job_text(workspace).replace("class_name: Net", "class_name: FixedPatch")
    text = text.replace("strides: [4, 4]", "strides: [8, 8]").replace("size: 4 ", "size: 1 ")
    (workspace.folder / "job.yaml").write_text(text)
    options = ("--keep", ALL_SETTINGS, "--dry-run", "--json", "--patch-sizes", "6", *LONG_TIME)
    more = ("--precision", "bfloat16", "-o", "other.zarr")
    answer = workspace.run("tune", "job.yaml", *options, *more, timeout=200).ok()
    assert answer.err == ""
    result = json.loads(answer.out)
    assert (result["written"], result["backup"]) == (None, None)
    assert everything_below(workspace.folder) == before
    assert job_text(workspace) == text
    first, *rest = result["table"]
    assert (first["batch"], first["stage"], first["status"]) == (1, "network", "ok")
    assert first["difference"] == 0
    assert first["patches_per_second"] > 0
    assert first["peak_bytes"] > 50_000_000
    assert (first["chunks"], first["patches"]) == (9, 9)
    assert first["job_seconds"] > first["patches"] / first["patches_per_second"]
    [other] = [row for row in rest if row["patch"] == [6, 6]]
    assert other["status"] == "failed"
    assert "RuntimeError: shape " in other["note"]
    reduced = [r for r in rest if r["precision"] and r["stage"] == "network"]
    assert [r["precision"] for r in reduced] == [{"precision": "bfloat16"}, {"dtype": "bfloat16"}]
    assert all(1e-4 < row["difference"] < 0.1 for row in reduced)
    assert all(0.5 < row["label_agreement"] <= 1 for row in reduced)
    assert all(len(row["ratios"]) >= 1 for row in reduced)
    assert all(row["status"] == "ok" for row in reduced)
    assert result["choice"] in result["table"]
    assert result["choice"]["patch"] is None
    assert set(result["changes"]) <= {"model_config.precision", "model_config.dtype"}


@pytest.mark.proof("tune")
def test_a_setting_above_the_memory_limit_is_listed_and_not_chosen(workspace: Workspace) -> None:
    """Four items need 2 GiB in addition to the process itself."""
    text = job_text(workspace).replace("class_name: Net", "class_name: LargeMemory")
    (workspace.folder / "job.yaml").write_text(text)
    options = ("--keep", "depth,chunksize,compile", "--memory", "1GiB", "--json", *LONG_TIME)
    result = json.loads(workspace.run("tune", "job.yaml", *options, timeout=200).ok().out)
    statuses = {row["batch"]: row["status"] for row in result["table"]}
    choice = result["choice"]
    assert statuses[4] == "too large"
    assert choice["batch"] < 4
    assert choice["peak_bytes"] <= 1 << 30
    assert all(row["peak_bytes"] <= 1 << 30 for row in result["table"] if row["status"] == "ok")
    assert load_job(workspace.folder / "job.yaml").model.max_batch_size == choice["batch"]
    assert result["written"] == "job.yaml"


def test_a_memory_limit_below_one_patch_is_an_error(workspace: Workspace) -> None:
    (workspace.folder / "job.yaml").write_text(JOB.replace("size: 4 ", "size: 1 "))
    assert_error(
        workspace,
        1,
        ErrorCode.LIMIT_TOO_SMALL,
        "--memory: ",
        "30 MB",
        options=("--memory", "30MB"),
    )


def test_a_time_limit_below_one_batch_is_an_error(workspace: Workspace) -> None:
    workspace.environment["NET_HANGS"] = os.devnull
    assert_error(
        workspace,
        1,
        ErrorCode.LIMIT_TOO_SMALL,
        "--max-time: 2 s ",
        options=("--seconds", "2"),
    )


def test_a_network_that_cannot_be_loaded_is_an_error_of_one_line(workspace: Workspace) -> None:
    (workspace.folder / "job.yaml").write_text(JOB.replace("class_name: Net", "class_name: Ned"))
    assert_error(workspace, 1, ErrorCode.MODEL_UNUSABLE, "model_config.class_name: ", "'Ned'")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_command_does_not_change_the_job_file_and_leaves_no_process(
    workspace: Workspace, number: signal.Signals
) -> None:
    before = everything_below(workspace.folder)
    marker = workspace.folder / "loading"
    with workspace.start("tune", "job.yaml", NET_HANGS=str(marker)) as cli:
        wait_until(marker.exists, "the network is being loaded")
        children = cli.children()
        assert children
        os.kill(cli.pid, number)
        ended = cli.wait(60)
        ended.refused(130, ErrorCode.INTERRUPTED, "job.yaml")
        assert len(ended.err.splitlines()) == 1
        assert not any(map(is_alive, children))
    marker.unlink()
    assert everything_below(workspace.folder) == before
    assert job_text(workspace) == JOB


def test_a_trial_ends_when_the_command_is_killed(workspace: Workspace) -> None:
    marker = workspace.folder / "loading"
    with workspace.start("tune", "job.yaml", NET_HANGS=str(marker)) as cli:
        wait_until(marker.exists, "the network is being loaded")
        assert cli.children()
        os.kill(cli.pid, signal.SIGKILL)
        cli.wait(60)
        cli.wait_for_children()


# Errors before anything is measured.


@pytest.mark.parametrize(
    ("change", "code", "fragments"),
    [
        (
            ("max_batch_size", "max_batch_sise"),
            ErrorCode.JOB_INVALID,
            ("model_config.max_batch_sise: ", "'max_batch_size'"),
        ),
        (("input: in.zarr", "input: no.zarr"), ErrorCode.STORE_MISSING, ("no.zarr",)),
        (
            ("class_file: 'net.py'", "class_file: 'no.py'"),
            ErrorCode.JOB_INVALID,
            ("model_config.class_file: ", "/no.py"),
        ),
        (
            ("storage_chunks: [4,", "storage_chunks: [3,"),
            ErrorCode.JOB_INVALID,
            ("storage_chunks", "3", "8"),
        ),
    ],
)
def test_a_mistake_in_the_job_is_an_error_of_one_line(
    workspace: Workspace, change: tuple[str, str], code: ErrorCode, fragments: tuple[str, ...]
) -> None:
    assert JOB.count(change[0]) == 1
    (workspace.folder / "job.yaml").write_text(JOB.replace(*change))
    assert_error(workspace, 2, code, *fragments)


@pytest.mark.parametrize(
    ("option", "value", "fragments"),
    [
        ("--max-time", "0", ("0",)),
        ("--max-time", "soon", ("'soon'", "1h30m")),
        ("--memory", "lots", ("'lots'", "8GiB")),
        ("--memory", "0", ("'0'", "8GiB")),
        ("--patch-sizes", "8,big", ("'8,big'", "64x64x32")),
        ("--patch-sizes", "8x8x8", ("8x8x8", "3 lengths", "1 or 2")),
        ("--keep", "batches", ("'batches'", "batch, compile, channels_last", "'batch'")),
        ("--precision", "float15", ("'float15'", "bfloat16, float16", "'float16'")),
        ("--precision", "tf32", ("'tf32'", "device cpu")),
    ],
)
def test_an_invalid_option_is_an_error_of_one_line(
    workspace: Workspace, option: str, value: str, fragments: tuple[str, ...]
) -> None:
    assert_error(
        workspace, 2, ErrorCode.JOB_INVALID, f"{option}: ", *fragments, options=(option, value)
    )


def test_a_job_file_that_cannot_be_edited_is_an_error_before_measuring(
    workspace: Workspace,
) -> None:
    path = workspace.folder / "job.yaml"
    path.chmod(0o444)
    assert_error(workspace, 2, ErrorCode.JOB_INVALID, "job.yaml: ", "read-only", "--dry-run")
    path.chmod(0o644)
    path.rename(workspace.folder / "real.yaml")
    path.symlink_to(workspace.folder / "real.yaml")
    assert_error(workspace, 2, ErrorCode.JOB_INVALID, "job.yaml: ", "link", "real.yaml")
    path.unlink()
    shared = JOB.replace("threads: 1\n", "").replace("size: 4 ", "size: &n 4 ")
    path.write_text(shared + "threads: *n\n")
    assert_error(workspace, 2, ErrorCode.JOB_FILE_UNEDITABLE, "job.yaml: ", "--dry-run")


def test_the_settings_of_a_job_that_was_produced_cannot_change(workspace: Workspace) -> None:
    workspace.call("produce", "job.yaml").ok()
    assert_error(workspace, 2, ErrorCode.JOB_STARTED, "job.yaml: ", "out.zarr", "-o", "--dry-run")


def test_every_chunk_shape_is_a_valid_job(workspace: Workspace) -> None:
    """Storage chunks do not change, and no shape leads to fewer chunks than the job has."""
    for keys in ({}, {"storage_chunks": None}, {"storage_chunks": None, "chunksize": None}):
        values: dict[str, Any] = yaml.safe_load(JOB) | {"input": str(workspace.folder / "in.zarr")}
        values["output"] = str(workspace.folder / "out.zarr")
        values["model_config"]["class_file"] = str(workspace.folder / "net.py")
        values = {key: v for key, v in (values | keys).items() if v is not None}
        job = load_job(values)
        record = JobRecord.create(job, [find_source(job.input[0])])
        plan, space = record.plan(), SearchSpace(record)
        # A CPU does not permit cuda_graph; the job file can be edited nevertheless.
        _check_editable(JobFile.read(workspace.folder / "job.yaml"), space)
        assert None in space.chunk_shapes
        for chunk in space.chunk_shapes:
            changed = space.record(Setting(4, 1, chunk=chunk)).plan()
            assert changed.storage_chunks == plan.storage_chunks
            assert changed.costs.chunks >= plan.costs.chunks
            assert changed.costs.patches == plan.costs.patches
