"""Redis servers that lose keys, go away for a while, or lack a command."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import astuple
from operator import attrgetter
from pathlib import Path

import pytest
import redis

from chunkq.errors import ErrorCode, QueueError
from chunkq.job.tasks import JobId, Task
from chunkq.queue.backends.rq import executor as rq_executor
from chunkq.queue.backends.rq.connect import PASSWORD_VARIABLE, connect
from chunkq.queue.backends.rq.executor import RqExecutor
from chunkq.queue.backends.rq.names import queue_name, rq_id
from chunkq.queue.contract.executor import WorkerOptions
from tests.harness.servers.redis import RedisServer, redis_server
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

JOB = JobId("/jobs/out.zarr.chunkq", "00000001")
TASKS = [Task("infer", JOB.path, JOB.epoch, 0, (n, 0, 0)) for n in range(7)]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def queue(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RqExecutor]:
    monkeypatch.setattr(rq_executor, "BATCH", 2)
    server.client.flushall()
    with closing(RqExecutor(server.url)) as queue:
        yield queue


def reserved(queue: RqExecutor) -> list[Task]:
    options = WorkerOptions("host:cpu:1")
    leases = iter(lambda: queue.reserve(options), None)
    return [lease.task for lease in leases if lease is not None]


id_of = attrgetter("id")

LOSSES = {
    "the list": ("rq:queue:{}",),
    "the list and the leases": ("rq:queue:{}", "rq:wip:{}"),
    "the list and the entries of the queue": ("rq:queue:{}", "chunkq:queues", "chunkq:jobs"),
    "the entries of the queue": ("chunkq:queues", "chunkq:jobs"),
    "nothing": (),
}


@pytest.mark.parametrize("keys", LOSSES.values(), ids=LOSSES)
def test_submitting_again_queues_the_tasks_whose_keys_are_lost_in_part(
    queue: RqExecutor, server: RedisServer, keys: tuple[str, ...]
) -> None:
    queue.submit(TASKS)
    running = [queue.reserve(WorkerOptions("host:cpu:1")) for _ in range(2)]
    for key in keys:
        assert server.client.delete(key.format(queue_name(JOB))) == 1
    has_lost_list, has_lost_leases = "rq:queue:{}" in keys, "rq:wip:{}" in keys
    assert queue.submit(TASKS) == 5 * has_lost_list + 2 * has_lost_leases
    assert queue.submit(TASKS) == 0
    kept = {lease.task for lease in running if lease and not has_lost_leases}
    assert queue.counts(JOB).running == len(kept)
    assert sorted(reserved(queue), key=id_of) == [task for task in TASKS if task not in kept]


def test_submitting_again_queues_the_rest_when_the_list_and_most_tasks_are_lost(
    queue: RqExecutor, server: RedisServer
) -> None:
    queue.submit(TASKS)
    with server.client as client:
        client.delete(f"rq:queue:{queue_name(TASKS[0].job_id)}")
        client.delete(*(f"rq:job:{rq_id(task)}" for task in TASKS[:5]))
    assert queue.submit(TASKS) == len(TASKS)
    assert sorted(reserved(queue), key=id_of) == TASKS


def test_waiting_tasks_whose_list_is_lost_wait_again(
    queue: RqExecutor, server: RedisServer
) -> None:
    queue.close_gate(JOB, "infer")
    queue.submit(TASKS)
    assert server.client.delete(f"chunkq:waiting:{queue_name(JOB)}:infer") == 1
    assert queue.submit(TASKS) == len(TASKS)
    assert queue.counts(JOB).waiting == len(TASKS)


def test_a_task_that_is_queued_twice_runs_once(queue: RqExecutor) -> None:
    queue.submit(TASKS)
    ids = [rq_executor.rq_id(task) for task in TASKS]
    queue._scripts("restore", queue_name(JOB), rq_executor.stored_job(JOB), *ids)
    assert sorted(reserved(queue), key=id_of) == TASKS


def test_leases_end_in_time_after_the_clock_of_the_server_was_put_back(
    queue: RqExecutor, server: RedisServer
) -> None:
    queue.submit(TASKS[:1])
    dead, heir = WorkerOptions("host:cpu:1"), WorkerOptions("host:cpu:2")
    assert queue.reserve(dead) is not None
    name = queue_name(JOB)
    [(entry, end)] = server.client.zrange(f"rq:wip:{name}", 0, -1, withscores=True)
    for key in ("seen", "grace"):  # as a server whose clock was an hour fast
        server.client.set(f"chunkq:{key}", end + 3600)
    server.client.zadd(f"rq:wip:{name}", {entry: end + 3600})
    assert queue.reserve(heir) is None
    [(_, shortened)] = server.client.zrange(f"rq:wip:{name}", 0, -1, withscores=True)
    assert end <= shortened <= end + heir.settings.lease
    assert not server.client.exists("chunkq:grace")


@pytest.mark.parametrize("is_held", [True, False])
def test_a_lease_that_a_living_worker_does_not_hold_costs_no_attempt(
    queue: RqExecutor, server: RedisServer, is_held: bool
) -> None:
    # Lost was the answer with the lease, or in a failover the acknowledgement.
    queue.submit(TASKS[:2])
    worker, heir = WorkerOptions("host:cpu:1"), WorkerOptions("host:cpu:2")
    wip, lease = f"rq:wip:{queue_name(JOB)}", worker.settings.lease
    with queue.registered(worker), server.client as client:
        first, second = queue.reserve(worker), queue.reserve(worker)
        assert first is not None
        assert second is not None
        queue.renew(worker, [first, second])
        entry = f"{rq_id(first.task)}:{first.token}"
        end = client.zscore(wip, entry) - lease - 1  # as if time had passed
        client.zadd(wip, {entry: end})
        if is_held:
            client.hset("rq:worker:host:cpu:1", "chunkq_renewal", f"{end - lease} {lease}")
        else:
            queue.renew(worker, [second])
        next_lease = queue.reserve(heir)
    assert next_lease is not None
    assert next_lease.task == first.task
    assert next_lease.attempt.number == (2 if is_held else 1)


def test_a_burst_worker_reports_the_chunks_that_the_server_has_lost(
    standard_job: StandardJob, server: RedisServer, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, url=server.url)
    workspace.produce()
    key = f"rq:queue:{queue_name(workspace.job.id)}"
    lost = server.client.llen(key) - 1
    server.client.ltrim(key, 0, 0)
    answer = workspace.work()
    assert answer.code == 3
    assert f"[{ErrorCode.QUEUE_LOST}]" in answer.err
    assert f"{lost} chunks of {workspace.output}" in answer.err


@pytest.mark.parametrize(
    ("extra", "fragments"),
    [
        ("maxmemory 50mb\nmaxmemory-policy allkeys-lru\n", ["allkeys-lru"]),
        ("maxmemory 50mb\nmaxmemory-policy volatile-lru\n", []),
        ("maxmemory-policy allkeys-lru\n", []),
        ('appendonly no\nsave ""\n', ["--resume"]),
        ("appendonly no\nsave 900 1\n", []),
    ],
)
def test_settings_of_a_server_that_can_lose_tasks_are_named(
    extra: str, fragments: list[str]
) -> None:
    with redis_server(extra=extra) as server:
        url = server.url.replace("redis://", "redis://admin:any@")
        with closing(RqExecutor(url)) as queue:
            risks = queue.risks()
        with closing(RqExecutor(server.url)) as restricted:
            assert {*restricted.risks()} <= {*risks}  # may not ask for everything
    assert len(risks) == len(fragments)
    assert all(map(str.__contains__, risks, fragments))


@pytest.mark.parametrize(
    ("command", "remedies"),
    [("hello", ["?protocol=2"]), ("evalsha", ["scripts"]), ("script", ["scripts"])],
)
def test_a_server_without_a_command_is_refused_with_the_remedy(
    command: str, remedies: list[str]
) -> None:
    with redis_server(extra=f'rename-command {command} ""\n') as server:
        with (
            pytest.raises(QueueError) as caught,
            closing(RqExecutor(server.url)) as queue,
        ):
            queue.check_ready()
        if command == "hello":
            with closing(RqExecutor(f"{server.url}?protocol=2")) as queue:
                queue.check_ready()
    assert caught.value.code is ErrorCode.QUEUE_UNSUPPORTED
    message = str(caught.value)
    assert all(remedy in message for remedy in remedies)
    assert "args" not in message


@pytest.mark.parametrize("value", ["CERT_NONE", "CERT_REQUIRED", "CERT_OPTIONAL", "none"])
def test_certificate_checks_can_be_written_as_for_other_clients(value: str) -> None:
    client = connect(
        f"rediss://:pass@localhost:1/0?ssl_cert_reqs={value}&db=2&decode_responses=True"
    )
    settings = client.connection_pool.connection_kwargs
    assert settings["ssl_cert_reqs"] == value.removeprefix("CERT_").lower()
    assert settings["db"] == 2
    assert not settings["decode_responses"]  # the scripts exchange bytes


@pytest.mark.parametrize("option", ["ssl_cert_reqs=False", "protocol=x", "foo=1"])
def test_an_unknown_option_is_refused_in_one_line(option: str) -> None:
    with pytest.raises(QueueError) as caught:
        connect(f"rediss://:pa55@localhost:1/0?{option}")
    assert caught.value.code is ErrorCode.QUEUE_ADDRESS_INVALID
    assert "pa55" not in str(caught.value)


def test_workers_report_an_outage_once_and_its_end(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    with redis_server() as server:
        workspace = standard_job.workspace(tmp_path, url=server.url)
        workspace.produce()
        settings = {"CHUNKQ_WORKER_SETTINGS": '{"restart_delay": 0.01}'}
        with workspace.start("work", "--gpus", "none", "-w", "2", **settings) as worker:
            wait_until(lambda: not any(astuple(workspace.counts())), "all chunks are done")
            first, second = worker.children()
            server.kill()
            reported = f"[{ErrorCode.QUEUE_UNAVAILABLE}]"
            wait_until(lambda: worker.output().count(reported) == 2, "the outage is reported")
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: "trying again" in worker.output(), "a process starts meanwhile")
            started: set[int] = set()

            def is_started_again() -> bool:
                started.update({*worker.children()} - {first, second})
                return len(started) > 1

            wait_until(is_started_again, "it is started again")
            server.start()
            wait_until(lambda: "answers again" in worker.output(), "its end is reported")
            wait_until(lambda: "reached again" in worker.output(), "the new process has it")
        lines = worker.output().splitlines()
    words = (reported, "answers again", "trying again", "reached again")
    assert [sum(text in line for line in lines) for text in words] == [2, 1, 1, 1]


def refuse(client: redis.Redis, *settings: str) -> Callable[[], object]:
    """Change settings so that a server refuses writes; return what ends it."""
    client.config_set(*settings)
    return lambda: client.config_set(settings[0], "0")


def become_replica(client: redis.Redis) -> Callable[[], object]:
    client.replicaof("127.0.0.1", 1)
    return lambda: client.replicaof("no", "one")


REFUSALS = {
    ErrorCode.QUEUE_READ_ONLY: become_replica,
    ErrorCode.QUEUE_UNAVAILABLE: lambda client: refuse(client, "min-replicas-to-write", "1"),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_workers_wait_in_their_processes_while_the_server_refuses_to_write(
    code: ErrorCode, standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace
) -> None:
    with redis_server() as server, server.client as client:
        workspace = standard_job.workspace(tmp_path, url=server.url)
        workspace.produce()
        with workspace.start("work", "--gpus", "none", "--burst", NET_SLEEP="0.1") as worker:
            wait_until(lambda: len(workspace.done()) >= 3, "some chunks are done")
            accept = REFUSALS[code](client)
            wait_until(lambda: f"[{code}]" in worker.output(), "the refusal is reported")
            accept()
            worker.wait().ok()
        workspace.finalize().ok()
    assert "ended with code" not in worker.output()
    assert len({commit.worker for commit in workspace.commits()}) == 1
    assert {commit.attempt for commit in workspace.commits()} == {1}
    assert workspace.stored() == undisturbed.stored()


def test_workers_read_a_password_that_was_changed_again(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace
) -> None:
    secret = tmp_path / "password"
    secret.write_text("first\n")
    with redis_server("first") as server, server.client as client:
        port = server.settings.port
        workspace = standard_job.workspace(tmp_path, url=f"redis://127.0.0.1:{port}/0")
        workspace.environment[PASSWORD_VARIABLE] = str(secret)
        workspace.produce()
        with workspace.start("work", "--gpus", "none", "--burst", NET_SLEEP="0.1") as worker:
            wait_until(lambda: len(workspace.done()) >= 3, "some chunks are done")
            client.execute_command("ACL", "SETUSER", "default", "resetpass", ">second")
            client.client_kill_filter(user="default")
            reported = f"[{ErrorCode.QUEUE_DENIED}]"
            wait_until(lambda: reported in worker.output(), "the refusal is reported")
            secret.write_text("second\n")
            worker.wait().ok()
        workspace.finalize().ok()
    assert len({commit.worker for commit in workspace.commits()}) == 1
    assert workspace.stored() == undisturbed.stored()
