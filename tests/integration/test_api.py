"""Python API: commands are functions, and the names of the package."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chunkq
from chunkq.errors import (
    ChunkqError,
    ErrorCode,
    IncompleteError,
    JobError,
    MissingJobError,
    StoreError,
)
from tests.harness.documents import code_block
from tests.harness.predictor_job import CHUNKS, POISONED, SHAPE, keys, save_script
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace

README = "README.md"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (8, 8, 8))
    values = keys(tmp_path) | {"input": str(tmp_path / "in.zarr")}
    workspace = Workspace(tmp_path, values | {"output": str(tmp_path / "out.zarr")})
    for name in [name for name in os.environ if name.startswith("CHUNKQ")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CHUNKQ_QUEUE", f"sqlite://{workspace.queue_file}")
    return workspace


def test_produce_status_and_finalize_are_functions_that_print_nothing(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[int, int]] = []
    result = chunkq.produce(workspace.values, progress=lambda *step: steps.append(step))
    assert (result.chunks, result.done, result.queued) == (CHUNKS, 0, CHUNKS)
    assert steps == [(0, CHUNKS), (CHUNKS, CHUNKS)]
    status = chunkq.status(str(workspace.output))
    assert (status.chunks, status.done, status.queued) == (CHUNKS, 0, CHUNKS)
    assert not status.sealed
    with pytest.raises(IncompleteError) as caught:
        chunkq.finalize(workspace.output)
    assert caught.value.code is ErrorCode.JOB_INCOMPLETE
    assert len(caught.value.missing) == CHUNKS
    workspace.compute_inline()
    report = chunkq.finalize(workspace.output)
    assert (report["chunks"], report["missing"]) == (CHUNKS, [])
    status = chunkq.status(workspace.output)
    assert (status.done, status.sealed) == (CHUNKS, True)
    assert status.blocks_finalized == status.blocks_to_finalize > 0
    assert chunkq.produce(workspace.write_job()).queued == 0
    with chunkq.Predictor.from_config(workspace.values) as predictor:
        np.testing.assert_array_equal(
            predictor.predict(workspace.folder / "in.zarr").probabilities,
            read_output(workspace.output),
        )
    assert capfd.readouterr() == ("", "")


def test_plans_and_reports_are_objects_of_one_line(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = chunkq.plan(workspace.values)
    assert not workspace.job_folder.exists()
    assert (plan.chunks, plan.warnings) == (CHUNKS, ())
    printed = json.loads(workspace.call("plan", workspace.write_job(), "--json").ok().out)
    assert plan.as_dict() == printed
    assert all(label in plan._repr_html_() for label, _ in plan.rows())
    chunkq.produce(workspace.values)
    assert not chunkq.report(workspace.output).sealed
    workspace.compute_inline()
    finished = chunkq.finalize(workspace.output)
    report, status = chunkq.report(workspace.output), chunkq.status(workspace.output)
    assert f"{CHUNKS}/{CHUNKS} chunks done" in repr(status)
    assert (report.sealed, report.timing.patches) == (True, plan.patches)
    assert report.as_dict()["conclusion"] == finished["conclusion"]
    for result in (plan, finished, report):
        text = repr(result)
        assert str(plan.patches) in text
        assert len(text) < 400
        assert str(plan.patches) in result._repr_html_()
    assert capfd.readouterr() == ("", "")


def test_functions_raise_the_errors_that_commands_print(workspace: Workspace) -> None:
    for function in (chunkq.status, chunkq.finalize, chunkq.report):
        with pytest.raises(MissingJobError, match=r"out\.zarr") as missing_job:
            function(workspace.output)
        assert missing_job.value.code is ErrorCode.JOB_MISSING
    for function in (chunkq.produce, chunkq.run, chunkq.plan):
        with pytest.raises(StoreError, match=r"^input: .*gone\.zarr"):
            function(workspace.values, input=workspace.folder / "gone.zarr")
        with pytest.raises(JobError, match=r"gone\.yaml: "):
            function(workspace.folder / "gone.yaml")
    with pytest.raises(JobError, match=r"--resume.*--overwrite"):
        chunkq.produce(workspace.values, resume=True, overwrite=True)
    with pytest.raises(JobError, match="amqp://x"):
        chunkq.produce(workspace.values, queue="amqp://x", output=workspace.folder / "other.zarr")
    chunkq.produce(workspace.values)
    status = chunkq.status(workspace.output, queue=f"sqlite://{workspace.folder}/in.zarr")
    assert (status.queued, status.chunks) == (None, CHUNKS)
    assert status.queue_problem is not None


def test_run_stops_on_ctrl_c_and_continues_with_the_same_call_in_another_thread(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupts: list[int] = []

    def interrupt(status: Any) -> None:
        if not interrupts:
            interrupts.append(status.done)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(ChunkqError) as caught:
        chunkq.run(workspace.values, progress=interrupt)
    assert caught.value.code is ErrorCode.INTERRUPTED
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before

    statuses: list[Any] = []
    threads: set[str] = set()

    def record(status: Any) -> None:
        statuses.append(status)
        threads.add(threading.current_thread().name)

    # Signals are forwarded only in the main thread.
    with ThreadPoolExecutor(1, thread_name_prefix="caller") as pool:
        report = pool.submit(chunkq.run, workspace.values, workers=2, progress=record).result()
    assert (report["chunks"], report["missing"]) == (CHUNKS, [])
    assert report["patches"] == report["planned_patches"]
    assert statuses[-1].done == CHUNKS
    assert threads == {"caller_0"}
    with chunkq.Predictor.from_config(workspace.values) as predictor:
        np.testing.assert_array_equal(
            predictor.predict(workspace.folder / "in.zarr").probabilities,
            read_output(workspace.output),
        )
    assert capfd.readouterr() == ("", "")


def test_run_adds_the_causes_of_failed_chunks_as_notes(workspace: Workspace) -> None:
    volume = random_volume(SHAPE)
    volume[16, 13, 18] = 255
    write_zarr(workspace.folder / "marked.zarr", volume, (8, 8, 8))
    model = keys(workspace.folder, POISONED)["model_config"]
    with pytest.raises(IncompleteError) as caught:
        chunkq.run(
            {**workspace.values, "model_config": model}, input=workspace.folder / "marked.zarr"
        )
    assert caught.value.missing
    assert any("NaN" in note for note in caught.value.__notes__)


def test_importing_chunkq_imports_no_large_package(tmp_path: Path) -> None:
    script = (
        "import sys, chunkq; "
        "print(*sorted({n.partition('.')[0] for n in sys.modules} & {'numpy', 'torch', 'zarr', "
        "'pydantic', 'click', 'rich', 'chunkq_worker', 'chunkq_producer'}))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert completed.stdout.strip() == ""


def test_the_names_of_the_package_match_its_type_stub() -> None:
    stub = ast.parse(Path(chunkq.__file__).with_suffix(".pyi").read_text())
    typed = {
        alias.asname
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert typed == set(chunkq.API)
    for name in chunkq.API:
        assert getattr(chunkq, name).__name__ == name
        assert name in dir(chunkq)
        assert getattr(chunkq, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'predict'"):
        chunkq.predict  # type: ignore[attr-defined]  # noqa: B018


def test_a_module_with_the_same_name_does_not_hide_a_function() -> None:
    script = (
        "import chunkq.finalize; import chunkq; from chunkq.finalize import finalize_job; "
        "from chunkq.plan.plan import Plan; assert chunkq.plan.__name__ == 'plan', chunkq.plan; "
        "assert chunkq.finalize.__module__ == 'chunkq_producer.api', chunkq.finalize"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


README_NETWORK = """
import torch


class UNet(torch.nn.Conv3d):
    def __init__(self):
        super().__init__(1, 3, 1)
"""


def test_the_example_in_the_readme_runs_unchanged(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace.folder / "readme"
    folder.mkdir()
    volume = random_volume((192, 64, 64))
    write_zarr(folder / "volume.zarr", volume, (32, 32, 32))
    save_script(folder / "model.ts")
    (folder / "net.py").write_text(README_NETWORK)
    torch.save(torch.nn.Conv3d(1, 3, 1).state_dict(), folder / "unet.pt")
    (folder / "job.yaml").write_text(code_block(README, "Your own job", "yaml"))
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(compile(code_block(README, "From Python", "python"), README, "exec"), names)
    assert names["prediction"].labels.shape == volume.shape
    assert (folder / "segmented.png").read_bytes().startswith(b"\x89PNG")
    probabilities = read_output(folder / "probabilities.zarr")
    np.testing.assert_array_equal(probabilities, names["prediction"].probabilities)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    assert names["report"]["missing"] == []
    assert read_output(folder / "labels.zarr").shape == volume.shape
    assert len(capsys.readouterr().out.splitlines()) > 1
    shutil.rmtree(folder)
