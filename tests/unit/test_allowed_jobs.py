"""Jobs that a worker with `--allow` accepts: `docs/security.md`, "Code that a worker runs"."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunkq_worker.commands.work import _lost_jobs
from chunkq_worker.device import Device, waits_for_device
from chunkq_worker.run_task import record_failure, run_task

from chunkq.create import check_job, create_job
from chunkq.errors import ErrorCode, JobError, MissingJobError, ModelError
from chunkq.job.allowed_paths import (
    ALLOW_VARIABLE,
    PACKAGES_VARIABLE,
    AllowedPaths,
    allowed_job_path,
    with_allowed_files,
)
from chunkq.job.job_file import Job
from chunkq.job.job_folder import RECORD, JobFolder
from chunkq.job.job_parsing import parse_job
from chunkq.job.job_reading import load_job
from chunkq.job.ledger import ItemLedger
from chunkq.job.model_config import ModelConfig
from chunkq.job.record import JobRecord
from chunkq.job.tasks import JobId, Task
from chunkq.job.user_code import load_names
from chunkq.queue.contract.executor import Attempt, TaskCounts
from chunkq.storage import documents

NETWORK = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
{imports}
class Net:
    def __init__(self, gain=1):
        self.gain = gain
    def __call__(self, batch):
        return batch * self.gain
"""
STEPS = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
def preprocessing(batch):
    return batch
"""
WEIGHTS = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
def blend(shape):
    return [1.0] * shape[0]
"""


def allow(monkeypatch: pytest.MonkeyPatch, *prefixes: str | Path) -> None:
    monkeypatch.setenv(ALLOW_VARIABLE, "\n".join(map(str, prefixes)))


def epoch_of(job: str | Path) -> str:
    """Return the epoch of a job folder; any epoch if it does not exist."""
    record = Path(job) / RECORD
    values = documents.decode(record.read_bytes()) if record.exists() else None
    return "0a1b2c3d" if values is None else str(values["epoch"])


def run(job: str | Path, kind: str = "infer") -> None:
    run_task(Task(kind, str(job), epoch_of(job), 0, (0,)), Attempt(1, "worker"))


def refused(job: str | Path, kind: str = "infer") -> JobError:
    """Run a task of a job that the worker must reject, and return the error."""
    with pytest.raises(JobError) as error:
        run(job, kind)
    assert len(str(error.value).splitlines()) == 1
    return error.value


def ledger(job: Path) -> ItemLedger:
    folder = JobFolder(str(job))
    return folder.ledger(folder.require_record().epoch).item(0)


def is_accepted(job: str | Path) -> bool:
    """Return whether a worker opens this job folder, which does not exist."""
    try:
        run(job)
    except MissingJobError:
        return True
    except JobError as error:
        return error.code not in (ErrorCode.PATH_INVALID, ErrorCode.PATH_NOT_ALLOWED)
    return False


@pytest.fixture
def modules() -> Iterator[None]:
    before, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


class Lab:
    """Jobs over eight voxels with files in two folders: `team` is allowed, `other` is not."""

    def __init__(self, root: Path) -> None:
        self.team, self.other = root / "team", root / "other"
        for folder in (self.team, self.other):
            folder.mkdir()
        np.save(self.other / "in.npy", np.ones(8, np.float32))
        (self.team / "net.py").write_text(NETWORK.format(imports=""))

    def produce(self, folder: Path | None = None, **changes: Any) -> Path:
        """Produce a job, delete the markers of code that ran, and return the job folder."""
        model = {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(self.team / "net.py"),
            "class_name": "Net",
            "model_input_shape": [4],
        }
        output = (folder or self.team) / "out.zarr"
        values = {"input": str(self.other / "in.npy"), "output": str(output), "chunksize": [8]}
        values |= {"model_config": model | changes.pop("model", {})} | changes
        create_job(check_job(load_job(values)))
        for marker in self.ran():
            marker.unlink()
        return Path(f"{output}.chunkq")

    def ran(self) -> list[Path]:
        """Return the markers of the files whose code ran."""
        return [*self.team.rglob("ran"), *self.other.rglob("ran")]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: None) -> Lab:
    lab = Lab(tmp_path)
    allow(monkeypatch, lab.team)
    return lab


# ----------------------------------------------------------------------------- the job folder


@pytest.mark.parametrize("allowed", ["team", "team/", "other/../team", "link", "team//."])
def test_only_jobs_below_the_allowed_folders_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    for folder in ("team/brain", "scratch", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("team")
    (tmp_path / "team" / "outwards").symlink_to(tmp_path / "other")
    allow(monkeypatch, tmp_path / "scratch", f"{tmp_path}/{allowed}")
    for folder in ("team", "team/brain", "scratch", "link/brain", "team/not-there"):
        assert is_accepted(tmp_path / folder / "out.zarr.chunkq"), folder
    for folder in ("team2", "other", "", "team/outwards", "link/outwards", "team/outwards/x"):
        assert not is_accepted(tmp_path / folder / "out.zarr.chunkq"), folder


@pytest.mark.parametrize("kind", ["infer", "finalize"])
@pytest.mark.parametrize(
    "spelling",
    [
        "{team}/../other/out.zarr.chunkq",
        "file://{team}/../other/out.zarr.chunkq",
        "FILE://{team}/../other/out.zarr.chunkq",
        "local://{team}/../other/out.zarr.chunkq",
        "file:{team}/../other/out.zarr.chunkq",
        "file://{other}/out.zarr.chunkq",
        "simplecache::file://{other}/out.zarr.chunkq",
        "filecache::file://{team}/../other/out.zarr.chunkq",
        "simplecache::local://{other}/out.zarr.chunkq",
        "dir::file://{other}/out.zarr.chunkq",
        "{team}/%2e%2e/other/out.zarr.chunkq",
        "file://{team}/%2e%2e/other/out.zarr.chunkq",
        "../other/out.zarr.chunkq",
        "other/out.zarr.chunkq",
        "{other}/out.zarr.chunkq",
        "{other}//out.zarr.chunkq",
        "/{other}/out.zarr.chunkq",
        "{team}/x\0/../../other/out.zarr.chunkq",
        "{other}/out.zarr.chunkq/",
        "{other}/out.zarr.chunkq/.",
    ],
)
def test_no_spelling_of_a_path_escapes_the_allowed_folders(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, spelling: str, kind: str
) -> None:
    (lab.other / "net.py").write_text(NETWORK.format(imports=""))
    lab.produce(lab.other, model={"class_file": str(lab.other / "net.py")})
    monkeypatch.chdir(lab.team)
    with pytest.raises((JobError, MissingJobError)):
        run(spelling.format(team=lab.team, other=lab.other), kind)
    assert lab.ran() == []


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        ("s3://bucket/a", ["s3://bucket/a/o", "s3://bucket/a/b/o"], ["s3://bucket/ab/o"]),
        ("s3://bucket/a/", ["s3://bucket/a/o"], ["s3://bucket/o", "s3://bucket-a/o"]),
        ("s3://bucket", ["s3://bucket/o"], ["s3://bucket2/o", "s3://BUCKET/o", "gs://bucket/o"]),
        ("S3://bucket//a/../b", ["s3://bucket/b/o"], ["s3://bucket/a/o", "s3://bucket/a/../b/o"]),
        ("s3://b/a", [], ["s3://b/a/../c/o", "s3://b/../c/o", "s3://b/a//o", "s3://b/a/./o"]),
        ("s3://b/a", [], ["S3://b/a/o", "s3://b/a/o?x=1", "s3://b/a/o#x", "s3://b/a\\..\\o"]),
        ("s3://b/a", [], ["filecache::s3://b/a/o", "s3://b/a/%2e%2e/c/o", "/b/a/o", "b/a/o"]),
        ("https://HOST/a", ["https://host/a/o"], ["http://host/a/o", "https://host:81/a/o"]),
        ("https://host/a", [], ["https://host@evil/a/o", "https://me:pw@host/a/o"]),
        ("memory://a", ["memory://a/o"], ["memory://ab/o", "memory:///a/o", "memory://o"]),
        ("memory://", ["memory://a/o"], ["/a/o", "s3://a/o"]),
        ("s3://bucket/a", [], [f"{os.getcwd()}/s3:/bucket/a/o"]),
        ("/", ["/data/o"], ["s3://data/o", "memory://data/o", "file:///data/o"]),
        ("/data/\u00e9", ["/data/\u00e9/o"], ["/data/e\u0301/o", "/data/\u00c9/o"]),
    ],
)
def test_prefixes_are_compared_by_whole_path_components(
    monkeypatch: pytest.MonkeyPatch, prefix: str, inside: list[str], outside: list[str]
) -> None:
    allow(monkeypatch, prefix)
    for path in inside:
        assert allowed_job_path(f"{path}.chunkq") == f"{path}.chunkq"
    for path in outside:
        with pytest.raises(JobError) as error:
            allowed_job_path(f"{path}.chunkq")
        assert error.value.code in (ErrorCode.PATH_INVALID, ErrorCode.PATH_NOT_ALLOWED)


def test_the_error_has_the_path_its_target_and_the_folder_to_allow(lab: Lab) -> None:
    (lab.team / "out.zarr.chunkq").symlink_to(lab.other / "x.zarr.chunkq")
    error = refused(lab.team / "out.zarr.chunkq")
    assert error.code == ErrorCode.PATH_NOT_ALLOWED
    assert f"{lab.team}/out.zarr.chunkq -> {lab.other}/x.zarr.chunkq" in str(error)
    assert f"--allow {lab.other} " in str(error)


def test_the_error_masks_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, "ftp://me:hush@host/a")
    assert "hush" not in str(refused("ftp://me:hush@host/b/out.zarr.chunkq"))


def test_an_output_outside_the_allowed_folders_is_rejected(lab: Lab) -> None:
    job = lab.produce()
    (lab.team / "out.zarr").rename(lab.other / "out.zarr")
    (lab.team / "out.zarr").symlink_to(lab.other / "out.zarr")
    error = refused(job)
    assert error.code == ErrorCode.PATH_NOT_ALLOWED
    assert f"output {job.with_suffix('')} -> {lab.other}/out.zarr" in str(error)
    assert lab.ran() == []


def test_a_worker_opens_the_checked_path_even_if_a_link_outside_changes(
    lab: Lab,
) -> None:
    link = lab.other / "link"
    with (lab.team / "net.py").open("a") as file:  # runs between the check and the commit
        file.write(f"link = Path({str(link)!r}); link.unlink(); link.symlink_to('/nowhere')\n")
    job = lab.produce()
    link.symlink_to(lab.team)
    alias = link / job.name
    assert allowed_job_path(str(alias)) == str(job)
    run(alias)
    assert os.readlink(link) == "/nowhere"
    assert ledger(job).is_committed("infer", (0,))
    link.unlink()
    link.symlink_to(lab.team)
    # The class file is also opened below the allowed folder, not through the link.
    record = JobFolder(str(job)).require_record()
    through_link = record.job.with_files({"model_config.class_file": f"{link}/net.py"})
    assert with_allowed_files(through_link, str(job)).model.class_file == f"{lab.team}/net.py"


def test_waiting_tasks_and_failures_are_recorded_for_the_resolved_job_folder(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lab.produce()
    (lab.other / "link").symlink_to(lab.team)
    task = Task("infer", f"{lab.other}/link/{job.name}", epoch_of(job), 0, (0,))
    device = Device()
    device._waiting.add(replace(task, job=str(job)))
    monkeypatch.setattr("chunkq_worker.device._device", device)
    assert waits_for_device(task)
    record_failure(task, Attempt(1, "worker"), ValueError("broken"))
    assert [failure.message for failure in ledger(job).failures(["infer"])] == [
        "ValueError: broken"
    ]


def test_no_failure_is_recorded_for_a_rejected_job(lab: Lab) -> None:
    task = Task("infer", f"{lab.other}/out.zarr.chunkq", "0a1b2c3d", 0, (0,))
    record_failure(task, Attempt(1, "worker"), ValueError("broken"))
    assert not waits_for_device(task)
    assert not (lab.other / "out.zarr.chunkq").exists()


# ------------------------------------------------------------------------ files of a job


def test_a_job_with_allowed_files_runs_with_an_input_outside(lab: Lab) -> None:
    (lab.team / "kwargs.py").write_text("kwargs = {'gain': 2}")
    (lab.team / "steps.py").write_text(STEPS)
    job = lab.produce(model={"kwargs_file": str(lab.team / "kwargs.py")})
    run(job)
    assert ledger(job).is_committed("infer", (0,))
    assert lab.ran() == [lab.team / "ran"]


KEYS = {
    "class_file": {"type": "class", "class_name": "Net"},
    "kwargs_file": {"type": "class", "class_file": "{team}/net.py", "class_name": "Net"},
    "checkpoint": {"type": "class", "class_file": "{team}/net.py", "class_name": "Net"},
    "processing_steps": {"type": "torchscript", "ts_file": "{team}/net.py"},
    "ts_file": {"type": "torchscript"},
    "model_file": {"type": "file"},
    "json_file": {"type": "json", "runtime": "tensorflow"},
}
"""Keys of model_config with a file, and the other keys that they need."""


def test_all_keys_with_files_are_tested() -> None:
    keys = {name for name in ModelConfig.model_fields if name.endswith("_file")}
    assert keys | {"checkpoint", "processing_steps"} == KEYS.keys()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "location",
    [
        "outside",
        "link",
        "link from outside",
        "relative",
        "url",
        "dots",
        "url dots",
        "encoded",
        "chained",
    ],
)
def test_every_file_that_a_job_loads_must_be_allowed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, key: str, location: str
) -> None:
    allow(monkeypatch, lab.team, "s3://bucket/a", "https://host/a")
    monkeypatch.chdir(lab.team)
    (lab.other / "file").touch()
    (lab.team / "link").symlink_to(lab.other / "file")
    # Users who can write to `other` can redirect this link.
    (lab.other / "link").symlink_to(lab.team / "net.py")
    path = {
        "outside": f"{lab.other}/file",
        "link": f"{lab.team}/link",
        "link from outside": f"{lab.other}/link",
        "relative": "net.py",
        "url": "s3://bucket/file",
        "url dots": "s3://bucket/a/../file",
        "encoded": "https://host/a/%2e%2e/file",
        "dots": f"{lab.team}/../other/file",
        "chained": f"simplecache::file://{lab.team}/net.py",
    }[location]
    model = {k: v.format(team=lab.team) for k, v in KEYS[key].items()}
    model = {"runtime": "torch", "model_input_shape": [8], **model, key: path}
    job = parse_job({"input": "/in.npy", "output": "/out.zarr", "model_config": model})
    with pytest.raises(JobError) as error:
        with_allowed_files(job, f"{lab.team}/out.zarr.chunkq")
    assert error.value.code == ErrorCode.PATH_NOT_ALLOWED
    assert f"model_config.{key} {path}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    inside = job.with_files({f"model_config.{key}": f"{lab.team}/net.py"})
    assert with_allowed_files(inside, f"{lab.team}/out.zarr.chunkq") == inside


CODE = {
    "class_file": NETWORK.format(imports=""),
    "kwargs_file": f"{WEIGHTS}\nkwargs = {{}}",
    "processing_steps": STEPS,
}


@pytest.mark.parametrize("kind", ["infer", "finalize"])
@pytest.mark.parametrize("key", CODE)
def test_no_code_outside_the_allowed_folders_runs(lab: Lab, key: str, kind: str) -> None:
    (lab.other / "code.py").write_text(CODE[key])
    job = lab.produce(model={key: str(lab.other / "code.py")})
    error = refused(job, kind)
    assert error.code == ErrorCode.PATH_NOT_ALLOWED
    assert f"model_config.{key} {lab.other}/code.py" in str(error)
    assert f"--allow {lab.other} " in str(error)
    assert lab.ran() == []
    assert ledger(job).failures(["infer"]) == []  # the job is rejected, but no chunk has failed


@pytest.mark.parametrize("kind", ["infer", "finalize"])
def test_no_weight_function_outside_the_allowed_folders_runs(lab: Lab, kind: str) -> None:
    (lab.other / "weights.py").write_text(WEIGHTS)
    job = lab.produce(weight_function=[str(lab.other / "weights.py"), "blend"])
    error = refused(job, kind)
    assert error.code == ErrorCode.PATH_NOT_ALLOWED
    assert f"weight_function {lab.other}/weights.py" in str(error)
    assert lab.ran() == []


def test_files_in_a_second_allowed_folder_are_accepted(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab.other / "net.py").write_text(NETWORK.format(imports=""))
    job = lab.produce(model={"class_file": str(lab.other / "net.py")})
    assert refused(job).code == ErrorCode.PATH_NOT_ALLOWED
    allow(monkeypatch, lab.team, lab.other)
    run(job)
    assert lab.ran() == [lab.other / "ran"]


def test_a_file_that_is_replaced_by_a_link_after_the_first_chunk_is_rejected(lab: Lab) -> None:
    job = lab.produce()
    run(job)
    (lab.team / "net.py").rename(lab.other / "net.py")
    (lab.team / "net.py").symlink_to(lab.other / "net.py")
    assert refused(job).code == ErrorCode.PATH_NOT_ALLOWED


@pytest.mark.parametrize("name", ["variables/weights", "assets"])
def test_every_file_in_the_folder_of_a_model_must_be_allowed(lab: Lab, name: str) -> None:
    (lab.team / "saved" / "variables").mkdir(parents=True)
    (lab.team / "saved" / "saved_model.pb").touch()
    model = {"runtime": "tensorflow", "type": "file", "model_file": f"{lab.team}/saved"}
    values = {"input": "/in.npy", "output": "/out.zarr"}
    job = parse_job({**values, "model_config": {**model, "model_input_shape": [8]}})
    assert with_allowed_files(job, "/out.zarr.chunkq") == job
    (lab.team / "saved" / name).symlink_to(lab.other)
    with pytest.raises(JobError, match=name) as error:
        with_allowed_files(job, "/out.zarr.chunkq")
    assert error.value.code == ErrorCode.PATH_NOT_ALLOWED


def test_every_file_of_a_tensorflow_checkpoint_must_be_allowed(lab: Lab) -> None:
    for suffix in ("index", "data-00000-of-00001"):
        (lab.team / f"model.{suffix}").touch()
    model = {"runtime": "tensorflow", "type": "class", "checkpoint": f"{lab.team}/model"}
    model |= {"class_file": f"{lab.team}/net.py", "class_name": "Net"}
    values = {"input": "/in.npy", "output": "/out.zarr"}
    job = parse_job({**values, "model_config": {**model, "model_input_shape": [8]}})
    assert with_allowed_files(job, "/out.zarr.chunkq") == job
    (lab.team / "model.index").unlink()
    (lab.team / "model.index").symlink_to(lab.other / "in.npy")
    with pytest.raises(JobError, match=r"checkpoint .*model\.index") as error:
        with_allowed_files(job, "/out.zarr.chunkq")
    assert error.value.code == ErrorCode.PATH_NOT_ALLOWED


def test_a_class_file_may_import_sibling_modules_unless_they_are_outside(lab: Lab) -> None:
    (lab.team / "net.py").write_text(NETWORK.format(imports="import sibling_net, inside.more"))
    (lab.team / "sibling_net.py").touch()
    (lab.team / "inside").mkdir()
    (lab.team / "inside" / "more.py").touch()
    key, path = "model_config.class_file", str(lab.team / "net.py")
    assert "Net" in load_names(path, key)
    for name in ("sibling_net.py", "inside/more.py"):
        target = (lab.team / name).rename(lab.other / "target.py")
        target.write_text("from pathlib import Path; Path(__file__).with_name('ran').touch()")
        (lab.team / name).symlink_to(target)
        with pytest.raises(JobError) as error:
            load_names(path, key)
        assert error.value.code == ErrorCode.PATH_NOT_ALLOWED
        assert str(error.value).startswith(f"{key}: {path} ")
        (lab.team / name).unlink()
        (lab.team / name).touch()
    assert lab.ran() == [lab.team / "ran"]


def test_an_installed_package_inside_the_folder_is_not_a_sibling_module(lab: Lab) -> None:
    (lab.other / "linked_package.py").touch()
    packages = lab.team / "env" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "linked_package.py").symlink_to(lab.other / "linked_package.py")
    sys.path.append(str(packages))
    (lab.team / "net.py").write_text("import linked_package")
    assert "linked_package" in load_names(str(lab.team / "net.py"), "model_config.class_file")


# ------------------------------------------------------------------------------ prefixes


def test_without_allow_a_worker_runs_any_job_in_canonical_form(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ALLOW_VARIABLE)
    (lab.other / "net.py").write_text(NETWORK.format(imports=""))
    job = lab.produce(lab.other, model={"class_file": str(lab.other / "net.py")})
    assert refused(f"file://{job}").code == ErrorCode.PATH_INVALID
    assert lab.ran() == []
    run(job)
    assert lab.ran() == [lab.other / "ran"]


@pytest.mark.parametrize(
    "text", ["\n", " ", "s3://", "s3:///a", "s3://b/../c", "team", ".", "a\n/b"]
)
def test_an_invalid_prefix_rejects_every_job(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    job = lab.produce()
    allow(monkeypatch, text)
    monkeypatch.chdir(lab.team)
    error = refused(job)
    assert error.code == ErrorCode.PATH_INVALID
    assert str(error).startswith(f"{ALLOW_VARIABLE}: ")
    assert lab.ran() == []


def test_an_empty_variable_allows_all_paths_and_empty_lines_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allow(monkeypatch, "")
    assert AllowedPaths.from_environment() is None
    allow(monkeypatch, "/a", "", "s3://b/", "")
    assert AllowedPaths.from_environment() == AllowedPaths(("/a", "s3://b"))


def test_relative_prefixes_of_the_option_are_relative_to_the_working_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ALLOW_VARIABLE, "")
    home = os.path.expanduser("~")
    AllowedPaths.parse([".", "a/../b", "~/c", "file:///d"], Path("/base")).to_environment()
    expected = AllowedPaths(("/base", "/base/b", f"{home}/c", "/d"))
    assert AllowedPaths.from_environment() == expected
    allow(monkeypatch, "jobs")
    assert AllowedPaths.from_environment(Path("/base")) == AllowedPaths(("/base/jobs",))


@pytest.mark.parametrize("prefix", ["", " ", "s3://", "/a\n/", "s3://b/../c", "dir::file:///a"])
def test_an_invalid_option_is_rejected(prefix: str) -> None:
    with pytest.raises(JobError, match=r"^--allow: ") as error:
        AllowedPaths.parse([prefix], Path("/base"))
    assert error.value.code == ErrorCode.PATH_INVALID


def of_package(name: str) -> Job:
    model = {
        "runtime": "numpy",
        "type": "class",
        "class_name": name,
        "model_input_shape": [8],
    }
    return parse_job({"input": "/team/in.zarr", "output": "/team/out.zarr", "model_config": model})


@pytest.mark.parametrize(
    ("packages", "is_allowed"),
    [
        ("", False),
        ("scipy", False),
        ("scipy\nnumpy", True),
        ("num", False),  # whole names are compared
    ],
)
def test_a_job_imports_a_package_only_if_it_is_named(
    monkeypatch: pytest.MonkeyPatch, packages: str, is_allowed: bool
) -> None:
    job = of_package("numpy.linalg.norm")
    monkeypatch.setenv(PACKAGES_VARIABLE, packages)
    monkeypatch.setenv(ALLOW_VARIABLE, "")
    assert with_allowed_files(job, "/team/out.zarr.chunkq") == job
    monkeypatch.setenv(ALLOW_VARIABLE, "/team")
    if is_allowed:
        assert with_allowed_files(job, "/team/out.zarr.chunkq") == job
        return
    with pytest.raises(JobError, match="--allow-package numpy") as error:
        with_allowed_files(job, "/team/out.zarr.chunkq")
    assert error.value.code == ErrorCode.PATH_NOT_ALLOWED
    assert "numpy.linalg.norm" in str(error.value)


def test_each_option_replaces_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_VARIABLE, "/env")
    monkeypatch.setenv(PACKAGES_VARIABLE, "monai")
    base = Path("/base")
    for paths, packages, expected in (
        ([], [], AllowedPaths(("/env",), ("monai",))),
        (["jobs"], [], AllowedPaths(("/base/jobs",), ("monai",))),
        ([], ["timm"], AllowedPaths(("/env",), ("timm",))),
        (["jobs"], ["timm", "torch"], AllowedPaths(("/base/jobs",), ("timm", "torch"))),
    ):
        allowed = AllowedPaths.from_options(paths, packages, base)
        assert allowed == expected
        with monkeypatch.context() as inner:
            inner.setenv(ALLOW_VARIABLE, "")
            inner.setenv(PACKAGES_VARIABLE, "")
            allowed.to_environment()  # as worker processes get it
            assert AllowedPaths.from_environment() == expected


def test_packages_without_paths_and_names_of_modules_are_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ALLOW_VARIABLE, "")
    assert AllowedPaths.from_options([], [], Path("/")) is None
    with pytest.raises(JobError, match=r"^--allow-package: monai, but without --allow"):
        AllowedPaths.from_options([], ["monai"], Path("/"))
    with pytest.raises(JobError, match=r"^--allow-package: monai\.networks "):
        AllowedPaths.from_options(["/a"], ["monai.networks"], Path("/"))


def test_a_full_name_needs_no_class_file_but_another_name_does() -> None:
    assert of_package("numpy.linalg.norm").model.class_package == "numpy"
    for name in ("norm", ".norm", "numpy.", "a b.c"):
        with pytest.raises(JobError, match=r"^model_config\.class_file: missing"):
            of_package(name)


def test_the_digest_of_a_job_does_not_depend_on_the_allowed_paths(lab: Lab) -> None:
    job = lab.produce()
    before = json.loads((job / "job.json").read_text())
    run(job)
    record = JobFolder(str(job)).require_record()
    assert record.digest == before["digest"]


def test_the_network_is_loaded_from_the_path_that_was_checked(lab: Lab) -> None:
    (lab.team / "net.py").unlink()
    job_file = lab.team / "net.py"
    job_file.write_text("raise ValueError(__file__)")
    (lab.other / "link").symlink_to(lab.team)
    job = lab.produce(model={"class_file": f"{lab.other}/link/net.py"})
    with pytest.raises(ModelError, match=f"ValueError: {job_file}$"):
        run(job)


def test_a_rejected_job_is_not_opened_to_report_a_lost_queue(lab: Lab) -> None:
    inside, outside = str(lab.produce()), str(lab.produce(lab.other))
    paths = (inside, outside, f"file://{inside}")
    before = {JobId(path, epoch_of(inside)): TaskCounts(queued=1) for path in paths}
    before[JobId(inside, "ffffffff")] = TaskCounts(queued=1)  # replaced
    (output,) = _lost_jobs(before, {})
    assert output == f"{lab.team}/out.zarr"


@pytest.mark.parametrize("name", ["../../other/x", "/x", "a/../../x", "..", "", "a//x"])
@pytest.mark.parametrize("key", ["array", "epoch", "metadata"])
def test_a_record_cannot_contain_names_outside_its_output_and_job_folder(
    lab: Lab, key: str, name: str
) -> None:
    job = lab.produce()
    record = JobFolder(str(job)).require_record()
    changed = replace(record, **{key: {name: "{}"} if key == "metadata" else name})
    assert JobRecord.from_json(record.to_json()) == record
    if (key, name) == ("epoch", ""):
        return  # a record that is not stored yet has no epoch
    (job / "job.json").write_bytes(changed.to_json())
    assert refused(job).code == ErrorCode.JOB_RECORD_DAMAGED
    assert lab.ran() == []
