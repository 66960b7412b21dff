"""Task messages, names of workers and chunks, and passwords in URLs."""

import json
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from chunkq.errors import ErrorCode, JobError, QueueError
from chunkq.job.tasks import JobId, Task, chunk_name, parse_chunk
from chunkq.paths import mask_secrets, without_secret
from chunkq.queue.backends.rq import executor
from chunkq.queue.backends.rq.connect import connect
from chunkq.queue.backends.rq.names import job_of, queue_name, queue_prefix, rq_id, stored_job
from chunkq.queue.contract.executor import WorkerName
from chunkq.queue.registry import open_executor

chunks = st.lists(st.integers(0, 10**9), min_size=1, max_size=4).map(tuple)
epochs = st.text("0123456789abcdef", min_size=8, max_size=8)
paths = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)
job_ids = st.builds(JobId, paths, epochs)
kinds = st.sampled_from(["infer", "finalize", "stats"])
tasks = st.builds(Task, kinds, paths, epochs, st.integers(0, 10**6), chunks)
values = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
almost = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["infer", "finalize", "os.system"]) | values,
        "epoch": st.sampled_from(["0a1b2c3d", "0A1B2C3D", "0a1b2c3", "0a1b2c3d4"]) | values,
        "item": st.integers(-1, 2) | values,
        "job": st.just("/data/out.zarr.chunkq") | values,
        "chunk": st.lists(st.integers(-1, 3), max_size=4) | values,
        "more": values,
    },
)


# -------------------------------------------------------------------------------- messages


@given(tasks)
def test_a_task_is_equal_after_a_round_trip_through_a_message(task: Task) -> None:
    assert Task.from_json(task.to_json()) == task == Task.from_dict(task.as_dict())
    assert len(task.to_json().splitlines()) == 1


@given(tasks)
def test_redis_stores_a_task_like_a_call_of_a_function(task: Task) -> None:
    stored = executor._message(task)
    assert json.loads(stored) == [f"chunkq.{task.kind}", None, [task.as_dict()], {}]
    assert executor._task(stored) == task


@given(tasks, tasks)
def test_tasks_have_the_same_id_only_if_they_are_equal_apart_from_the_job(
    one: Task, other: Task
) -> None:
    assert re.fullmatch(r"[A-Za-z0-9/.-]+", one.id)
    assert (one.id == other.id) == (replace(one, job=other.job, epoch=other.epoch) == other)
    assert one.id != replace(one, chunk=(*one.chunk, 0)).id
    assert one.id != replace(one, item=one.item + 1).id


@given(tasks, tasks)
def test_tasks_have_the_same_id_in_redis_only_if_they_are_equal(one: Task, other: Task) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]+", rq_id(one))  # RQ rejects other characters
    assert (rq_id(one) == rq_id(other)) == (one == other)
    changed = [replace(one, epoch="f" * 8), replace(one, job=one.job + "/"), replace(one, item=9)]
    assert rq_id(one) not in [rq_id(task) for task in changed if task != one]


@given(job_ids, job_ids)
def test_queues_in_redis_have_the_same_prefix_only_if_their_jobs_have_the_same_path(
    one: JobId, other: JobId
) -> None:
    assert job_of(stored_job(one)) == one
    assert (queue_name(one) == queue_name(other)) == (one == other)
    assert queue_name(one).startswith(queue_prefix(one.path))
    assert queue_name(other).startswith(queue_prefix(one.path)) == (one.path == other.path)


def matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def task_message(**changes: Any) -> dict[str, Any]:
    task = Task("infer", "/data/out.zarr.chunkq", "0a1b2c3d", 0, (0,))
    return {**task.as_dict(), **changes}


def is_task(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and matches("[a-z]+", message.get("kind"))
        and matches("[0-9a-f]{8}", message.get("epoch"))
        and isinstance(message.get("job"), str)
        and is_number(message.get("item"))
        and isinstance(message.get("chunk"), list)
        and message["chunk"] != []
        and all(map(is_number, message["chunk"]))
    )


def assert_no_task(decode: Callable[[Any], Task], message: Any) -> None:
    with pytest.raises(QueueError) as error:
        decode(message)
    assert error.value.code is ErrorCode.TASK_INVALID
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000


@given(almost | values)
@example(task_message())
@example(task_message(chunk=[0, 0.0]))
@example(task_message(chunk=[None]))
@example(task_message(chunk=[]))
@example(task_message(chunk={"0": 0}))
@example(task_message(kind={}))
@example(task_message(kind="infer\n"))
@example(task_message(epoch="0a1b2c3d\n"))
@example(task_message(epoch=10000000))
@example(task_message(item=False))
@example(task_message(item=0.0))
@example(["kind", "job", "chunk"])
@example("kind job chunk")
def test_a_decoded_message_is_a_task_or_an_error_of_one_line(value: Any) -> None:
    for decode, message in ((Task.from_dict, value), (Task.from_json, json.dumps(value))):
        if is_task(value):
            task = decode(message)
            assert task.as_dict() == {name: value[name] for name in task_message()}
        else:
            assert_no_task(decode, message)


@given(st.binary(max_size=40) | st.text(max_size=40))
def test_a_message_that_is_not_json_is_rejected(message: str | bytes) -> None:
    assert_no_task(Task.from_json, message)


def test_a_number_that_python_cannot_parse_is_rejected() -> None:
    assert_no_task(Task.from_json, json.dumps(task_message()).replace("[0]", f"[{'9' * 5000}]"))


def test_a_boolean_is_not_a_chunk_number() -> None:
    assert_no_task(Task.from_json, json.dumps(task_message(chunk=[True])))


def test_a_job_that_cannot_be_encoded_is_rejected() -> None:
    assert_no_task(Task.from_json, json.dumps(task_message(job="\ud800")))


# ----------------------------------------------------------------------------------- names


@given(chunks)
def test_a_chunk_is_equal_after_a_round_trip_through_its_name(chunk: tuple[int, ...]) -> None:
    assert parse_chunk(chunk_name(chunk)) == chunk


@pytest.mark.parametrize("name", ["", ".", "0.", ".0", "a", "0.a", "0,1", "0.1.json", "1e3", "0x1"])
def test_a_name_of_another_form_is_not_a_chunk(name: str) -> None:
    assert parse_chunk(name) is None


part = st.text(st.characters(exclude_characters=":", exclude_categories=("Cs",)))


@given(host=part | st.just("fe80::1%eth0"), device=part, suffix=part)
def test_a_worker_name_is_equal_after_a_round_trip_through_text(
    host: str, device: str, suffix: str
) -> None:
    name = WorkerName(host, device, suffix)
    assert WorkerName.parse(name.name) == name


def test_every_new_worker_of_this_host_has_a_unique_name() -> None:
    names = [WorkerName.new("GPU-5") for _ in range(100)]
    assert len({name.name for name in names}) == 100
    assert {(name.host, name.device) for name in names} == {(socket.gethostname(), "GPU-5")}
    # RQ uses the name as the name of a Redis connection.
    assert all(re.fullmatch(r"[!-~]+", name.suffix) for name in names)
    assert [WorkerName.parse(name.name) for name in names] == names


@given(st.text())
def test_a_worker_name_of_another_form_is_read_as_a_host(text: str) -> None:
    name = WorkerName.parse(text)
    assert text.startswith(name.host)
    if ":" not in text:
        assert name == WorkerName(text, "", "")


# --------------------------------------------------------------------------------- secrets

schemes = st.sampled_from(["redis", "rediss", "unix"])
users = st.sampled_from(["", "", "chunkq", "my-user", "a.b", "user%40lab"])
# URL parsers remove line breaks; see below.
secrets = st.text(st.characters(exclude_characters="\n", exclude_categories=("Cs",)), min_size=1)
locations = st.sampled_from(
    ["host", "host:6379", "host:6379/0", "10.0.0.1:6380/3?a=b", "[::1]:6379/0", "/run/redis.sock"]
)


@given(schemes, users, secrets, locations)
@example("redis", "", "@", "host")
@example("redis", "", "a@b@", "host")
@example("redis", "", "/", "host")
@example("redis", "", "a/b?c#d", "host")
@example("redis", "", ":", "host")
@example("redis", "", "[", "[::1]:6379")
@example("redis", "", "?password=x", "host")
@example("redis", "", "***", "host")
@example("redis", "", "\\1", "host")
@example("redis", "", "\r", "host")
@example("redis", "", "host", "host")
def test_the_password_of_a_queue_is_masked_for_any_characters(
    scheme: str, user: str, secret: str, location: str
) -> None:
    for password in (secret, quote(secret), quote(secret, safe="")):
        masked = without_secret(f"{scheme}://{user}:{password}@{location}")
        expected = re.sub(r"([?&]password=)[^&#]*", r"\1***", f"{scheme}://{user}:***@{location}")
        assert masked == expected
        assert without_secret(masked) == masked


@given(schemes, secrets, st.sampled_from(["", "db=1&", "a=b&c=d&"]), st.sampled_from(["", "&x=1"]))
def test_a_password_in_the_query_of_a_url_is_masked(
    scheme: str, secret: str, before: str, after: str
) -> None:
    password = quote(secret, safe="")
    masked = without_secret(f"{scheme}://host/0?{before}password={password}{after}")
    assert masked == f"{scheme}://host/0?{before}password=***{after}"


@given(secrets, secrets)
def test_two_passwords_in_a_url_are_masked(one: str, other: str) -> None:
    assume("?" not in one)
    assume("&" not in one)
    url = f"redis://:{one}@host/0?password={quote(other, safe='')}"
    assert without_secret(url) == "redis://:***@host/0?password=***"


@pytest.mark.parametrize(
    "url",
    [
        "https://user:geheim@host/in.zarr",
        "https://user:ge%2Fheim@host/in.zarr",
        "https://host/in.zarr?password=geheim",
        "https://host/in.zarr?a=b&key_password=geheim&c=d",
    ],
)
def test_a_text_about_a_url_has_no_password_of_it_in_any_form(url: str) -> None:
    inner = url.partition("://")[2]
    text = f"no {url}, {inner} or {unquote(inner)}: 'geheim' and 'ge/heim'"
    masked = mask_secrets(text, url)
    password = "ge/heim" if "%2F" in url else "geheim"
    assert password not in masked
    assert quote(password, safe="") not in masked
    assert without_secret(url) in masked


@pytest.mark.parametrize("url", ["/data/geheim.zarr", "s3://geheim/in.zarr"])
def test_a_text_about_a_path_without_a_password_is_unchanged(url: str) -> None:
    assert mask_secrets(f"no geheim at {url}", url) == f"no geheim at {url}"


@pytest.mark.parametrize(
    "url",
    [
        "/data/brain.zarr",
        "relative/path@v2:3",
        "C:/data/brain.zarr",
        "sqlite:///home/me/queue.db",
        "redis://host",
        "redis://host:6379/0",
        "redis://user@host:6379/0",
        "rediss://[::1]:6379/0?ssl_ca_certs=/etc/ca.pem",
        "unix:///run/redis.sock?db=1",
        "s3://bucket/key@v1/a:b@c.zarr",
        "gs://bucket/brain.zarr",
        "memory://out.zarr",
        "https://host:8080/volume.zarr?x=1#part",
    ],
)
def test_a_url_without_a_password_is_unchanged(url: str) -> None:
    assert without_secret(url) == url


@given(st.sampled_from(["https", "s3", "ftp", "dask"]), st.text(min_size=1))
def test_the_password_of_a_storage_url_is_masked(scheme: str, secret: str) -> None:
    password = quote(secret, safe="")
    masked = without_secret(f"{scheme}://user:{password}@host:80/a@b/c?d=e")
    assert masked == f"{scheme}://user:***@host:80/a@b/c?d=e"


@given(secrets, st.sampled_from(["host:port", "host:6379/zero/0?db=x", "ho st:99999999"]))
def test_the_error_for_an_invalid_redis_url_masks_the_password(secret: str, location: str) -> None:
    with pytest.raises(QueueError) as error:
        connect(f"redis://:{quote(secret, safe='')}@{location}")
    assert error.value.code is ErrorCode.QUEUE_ADDRESS_INVALID
    assert str(error.value).startswith(f"queue: redis://:***@{location}: ")


CLOSED_PORT = "127.0.0.1:1"
LEAKS = {
    "a line break": f"redis://:ab/hush\n/x@{CLOSED_PORT}",
    "capital letters": f"REDIS://:ab/hush@{CLOSED_PORT}",
    "an @ in the user": f"redis://me@lab:ab/hush@{CLOSED_PORT}",
    "a / in the user": f"redis://lab/me:ab/hush@{CLOSED_PORT}",
    "a # among the options": f"redis://{CLOSED_PORT}/0?password=ab#hush",
}


@pytest.mark.parametrize("url", LEAKS.values(), ids=LEAKS.keys())
def test_no_part_of_a_password_is_printed_if_the_url_cannot_be_parsed(url: str) -> None:
    assert "hush" not in without_secret(url)
    with pytest.raises((JobError, QueueError)) as error:
        open_executor(url)
    assert "hush" not in str(error.value)


def test_the_error_for_a_misspelt_scheme_masks_the_password() -> None:
    with pytest.raises(JobError) as error:
        open_executor(f"redsi://:ab/hush@{CLOSED_PORT}")
    assert "hush" not in str(error.value)
    assert "did you mean 'redis'?" in str(error.value)


@pytest.mark.parametrize("url", ["redis://[host:6379/0", "redis://:pw@[::1:6379", "s3://[/key"])
def test_the_password_of_a_url_with_an_unclosed_bracket_is_masked(url: str) -> None:
    assert "pw" not in without_secret(url)
