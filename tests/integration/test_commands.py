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
from chunkq.executors.base import Shift
from chunkq.executors.sqlite import SqliteExecutor
from chunkq.job import load_job
from tests.integration.bench import (
    Bench,
    everything_below,
    random_volume,
    read_output,
    toy_model,
    write_zarr,
)


def make_bench(folder: Path) -> Bench:
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
    bench = Bench(folder, values)
    bench.write_job()
    return bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A job done from beginning to end by `chunkq run`."""
    bench = make_bench(tmp_path_factory.mktemp("sealed"))
    answer = bench.run("run", "job.json", "--gpus", "none").ok()
    assert answer.out.startswith(f"complete: {bench.output} (6 chunks, ")
    return bench


def test_the_template_is_a_job_as_soon_as_its_files_are_there(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert "wrote job.yaml" in bench.here("init").ok().out
    bench.here("plan", "job.yaml").refused(2, "input: ", "volume.zarr is not there")
    write_zarr(tmp_path / "volume.zarr", np.zeros((96, 80, 64), np.uint8), (64, 64, 64))
    bench.here("plan", "job.yaml").refused(2, "model_config.ts_file: no file", "model.ts")
    (tmp_path / "model.ts").write_bytes(b"read for its hash only")
    plan = json.loads(bench.here("plan", "job.yaml", "--json").ok().out)
    assert plan["volume"] == [96, 80, 64]
    assert plan["output_dtype"] == "uint8"
    assert "newly queued" in bench.here("produce", "job.yaml").ok().out


def test_init_never_replaces_a_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.here("init", "mine.yaml").ok()
    (tmp_path / "mine.yaml").write_text("mine")
    bench.here("init", "mine.yaml").refused(2, "mine.yaml: is there already")
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_init_into_a_folder_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    answer = bench.here("init", "none/job.yaml")
    answer.refused(answer.code, "none/job.yaml")
    assert answer.code in (1, 2)


def test_plan_says_what_the_job_will_cost_and_writes_nothing(bench: Bench) -> None:
    before = everything_below(bench.folder)
    shown = bench.here("plan", "job.json").ok().out
    plan = json.loads(bench.here("plan", "job.json", "--json").ok().out)
    assert everything_below(bench.folder) == before
    assert plan["chunks"] == 6
    assert plan["blocks"] == [3, 2]
    assert plan["patches"] == 7 * 5
    assert plan["recompute_factor"] == 1.0
    assert plan["output_bytes"] == 3 * 30 * 22 * 4
    total = plan["input_bytes"] + plan["output_bytes"] + 2 * plan["piece_bytes"]
    assert plan["store_bytes"] == total
    for words in ("30×22 uint8", "6 (3×2) of 12×12", "35, each computed once"):
        assert words in shown


def test_what_was_planned_is_what_was_moved(sealed: Bench) -> None:
    plan = json.loads(sealed.here("plan", "job.json", "--json").ok().out)
    report = json.loads((sealed.job_folder / "report.json").read_text())
    assert report["patches"] == plan["patches"]
    assert report["bytes"]["input"] == plan["input_bytes"]
    assert report["bytes"]["output"] == plan["output_bytes"]
    headers = 150 * 6 * 8  # of the arrays in the pieces
    assert 0 <= report["bytes"]["pieces_written"] - plan["piece_bytes"] < headers
    assert report["bytes"]["pieces_read"] == report["bytes"]["pieces_written"]


def test_plan_with_probe_times_a_batch(bench: Bench) -> None:
    plan = json.loads(bench.run("plan", "job.json", "--probe", "--json").ok().out)
    assert plan["probe"]["batch"] == 4
    assert 0 < plan["probe"]["batch_seconds"] < 60


def test_input_and_output_may_be_replaced_on_the_command_line(bench: Bench) -> None:
    other = bench.folder / "elsewhere"
    other.mkdir()
    write_zarr(other / "other.zarr", random_volume((16, 16)))
    options = ("-i", "elsewhere/other.zarr", "-o", "elsewhere/result.zarr")
    plan = json.loads(bench.here("plan", "job.json", *options, "--json").ok().out)
    assert plan["volume"] == [16, 16]
    bench.here("produce", "job.json", *options).ok()
    assert (other / "result.zarr.chunkq" / "job.json").exists()
    assert not bench.output.exists()


def test_a_job_means_the_same_as_yaml_json_and_a_mapping(bench: Bench) -> None:
    text = (bench.folder / "job.json").read_text()
    (bench.folder / "job.yaml").write_text(yaml.safe_dump(json.loads(text)))
    absolute = {**bench.values, "input": str(bench.folder / "in.zarr"), "output": str(bench.output)}
    jobs = [load_job(bench.folder / name) for name in ("job.json", "job.yaml")]
    assert jobs[0] == jobs[1] == load_job(absolute)
    assert jobs[0].input == (str(bench.folder / "in.zarr"),)


def test_the_schema_is_one_and_tells_jobs_from_mistakes(bench: Bench) -> None:
    schema = json.loads(bench.here("schema").ok().out)
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    job = json.loads((bench.folder / "job.json").read_text())
    assert list(validator(schema).iter_errors(job)) == []
    for wrong in ({"stride": [4]}, {"chunksize": [0]}, {"combine": "sofd"}):
        assert list(validator(schema).iter_errors(job | wrong)), wrong


def test_the_schema_accepts_the_template(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.here("init").ok()
    schema = json.loads(bench.here("schema").ok().out)
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    jsonschema.validate(job, schema)


def test_status_of_a_sealed_job_says_so_in_every_form(sealed: Bench) -> None:
    found = json.loads(sealed.here("status", "out.zarr", "--json").ok().out)
    assert found["output"] == str(sealed.output)
    assert (found["chunks"], found["done"], found["sealed"]) == (6, 6, True)
    assert (found["running"], found["queued"], found["failed"]) == (0, 0, 0)
    assert found["blocks_finalized"] == found["blocks_to_finalize"] == 5
    assert found["failures"] == []
    [worker] = found["workers"]
    assert worker["recent_chunks"] == 6
    assert abs(sum(worker["stage_shares"].values()) - 1) < 1e-9
    shown = sealed.here("status", "out.zarr").ok().out
    assert "6/6 chunks done" in shown
    assert "\x1b" not in shown


def test_watching_a_sealed_job_in_a_log_prints_plain_lines_and_ends(sealed: Bench) -> None:
    shown = sealed.run("status", "out.zarr", "--watch").ok().out
    [line] = shown.splitlines()
    assert "6/6 chunks done, 5/5 blocks finalized" in line
    assert line.endswith("sealed")
    assert line.isprintable()
    found = sealed.here("status", "out.zarr", "--watch", "--json").ok().out
    assert json.loads(found)["sealed"] is True


def test_status_before_anything_ran_knows_what_is_queued(bench: Bench) -> None:
    bench.here("produce", "job.json").ok()
    found = json.loads(bench.here("status", "out.zarr", "--json").ok().out)
    assert (found["done"], found["queued"], found["sealed"]) == (0, 6, False)
    assert found["voxels_per_second"] is None
    assert found["seconds_left"] is None
    assert found["workers"] == []
    assert "0/6 chunks done, 6 queued" in bench.here("status", "out.zarr").ok().out


def test_status_without_its_queue_still_tells_what_the_ledger_knows(bench: Bench) -> None:
    bench.here("produce", "job.json").ok()
    bench.work_here(only={(0, 0)}.__contains__)
    answer = bench.here("status", "out.zarr", "--json", "--queue", "sqlite:///proc/none/queue.db")
    found = json.loads(answer.ok().out)
    assert (found["done"], found["queued"]) == (1, None)
    assert "/proc/none" in found["queue_problem"]


def test_the_job_folder_may_be_named_in_place_of_the_output(sealed: Bench) -> None:
    found = json.loads(sealed.here("status", "out.zarr.chunkq", "--json").ok().out)
    assert found["done"] == 6
    assert json.loads(sealed.here("status", "out.zarr/", "--json").ok().out) == found


@pytest.mark.parametrize("command", ["status", "finalize", "retry", "cancel"])
def test_commands_on_an_output_without_a_job_say_so(bench: Bench, command: str) -> None:
    answer = bench.here(command, "nothing.zarr")
    if command == "cancel":  # the queue may hold a job whose folder is gone
        assert answer.ok().out.startswith("no chunk of this job is on the queue")
        return
    answer.refused(2, "nothing.zarr: no job was produced here", "chunkq produce")


def test_jobs_lists_every_job_on_the_queue_and_cancel_takes_one_off(bench: Bench) -> None:
    assert bench.here("jobs").ok().out == "no job has chunks on this queue\n"
    assert json.loads(bench.here("jobs", "--json").ok().out) == []
    bench.here("produce", "job.json").ok()
    bench.here("produce", "job.json", "-o", "second.zarr").ok()
    listed = bench.here("jobs").ok().out
    assert f"{bench.output}: 6 queued, 0 running, 0 failed" in listed
    assert f"{bench.folder}/second.zarr: 6 queued" in listed
    assert bench.here("status").ok().out == listed
    rows = json.loads(bench.here("jobs", "--json").ok().out)
    assert {row["output"] for row in rows} == {str(bench.output), f"{bench.folder}/second.zarr"}
    assert bench.here("cancel", "out.zarr").ok().out.startswith("6 chunks taken off the queue")
    assert str(bench.output) not in bench.here("jobs").ok().out
    assert "6 newly queued" in bench.here("produce", "job.json", "--resume").ok().out


def test_status_says_what_to_do_about_chunks_that_are_on_no_queue(bench: Bench) -> None:
    bench.here("produce", "job.json").ok()
    shown = bench.here("status", "out.zarr").ok().out
    assert "next:" not in shown
    bench.here("cancel", "out.zarr").ok()
    shown = " ".join(bench.here("status", "out.zarr").ok().out.split())
    assert "neither done nor on this queue; next: the `chunkq run` or `chunkq produce`" in shown
    found = json.loads(bench.here("status", "out.zarr", "--json").ok().out)
    assert (found["forgotten"], found["seconds_left"]) == (True, None)


def test_retry_queues_what_failed_and_nothing_else(bench: Bench) -> None:
    bench.here("produce", "job.json").ok()
    assert bench.here("retry", "out.zarr").ok().out == "no failed chunk\n"
    queue = SqliteExecutor(f"sqlite://{bench.queue}")
    for _ in range(3):
        begun = queue.take(Shift("unlucky"))
        assert begun is not None
        queue.fail(begun, ValueError("unlucky"))
    found = json.loads(bench.here("status", "out.zarr", "--json").ok().out)
    assert found["failed"] + found["queued"] == 6
    queue.close()


def test_a_changed_checkpoint_is_another_job(bench: Bench) -> None:
    weights = bench.folder / "weights.pt"
    torch.save({}, weights)
    bench.write_job(model={"checkpoint": "weights.pt"})
    bench.here("produce", "job.json").ok()
    torch.save({"more": torch.zeros(1)}, weights)
    bench.here("produce", "job.json").refused(2, "different: content of model_config.checkpoint")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(bench: Bench, command: str) -> None:
    shown = bench.here(command, "--help").ok().out
    assert shown.startswith(f"Usage: chunkq {command} ")
    assert len(shown.splitlines()) > 4
    assert bench.here(command, "-h").ok().out == shown


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


def test_commands_that_run_no_network_import_no_torch(bench: Bench) -> None:
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
        cwd=bench.folder,
        env=bench.env,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    codes = dict.fromkeys(lines, 0) | {"finalize out.zarr": 3}
    told = [line for line in done.stderr.splitlines() if not line.startswith("chunkq: ")]
    assert told == [f"{line} {code} False" for line, code in codes.items()]


def test_a_misspelt_command_is_bad_usage_with_a_hint(bench: Bench) -> None:
    answer = bench.here("finalise", "out.zarr")
    assert answer.code == 2
    assert "no command 'finalise'; did you mean 'finalize'?" in answer.err


@pytest.mark.parametrize(
    "command",
    [("plan",), ("produce",), ("finalize",), ("work", "--workers", "0"), ("status", "--x")],
)
def test_bad_usage_ends_with_2(bench: Bench, command: tuple[str, ...]) -> None:
    answer = bench.here(*command)
    assert answer.code == 2
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("value", ["soon", "", "h", "1.5h", "-5"])
def test_a_time_that_is_none_is_refused(bench: Bench, value: str) -> None:
    bench.here("work", "--burst", "--max-time", value).refused(2, "--max-time", "is no time")


def test_a_gpu_that_is_not_granted_is_refused(bench: Bench) -> None:
    bench.environment["CUDA_VISIBLE_DEVICES"] = ""
    bench.here("work", "--gpus", "3").refused(2, "--gpus: '3' is not among the visible GPUs (none)")


def test_run_again_on_a_finished_job_does_no_work_and_changes_nothing(sealed: Bench) -> None:
    commits, values = sealed.commits(), read_output(sealed.output)
    answer = sealed.run("run", "job.json", "--gpus", "none").ok()
    assert "complete: " in answer.out
    assert sealed.commits() == commits
    np.testing.assert_array_equal(read_output(sealed.output), values)


def test_version_names_the_program(bench: Bench) -> None:
    assert bench.here("--version").ok().out.startswith("chunkq, version ")
