"""Messages, names of workers and chunks, and URLs fit to be shown."""

import json
import re
import socket
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from chunkq.errors import ErrorCode, JobError, QueueError
from chunkq.executors import open_executor
from chunkq.executors.base import WorkerName
from chunkq.executors.rq.connect import connect
from chunkq.paths import without_secret
from chunkq.tasks import ENTRY_POINTS, Task, chunk_name, job_key, parse_chunk

chunks = st.lists(st.integers(0, 10**9), min_size=1, max_size=4).map(tuple)
tasks = st.builds(Task, st.sampled_from(sorted(ENTRY_POINTS)), st.text(min_size=1), chunks)
values = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
almost = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["infer", "finalize", "os.system"]) | values,
        "job": st.just("/data/out.zarr.chunkq") | values,
        "chunk": st.lists(st.integers(-1, 3), max_size=4) | values,
        "more": values,
    },
)


# -------------------------------------------------------------------------------- messages


@given(tasks)
def test_a_task_comes_back_from_its_message_as_it_was(task: Task) -> None:
    assert Task.from_json(task.to_json()) == task == Task.from_dict(task.as_dict())
    assert len(task.to_json().splitlines()) == 1


@given(tasks, tasks)
def test_tasks_have_the_same_id_only_if_they_are_the_same(one: Task, other: Task) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]+", one.id)
    assert one.id.startswith(job_key(one.job))
    assert (one.id == other.id) == (one == other)
    assert len({one.id, Task(one.kind, one.job, (*one.chunk, 0)).id}) == 2


def is_task(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and found.get("kind") in ("infer", "finalize")
        and isinstance(found.get("job"), str)
        and isinstance(found.get("chunk"), list)
        and all(type(number) is int and number >= 0 for number in found["chunk"])
    )


@given(almost | values)
@example({"kind": "infer", "job": "j", "chunk": [0, 0.0]})
@example({"kind": "infer", "job": "j", "chunk": [None]})
@example({"kind": "infer", "job": "j", "chunk": {"0": 0}})
@example({"kind": {}, "job": "j", "chunk": [0]})
@example(["kind", "job", "chunk"])
@example("kind job chunk")
def test_whatever_is_decoded_is_a_task_or_refused_in_one_short_line(found: Any) -> None:
    for decode, message in ((Task.from_dict, found), (Task.from_json, json.dumps(found))):
        if is_task(found):
            task = decode(message)
            assert task == Task(found["kind"], found["job"], tuple(found["chunk"]))
        else:
            with pytest.raises(QueueError, match="not a chunkq task") as refusal:
                decode(message)
            assert len(str(refusal.value).splitlines()) == 1
            assert len(str(refusal.value)) < 1000


@given(st.binary(max_size=40) | st.text(max_size=40))
def test_what_is_no_json_is_refused_and_nothing_else_happens(message: str | bytes) -> None:
    with pytest.raises(QueueError, match="not a chunkq task"):
        Task.from_json(message)  # type: ignore[arg-type]


def test_a_number_too_long_to_read_is_refused() -> None:
    message = '{"kind": "infer", "job": "j", "chunk": [' + "9" * 5000 + "]}"
    with pytest.raises(QueueError, match="not a chunkq task"):
        Task.from_json(message)


def test_truth_is_no_chunk_number() -> None:
    with pytest.raises(QueueError, match="not a chunkq task"):
        Task.from_json('{"kind": "infer", "job": "j", "chunk": [true]}')


def test_a_job_that_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(QueueError, match="not a chunkq task"):
        Task.from_json('{"kind": "infer", "job": "\\ud800", "chunk": [0]}')


# ----------------------------------------------------------------------------------- names


@given(chunks)
def test_a_chunk_comes_back_from_its_name(chunk: tuple[int, ...]) -> None:
    assert parse_chunk(chunk_name(chunk)) == chunk


@pytest.mark.parametrize("name", ["", ".", "0.", ".0", "a", "0.a", "0,1", "0.1.json", "1e3", "0x1"])
def test_a_name_of_another_form_is_no_chunk(name: str) -> None:
    assert parse_chunk(name) is None


part = st.text(st.characters(exclude_characters=":", exclude_categories=("Cs",)))


@given(host=part | st.just("fe80::1%eth0"), device=part, own=part)
def test_a_worker_name_comes_back_from_its_text(host: str, device: str, own: str) -> None:
    name = WorkerName(host, device, own)
    assert WorkerName.parse(name.name) == name


def test_every_new_worker_of_this_host_has_a_name_of_its_own() -> None:
    names = [WorkerName.new("GPU-5") for _ in range(100)]
    assert len({name.name for name in names}) == 100
    assert {(name.host, name.device) for name in names} == {(socket.gethostname(), "GPU-5")}
    # RQ gives it to Redis as a connection's name.
    assert all(re.fullmatch(r"[!-~]+", name.suffix) for name in names)
    assert [WorkerName.parse(name.name) for name in names] == names


@given(st.text())
def test_a_worker_name_of_another_form_is_some_hosts(text: str) -> None:
    name = WorkerName.parse(text)
    assert text.startswith(name.host)
    if ":" not in text:
        assert name == WorkerName(text, "", "")


# --------------------------------------------------------------------------------- secrets

schemes = st.sampled_from(["redis", "rediss", "unix"])
users = st.sampled_from(["", "", "chunkq", "my-user", "a.b", "user%40lab"])
# A line break is left out of an address by everyone who reads it; see below.
secrets = st.text(st.characters(exclude_characters="\n", exclude_categories=("Cs",)), min_size=1)
places = st.sampled_from(
    ["host", "host:6379", "host:6379/0", "10.0.0.1:6380/3?a=b", "[::1]:6379/0", "/run/redis.sock"]
)


@given(schemes, users, secrets, places)
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
def test_a_queues_password_never_shows_whatever_its_characters(
    scheme: str, user: str, secret: str, place: str
) -> None:
    for written in (secret, quote(secret), quote(secret, safe="")):
        shown = without_secret(f"{scheme}://{user}:{written}@{place}")
        hidden = re.sub(r"([?&]password=)[^&#]*", r"\1***", f"{scheme}://{user}:***@{place}")
        assert shown == hidden
        assert without_secret(shown) == shown


@given(schemes, secrets, st.sampled_from(["", "db=1&", "a=b&c=d&"]), st.sampled_from(["", "&x=1"]))
def test_a_password_among_the_options_of_an_address_does_not_show(
    scheme: str, secret: str, before: str, after: str
) -> None:
    written = quote(secret, safe="")
    shown = without_secret(f"{scheme}://host/0?{before}password={written}{after}")
    assert shown == f"{scheme}://host/0?{before}password=***{after}"


@given(secrets, secrets)
def test_two_passwords_in_one_address_do_not_show(one: str, other: str) -> None:
    assume("?" not in one)
    assume("&" not in one)
    url = f"redis://:{one}@host/0?password={quote(other, safe='')}"
    assert without_secret(url) == "redis://:***@host/0?password=***"


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
def test_what_holds_no_password_is_shown_as_it_is(url: str) -> None:
    assert without_secret(url) == url


@given(st.sampled_from(["https", "s3", "ftp", "dask"]), st.text(min_size=1))
def test_a_storage_password_does_not_show(scheme: str, secret: str) -> None:
    written = quote(secret, safe="")
    shown = without_secret(f"{scheme}://user:{written}@host:80/a@b/c?d=e")
    assert shown == f"{scheme}://user:***@host:80/a@b/c?d=e"


@given(secrets, st.sampled_from(["host:port", "host:6379/zero/0?db=x", "ho st:99999999"]))
def test_an_address_that_is_none_is_refused_without_its_password(secret: str, place: str) -> None:
    with pytest.raises(QueueError) as refusal:
        connect(f"redis://:{quote(secret, safe='')}@{place}")
    assert refusal.value.code is ErrorCode.QUEUE_ADDRESS_INVALID
    assert str(refusal.value).startswith(f"queue: redis://:***@{place}: ")


NOWHERE = "127.0.0.1:1"
LEAKS = {
    "a line break": f"redis://:ab/hush\n/x@{NOWHERE}",
    "capital letters": f"REDIS://:ab/hush@{NOWHERE}",
    "an @ in the user": f"redis://me@lab:ab/hush@{NOWHERE}",
    "a / in the user": f"redis://lab/me:ab/hush@{NOWHERE}",
    "a # among the options": f"redis://{NOWHERE}/0?password=ab#hush",
}


@pytest.mark.parametrize("url", LEAKS.values(), ids=LEAKS.keys())
def test_no_part_of_a_password_shows_in_an_address_that_nobody_can_read(url: str) -> None:
    assert "hush" not in without_secret(url)
    with pytest.raises((JobError, QueueError)) as refusal:
        open_executor(url)
    assert "hush" not in str(refusal.value)


def test_an_address_whose_scheme_is_mistyped_is_refused_without_its_password() -> None:
    with pytest.raises(JobError) as refusal:
        open_executor(f"redsi://:ab/hush@{NOWHERE}")
    assert "hush" not in str(refusal.value)
    assert "did you mean 'redis'?" in str(refusal.value)


@pytest.mark.parametrize("url", ["redis://[host:6379/0", "redis://:pw@[::1:6379", "s3://[/key"])
def test_an_address_with_half_a_bracket_can_be_shown(url: str) -> None:
    assert "pw" not in without_secret(url)
