"""The messages on the page "When something goes wrong" are those that the program prints.

Each scenario brings the failure of one section about and returns what the user then sees.
"""

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from redis.exceptions import ResponseError

import chunkq
from chunkq.create import check_job, create_job
from chunkq.finalize import finalize_job
from chunkq.job.job_reading import load_job
from chunkq.queue import registry
from chunkq.queue.backends.rq.connect import connect, outages_of
from chunkq.system import gpus
from tests.harness.documents import code_blocks, settled
from tests.harness.photos import photo_job, write_photos
from tests.harness.workspace import Workspace, run_tasks

PAGE = "docs/troubleshooting.md"
QUICK = json.dumps({"early_deaths": 1, "restart_delay": 0})
"""Settings with which a supervisor gives up after the first process that ends early."""
IDENTITY = "def net(batch):\n    return batch\n"


def workspace_with(folder: Path, network: str = IDENTITY, **model: Any) -> Workspace:
    """A job of four chunks over 64 voxels, with bands, and a network written in NumPy."""
    np.save(folder / "volume.npy", np.arange(64, dtype="uint8"))
    (folder / "net.py").write_text(f"import os, time\nimport numpy as np\n\n{network}")
    values = {
        "input": "volume.npy",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4],
        "chunksize": [16],
        "storage_chunks": [4],
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": "net.py",
            "class_name": "net",
            "model_input_shape": [8],
            **model,
        },
    }
    return Workspace(folder, values, {"COLUMNS": "200"})


def messages(text: str) -> str:
    """Return the lines of a worker that chunkq itself writes, without the first and the last."""
    lines = [line for line in text.splitlines(True) if line.startswith("chunkq: ")]
    return "".join(
        line for line in lines if "Ctrl-C to stop" not in line and "giving up" not in line
    )


def in_python(function: Callable[[], object]) -> str:
    """Return the message of the error that a call raises, as a command prints it."""
    with pytest.raises(chunkq.ChunkqError) as caught:
        function()
    return f"chunkq: {caught.value} [{caught.value.code}]\n"


def predict(workspace: Workspace) -> str:
    """Return the message of a network that cannot be used."""
    with chunkq.Predictor.from_config(workspace.write_job()) as predictor:
        return in_python(lambda: predictor.predict(str(workspace.folder / "volume.npy")))


def worked(workspace: Workspace, *options: str) -> str:
    workspace.produce()
    return messages(workspace.work(*options, CHUNKQ_WORKER_SETTINGS=QUICK).err)


def job_file_is_wrong(folder: Path) -> str:
    workspace = workspace_with(folder)
    return workspace.call("plan", workspace.write_job(stride=[4], strides=None)).err


def no_gpu(folder: Path) -> str:
    workspace = workspace_with(folder, runtime="torch", device="cuda")
    workspace.environment["CUDA_VISIBLE_DEVICES"] = ""
    return workspace.call("run", workspace.job_file).err


def queue_is_away(folder: Path) -> str:
    workspace = workspace_with(folder)
    error = workspace.call("produce", workspace.job_file, "--queue", "redis://127.0.0.1:1/0").err
    return error.replace("127.0.0.1:1", "127.0.0.1:6379")


def chunks_failed(folder: Path) -> str:
    network = "def net(batch):\n    return np.where(batch > 60, np.nan, batch)\n"
    workspace = workspace_with(folder, network)
    workspace.produce()
    workspace.compute_inline()
    shown = workspace.call("status", workspace.output).ok().out
    # No queue was involved, so the chunks that are done are still on it.
    part = shown[shown.index("failed 1") : shown.index("no chunk is running")]
    return "".join(line.rstrip() + "\n" for line in part.splitlines())


def all_fail_alike(folder: Path) -> str:
    network = "def net(batch):\n    if batch.any():\n        raise RuntimeError('no weights')\n"
    workspace = workspace_with(folder, f"{network}    return batch\n")
    workspace.values["chunksize"] = [8]
    return worked(workspace, "--depth", "1")


def shapes_differ(folder: Path) -> str:
    return predict(workspace_with(folder, "def net(batch):\n    return batch[:, 1:-1]\n"))


def untrusted(folder: Path) -> str:
    import torch

    torch.save(torch.nn.Identity(), folder / "model.pt")
    model = {"runtime": "torch", "type": "file", "model_file": "model.pt"}
    return predict(workspace_with(folder, **model, class_file=None, class_name=None))


def random_weights(folder: Path) -> str:
    workspace = workspace_with(folder, runtime="torch", class_name="Net")
    code = "import torch\n\n\nclass Net(torch.nn.Conv1d):\n    def __init__(self):\n"
    (folder / "net.py").write_text(f"{code}        super().__init__(1, 1, 3, padding=1)\n")
    workspace.values["model_config"]["model_input_shape"] = [1, 8]
    return predict(workspace)


def labels(folder: Path) -> str:
    network = "def net(batch):\n    return (batch // 20).astype('int64')\n"
    return predict(workspace_with(folder, network))


def dtype_too_small(folder: Path) -> str:
    network = "def net(batch):\n    return batch.astype('float32')\n"
    workspace = workspace_with(folder, network, dtype="int8")
    np.save(folder / "volume.npy", np.arange(64, dtype="uint8") * 4)
    return workspace.call("run", workspace.job_file).err


def out_of_memory(folder: Path) -> str:
    return predict(workspace_with(folder, "def net(batch):\n    raise MemoryError('no room')\n"))


def worker_killed(folder: Path) -> str:
    workspace = workspace_with(folder, "def net(batch):\n    os.kill(os.getpid(), 9)\n")
    return worked(workspace, "--depth", "1")


def hung(folder: Path) -> str:
    workspace = workspace_with(folder, "def net(batch):\n    time.sleep(3600)\n")
    return worked(workspace, "--time-limit", "1s", "--depth", "1")


def other_job(folder: Path) -> str:
    workspace = workspace_with(folder)
    workspace.produce()
    return workspace.call("produce", workspace.write_job(combine="hard")).err


def record_damaged(folder: Path) -> str:
    workspace = workspace_with(folder)
    workspace.produce()
    record = workspace.job_folder / "job.json"
    record.write_text(record.read_text().replace('"chunksize"', '"chunksizes"'))
    return workspace.call("status", workspace.output).err


def results_lost(folder: Path) -> str:
    workspace = workspace_with(folder)
    workspace.produce()
    workspace.compute_inline()
    min(workspace.pieces()).unlink()
    return workspace.finalize().err.replace(workspace.epoch_folder.name, "c74214dc")


def images_failed(folder: Path) -> str:
    write_photos(folder)
    job = create_job(check_job(load_job(photo_job(folder, max_errors=2))))
    run_tasks(job)
    message = in_python(lambda: finalize_job(job, worker="inline"))
    return message.replace(job.record.epoch, "c74214dc")


def incomplete(folder: Path) -> str:
    workspace = workspace_with(folder)
    workspace.produce()
    workspace.compute_inline(lambda index: index != (2,))
    return workspace.finalize().err


def forgotten(folder: Path) -> str:
    workspace = workspace_with(folder)
    workspace.produce()
    workspace.queue_file.unlink()
    shown = workspace.call("status", workspace.output).ok().out
    return " ".join(shown[shown.index("some chunks") :].split()) + "\n"


def input_changed(folder: Path) -> str:
    workspace = workspace_with(folder)
    workspace.produce()
    np.save(folder / "volume.npy", np.arange(128, dtype="uint8"))
    return workspace.call("finalize", workspace.output, "--allow-missing").err


def not_allowed(folder: Path) -> str:
    return worked(workspace_with(folder), "--allow", "/srv/jobs")


def killed_while_loading(folder: Path) -> str:
    workspace = workspace_with(folder, "os.kill(os.getpid(), 9)\n" + IDENTITY)
    return worked(workspace, "--depth", "1")


def outside_slurm(folder: Path) -> str:
    workspace = workspace_with(folder)
    workspace.environment["CHUNKQ_QUEUE"] = "dask://"
    return workspace.call("run", workspace.write_job(cluster="slurm"), "-e", "dask").err


def other_ray_cluster(folder: Path) -> str:
    workspace = workspace_with(folder)
    with mock.patch.dict(os.environ, RAY_ADDRESS="127.0.0.1:1"):
        return workspace.call("produce", workspace.job_file, "--queue", "ray://auto").err


def foreign_address(folder: Path) -> str:
    workspace = workspace_with(folder)
    return workspace.call("produce", workspace.job_file, "--queue", "tls://node1:8786").err


def homeless(folder: Path) -> str:
    with (
        mock.patch.dict(os.environ),
        mock.patch("pwd.getpwuid", side_effect=KeyError),
        mock.patch("os.getuid", return_value=12345),
    ):
        for name in ("HOME", "XDG_STATE_HOME"):
            os.environ.pop(name, None)
        return in_python(registry.default_url)


def logged(call: Callable[[], object]) -> str:
    """Return what a call logs."""
    with io.StringIO() as stream:
        handler = logging.StreamHandler(stream)
        logging.getLogger("chunkq").addHandler(handler)
        try:
            call()
        finally:
            logging.getLogger("chunkq").removeHandler(handler)
        return stream.getvalue()


def silent_driver(folder: Path) -> str:
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    paths = os.pathsep.join([str(folder), os.environ["PATH"]])
    with mock.patch.dict(os.environ, PATH=paths), mock.patch.object(gpus, "TOOL_SECONDS", 0.1):
        os.environ.pop(gpus.VISIBLE, None)
        return logged(gpus.visible_gpus)


def refusing_redis(folder: Path) -> str:
    refusal = ResponseError("MISCONF Errors writing to the AOF file: No space left on device")
    refusals = iter([refusal, refusal])

    def request() -> None:
        for error in refusals:
            raise error

    url = "redis://127.0.0.1:6379/0"
    retry = connect(url, patient=True).get_retry()

    def send() -> None:
        with outages_of(url).request():
            retry.call_with_retry(request, lambda error: None)

    return logged(send)


def interrupted(folder: Path) -> str:
    workspace = workspace_with(folder)
    with mock.patch("chunkq_producer.runner.run_job", side_effect=KeyboardInterrupt):
        return workspace.call("run", workspace.job_file).err


SCENARIOS: dict[str, Callable[[Path], str]] = {
    "The job file is refused": job_file_is_wrong,
    "This machine has no GPU": no_gpu,
    "The queue cannot be reached": queue_is_away,
    "Chunks failed: NaN in the predictions": chunks_failed,
    "Every chunk fails with the same cause": all_fail_alike,
    "The network does not fit its declaration": shapes_differ,
    "The model file is refused as untrusted": untrusted,
    "The weights are random": random_weights,
    "The network returns labels": labels,
    "Values do not fit the dtype": dtype_too_small,
    "Out of memory": out_of_memory,
    "A worker process is killed": worker_killed,
    "A chunk hangs": hung,
    "The output belongs to another job": other_job,
    "The job record is damaged": record_damaged,
    "Results are lost": results_lost,
    "Images have no result": images_failed,
    "Chunks are missing": incomplete,
    "A command was interrupted": interrupted,
    "Redis does not answer, or refuses writes": refusing_redis,
    "The queue was lost": forgotten,
    "The input was replaced or is gone": input_changed,
    "A worker refuses a job": not_allowed,
    "A worker dies while it loads the network": killed_while_loading,
    "The command is not part of an allocation": outside_slurm,
    "The address is that of another cluster": other_ray_cluster,
    "The address has the form of another program": foreign_address,
    "The user has no home folder": homeless,
    "The driver of the GPUs does not answer": silent_driver,
}


@pytest.mark.parametrize("heading", SCENARIOS)
def test_a_message_of_the_page_is_what_the_program_prints(heading: str, tmp_path: Path) -> None:
    expected = next(
        block.text
        for block in code_blocks(PAGE)
        if block.heading == heading and block.language == "text"
    )
    printed = SCENARIOS[heading](tmp_path).replace(str(tmp_path), "/data")
    assert settled(printed) == settled(expected)
