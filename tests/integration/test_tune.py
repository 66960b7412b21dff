"""`chunkq tune`: a real network over a real volume, tried in processes of its own.

What is fastest depends on the machine and is not asserted; what must hold for any choice is.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chunkq_worker.tune.search import Setting
from chunkq_worker.tune.space import SearchSpace

from chunkq.job import load_job
from chunkq.record import JobRecord
from chunkq.stores import find_source
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
        if os.environ.get("NET_HOLDS"):
            open(os.environ["NET_HOLDS"], "w").close()
            time.sleep(600)

    def forward(self, x):
        return self.conv(x / 100)


class Hungry(Net):
    """Takes 2 GiB for more than two items."""

    def forward(self, x):
        if len(x) > 2:
            self.held = torch.ones(2 << 28)
        return self.conv(x / 100)


class Strict(Net):
    """Takes patches of 8 voxels only."""

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
- 8                       # as storage wants it
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


PATIENTLY = ("--max-time", "3m")
ALL = "batch,compile,depth,chunksize"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A folder with a job of 9 chunks with 4 patches and fewer each."""
    write_zarr(tmp_path / "in.zarr", random_volume((24, 24)), (8, 8))
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "job.yaml").write_text(JOB)
    return Workspace(tmp_path)


def job_text(workspace: Workspace) -> str:
    return (workspace.folder / "job.yaml").read_text()


def refused(workspace: Workspace, code: int, *words: str, more: tuple[str, ...] = ()) -> None:
    """Run the command, which must say one line and change nothing."""
    before, text = everything_below(workspace.folder), job_text(workspace)
    answer = workspace.call("tune", "job.yaml", *more)
    assert (answer.code, answer.out) == (code, ""), answer
    [line] = [line for line in answer.err.splitlines() if line.startswith("chunkq: ")]
    assert all(part in line for part in words), line
    assert "Traceback" not in answer.err
    assert everything_below(workspace.folder) == before
    assert job_text(workspace) == text


def test_the_best_is_written_into_the_job_file_and_the_result_stays(workspace: Workspace) -> None:
    """Comments stay, nothing is left behind, and the tuned job gives the same labels."""
    before = everything_below(workspace.folder)
    old = load_job(workspace.folder / "job.yaml")
    answer = workspace.run("tune", "job.yaml", "--keep", "compile", *PATIENTLY, timeout=200).ok()
    assert sorted({*before, "job.yaml.before-tune"}) == everything_below(workspace.folder)
    assert (workspace.folder / "job.yaml.before-tune").read_text() == JOB
    assert "whole job" in answer.out
    assert "\x1b" not in answer.out
    assert "wrote job.yaml; as it was: job.yaml.before-tune" in answer.out

    text = job_text(workspace)
    assert text.startswith("# chunkq tune: 20")
    head, end, rest = text.partition("# end of chunkq tune\n")
    assert end
    assert all(line.startswith("#") for line in head.splitlines())
    assert "chosen" in head
    assert "batch 4" in head
    kept = [line for line in JOB.splitlines() if "max_batch" not in line and "- 8" not in line]
    assert [line for line in rest.splitlines() if line in kept] == kept
    assert "# as storage wants it" in rest
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


def test_a_dry_run_with_json_shows_the_table_and_writes_nothing(workspace: Workspace) -> None:
    """With a patch size that the network does not take, and another precision."""
    before = everything_below(workspace.folder)
    text = job_text(workspace).replace("class_name: Net", "class_name: Strict")
    text = text.replace("strides: [4, 4]", "strides: [8, 8]").replace("size: 4 ", "size: 1 ")
    (workspace.folder / "job.yaml").write_text(text)
    options = ("--keep", ALL, "--dry-run", "--json", "--patch-sizes", "6", *PATIENTLY)
    more = ("--precision", "bfloat16", "-o", "other.zarr")
    answer = workspace.run("tune", "job.yaml", *options, *more, timeout=200).ok()
    assert answer.err == ""
    found = json.loads(answer.out)
    assert (found["written"], found["backup"]) == (None, None)
    assert everything_below(workspace.folder) == before
    assert job_text(workspace) == text
    first, *rest = found["table"]
    assert (first["batch"], first["stage"], first["verdict"]) == (1, "network", "ok")
    assert first["difference"] == 0
    assert first["patches_per_second"] > 0
    assert first["peak_bytes"] > 50_000_000
    assert (first["chunks"], first["patches"]) == (9, 9)
    assert first["job_seconds"] > first["patches"] / first["patches_per_second"]
    [other] = [row for row in rest if row["patch"] == [6, 6]]
    assert other["verdict"] == "failed"
    assert other["note"].startswith("the trial raised RuntimeError: shape ")
    coarse = [r for r in rest if r["precision"] and r["stage"] == "network"]
    assert [r["precision"] for r in coarse] == [{"autocast": "bfloat16"}, {"dtype": "bfloat16"}]
    assert all(1e-4 < row["difference"] < 0.1 for row in coarse)
    assert all(row["verdict"] == "ok" for row in coarse)
    assert found["choice"] in found["table"]
    assert found["choice"]["patch"] is None
    assert set(found["changes"]) <= {"model_config.autocast", "model_config.dtype"}


@pytest.mark.proof("tune")
def test_what_takes_more_memory_than_allowed_is_listed_and_not_chosen(workspace: Workspace) -> None:
    """Four items take 2 GiB beside the process itself."""
    text = job_text(workspace).replace("class_name: Net", "class_name: Hungry")
    (workspace.folder / "job.yaml").write_text(text)
    options = ("--keep", "depth,chunksize,compile", "--memory", "1GiB", "--json", *PATIENTLY)
    found = json.loads(workspace.run("tune", "job.yaml", *options, timeout=200).ok().out)
    verdicts = {row["batch"]: row["verdict"] for row in found["table"]}
    assert verdicts[4] == "too large"
    assert found["choice"]["batch"] < 4
    assert found["choice"]["peak_bytes"] <= 1 << 30
    assert all(row["peak_bytes"] <= 1 << 30 for row in found["table"] if row["verdict"] == "ok")
    assert load_job(workspace.folder / "job.yaml").model.max_batch_size == found["choice"]["batch"]
    assert found["written"] == "job.yaml"


def test_where_not_even_one_patch_fits_nothing_is_written(workspace: Workspace) -> None:
    (workspace.folder / "job.yaml").write_text(JOB.replace("size: 4 ", "size: 1 "))
    words = "--memory: no batch size fits into 30.0 MB, not even one patch"
    refused(workspace, 1, words, more=("--memory", "30MB"))


def test_a_budget_that_does_not_do_for_one_batch_is_said(workspace: Workspace) -> None:
    workspace.environment["NET_HOLDS"] = os.devnull
    refused(
        workspace, 1, "--max-time: 2 s is too short to load the network", more=("--seconds", "2")
    )


def test_a_network_that_cannot_be_loaded_is_said_in_its_own_line(workspace: Workspace) -> None:
    (workspace.folder / "job.yaml").write_text(JOB.replace("class_name: Net", "class_name: Ned"))
    refused(workspace, 1, "model_config.class_name: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_ctrl_c_leaves_the_job_file_and_no_process_behind(
    workspace: Workspace, number: signal.Signals
) -> None:
    before = everything_below(workspace.folder)
    sign = workspace.folder / "loading"
    with workspace.start("tune", "job.yaml", NET_HOLDS=str(sign)) as cli:
        wait_until(sign.exists, "the network is being loaded")
        family = cli.children()
        assert family
        os.kill(cli.pid, number)
        ended = cli.wait(60)
        assert ended.code == 130
        assert ended.err == "chunkq: interrupted; job.yaml is as it was\n"
        assert not any(map(is_alive, family))
    sign.unlink()
    assert everything_below(workspace.folder) == before
    assert job_text(workspace) == JOB


def test_a_trial_ends_when_the_command_is_killed(workspace: Workspace) -> None:
    sign = workspace.folder / "loading"
    with workspace.start("tune", "job.yaml", NET_HOLDS=str(sign)) as cli:
        wait_until(sign.exists, "the network is being loaded")
        assert cli.children()
        os.kill(cli.pid, signal.SIGKILL)
        cli.wait(60)
        cli.wait_for_children()


# Refused before anything is measured.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("max_batch_size", "max_batch_sise"), "did you mean 'max_batch_size'?"),
        (("input: in.zarr", "input: nowhere.zarr"), "nowhere.zarr does not exist"),
        (("class_file: 'net.py'", "class_file: 'no.py'"), "model_config.class_file: no file "),
        (("storage_chunks: [4,", "storage_chunks: [3,"), "does not divide the chunk (8)"),
    ],
)
def test_a_mistake_in_the_job_is_one_line(
    workspace: Workspace, change: tuple[str, str], words: str
) -> None:
    assert JOB.count(change[0]) == 1
    (workspace.folder / "job.yaml").write_text(JOB.replace(*change))
    refused(workspace, 2, words)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--max-time", "0", "--max-time: 0 leaves no time"),
        ("--max-time", "soon", "--max-time: 'soon' is no time; write 90, 15m, 2h or 1h30m"),
        ("--memory", "lots", "--memory: 'lots' is no size; write 8GiB, 500MB or bytes"),
        ("--memory", "0", "--memory: 0 is no memory at all"),
        ("--patch-sizes", "8,big", "--patch-sizes: '8,big' are no patches"),
        ("--patch-sizes", "8x8x8", "--patch-sizes: 8x8x8 has 3 lengths, the input 2 axes"),
        ("--keep", "batches", "--keep: 'batches' is none of batch, compile, depth, chunksize; did"),
        ("--precision", "float15", "--precision: 'float15' is none of bfloat16, float16; did you"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    workspace: Workspace, option: str, value: str, words: str
) -> None:
    refused(workspace, 2, words, more=(option, value))


def test_a_file_that_cannot_be_rewritten_is_refused_before_measuring(workspace: Workspace) -> None:
    path = workspace.folder / "job.yaml"
    path.chmod(0o444)
    refused(workspace, 2, "job.yaml: is read-only; make it writable, or look with --dry-run")
    path.chmod(0o644)
    path.rename(workspace.folder / "real.yaml")
    path.symlink_to(workspace.folder / "real.yaml")
    refused(workspace, 2, "job.yaml: is a link to ", "real.yaml; tune that file")
    path.unlink()
    path.write_text(JOB.replace("threads: 1", "threads: &n 1").replace("size: 4 ", "size: *n "))
    refused(workspace, 2, "job.yaml: is written so that these values cannot be changed alone")


def test_a_job_that_is_begun_keeps_its_settings(workspace: Workspace) -> None:
    workspace.call("produce", "job.yaml").ok()
    refused(
        workspace, 2, "job.yaml: its output ", "out.zarr is begun", "-o, or look with --dry-run"
    )


def test_every_rung_of_the_ladder_is_a_job_that_can_be_done(workspace: Workspace) -> None:
    """Storage chunks stay, and no cut leaves fewer chunks than the job had."""
    for keys in ({}, {"storage_chunks": None}, {"storage_chunks": None, "chunksize": None}):
        values: dict[str, Any] = yaml.safe_load(JOB) | {"input": str(workspace.folder / "in.zarr")}
        values["output"] = str(workspace.folder / "out.zarr")
        values["model_config"]["class_file"] = str(workspace.folder / "net.py")
        values = {key: v for key, v in (values | keys).items() if v is not None}
        job = load_job(values)
        record = JobRecord.create(job, [find_source(job.input[0])])
        plan, space = record.plan(), SearchSpace(record)
        assert None in space.ladder
        for chunk in space.ladder:
            again = space.record(Setting(4, 1, chunk=chunk)).plan()
            assert again.storage_chunks == plan.storage_chunks
            assert again.costs.chunks >= plan.costs.chunks
            assert again.costs.patches == plan.costs.patches
