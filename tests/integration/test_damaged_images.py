"""Jobs over thousands of images, 1 % damaged: the table of a plain loop, whatever is killed."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import s3fs

from tests.harness.image_files import DAMAGES, ListedImage, generated_images
from tests.harness.image_job import (
    BATCH,
    CHUNK,
    TIME,
    ImageWorkspace,
    assert_expected,
    job_values,
    reference,
    write_list,
    write_local,
    write_network,
)
from tests.harness.processes import RunningCommand, is_alive
from tests.harness.servers.moto import moto_server
from tests.harness.servers.redis import redis_server
from tests.harness.workspace import run_inline
from tests.image_reference import Result

FEW, MANY = 1000, 10_000
LEASES = '{"lease": 2, "same_signal": 0, "early_death": 0}'
"""Seconds. The defaults are too long for a test."""
Tables = tuple[bytes, bytes]


@dataclass(frozen=True)
class Images:
    """Generated images and what is known about them.

    source    path of their list
    network   folder of the network
    codes     code of the error of each path, in the order of the list
    expected  what a plain loop finds
    """

    source: str
    network: Path
    codes: dict[str, str | None]
    expected: Result
    environment: dict[str, str]

    def workspace(self, folder: Path, url: str | None = None) -> ImageWorkspace:
        folder.mkdir()
        values = job_values(self.network, self.source)
        return ImageWorkspace(folder, values, self.environment, url, images=self.network)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Local files."""
    folder = tmp_path_factory.mktemp("images")
    write_network(folder / "network")
    images = generated_images(FEW, len(DAMAGES))
    codes = write_local(folder / "files", images)
    write_list(folder / "list.csv", codes)
    contents = readable(images, codes)
    expected = reference(codes, contents)
    return Images(str(folder / "list.csv"), folder / "network", codes, expected, {})


def readable(images: list[ListedImage], codes: dict[str, str | None]) -> dict[str, bytes]:
    """Return the contents of the files that can be read, by their path in the list."""
    return {
        path: image.content
        for image, (path, code) in zip(images, codes.items(), strict=True)
        if image.content is not None and code != "image_missing"
    }


@pytest.fixture(scope="module")
def computed_inline(few: Images, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Both tables of the job over the local files, made without a queue, once compared."""
    folder = tmp_path_factory.mktemp("inline")
    _, report = run_inline(job_values(few.network, few.source, output=str(folder / "out.parquet")))
    output, errors = folder / "out.parquet", Path(report["images"]["errors"])
    assert_expected(output, errors, few.codes, few.expected)
    return output.read_bytes(), errors.read_bytes()


def test_the_table_is_that_of_a_plain_loop_and_the_errors_are_the_damaged_images(
    computed_inline: Tables, few: Images
) -> None:
    # The comparison is in the fixture, whose tables other tests compare with.
    assert len(few.expected.scores) + len(few.expected.unreadable) == FEW
    assert len(few.expected.unreadable) == sum(code is not None for code in few.codes.values())


def test_a_killed_worker_and_a_killed_run_change_no_byte_and_lose_no_chunk(
    few: Images, computed_inline: Tables, tmp_path: Path
) -> None:
    workspace = few.workspace(tmp_path / "killed")
    workspace.stop_at("forward", 2)
    with workspace.start("run", workspace.job_file, "-w", "3", "--gpus", "none") as run:
        os.kill(workspace.wait_until_stopped(run), signal.SIGKILL)
        workspace.stop_at("export")
        assert workspace.wait_until_stopped(run) == run.pid
        assert not (workspace.epoch_folder / "sealed.json").exists()
        run.kill()
    before = workspace.computed()
    workspace.run("run", workspace.job_file, "-w", "1", "--gpus", "none").ok()
    assert workspace.tables() == computed_inline
    assert workspace.computed() == before
    assert sum(before.values()) <= len(few.expected.scores) + 3 * CHUNK


# ------------------------------------------------------------------------- ten thousand on S3


def s3_environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def write_bucket(endpoint: str, images: list[ListedImage]) -> dict[str, str | None]:
    """Write images into a bucket; return the code of the error of each URL, in their order.

    An image without permission is in a bucket that does not exist, and a folder with an image's
    name is a key that other keys begin with.
    """
    filesystem = s3fs.S3FileSystem(
        endpoint_url=endpoint, key="key", secret="secret", skip_instance_cache=True
    )
    filesystem.mkdir("lab")
    objects, codes = dict[str, bytes](), dict[str, str | None]()
    for image in images:
        bucket = {"permission": "s3://nobody", "trick": "nothing://lab"}.get(
            image.damage, "s3://lab/images"
        )
        url = f"{bucket}/{image.name}"
        codes[url] = DAMAGES[image.damage].code if image.damage else None
        if image.damage == "folder":
            objects[f"{url}/inner.txt"] = b"text"
        elif image.content is not None and bucket == "s3://lab/images":
            objects[url] = image.content
    filesystem.pipe(objects)
    return codes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """Objects in a bucket."""
    folder = tmp_path_factory.mktemp("many")
    write_network(folder / "network")
    images = generated_images(MANY, MANY // 100)
    with moto_server() as endpoint:
        codes = write_bucket(endpoint, images)
        write_list(folder / "list.csv", codes)
        expected = reference(codes, readable(images, codes))
        environment = s3_environment(endpoint)
        yield Images(str(folder / "list.csv"), folder / "network", codes, expected, environment)


@pytest.fixture(scope="module")
def undisturbed(many: Images, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Both tables of one worker that nothing disturbs, once compared."""
    workspace = many.workspace(tmp_path_factory.mktemp("undisturbed") / "job")
    workspace.run("run", workspace.job_file, "-w", "1", "--gpus", "none", timeout=TIME).ok()
    assert_expected(workspace.output, workspace.errors, many.codes, many.expected)
    assert_computed_once(workspace, many, workers=1)
    return workspace.tables()


def assert_computed_once(workspace: ImageWorkspace, images: Images, workers: int) -> None:
    """Assert that no image is computed twice but those of the first batch of each process.

    That one is repeated, to find networks that are random.
    """
    computed = workspace.computed()
    assert len(computed) == len(images.expected.scores)
    assert set(computed.values()) <= {1, 2}
    assert computed.total() - len(computed) <= workers * BATCH


@contextmanager
def queue_url(name: str) -> Iterator[str | None]:
    """Yield the URL of an empty queue; None is the embedded one of a workspace."""
    if name == "sqlite":
        yield None
    else:
        with redis_server() as server:
            yield server.url


def kill_worker(command: RunningCommand, worker: int) -> None:
    """Kill a worker process. The command goes on."""
    os.kill(worker, signal.SIGKILL)


def kill_parent(command: RunningCommand, worker: int) -> None:
    """Kill the command alone. Its processes end with it, and so does one that hangs."""
    command.children()
    os.kill(command.pid, signal.SIGKILL)
    command.process.wait()
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    command.wait_for_children()


STEPS = ("load", "forward", "piece", "commit")


@pytest.mark.proof("images")
@pytest.mark.timeout(4 * TIME)
@pytest.mark.parametrize("queue", ["sqlite", "redis"])
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    many: Images, undisturbed: Tables, tmp_path: Path, queue: str, workers: int
) -> None:
    with queue_url(queue) as url:
        workspace = many.workspace(tmp_path / "job", url)
        workspace.call("produce", workspace.job_file).ok()
        with workspace.start("work", "--burst", "-w", str(workers), "--gpus", "none") as command:
            assert command.wait(TIME).code == 0
        workspace.call("finalize", workspace.output).ok()
    assert workspace.tables() == undisturbed
    assert_computed_once(workspace, many, workers)


@pytest.mark.proof("images")
@pytest.mark.timeout(4 * TIME)
@pytest.mark.parametrize("queue", ["sqlite", "redis"])
@pytest.mark.parametrize("victim", ["worker", "supervisor", "run"])
def test_kills_at_each_step_change_no_byte_and_lose_no_chunk(
    many: Images, undisturbed: Tables, tmp_path: Path, queue: str, victim: str
) -> None:
    with queue_url(queue) as url:
        environment = many.environment | {"CHUNKQ_WORKER_SETTINGS": LEASES}
        workspace = replace(many, environment=environment).workspace(tmp_path / "job", url)
        run = ("run", str(workspace.job_file), "-w", "3", "--gpus", "none")
        command = run
        if victim == "supervisor":
            workspace.call("produce", workspace.job_file).ok()
            command = ("work", "--burst", "-w", "3", "--gpus", "none")
        kept = disturb(workspace, command, kill_worker if victim == "worker" else kill_parent)
        with workspace.start(*run) as last:
            code = last.wait(TIME).code
        if code == 3:  # chunks that were in flight at three kills have no attempt left
            workspace.call("retry", workspace.output).ok()
            with workspace.start(*run) as last:
                code = last.wait(TIME).code
        assert code == 0
    assert kept.items() <= workspace.done().items()
    assert workspace.tables() == undisturbed
    computed = workspace.computed()
    assert len(computed) == len(many.expected.scores)
    # Each kill loses the chunks that were in flight, of three processes if their parent was killed.
    depth, processes = 3, 1 if victim == "worker" else 3
    assert computed.total() - len(computed) <= len(STEPS) * depth * processes * CHUNK


def disturb(
    workspace: ImageWorkspace,
    arguments: tuple[str, ...],
    kill: Callable[[RunningCommand, int], None],
) -> dict[str, tuple[bytes, int]]:
    """Kill a command or its workers at each step; return the commit records at the last one."""
    kept = {}
    with ExitStack() as stack:
        command = None
        for number, step in enumerate(STEPS):
            workspace.stop_at(step, 10 * number)
            if command is None or not is_alive(command.pid):
                command = stack.enter_context(workspace.start(*arguments))
            kill(command, workspace.wait_until_stopped(command))
            kept = workspace.done()
        if command is not None and is_alive(command.pid):
            assert command.wait(TIME).code == 0
    assert len(kept) >= 10 * (len(STEPS) - 1)
    return kept
