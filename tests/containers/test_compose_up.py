"""Run the compose file with a container engine that has its images: `make containers`."""

import http.client
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.harness.compose import make_stack
from tests.harness.files import files_below
from tests.harness.networks import toy_model
from tests.harness.servers.redis import free_port
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace


@contextmanager
def polled_health() -> Iterator[None]:
    """Request the health check of Redis every second: podman leaves that to systemd."""
    address, ended = os.environ.get("DOCKER_HOST", ""), threading.Event()

    def poll() -> None:
        while address.startswith("unix://") and not ended.wait(1):
            connection = http.client.HTTPConnection("engine", timeout=5)
            connection.sock = socket.socket(socket.AF_UNIX)
            with suppress(OSError, http.client.HTTPException):
                connection.sock.connect(address.removeprefix("unix://"))
                name = f"chunkq-test-{os.getpid()}-redis-1"
                connection.request("GET", f"/v4.0.0/libpod/containers/{name}/healthcheck")
                connection.getresponse().read()
            connection.close()

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_job_in_containers_gives_the_same_bytes_as_without(tmp_path: Path) -> None:
    stack = make_stack(tmp_path)
    data = Path(stack.settings["CHUNKQ_DATA"])
    stack.settings.update(
        CHUNKQ_UID=str(os.getuid() or 1234),
        CHUNKQ_GID=str(os.getgid() or 1234),
        CHUNKQ_PORT=str(free_port()),
        CHUNKQ_WORKERS="2",
    )
    write_zarr(data / "in.zarr", random_volume((48, 40, 36)), (16, 16, 16))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [4, 4, 4],
        "chunksize": [16, 16, 16],
        "storage_chunks": [8, 8, 8],
        "threads": 1,
        "model_config": toy_model(data, (8, 8, 8), scale=100.0),
    }
    workspace = Workspace(data, values)
    workspace.write_job()
    workspace.run("run", "job.json", "--gpus", "none").ok()
    expected = files_below(workspace.output)
    for path in (workspace.output, workspace.job_folder):
        path.rename(stack.folder / path.name)
    # Containers with another user id need access to the test's folders.
    for path in [data, *data.rglob("*")]:
        os.chown(path, int(stack.settings["CHUNKQ_UID"]), int(stack.settings["CHUNKQ_GID"]))
    try:
        with polled_health():
            result = stack.call("cpu", "run", "--rm", "finalizer")
        output = result.stdout + result.stderr + stack.call("cpu", "logs").stdout
        assert result.returncode == 0, output
        assert "complete: " in output
        assert "s3cr3t" not in output
    finally:
        stack.call("cpu", "down", "--volumes")
    assert files_below(workspace.output) == expected
    assert {path.stat().st_uid for path in workspace.output.rglob("*")} == {
        int(stack.settings["CHUNKQ_UID"])
    }
