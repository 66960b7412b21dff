"""RQ's own tools see the true state of chunkq's queues, and whatever they do there does no harm."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from rq import Queue, Worker
from rq.job import Job, JobStatus
from rq.registry import clean_registries
from rq.results import Result
from rq.serializers import JSONSerializer

from chunkq.errors import ChunkqError
from chunkq.executors import open_executor
from chunkq.executors.base import MAX_ATTEMPTS, Attempt, Counts, Handler, WorkerOptions
from chunkq.executors.leases import Lease
from chunkq.executors.rq import RqExecutor
from chunkq.executors.rq.executor import queue_name
from chunkq.executors.settings import WorkerSettings
from chunkq.tasks import Task
from tests.harness.servers.redis import RedisServer, redis_server
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

RQ = Path(sys.executable).parent / "rq"
JOB = "/data/brain.zarr.chunkq"
CHUNKS = 24
"""Of the real job."""


def rq(url: str, *arguments: str) -> str:
    """Run RQ's command; returns what it prints."""
    done = subprocess.run(
        [RQ, *arguments],
        env=os.environ | {"RQ_REDIS_URL": url, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert arguments[0] == "worker" or "Traceback" not in done.stderr, done.stderr
    return done.stdout


def every_value(client: redis_client.Redis) -> dict[str, list[bytes]]:
    """All that a database holds, by key."""
    found = {}
    for key in client.scan_iter():
        kind = client.type(key)
        if kind == b"string":
            values = [client.get(key)]
        elif kind == b"hash":
            values = [part for pair in client.hgetall(key).items() for part in pair]
        elif kind == b"list":
            values = client.lrange(key, 0, -1)
        elif kind == b"set":
            values = list(client.smembers(key))
        elif kind == b"zset":
            values = client.zrange(key, 0, -1)
        else:
            assert kind == b"stream"
            values = [
                part for _, row in client.xrange(key) for pair in row.items() for part in pair
            ]
        found[key.decode()] = values
    return found


def holds_pickle(value: bytes) -> bool:
    """Tell whether a value is a pickle of any protocol since 2, packed as RQ packs or not."""
    packed = [value]
    with suppress(ValueError):
        packed.append(base64.b64decode(value, validate=True))
    for one in tuple(packed):
        with suppress(zlib.error):
            packed.append(zlib.decompress(one))
    return any(one.startswith(b"\x80") and one.endswith(b".") for one in packed)


# A real worker, watched through RQ.


@dataclass(frozen=True)
class Watched:
    """What RQ's tools told about a real job, before, while, and after its chunks were done."""

    workspace: StandardWorkspace
    server: RedisServer
    name: str
    info: dict[str, str]
    jobs: dict[str, dict[str, Any]]
    workers: dict[str, list[dict[str, Any]]]
    counts: dict[str, dict[str, int]]
    running: list[str]
    deleted: dict[str, str]
    stored: dict[str, list[bytes]]
    resumed: str
    code: int
    left: dict[str, list[bytes]]


def look_at_workers(client: redis_client.Redis) -> list[dict[str, Any]]:
    return [
        {
            "name": worker.name,
            "state": worker.get_state(),
            "job": worker.get_current_job_id(),
            "queues": worker.queue_names(),
            "host": worker.hostname,
            "pid": worker.pid,
            "done": worker.successful_job_count,
            "failed": worker.failed_job_count,
            "seen": worker.last_heartbeat.timestamp(),
        }
        for worker in Worker.all(client, serializer=JSONSerializer)
    ]


def look_at_queues(client: redis_client.Redis) -> dict[str, int]:
    (queue,) = Queue.all(client, serializer=JSONSerializer)
    return {
        "queued": queue.count,
        "listed": len(queue.job_ids),
        "fetched": len(queue.jobs),
        "started": queue.started_job_registry.count,
        "failed": queue.failed_job_registry.count,
        "finished": queue.finished_job_registry.count,
        "deferred": queue.deferred_job_registry.count,
        "scheduled": queue.scheduled_job_registry.count,
    }


def look_at_job(client: redis_client.Redis, job_id: str) -> dict[str, Any]:
    job = Job.fetch(job_id, client, serializer=JSONSerializer)
    return {
        "status": job.get_status(),
        "function": job.func_name,
        "arguments": job.args,
        "origin": job.origin,
        "worker": job.worker_name,
        "position": job.get_position(),
        "enqueued": job.enqueued_at,
        "started": job.started_at,
    }


@pytest.fixture(scope="module")
def watched(
    standard_job: StandardJob, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """Hold a worker with two chunks in flight, look around, delete two tasks, let it go on."""
    folder = tmp_path_factory.mktemp("watched")
    with redis_server() as server, server.client as client:
        workspace = standard_job.workspace(folder, url=server.url)
        workspace.produce()
        info = {"before": rq(server.url, "info", "--raw")}
        counts = {"before": look_at_queues(client)}
        jobs, workers = {}, {}
        work = ("work", "--gpus", "none", "--depth", "2")
        with workspace.start(
            *work, NET_HOLD="forward", CHUNKQ_WORKER_SETTINGS='{"lease": 9}'
        ) as cli:
            workspace.wait_until_stopped()
            workspace.wait_for_chunks_in_flight(2)
            (queue,) = Queue.all(client, serializer=JSONSerializer)
            # Its first heartbeat may not have known yet what it holds; the next one does.
            with suppress(AssertionError):
                wait_until(lambda: look_at_workers(client)[0]["state"] == "busy", "it is busy", 6)
            running = queue.started_job_registry.get_job_ids()
            last = queue.job_ids[-1]
            info["while"] = rq(server.url, "info", "--raw")
            info["of workers"] = rq(server.url, "info", "--raw", "--by-queue")
            counts["while"] = look_at_queues(client)
            workers["while"] = look_at_workers(client)
            jobs = {i: look_at_job(client, i) for i in (*running, last)}
            stored = every_value(client)
            deleted = {"running": running[0], "queued": last}
            for job_id in deleted.values():
                Job.fetch(job_id, client, serializer=JSONSerializer).delete()
            workspace.open_gate()
            wait_until(lambda: len(workspace.done()) == CHUNKS - 1, "all but the deleted are done")
            wait_until(
                lambda: look_at_workers(client)[0]["state"] == "idle", "the worker is at rest"
            )
            workers["at rest"] = look_at_workers(client)
            resumed = workspace.produce("--resume").out
            wait_until(lambda: len(workspace.done()) == CHUNKS, "the deleted one is done too")
            wait_until(lambda: not client.exists("chunkq:queues"), "the queue is empty")
            cli.process.send_signal(signal.SIGTERM)
            code = cli.wait().code
        workers["after"] = look_at_workers(client)
        info["after"] = rq(server.url, "info", "--raw")
        yield Watched(
            workspace=workspace,
            server=server,
            name=queue.name,
            info=info,
            jobs=jobs,
            workers=workers,
            counts=counts,
            running=running,
            deleted=deleted,
            stored=stored,
            resumed=resumed,
            code=code,
            left=every_value(client),
        )


def test_each_job_is_a_queue_named_after_its_output_with_the_right_counts(
    watched: Watched,
) -> None:
    none = {"finished": 0, "deferred": 0, "scheduled": 0, "failed": 0}
    some = {"queued": CHUNKS, "listed": CHUNKS, "fetched": CHUNKS, "started": 0}
    assert watched.counts["before"] == some | none
    fewer = dict.fromkeys(("queued", "listed", "fetched"), CHUNKS - 2)
    assert watched.counts["while"] == fewer | {"started": 2} | none
    assert watched.name.startswith("out.zarr-")


def test_rq_info_shows_the_queue_and_its_worker(watched: Watched) -> None:
    queue = f"queue {watched.name} {CHUNKS}, 0 executing, 0 finished, 0 failed"
    assert watched.info["before"].split("\n") == [queue, ""]
    first, second, *rest = watched.info["while"].split("\n")
    assert first == f"queue {watched.name} {CHUNKS - 2}, 2 executing, 0 finished, 0 failed"
    (worker,) = watched.workers["while"]
    assert second.startswith(f"worker {worker['name']} (")
    assert f"{worker['pid']}) busy {watched.name}." in second
    assert second.endswith("jobs: 0 finished, 0 failed")
    assert rest == [""]
    assert f"{watched.name}: {worker['name']} (busy)" in watched.info["of workers"]
    assert watched.info["after"] == ""


def test_a_busy_worker_is_listed_with_its_current_job(watched: Watched) -> None:
    (worker,) = watched.workers["while"]
    assert (worker["state"], worker["queues"]) == ("busy", [watched.name])
    assert worker["job"] in watched.running
    assert (worker["done"], worker["failed"]) == (0, 0)
    assert worker["host"] == os.uname().nodename
    assert worker["name"].startswith(f"{worker['host']}:cpu:")


def test_a_worker_at_rest_is_listed_as_idle(watched: Watched) -> None:
    (worker,), (before,) = watched.workers["at rest"], watched.workers["while"]
    assert (worker["state"], worker["job"]) == ("idle", None)
    assert (worker["name"], worker["pid"]) == (before["name"], before["pid"])
    assert worker["seen"] > before["seen"]
    # All but the one deleted before it was begun; what was deleted meanwhile may not be counted.
    assert CHUNKS - 2 <= worker["done"] <= CHUNKS - 1
    assert worker["failed"] == 0


def test_a_worker_that_has_left_is_not_listed(watched: Watched) -> None:
    assert watched.code == 0
    assert watched.workers["after"] == []


def test_jobs_can_be_fetched_and_read(watched: Watched) -> None:
    (worker,) = watched.workers["while"]
    plan = watched.workspace.job.plan
    for job_id, job in watched.jobs.items():
        assert job["function"] == "chunkq.infer"
        (task,) = job["arguments"]
        assert (task["kind"], task["job"]) == ("infer", str(watched.workspace.job_folder))
        assert tuple(task["chunk"]) in set(plan.indices())
        assert job["origin"] == watched.name
        assert job["enqueued"] is not None
        if job_id in watched.running:
            assert (job["status"], job["worker"]) == (JobStatus.STARTED, worker["name"])
            assert job["started"] >= job["enqueued"]
            assert job["position"] is None
        else:
            assert (job["status"], job["worker"]) == (JobStatus.QUEUED, None)
            assert job["position"] == CHUNKS - 3


def test_what_is_deleted_while_it_runs_is_done_and_what_is_deleted_before_can_be_resumed(
    watched: Watched,
) -> None:
    assert f"{CHUNKS} chunks, {CHUNKS - 1} done, 1 newly queued" in watched.resumed
    assert set(watched.deleted) == {"running", "queued"}
    assert len(watched.workspace.done()) == CHUNKS
    assert set(watched.workspace.computed().values()) == {1}
    assert watched.workspace.finalize().code == 0
    assert watched.workspace.report()["missing"] == []


def test_after_a_job_redis_holds_nothing_of_it(watched: Watched) -> None:
    (worker,) = watched.workers["while"]
    # What RQ remembers of a worker for a minute, and the server's last sign of life.
    assert set(watched.left) == {f"rq:worker:{worker['name']}", "chunkq:seen"}
    with watched.server.client as client:
        assert 0 < client.ttl(f"rq:worker:{worker['name']}") <= 60


def test_nothing_stored_is_a_pickle(watched: Watched) -> None:
    assert len(watched.stored) > CHUNKS
    for key, values in (watched.stored | watched.left).items():
        assert not any(map(holds_pickle, values)), key
    # The test can fail: this is how RQ itself would have stored it.
    with watched.server.client as client:
        usual = Job.create(print, ("x",), connection=client).to_dict()["data"]
    assert holds_pickle(usual)


# What RQ's tools change.


@pytest.fixture
def executor(redis: RedisServer) -> Iterator[RqExecutor]:
    queue = open_executor(redis.url)
    assert isinstance(queue, RqExecutor)
    yield queue
    queue.close()


@pytest.fixture
def client(redis: RedisServer) -> Iterator[redis_client.Redis]:
    with redis.client as connection:
        yield connection


@pytest.fixture
def queue(client: redis_client.Redis) -> Queue:
    return Queue(queue_name(JOB), connection=client, serializer=JSONSerializer)


def tasks(count: int) -> list[Task]:
    return [Task("infer", JOB, (number, 0)) for number in range(count)]


def work_off(executor: RqExecutor, handler: Handler | None = None) -> list[Task]:
    """Work until nothing is left; returns what was begun, in order."""
    begun: list[Task] = []

    def run(task: Task, attempt: Attempt) -> None:
        begun.append(task)
        if handler is not None:
            handler(task, attempt)

    with suppress(ChunkqError):
        executor.run_tasks(run, WorkerOptions("host:cpu:worker", burst=True))
    return begun


def fails(task: Task, attempt: Attempt) -> None:
    raise ArithmeticError(f"a poisonous voxel in {task.chunk}")


def take_and_vanish(executor: RqExecutor, seconds: float = 0.05) -> Lease:
    """Begin a task as a worker that is not heard of again; returns once its lease has run out.

    RQ's clock ticks in whole seconds.
    """
    lease = executor.reserve(WorkerOptions("host:cpu:gone", settings=WorkerSettings(lease=seconds)))
    assert lease is not None
    wait_until(lambda: int(time.time()) > lease.since + seconds, "the lease has run out")
    return lease


def test_a_failed_job_has_its_traceback_in_its_latest_result(
    executor: RqExecutor, queue: Queue, client: redis_client.Redis, redis: RedisServer
) -> None:
    executor.submit(tasks(1))
    assert len(work_off(executor, fails)) == MAX_ATTEMPTS
    (job_id,) = queue.failed_job_registry.get_job_ids()
    job = Job.fetch(job_id, client, serializer=JSONSerializer)
    assert (job.get_status(), job.is_failed) == (JobStatus.FAILED, True)
    assert job.ended_at >= job.started_at
    result = job.latest_result()
    assert (result.type, result.worker_name) == (Result.Type.FAILED, "host:cpu:worker")
    assert result.exc_string.startswith("Traceback (most recent call last):")
    assert "ArithmeticError: a poisonous voxel in (0, 0)" in result.exc_string
    assert "0 executing, 0 finished, 1 failed" in rq(redis.url, "info", "--raw")
    for key, values in every_value(client).items():
        assert not any(map(holds_pickle, values)), key


@pytest.mark.parametrize("how", ["rq requeue --all", "rq requeue ID", "requeue", "registry"])
def test_what_rq_requeues_is_done(
    how: str, executor: RqExecutor, queue: Queue, client: redis_client.Redis, redis: RedisServer
) -> None:
    executor.submit(tasks(2))
    work_off(executor, fails)
    failed = sorted(queue.failed_job_registry.get_job_ids())
    assert len(failed) == 2
    if how == "rq requeue --all":
        said = rq(redis.url, "requeue", "--all", "--queue", queue.name)
        assert "Requeueing 2 jobs from failed queue" in said
    elif how == "rq requeue ID":
        rq(redis.url, "requeue", "--queue", queue.name, *failed)
    else:
        for job_id in failed:
            if how == "registry":
                queue.failed_job_registry.requeue(job_id)
            else:
                Job.fetch(job_id, client, serializer=JSONSerializer).requeue()
    assert executor.counts(JOB) == Counts(queued=2)
    assert sorted(work_off(executor), key=lambda task: task.chunk) == tasks(2)
    assert executor.counts(JOB) == Counts()
    assert not client.keys("rq:job:*")


def test_what_rq_requeues_and_fails_again_is_failed_again(
    executor: RqExecutor, queue: Queue, redis: RedisServer
) -> None:
    executor.submit(tasks(1))
    work_off(executor, fails)
    rq(redis.url, "requeue", "--all", "--queue", queue.name)
    assert set(work_off(executor, fails)) == set(tasks(1))
    assert executor.counts(JOB) == Counts(failed=1)
    assert executor.failed(JOB) == tasks(1)
    assert executor.retry(JOB) == 1
    assert work_off(executor) == tasks(1)


def clean(how: str, queue: Queue, url: str) -> None:
    """Have RQ look for jobs whose workers are gone, as several of its tools do in passing."""
    if how == "rq info":
        rq(url, "info")
    elif how == "a count":
        assert queue.started_job_registry.count == 0
    else:
        clean_registries(queue)


HOW_TO_CLEAN = pytest.mark.parametrize("how", ["rq info", "a count", "clean_registries"])


@HOW_TO_CLEAN
def test_a_lease_that_ran_out_is_requeued_by_rq_and_the_chunk_is_done(
    how: str, executor: RqExecutor, queue: Queue, client: redis_client.Redis, redis: RedisServer
) -> None:
    executor.submit(tasks(2))
    lost = take_and_vanish(executor)
    clean(how, queue, redis.url)
    assert queue.count == 2
    assert executor.counts(JOB) == Counts(queued=2)
    attempts = {}
    begun = work_off(executor, lambda task, attempt: attempts.update({task: attempt.number}))
    assert set(begun) == set(tasks(2))
    assert attempts[lost.task] == 2
    executor.ack(lost)  # its worker was only asleep
    assert executor.counts(JOB) == Counts()
    assert not client.keys("rq:job:*")


def test_a_lease_that_holds_is_left_alone_by_rq(
    executor: RqExecutor, queue: Queue, redis: RedisServer
) -> None:
    executor.submit(tasks(2))
    lease = executor.reserve(WorkerOptions("host:cpu:worker"))
    assert lease is not None
    clean_registries(queue)
    rq(redis.url, "info")
    assert executor.counts(JOB) == Counts(queued=1, running=1)
    executor.ack(lease)
    assert executor.counts(JOB) == Counts(queued=1)


@HOW_TO_CLEAN
def test_a_chunk_whose_last_lease_ran_out_is_failed_by_rq_and_can_be_retried(
    how: str, executor: RqExecutor, queue: Queue, redis: RedisServer
) -> None:
    executor.submit(tasks(1))
    for _ in range(MAX_ATTEMPTS - 1):
        lease = executor.reserve(WorkerOptions("host:cpu:worker"))
        assert lease is not None
        executor.nack(lease, ArithmeticError("once more"))
    take_and_vanish(executor)
    clean(how, queue, redis.url)
    assert executor.counts(JOB) == Counts(failed=1)
    assert executor.failed(JOB) == tasks(1)
    assert executor.retry(JOB) == 1
    assert work_off(executor) == tasks(1)
    assert executor.counts(JOB) == Counts()


@pytest.mark.parametrize("how", ["rq empty", "empty", "delete"])
def test_an_emptied_queue_leaves_what_runs_and_can_be_filled_again(
    how: str, executor: RqExecutor, queue: Queue, client: redis_client.Redis, redis: RedisServer
) -> None:
    executor.submit(tasks(4))
    lease = executor.reserve(WorkerOptions("host:cpu:worker"))
    assert lease is not None
    if how == "rq empty":
        assert "3 jobs removed" in rq(redis.url, "empty", queue.name)
    elif how == "empty":
        queue.empty()
    else:
        queue.delete(delete_jobs=True)
    assert executor.counts(JOB) == Counts(running=1)
    executor.renew(WorkerOptions("host:cpu:worker"), [lease])
    assert executor.counts(JOB) == Counts(running=1)
    executor.ack(lease)
    assert executor.counts(JOB) == Counts()
    assert executor.jobs() == {}
    assert executor.submit(tasks(4)) == 4
    assert work_off(executor) == tasks(4)
    assert set(every_value(client)) == {"rq:worker:host:cpu:worker", "chunkq:seen"}


@pytest.mark.parametrize("how", ["delete", "cancel"])
@pytest.mark.parametrize("ends", ["finish", "fail", "hand_back", "release"])
def test_a_job_taken_away_while_it_runs_ends_without_a_trace(
    how: str, ends: str, executor: RqExecutor, queue: Queue, client: redis_client.Redis
) -> None:
    executor.submit(tasks(3))
    lease = executor.reserve(WorkerOptions("host:cpu:worker"))
    assert lease is not None
    job = Job.fetch(lease.task.id, client, serializer=JSONSerializer)
    getattr(job, how)()
    executor.renew(WorkerOptions("host:cpu:worker"), [lease])
    if ends == "fail":
        executor.nack(lease, ArithmeticError("too late"))
    elif ends == "release":
        executor.release("host:cpu:worker")
    else:
        getattr(executor, ends)(lease)
    counts = executor.counts(JOB)
    assert (counts.running, counts.failed) == (0, 0)
    # Resumed, it is queued once, however it ended.
    executor.submit(tasks(3))
    assert executor.counts(JOB) == Counts(queued=3)
    begun = work_off(executor)
    assert sorted(begun, key=lambda task: task.chunk) == tasks(3)
    assert queue.count == 0
    assert executor.jobs() == {}


@pytest.mark.parametrize("how", ["delete", "cancel"])
def test_a_job_taken_away_while_it_waits_is_not_begun(
    how: str, executor: RqExecutor, queue: Queue, client: redis_client.Redis
) -> None:
    executor.submit(tasks(3))
    getattr(Job.fetch(queue.job_ids[1], client, serializer=JSONSerializer), how)()
    assert executor.counts(JOB) == Counts(queued=2)
    assert work_off(executor) == [tasks(3)[0], tasks(3)[2]]
    assert executor.submit(tasks(3)) == 3
    assert work_off(executor) == tasks(3)


def listed(client: redis_client.Redis) -> tuple[str, str | None]:
    """State and current job of the only worker; reading them must not fail."""
    (worker,) = Worker.all(client, serializer=JSONSerializer)
    job = worker.get_current_job()
    return worker.get_state(), None if job is None else job.id


def test_a_worker_is_listed_as_busy_as_long_as_it_holds_a_chunk(
    executor: RqExecutor, client: redis_client.Redis
) -> None:
    executor.submit(tasks(1))
    options = WorkerOptions("host:cpu:worker")
    with executor.registered(options):
        executor.renew(options, [])
        assert listed(client) == ("idle", None)
        lease = executor.reserve(options)
        assert lease is not None
        assert listed(client) == ("busy", lease.task.id)
        executor.renew(options, [])  # from just before it was begun
        executor.renew(options, [lease])
        assert listed(client) == ("busy", lease.task.id)
        client.delete("rq:worker:host:cpu:worker")
        executor.renew(options, [lease])
        assert listed(client) == ("busy", lease.task.id)
        executor.ack(lease)
        executor.renew(options, [])
        assert listed(client) == ("idle", None)
    assert Worker.all(client) == []


def test_a_workers_current_job_is_never_one_that_is_gone(
    executor: RqExecutor, client: redis_client.Redis
) -> None:
    executor.submit(tasks(2))
    options = WorkerOptions("host:cpu:worker", depth=2)
    with executor.registered(options):
        first, second = executor.reserve(options), executor.reserve(options)
        assert first is not None
        assert second is not None
        executor.ack(second)
        assert listed(client) in [("busy", None), ("busy", first.task.id)]
        executor.renew(options, [first])
        assert listed(client) == ("busy", first.task.id)
        executor.ack(first)
        assert listed(client)[1] is None


def test_an_id_that_is_listed_twice_is_begun_once(executor: RqExecutor, queue: Queue) -> None:
    executor.submit(tasks(2))
    first, second = queue.job_ids
    queue.push_job_id(first)
    queue.push_job_id(second, at_front=True)
    leases_taken = [executor.reserve(WorkerOptions("host:cpu:worker")) for _ in range(4)]
    begun = [lease.task.id for lease in leases_taken if lease is not None]
    assert sorted(begun) == sorted([first, second])


def test_an_id_whose_task_is_gone_is_passed_over(
    executor: RqExecutor, queue: Queue, client: redis_client.Redis
) -> None:
    executor.submit(tasks(2))
    job = Job.fetch(queue.job_ids[0], client, serializer=JSONSerializer)
    job.delete(remove_from_queue=False)
    assert queue.count == 2
    assert work_off(executor) == tasks(2)[1:]
    assert not client.keys("rq:job:*")


@pytest.mark.parametrize("ends", ["fail", "hand_back"])
def test_a_task_that_is_gone_is_not_put_back(
    ends: str, executor: RqExecutor, client: redis_client.Redis
) -> None:
    executor.submit(tasks(1))
    lease = executor.reserve(WorkerOptions("host:cpu:worker"))
    assert lease is not None
    client.delete(f"rq:job:{lease.task.id}")
    arguments = (ArithmeticError("too late"),) if ends == "fail" else ()
    getattr(executor, ends)(lease, *arguments)
    assert executor.counts(JOB) == Counts()
    assert not client.keys("rq:job:*")
    assert executor.jobs() == {}


@pytest.mark.parametrize("serializer", ["DefaultSerializer", "JSONSerializer"])
def test_an_ordinary_rq_worker_runs_nothing_and_retry_mends_it(
    serializer: str, executor: RqExecutor, queue: Queue, redis: RedisServer
) -> None:
    executor.submit(tasks(2))
    rq_with = ("worker", "--burst", "--quiet", "--serializer", f"rq.serializers.{serializer}")
    rq(redis.url, *rq_with, "--worker-class", "rq.SimpleWorker", queue.name)
    assert executor.counts(JOB) == Counts(failed=2)
    assert sorted(executor.failed(JOB), key=lambda task: task.chunk) == tasks(2)
    assert executor.retry(JOB) == 2
    assert sorted(work_off(executor), key=lambda task: task.chunk) == tasks(2)


def test_a_packed_message_that_is_none_of_ours_is_dropped(
    executor: RqExecutor, queue: Queue, client: redis_client.Redis
) -> None:
    executor.submit(tasks(1))
    (job_id,) = queue.job_ids
    for stored in (
        zlib.compress(b"\x80\x04N."),
        zlib.compress(json.dumps(["x"]).encode()),
        b"x\x9c",
    ):
        client.hset(f"rq:job:{job_id}", "data", stored)
        assert work_off(executor) == []
        assert executor.counts(JOB) == Counts()
        executor.submit(tasks(1))
