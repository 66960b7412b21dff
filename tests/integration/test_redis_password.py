"""Tests of CHUNKQ_QUEUE_PASSWORD_FILE, which reads the password of a queue from a file."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock
from urllib.parse import quote

import pytest

from chunkq.errors import ErrorCode, QueueError
from chunkq.queue.backends.rq.connect import PASSWORD_VARIABLE
from chunkq.queue.registry import open_executor
from tests.harness.files import files_below
from tests.harness.servers.redis import RedisServer, redis_server
from tests.harness.small_job import four_chunks
from tests.harness.workspace import Workspace
from tests.integration.test_redis_command import command_lines

SECRET = "s3cr3t"
PASSWORD = f"{SECRET} p%40@{SECRET}/{SECRET}#{SECRET}?{SECRET}:ü"
"""An unescaped password. Every part between two delimiters of a URL contains SECRET."""


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    with redis_server(PASSWORD) as server:
        server.client.execute_command(
            "ACL", "SETUSER", "scientist", "on", f">{PASSWORD}", "~*", "&*", "+@all"
        )
        yield server


def address(server: RedisServer, user: str = "") -> str:
    """Return the address of a server without a password."""
    return f"redis://{user}127.0.0.1:{server.settings.port}/0"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secrets").mkdir()
    path = tmp_path / "secrets" / "redis_password"
    path.write_text(PASSWORD + "\n")
    return path


@pytest.fixture
def workspace(tmp_path: Path, guarded: RedisServer, secret: Path) -> Workspace:
    environment = {"CHUNKQ_QUEUE": address(guarded), PASSWORD_VARIABLE: str(secret)}
    workspace = replace(four_chunks(tmp_path / "job"), environment=environment)
    with guarded.client as client:
        client.flushall()
    return workspace


def test_a_job_with_the_password_in_a_file_does_not_reveal_it(
    workspace: Workspace, guarded: RedisServer
) -> None:
    output = ""
    for command in (
        ("produce", "job.json"),
        ("status", "out.zarr"),
        ("status", "out.zarr", "--json"),
        ("jobs",),
    ):
        answer = workspace.call(*command).ok()
        output += answer.out + answer.err
    arguments = ""
    with workspace.start("work", "--burst", "--gpus", "none", "-w", "2") as cli:
        while cli.process.poll() is None:
            arguments += command_lines()
        output += cli.wait().ok().err
    assert "python" in arguments
    answer = workspace.call("finalize", "out.zarr").ok()
    output += answer.out + answer.err
    assert "complete: " in answer.out
    assert SECRET not in output + arguments
    files = [
        n for n, content in files_below(workspace.folder).items() if SECRET.encode() in content
    ]
    assert files == []
    # The address is stored, so that `status` can connect to the queue without an option.
    assert address(guarded) in (workspace.job_folder / "job.json").read_text()


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\n\n"])
def test_line_ends_after_the_password_are_ignored(
    ending: str, guarded: RedisServer, secret: Path
) -> None:
    secret.write_bytes((PASSWORD + ending).encode())
    with mock.patch.dict(os.environ, {PASSWORD_VARIABLE: str(secret)}):
        executor = open_executor(address(guarded))
    executor.check_ready()
    assert SECRET not in executor.url + repr(executor) + repr(vars(executor))
    executor.close()


def test_a_user_in_the_address_is_combined_with_the_password_in_the_file(
    guarded: RedisServer, secret: Path
) -> None:
    with mock.patch.dict(os.environ, {PASSWORD_VARIABLE: str(secret)}):
        open_executor(address(guarded, "scientist@")).close()
        with pytest.raises(QueueError, match=str(secret)) as error:
            open_executor(address(guarded, "stranger@"))
        assert error.value.code is ErrorCode.QUEUE_DENIED


@pytest.mark.parametrize("option", [False, True], ids=["before the host", "as an option"])
def test_a_password_in_the_address_takes_precedence(
    option: bool, guarded: RedisServer, secret: Path
) -> None:
    secret.write_text("another\n")
    coded = quote(PASSWORD, safe="")
    url = f"{address(guarded)}?password={coded}" if option else address(guarded, f":{coded}@")
    with mock.patch.dict(os.environ, {PASSWORD_VARIABLE: str(secret)}):
        open_executor(url).close()
        with mock.patch.dict(os.environ, {PASSWORD_VARIABLE: "/nowhere"}):
            open_executor(url).close()


def test_an_empty_password_in_the_address_means_none(redis: RedisServer) -> None:
    with mock.patch.dict(os.environ, {PASSWORD_VARIABLE: "/nowhere"}):
        open_executor(address(redis, ":@")).close()


def test_an_empty_variable_is_ignored(redis: RedisServer) -> None:
    with mock.patch.dict(os.environ, {PASSWORD_VARIABLE: ""}):
        open_executor(address(redis)).close()


def test_a_socket_or_another_queue_does_not_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with (
        redis_server(extra=f"unixsocket {path}\n"),
        mock.patch.dict(os.environ, {PASSWORD_VARIABLE: "/nowhere"}),
    ):
        open_executor(f"unix://{path}").close()
        open_executor(f"sqlite://{tmp_path}/queue.db").close()


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_text("\n")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def several_lines(path: Path) -> None:
    path.write_text(f"user\n{SECRET}\n")


def no_text(path: Path) -> None:
    path.write_bytes(SECRET.encode() + b"\xff\xfe")


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def wrong(path: Path) -> None:
    path.write_text(f"{SECRET}-of-another")


@pytest.mark.parametrize(
    ("replace_file", "fragment"),
    [
        (missing, "missing file"),
        (empty, "empty"),
        (folder, "Is a directory"),
        (several_lines, "one line"),
        (no_text, "UTF-8"),
        (endless, "one line"),
        (wrong, "invalid user or password"),
    ],
)
@pytest.mark.parametrize("command", ["produce", "work"])
def test_an_unusable_password_file_is_an_error_of_one_line(
    command: str,
    replace_file: Callable[[Path], None],
    fragment: str,
    workspace: Workspace,
    secret: Path,
) -> None:
    replace_file(secret)
    arguments = {"produce": ("produce", "job.json"), "work": ("work", "--gpus", "none")}[command]
    answer = workspace.call(*arguments)
    answer.refused(
        1, ErrorCode.QUEUE_DENIED, "chunkq: queue: ", PASSWORD_VARIABLE, str(secret), fragment
    )
    assert len(answer.err.splitlines()) == 1, answer.err
    assert SECRET not in answer.err + answer.out
    assert not workspace.output.exists()


def test_the_error_for_a_missing_password_names_address_and_file(guarded: RedisServer) -> None:
    with pytest.raises(QueueError, match="redis://:password@host") as error:
        open_executor(address(guarded))
    assert error.value.code is ErrorCode.QUEUE_DENIED
    assert PASSWORD_VARIABLE in str(error.value)
