"""The commands as a user meets them: templates, plans, status, help and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
import yaml

from chunkq.cli import COMMANDS
from chunkq.executors.base import WorkerOptions
from chunkq.executors.sqlite import SqliteExecutor
from chunkq.job import load_job
from tests.harness.files import everything_below
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace


def make_bench(folder: Path) -> Workspace:
    write_zarr(folder / "in.zarr", random_volume((30, 22)), (8, 8))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4],
        "chunksize": [12, 12],
        "storage_chunks": [4, 4],
        "threads": 1,
        "model_config": toy_model(folder, (8, 8), scale=100.0),
    }
    workspace = Workspace(folder, values)
    workspace.write_job()
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_bench(tmp_path)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A job done from beginning to end by `chunkq run`."""
    workspace = make_bench(tmp_path_factory.mktemp("sealed"))
    answer = workspace.run("run", "job.json", "--gpus", "none").ok()
    assert answer.out.startswith(f"complete: {workspace.output} (6 chunks, ")
    return workspace


def test_the_template_is_a_job_as_soon_as_its_files_are_there(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert "wrote job.yaml" in workspace.call("init").ok().out
    workspace.call("plan", "job.yaml").refused(2, "input: ", "volume.zarr is not there")
    write_zarr(tmp_path / "volume.zarr", np.zeros((96, 80, 64), np.uint8), (64, 64, 64))
    workspace.call("plan", "job.yaml").refused(2, "model_config.ts_file: no file", "model.ts")
    (tmp_path / "model.ts").write_bytes(b"read for its hash only")
    plan = json.loads(workspace.call("plan", "job.yaml", "--json").ok().out)
    assert plan["volume"] == [96, 80, 64]
    assert plan["output_dtype"] == "uint8"
    assert "newly queued" in workspace.call("produce", "job.yaml").ok().out


def test_init_never_replaces_a_file(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.call("init", "mine.yaml").ok()
    (tmp_path / "mine.yaml").write_text("mine")
    workspace.call("init", "mine.yaml").refused(2, "mine.yaml: is there already")
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_init_into_a_folder_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    answer = workspace.call("init", "none/job.yaml")
    answer.refused(answer.code, "none/job.yaml")
    assert answer.code in (1, 2)


def test_plan_says_what_the_job_will_cost_and_writes_nothing(workspace: Workspace) -> None:
    before = everything_below(workspace.folder)
    shown = workspace.call("plan", "job.json").ok().out
    plan = json.loads(workspace.call("plan", "job.json", "--json").ok().out)
    assert everything_below(workspace.folder) == before
    assert plan["chunks"] == 6
    assert plan["blocks"] == [3, 2]
    assert plan["patches"] == 7 * 5
    assert plan["recompute_factor"] == 1.0
    assert plan["output_bytes"] == 3 * 30 * 22 * 4
    total = plan["input_bytes"] + plan["output_bytes"] + 2 * plan["piece_bytes"]
    assert plan["store_bytes"] == total
    for words in ("30×22 uint8", "6 (3×2) of 12×12", "35, each computed once"):
        assert words in shown


def test_what_was_planned_is_what_was_moved(sealed: Workspace) -> None:
    plan = json.loads(sealed.call("plan", "job.json", "--json").ok().out)
    report = json.loads((sealed.epoch_folder / "report.json").read_text())
    assert report["patches"] == plan["patches"]
    assert report["bytes"]["input"] == plan["input_bytes"]
    assert report["bytes"]["output"] == plan["output_bytes"]
    headers = 150 * 6 * 8  # of the arrays in the pieces
    assert 0 <= report["bytes"]["pieces_written"] - plan["piece_bytes"] < headers
    assert report["bytes"]["pieces_read"] == report["bytes"]["pieces_written"]


def test_plan_with_probe_times_a_batch(workspace: Workspace) -> None:
    plan = json.loads(workspace.run("plan", "job.json", "--check-model", "--json").ok().out)
    assert plan["model_check"]["batch"] == 4
    assert 0 < plan["model_check"]["batch_seconds"] < 60


def test_input_and_output_may_be_replaced_on_the_command_line(workspace: Workspace) -> None:
    other = workspace.folder / "elsewhere"
    other.mkdir()
    write_zarr(other / "other.zarr", random_volume((16, 16)))
    options = ("-i", "elsewhere/other.zarr", "-o", "elsewhere/result.zarr")
    plan = json.loads(workspace.call("plan", "job.json", *options, "--json").ok().out)
    assert plan["volume"] == [16, 16]
    workspace.call("produce", "job.json", *options).ok()
    assert (other / "result.zarr.chunkq" / "job.json").exists()
    assert not workspace.output.exists()


def test_a_job_means_the_same_as_yaml_json_and_a_mapping(workspace: Workspace) -> None:
    text = (workspace.folder / "job.json").read_text()
    (workspace.folder / "job.yaml").write_text(yaml.safe_dump(json.loads(text)))
    absolute = {
        **workspace.values,
        "input": str(workspace.folder / "in.zarr"),
        "output": str(workspace.output),
    }
    jobs = [load_job(workspace.folder / name) for name in ("job.json", "job.yaml")]
    assert jobs[0] == jobs[1] == load_job(absolute)
    assert jobs[0].input == (str(workspace.folder / "in.zarr"),)


def test_the_schema_is_one_and_tells_jobs_from_mistakes(workspace: Workspace) -> None:
    schema = json.loads(workspace.call("schema").ok().out)
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    job = json.loads((workspace.folder / "job.json").read_text())
    assert list(validator(schema).iter_errors(job)) == []
    for wrong in ({"stride": [4]}, {"chunksize": [0]}, {"combine": "sofd"}):
        assert list(validator(schema).iter_errors(job | wrong)), wrong


def test_the_schema_accepts_the_template(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.call("init").ok()
    schema = json.loads(workspace.call("schema").ok().out)
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    jsonschema.validate(job, schema)


def test_status_of_a_sealed_job_says_so_in_every_form(sealed: Workspace) -> None:
    found = json.loads(sealed.call("status", "out.zarr", "--json").ok().out)
    assert found["output"] == str(sealed.output)
    assert (found["chunks"], found["done"], found["sealed"]) == (6, 6, True)
    assert (found["running"], found["queued"], found["failed"]) == (0, 0, 0)
    assert found["blocks_finalized"] == found["blocks_to_finalize"] == 5
    assert found["failures"] == []
    [worker] = found["workers"]
    assert worker["recent_chunks"] == 6
    assert abs(sum(worker["stage_shares"].values()) - 1) < 1e-9
    shown = sealed.call("status", "out.zarr").ok().out
    assert "6/6 chunks done" in shown
    assert "\x1b" not in shown


def test_watching_a_sealed_job_in_a_log_prints_plain_lines_and_ends(sealed: Workspace) -> None:
    shown = sealed.run("status", "out.zarr", "--watch").ok().out
    [line] = shown.splitlines()
    assert "6/6 chunks done, 5/5 blocks finalized" in line
    assert line.endswith("sealed")
    assert line.isprintable()
    found = sealed.call("status", "out.zarr", "--watch", "--json").ok().out
    assert json.loads(found)["sealed"] is True


def test_status_before_anything_ran_knows_what_is_queued(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    found = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (found["done"], found["queued"], found["sealed"]) == (0, 6, False)
    assert found["voxels_per_second"] is None
    assert found["seconds_left"] is None
    assert found["workers"] == []
    assert "0/6 chunks done, 6 queued" in workspace.call("status", "out.zarr").ok().out


def test_status_without_its_queue_still_tells_what_the_ledger_knows(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline(only={(0, 0)}.__contains__)
    answer = workspace.call(
        "status", "out.zarr", "--json", "--queue", "sqlite:///proc/none/queue.db"
    )
    found = json.loads(answer.ok().out)
    assert (found["done"], found["queued"]) == (1, None)
    assert "/proc/none" in found["queue_problem"]


def test_the_job_folder_may_be_named_in_place_of_the_output(sealed: Workspace) -> None:
    found = json.loads(sealed.call("status", "out.zarr.chunkq", "--json").ok().out)
    assert found["done"] == 6
    assert json.loads(sealed.call("status", "out.zarr/", "--json").ok().out) == found


@pytest.mark.parametrize("command", ["status", "finalize", "retry", "cancel"])
def test_commands_on_an_output_without_a_job_say_so(workspace: Workspace, command: str) -> None:
    answer = workspace.call(command, "nothing.zarr")
    if command == "cancel":  # the queue may hold a job whose folder is gone
        assert answer.ok().out.startswith("no chunk of this job is on the queue")
        return
    answer.refused(2, "nothing.zarr: no job was produced here", "chunkq produce")


def test_jobs_lists_every_job_on_the_queue_and_cancel_takes_one_off(workspace: Workspace) -> None:
    assert workspace.call("jobs").ok().out == "no job has chunks on this queue\n"
    assert json.loads(workspace.call("jobs", "--json").ok().out) == []
    workspace.call("produce", "job.json").ok()
    workspace.call("produce", "job.json", "-o", "second.zarr").ok()
    listed = workspace.call("jobs").ok().out
    assert f"{workspace.output}: 6 queued, 0 running, 0 failed" in listed
    assert f"{workspace.folder}/second.zarr: 6 queued" in listed
    assert workspace.call("status").ok().out == listed
    rows = json.loads(workspace.call("jobs", "--json").ok().out)
    assert {row["output"] for row in rows} == {
        str(workspace.output),
        f"{workspace.folder}/second.zarr",
    }
    assert workspace.call("cancel", "out.zarr").ok().out.startswith("6 chunks taken off the queue")
    assert str(workspace.output) not in workspace.call("jobs").ok().out
    assert "6 newly queued" in workspace.call("produce", "job.json", "--resume").ok().out


def test_status_says_what_to_do_about_chunks_that_are_on_no_queue(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    shown = workspace.call("status", "out.zarr").ok().out
    assert "next:" not in shown
    workspace.call("cancel", "out.zarr").ok()
    shown = " ".join(workspace.call("status", "out.zarr").ok().out.split())
    assert "neither done nor on this queue; next: the `chunkq run` or `chunkq produce`" in shown
    found = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (found["forgotten"], found["seconds_left"]) == (True, None)


def test_retry_queues_what_failed_and_nothing_else(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    assert workspace.call("retry", "out.zarr").ok().out == "no failed chunk\n"
    queue = SqliteExecutor(f"sqlite://{workspace.queue_file}")
    for _ in range(3):
        begun = queue.reserve(WorkerOptions("unlucky"))
        assert begun is not None
        queue.nack(begun, ValueError("unlucky"))
    found = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert found["failed"] + found["queued"] == 6
    queue.close()


def test_a_changed_checkpoint_is_another_job(workspace: Workspace) -> None:
    weights = workspace.folder / "weights.pt"
    torch.save({}, weights)
    workspace.write_job(model={"runtime": "torch", "checkpoint": "weights.pt"})
    workspace.call("produce", "job.json").ok()
    torch.save({"more": torch.zeros(1)}, weights)
    workspace.call("produce", "job.json").refused(
        2, "different: content of model_config.checkpoint"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(workspace: Workspace, command: str) -> None:
    shown = workspace.call(command, "--help").ok().out
    assert shown.startswith(f"Usage: chunkq {command} ")
    assert len(shown.splitlines()) > 4
    assert workspace.call(command, "-h").ok().out == shown


def test_help_imports_no_heavy_library() -> None:
    heavy = "torch zarr tensorstore redis numpy pydantic fsspec s3fs chunkq_worker chunkq_producer"
    code = (
        "import sys\n"
        "from chunkq.cli import main\n"
        "sys.argv = ['chunkq', '--help']\n"
        "code = main()\n"
        f"print('HEAVY', [n for n in {heavy.split()} if n in sys.modules], code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    *shown, last = done.stdout.splitlines()
    assert last == "HEAVY [] 0"
    for name in COMMANDS:
        assert any(line.strip().startswith(f"{name} ") for line in shown), name


def test_commands_that_run_no_network_import_no_torch(workspace: Workspace) -> None:
    lines = ["plan job.json", "produce job.json", "status out.zarr", "finalize out.zarr"]
    lines += ["retry out.zarr", "cancel out.zarr", "jobs", "schema"]
    code = (
        "import sys\n"
        "from chunkq.cli import main\n"
        f"for line in {lines!r}:\n"
        "    sys.argv = ['chunkq', *line.split()]\n"
        "    print(line, main(), 'torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workspace.folder,
        env=workspace.env,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    codes = dict.fromkeys(lines, 0) | {"finalize out.zarr": 3}
    told = [line for line in done.stderr.splitlines() if not line.startswith("chunkq: ")]
    assert told == [f"{line} {code} False" for line, code in codes.items()]


def test_a_misspelt_command_is_bad_usage_with_a_hint(workspace: Workspace) -> None:
    answer = workspace.call("finalise", "out.zarr")
    assert answer.code == 2
    assert "no command 'finalise'; did you mean 'finalize'?" in answer.err


@pytest.mark.parametrize(
    "command",
    [("plan",), ("produce",), ("finalize",), ("work", "--workers", "0"), ("status", "--x")],
)
def test_bad_usage_ends_with_2(workspace: Workspace, command: tuple[str, ...]) -> None:
    answer = workspace.call(*command)
    assert answer.code == 2
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("value", ["soon", "", "h", "1.5h", "-5"])
def test_a_time_that_is_none_is_refused(workspace: Workspace, value: str) -> None:
    workspace.call("work", "--burst", "--max-time", value).refused(2, "--max-time", f"{value!r}")


def test_a_gpu_that_is_not_granted_is_refused(workspace: Workspace) -> None:
    workspace.environment["CUDA_VISIBLE_DEVICES"] = ""
    workspace.call("work", "--gpus", "3").refused(
        2, "--gpus: invalid value '3'; expected one of the visible GPUs (none)"
    )


def test_run_again_on_a_finished_job_does_no_work_and_changes_nothing(sealed: Workspace) -> None:
    commits, values = sealed.commits(), read_output(sealed.output)
    answer = sealed.run("run", "job.json", "--gpus", "none").ok()
    assert "complete: " in answer.out
    assert sealed.commits() == commits
    np.testing.assert_array_equal(read_output(sealed.output), values)


def test_version_names_the_program(workspace: Workspace) -> None:
    assert workspace.call("--version").ok().out.startswith("chunkq, version ")
