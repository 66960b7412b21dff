"""Commands: job template, plan, status, queue operations, help and exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jsonschema
import numpy as np
import pytest
import torch
import yaml

from chunkq.errors import ErrorCode
from chunkq.install_hint import EXTRAS, install_command
from chunkq.job import key_reference
from chunkq.job.job_reading import load_job
from chunkq.lazy_imports import COMMANDS
from chunkq.queue.backends.sqlite import SqliteExecutor
from chunkq.queue.contract.executor import WorkerOptions
from tests.harness.files import everything_below
from tests.harness.small_job import small_workspace
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace


def create_workspace(folder: Path) -> Workspace:
    return small_workspace(folder, weight_function=["weight_uniform"])


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return create_workspace(tmp_path)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Return a job that `chunkq run` has completed."""
    workspace = create_workspace(tmp_path_factory.mktemp("sealed"))
    result = workspace.run("run", "job.json", "--gpus", "none").ok()
    assert result.out.startswith(f"complete: {workspace.output} (6 chunks, ")
    return workspace


def python(workspace: Workspace, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in another Python process; assert success."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=workspace.folder,
        env=workspace.env,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def test_the_template_is_a_valid_job_once_its_files_exist(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert "wrote job.yaml" in workspace.call("init").ok().out
    workspace.call("plan", "job.yaml").refused(2, "input: ", "volume.zarr")
    write_zarr(tmp_path / "volume.zarr", np.ones((96, 80, 64), np.uint8), (64, 64, 64))
    workspace.call("plan", "job.yaml").refused(
        2, ErrorCode.JOB_INVALID, "model_config.class_file: ", "net.py"
    )
    for name in ("net.py", "net.pt"):
        (tmp_path / name).write_bytes(b"# only its hash is read")
    plan = json.loads(workspace.call("plan", "job.yaml", "--json").ok().out)
    assert plan["volume"] == [96, 80, 64]
    assert plan["output_dtype"] == "uint8"
    assert "newly queued" in workspace.call("produce", "job.yaml").ok().out


def test_init_does_not_replace_an_existing_file(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.call("init", "own.yaml").ok()
    (tmp_path / "own.yaml").write_text("content")
    workspace.call("init", "own.yaml").refused(2, ErrorCode.OUTPUT_EXISTS, "own.yaml: ")
    assert (tmp_path / "own.yaml").read_text() == "content"


def test_init_in_a_missing_folder_reports_one_line(tmp_path: Path) -> None:
    result = Workspace(tmp_path).call("init", "none/job.yaml")
    result.refused(2, ErrorCode.STORE_UNUSABLE, "none/job.yaml: ")
    assert len(result.err.splitlines()) == 1


def test_plan_estimates_the_cost_and_writes_nothing(workspace: Workspace) -> None:
    before = everything_below(workspace.folder)
    text = workspace.call("plan", "job.json").ok().out
    plan = json.loads(workspace.call("plan", "job.json", "--json").ok().out)
    assert everything_below(workspace.folder) == before
    assert plan["chunks"] == 6
    assert plan["blocks"] == [3, 2]
    assert plan["patches"] == 7 * 5
    assert plan["recompute_factor"] == 1.0
    assert plan["output_bytes"] == 3 * 32 * 22 * 4
    expected_bytes = plan["input_bytes"] + plan["output_bytes"] + 2 * plan["piece_bytes"]
    assert plan["store_bytes"] == expected_bytes
    for value in ("32×22 uint8", "6 (3×2) of 12×12", "35, each computed once"):
        assert value in text


@pytest.mark.parametrize(
    ("keys", "filled"),
    [({"pad_value": 7}, "7 (pad_value)"), ({"pad_mode": "reflect"}, "pad_mode reflect")],
)
def test_plan_says_with_what_a_patch_larger_than_the_volume_is_filled(
    workspace: Workspace, keys: dict[str, object], filled: str
) -> None:
    assert "larger than the volume" not in workspace.call("plan", "job.json").ok().out
    write_zarr(workspace.folder / "in.zarr", random_volume((32, 5)), (8, 8), overwrite=True)
    workspace.write_job(**keys)
    text = " ".join(workspace.call("plan", "job.json").ok().out.split())
    assert "(8 of 5 voxels); the rest of it is filled with" in text
    assert filled in text


def test_the_measured_bytes_equal_the_planned_bytes(sealed: Workspace) -> None:
    plan = json.loads(sealed.call("plan", "job.json", "--json").ok().out)
    report = json.loads((sealed.epoch_folder / "report.json").read_text())
    assert report["patches"] == plan["patches"]
    assert report["bytes"]["input"] == plan["input_bytes"]
    assert report["bytes"]["output"] == plan["output_bytes"]
    max_header_bytes = 150 * 6 * 8  # arrays in the pieces have headers
    assert 0 <= report["bytes"]["pieces_written"] - plan["piece_bytes"] < max_header_bytes
    assert report["bytes"]["pieces_read"] == report["bytes"]["pieces_written"]


def test_plan_with_check_model_measures_the_time_of_a_batch(workspace: Workspace) -> None:
    plan = json.loads(workspace.run("plan", "job.json", "--check-model", "--json").ok().out)
    assert plan["model_check"]["batch"] == 4
    assert 0 < plan["model_check"]["batch_seconds"] < 60


def test_command_line_options_override_input_and_output(workspace: Workspace) -> None:
    folder = workspace.folder / "elsewhere"
    folder.mkdir()
    write_zarr(folder / "other.zarr", random_volume((16, 16)))
    options = ("-i", "elsewhere/other.zarr", "-o", "elsewhere/result.zarr")
    plan = json.loads(workspace.call("plan", "job.json", *options, "--json").ok().out)
    assert plan["volume"] == [16, 16]
    workspace.call("produce", "job.json", *options).ok()
    assert (folder / "result.zarr.chunkq" / "job.json").exists()
    assert not workspace.output.exists()


def test_a_job_file_can_be_named_like_the_config_of_spinn(workspace: Workspace) -> None:
    expected = workspace.call("plan", workspace.job_file, "--json").ok().out
    assert workspace.call("plan", "-c", workspace.job_file, "--json").ok().out == expected


@pytest.mark.parametrize("command", ["run", "plan", "produce"])
@pytest.mark.parametrize("files", [(), ("job.yaml", "-c", "job.yaml")])
def test_a_command_needs_exactly_one_job_file(
    workspace: Workspace, command: str, files: tuple[str, ...]
) -> None:
    assert workspace.job_file.name == "job.yaml"
    assert workspace.call(command, *files).code == 2


def test_yaml_json_and_a_mapping_define_the_same_job(workspace: Workspace) -> None:
    text = (workspace.folder / "job.json").read_text()
    (workspace.folder / "job.yaml").write_text(yaml.safe_dump(json.loads(text)))
    mapping = {
        **workspace.values,
        "input": str(workspace.folder / "in.zarr"),
        "output": str(workspace.output),
    }
    jobs = [load_job(workspace.folder / name) for name in ("job.json", "job.yaml")]
    assert jobs[0] == jobs[1] == load_job(mapping)
    assert jobs[0].input == (str(workspace.folder / "in.zarr"),)


def test_the_schema_is_valid_and_rejects_invalid_jobs(workspace: Workspace) -> None:
    schema = json.loads(workspace.call("schema").ok().out)
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    job = json.loads((workspace.folder / "job.json").read_text())
    assert list(validator(schema).iter_errors(job)) == []
    for mistake in ({"stride": [4]}, {"chunksize": [0]}, {"combine": "sofd"}):
        assert list(validator(schema).iter_errors(job | mistake)), mistake


def test_the_schema_accepts_the_template(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.call("init").ok()
    schema = json.loads(workspace.call("schema").ok().out)
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    jsonschema.validate(job, schema)


def test_status_shows_a_sealed_job_as_json_and_text(sealed: Workspace) -> None:
    status = json.loads(sealed.call("status", "out.zarr", "--json").ok().out)
    assert status["output"] == str(sealed.output)
    assert (status["chunks"], status["done"], status["sealed"]) == (6, 6, True)
    assert (status["running"], status["queued"], status["failed"]) == (0, 0, 0)
    assert status["blocks_finalized"] == status["blocks_to_finalize"] == 5
    assert status["failures"] == []
    [worker] = status["workers"]
    assert worker["recent_chunks"] == 6
    assert abs(sum(worker["stage_shares"].values()) - 1) < 1e-9
    text = sealed.call("status", "out.zarr").ok().out
    assert "6/6 chunks done" in text
    assert "\x1b" not in text


def test_watching_a_sealed_job_in_a_log_prints_one_plain_line_and_ends(
    sealed: Workspace,
) -> None:
    text = sealed.run("status", "out.zarr", "--watch").ok().out
    [line] = text.splitlines()
    assert "6/6 chunks done, 5/5 blocks finalized" in line
    assert line.endswith("complete")
    assert line.isprintable()
    text = sealed.call("status", "out.zarr", "--watch", "--json").ok().out
    assert json.loads(text)["sealed"] is True


def test_status_of_a_new_job_shows_the_queued_chunks(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (status["done"], status["queued"], status["sealed"]) == (0, 6, False)
    assert status["voxels_per_second"] is None
    assert status["seconds_left"] is None
    assert status["workers"] == []
    assert "0/6 chunks done, 6 queued" in workspace.call("status", "out.zarr").ok().out


def test_status_of_an_interrupted_job_says_that_no_chunk_is_running(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline(only={(0, 0)}.__contains__)
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert status["patches_per_second"] > 0
    assert (status["is_idle"], status["seconds_left"]) == (True, None)
    assert "no chunk is running" in workspace.call("status", "out.zarr").ok().out
    queue = SqliteExecutor(f"sqlite://{workspace.queue_file}")
    assert queue.reserve(WorkerOptions("busy")) is not None
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert not status["is_idle"]
    assert status["seconds_left"] > 0
    queue.close()


def test_status_without_a_reachable_queue_shows_the_figures_of_the_ledger(
    workspace: Workspace,
) -> None:
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline(only={(0, 0)}.__contains__)
    result = workspace.call(
        "status", "out.zarr", "--json", "--queue", "sqlite:///proc/none/queue.db"
    )
    status = json.loads(result.ok().out)
    assert (status["done"], status["queued"]) == (1, None)
    assert "/proc/none" in status["queue_problem"]


def test_commands_accept_the_job_folder_instead_of_the_output(sealed: Workspace) -> None:
    status = json.loads(sealed.call("status", "out.zarr.chunkq", "--json").ok().out)
    assert status["done"] == 6
    assert json.loads(sealed.call("status", "out.zarr/", "--json").ok().out) == status


@pytest.mark.parametrize("command", ["status", "finalize", "retry", "cancel"])
def test_commands_report_an_output_without_a_job(workspace: Workspace, command: str) -> None:
    result = workspace.call(command, "nothing.zarr")
    if command == "cancel":  # the queue may contain a job whose folder was deleted
        assert result.ok().out.startswith("no chunk of this job is on the queue")
        return
    result.refused(2, ErrorCode.JOB_MISSING, "nothing.zarr", "chunkq produce")


def test_jobs_lists_every_job_on_the_queue_and_cancel_removes_one(workspace: Workspace) -> None:
    assert workspace.call("jobs").ok().out == "no job has chunks on this queue\n"
    assert json.loads(workspace.call("jobs", "--json").ok().out) == []
    workspace.call("produce", "job.json").ok()
    workspace.call("produce", "job.json", "-o", "second.zarr").ok()
    listing = workspace.call("jobs").ok().out
    assert f"{workspace.output}: 6 queued, 0 running, 0 failed" in listing
    assert f"{workspace.folder}/second.zarr: 6 queued" in listing
    assert workspace.call("status").ok().out == listing
    rows = json.loads(workspace.call("jobs", "--json").ok().out)
    assert {row["output"] for row in rows} == {
        str(workspace.output),
        f"{workspace.folder}/second.zarr",
    }
    assert workspace.call("cancel", "out.zarr").ok().out.startswith("6 chunks taken off the queue")
    assert str(workspace.output) not in workspace.call("jobs").ok().out
    assert "6 newly queued" in workspace.call("produce", "job.json", "--resume").ok().out


def test_status_suggests_a_command_for_chunks_that_are_on_no_queue(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    assert "next:" not in workspace.call("status", "out.zarr").ok().out
    workspace.call("cancel", "out.zarr").ok()
    text = " ".join(workspace.call("status", "out.zarr").ok().out.split())
    suggestion = text.partition("next: ")[2]
    assert "`chunkq run`" in suggestion
    assert "`chunkq produce`" in suggestion
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert (status["lost_from_queue"], status["seconds_left"]) == (True, None)


@pytest.mark.parametrize("command", ["status", "finalize", "report", "retry", "cancel"])
def test_a_job_file_in_place_of_an_output_is_reported(workspace: Workspace, command: str) -> None:
    workspace.call(command, "job.json").refused(
        2, ErrorCode.JOB_MISSING, "job.json: found a job file"
    )


def test_retry_queues_only_failed_chunks(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    assert workspace.call("retry", "out.zarr").ok().out == "no failed chunk\n"
    queue = SqliteExecutor(f"sqlite://{workspace.queue_file}")
    for _ in range(3):
        lease = queue.reserve(WorkerOptions("unlucky"))
        assert lease is not None
        queue.nack(lease, ValueError("unlucky"))
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert status["failed"] + status["queued"] == 6
    queue.close()


def test_a_job_with_a_changed_checkpoint_is_a_different_job(workspace: Workspace) -> None:
    checkpoint = workspace.folder / "weights.pt"
    torch.save({}, checkpoint)
    workspace.write_job(model={"runtime": "torch", "checkpoint": "weights.pt"})
    workspace.call("produce", "job.json").ok()
    torch.save({"more": torch.zeros(1)}, checkpoint)
    workspace.call("produce", "job.json").refused(
        2, ErrorCode.OUTPUT_OF_OTHER_JOB, "content of model_config.checkpoint"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_text(workspace: Workspace, command: str) -> None:
    text = workspace.call(command, "--help").ok().out
    assert text.startswith(f"Usage: chunkq {command} ")
    assert len(text.splitlines()) > 4
    assert workspace.call(command, "-h").ok().out == text


def test_help_imports_no_large_package() -> None:
    packages = (
        "torch zarr tensorstore redis numpy pydantic fsspec s3fs importlib.metadata asyncio "
        "chunkq_worker chunkq_producer"
    )
    code = (
        "import sys\n"
        "from chunkq.cli import main\n"
        "sys.argv = ['chunkq', '--help']\n"
        "code = main()\n"
        f"print('IMPORTED', [n for n in {packages.split()} if n in sys.modules], code)\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    *lines, last_line = completed.stdout.splitlines()
    assert last_line == "IMPORTED [] 0"
    for name in COMMANDS:
        assert any(line.strip().startswith(f"{name} ") for line in lines), name


NOT_FOR_STATUS = (
    "chunkq_worker PIL psutil click.shell_completion chunkq.job.output chunkq.job.known_empty "
    "chunkq.blend.weights chunkq.images.image_list chunkq.images.decoding "
    "chunkq.writers.base chunkq.writers.zarr chunkq.job.exports chunkq.storage.formats.zarr "
    "chunkq.storage.formats.zarr_writing chunkq.storage.staged chunkq.storage.claims "
    "chunkq.storage.formats.nifti chunkq.storage.formats.tiff"
)


@pytest.mark.parametrize(
    ("line", "packages"),
    [
        (
            "plan job.json",
            "torch zarr redis rich s3fs fsspec tifffile nibabel h5py array_api_compat pyarrow PIL "
            "chunkq_worker chunkq.writers.base chunkq.storage.formats.nifti chunkq.model_check "
            "chunkq.storage.formats.tiff chunkq.storage.formats.hdf5 chunkq.stages.completion",
        ),
        (
            "status out.zarr",
            f"torch zarr tensorstore redis array_api_compat pyarrow yaml {NOT_FOR_STATUS}",
        ),
        (
            "jobs",
            "torch zarr tensorstore redis numpy pydantic importlib.metadata asyncio chunkq_worker",
        ),
        (
            "work --burst --gpus none",
            "torch zarr tensorstore redis numpy pydantic importlib.metadata asyncio "
            "chunkq_producer",
        ),
    ],
)
def test_a_command_imports_no_large_package_that_it_does_not_need(
    workspace: Workspace, line: str, packages: str
) -> None:
    workspace.call("produce", "job.json").ok()
    workspace.call("cancel", "out.zarr").ok()  # so that `work` ends at once
    code = (
        "import sys\n"
        "from chunkq.cli import main\n"
        f"sys.argv = ['chunkq', *{line!r}.split()]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    modules = [n for n in {packages.split()} if n in sys.modules]\n"
        "    print('IMPORTED', modules, file=sys.stderr)\n"
    )
    completed = python(workspace, code)
    assert completed.stderr.splitlines()[-1] == "IMPORTED []"


def test_commands_that_run_no_network_do_not_import_torch(workspace: Workspace) -> None:
    lines = ["plan job.json", "produce job.json", "status out.zarr", "finalize out.zarr"]
    lines += ["retry out.zarr", "cancel out.zarr", "jobs", "schema"]
    code = (
        "import sys\n"
        "from chunkq.cli import main\n"
        f"for line in {lines!r}:\n"
        "    sys.argv = ['chunkq', *line.split()]\n"
        "    print(line, main(), 'torch' in sys.modules, file=sys.stderr)\n"
    )
    completed = python(workspace, code)
    codes = dict.fromkeys(lines, 0) | {"finalize out.zarr": 3}
    printed = [line for line in completed.stderr.splitlines() if not line.startswith("chunkq: ")]
    assert printed == [f"{line} {code} False" for line, code in codes.items()]


def test_a_misspelled_command_is_an_error_with_a_suggestion(workspace: Workspace) -> None:
    result = workspace.call("finalise", "out.zarr")
    assert result.code == 2
    assert "'finalise'" in result.err
    assert "did you mean 'finalize'?" in result.err


@pytest.mark.parametrize(
    "command",
    [("plan",), ("produce",), ("finalize",), ("work", "--workers", "0"), ("status", "--x")],
)
def test_a_usage_error_has_exit_code_2(workspace: Workspace, command: tuple[str, ...]) -> None:
    result = workspace.call(*command)
    assert result.code == 2
    assert "Traceback" not in result.err


HIDDEN_EXTRAS = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(EXTRAS)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
from chunkq.cli import main
"""
"""Code after which the packages of all extras are missing."""


def test_every_command_shows_its_help_without_any_extra() -> None:
    code = (
        f"{HIDDEN_EXTRAS}\n"
        f"for name in {list(COMMANDS)}:\n"
        "    sys.argv = ['chunkq', name, '--help']\n"
        "    print('EXIT', name, main())\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    exits = [line for line in completed.stdout.splitlines() if line.startswith("EXIT")]
    assert exits == [f"EXIT {name} 0" for name in COMMANDS]
    assert completed.stderr == ""


@pytest.mark.parametrize("missing", ["redis", "rq"])
def test_a_redis_server_without_its_extra_ends_with_the_line_of_other_commands(
    tmp_path: Path, missing: str
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from chunkq.cli import main\n"
        f"sys.argv = ['chunkq', 'redis', '--folder', {str(tmp_path / 'redis')!r}]\n"
        "print(main())\n"
        "sys.argv = ['chunkq', 'jobs', '--queue', 'redis://127.0.0.1:1']\n"
        "print(main())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.split() == ["1", "1"]
    line, other = result.stderr.splitlines()
    assert line == other
    assert line.endswith(f"{missing}; run `{install_command('redis')}` [package_missing]")
    assert not (tmp_path / "redis").exists()


def test_explain_describes_a_key(workspace: Workspace) -> None:
    text = workspace.call("explain", "strides").ok().out
    for part in ("strides\n", "list of integers > 0", "voxels", "strides: [32, 32, 32]"):
        assert part in text


def test_explain_without_a_key_lists_all_keys_in_groups(workspace: Workspace) -> None:
    lines = workspace.call("explain").ok().out.splitlines()
    for entry in key_reference.all_keys():
        assert any(line.startswith(f"  {entry.path.rpartition('.')[2]} ") for line in lines)
    assert "Patches" in lines


def test_explain_reports_an_unknown_key_with_the_nearest_ones(workspace: Workspace) -> None:
    workspace.call("explain", "stridse").refused(2, ErrorCode.JOB_INVALID, "stridse: ", "strides?")


def test_the_template_names_a_schema_that_exists_and_accepts_it(tmp_path: Path) -> None:
    Workspace(tmp_path).call("init").ok()
    text = (tmp_path / "job.yaml").read_text()
    comment = text.splitlines()[0]
    url = comment.removeprefix("# yaml-language-server: $schema=")
    assert url != comment
    assert " " not in url
    schema = json.loads(Path(unquote(urlsplit(url).path)).read_text())
    jsonschema.validate(yaml.safe_load(text), schema)


SHELLS = {"bash": ".bashrc", "zsh": ".zshrc", "fish": ""}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_installed_once(tmp_path: Path, shell: str) -> None:
    environment = {"HOME": str(tmp_path), "SHELL": f"/usr/bin/{shell}"}
    workspace = Workspace(tmp_path, environment=environment)
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        workspace.environment[variable] = ""
    startup = tmp_path / SHELLS[shell] if SHELLS[shell] else None
    if startup is not None:
        startup.write_text("# without a line end")
    script = Path(workspace.call("completion", "install").ok().out.split()[1].rstrip(";"))
    assert script.read_text() == workspace.call("completion", "show").ok().out
    assert "_CHUNKQ_COMPLETE" in script.read_text()
    before = everything_below(tmp_path)
    workspace.call("completion", "install").ok()
    assert everything_below(tmp_path) == before
    if startup is not None:
        assert startup.read_text() == f"# without a line end\n. {script}\n"


def test_completion_without_a_known_shell_asks_for_one(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, environment={"HOME": str(tmp_path), "SHELL": "/bin/sh"})
    workspace.call("completion", "install").refused(2, ErrorCode.JOB_INVALID, "--shell: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("chunkq expl", {"plain,explain"}),
        ("chunkq explain stri", {"plain,strides"}),
        ("chunkq explain model_config.max", {"plain,model_config.max_batch_size"}),
        ("chunkq plan jo", {"file,jo"}),
        ("chunkq status la", {"dir,la"}),
    ],
)
def test_shells_complete_commands_keys_and_files(
    tmp_path: Path, words: str, expected: set[str]
) -> None:
    environment = {
        "_CHUNKQ_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    result = Workspace(tmp_path).run(**environment)
    assert set(result.out.split()) == expected


@pytest.mark.parametrize("value", ["soon", "", "h", "1.5h", "-5"])
def test_an_invalid_time_is_refused(workspace: Workspace, value: str) -> None:
    workspace.call("work", "--burst", "--max-time", value).refused(
        2, ErrorCode.JOB_INVALID, "--max-time", repr(value)
    )


def test_a_gpu_that_is_not_visible_is_refused(workspace: Workspace) -> None:
    workspace.environment["CUDA_VISIBLE_DEVICES"] = ""
    workspace.call("work", "--gpus", "3").refused(2, ErrorCode.JOB_INVALID, "--gpus: ", "'3'")


def test_running_a_finished_job_again_changes_nothing(sealed: Workspace) -> None:
    commits, values = sealed.commits(), read_output(sealed.output)
    result = sealed.run("run", "job.json", "--gpus", "none").ok()
    assert "complete: " in result.out
    assert "--overwrite" in result.err  # the note that nothing was left to compute
    assert sealed.commits() == commits
    np.testing.assert_array_equal(read_output(sealed.output), values)


def test_version_prints_the_program_name(workspace: Workspace) -> None:
    assert workspace.call("--version").ok().out.startswith("chunkq, version ")


@pytest.mark.parametrize("name", ["statistics", "logging", "tensorstore", "chunkq_worker"])
def test_a_file_beside_the_job_that_is_named_like_a_module_is_not_imported(
    workspace: Workspace, name: str
) -> None:
    (workspace.folder / f"{name}.py").write_text("raise SystemExit('not the library')\n")
    command = [Path(sys.executable).with_name("chunkq"), "run", "job.yaml", "-w", "1"]
    assert workspace.job_file.name == "job.yaml"
    result = subprocess.run(
        command, cwd=workspace.folder, env=workspace.process_env, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
