"""Tests with the tools of RQ, which show the state of chunkq's queues and change it safely."""

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
from chunkq.job.tasks import JobId, Task
from chunkq.queue.backends.rq import RqExecutor
from chunkq.queue.backends.rq.names import queue_name, rq_id
from chunkq.queue.contract.executor import MAX_ATTEMPTS, Attempt, Handler, TaskCounts, WorkerOptions
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.leases.task_loop import Lease
from chunkq.queue.registry import open_executor
from tests.harness.servers.redis import RedisServer, redis_server
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

RQ = Path(sys.executable).parent / "rq"
JOB = JobId("/data/brain.zarr.chunkq", "0a1b2c3d")
CHUNKS = 24
"""Chunks of the standard job."""


def rq(url: str, *arguments: str) -> str:
    """Run the command `rq` and return its output."""
    result = subprocess.run(
        [RQ, *arguments],
        env=os.environ | {"RQ_REDIS_URL": url, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert arguments[0] == "worker" or "Traceback" not in result.stderr, result.stderr
    return result.stdout


def every_value(client: redis_client.Redis) -> dict[str, list[bytes]]:
    """Return all values of a database by key."""
    all_values = {}
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
        all_values[key.decode()] = values
    return all_values


def is_pickle(value: bytes) -> bool:
    """Return whether a value is a pickle (protocol 2 or later), encoded or compressed by RQ."""
    candidates = [value]
    with suppress(ValueError):
        candidates.append(base64.b64decode(value, validate=True))
    for candidate in tuple(candidates):
        with suppress(zlib.error):
            candidates.append(zlib.decompress(candidate))
    return any(c.startswith(b"\x80") and c.endswith(b".") for c in candidates)


# A worker, observed with RQ.


@dataclass(frozen=True)
class Observation:
    """Output of RQ's tools for a job: before, during and after the run of its worker."""

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
    remaining: dict[str, list[bytes]]


def worker_states(client: redis_client.Redis) -> list[dict[str, Any]]:
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


def queue_counts(client: redis_client.Redis) -> dict[str, int]:
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


def job_state(client: redis_client.Redis, job_id: str) -> dict[str, Any]:
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
def observed(
    standard_job: StandardJob, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observation]:
    """Block a worker with two chunks in flight, observe it, delete two tasks, let it continue."""
    folder = tmp_path_factory.mktemp("observed")
    with redis_server() as server, server.client as client:
        workspace = standard_job.workspace(folder, url=server.url)
        workspace.produce()
        info = {"before": rq(server.url, "info", "--raw")}
        counts = {"before": queue_counts(client)}
        jobs, workers = {}, {}
        work = ("work", "--gpus", "none", "--depth", "2")
        with workspace.start(
            *work, NET_HOLD="forward", CHUNKQ_WORKER_SETTINGS='{"lease": 9}'
        ) as cli:
            workspace.wait_until_stopped()
            workspace.wait_for_chunks_in_flight(2)
            (queue,) = Queue.all(client, serializer=JSONSerializer)
            # The first heartbeat may precede the leases, the next one does not.
            with suppress(AssertionError):
                wait_until(
                    lambda: worker_states(client)[0]["state"] == "busy", "the worker is busy", 6
                )
            running = queue.started_job_registry.get_job_ids()
            last = queue.job_ids[-1]
            info["while"] = rq(server.url, "info", "--raw")
            info["of workers"] = rq(server.url, "info", "--raw", "--by-queue")
            counts["while"] = queue_counts(client)
            workers["while"] = worker_states(client)
            jobs = {i: job_state(client, i) for i in (*running, last)}
            stored = every_value(client)
            deleted = {"running": running[0], "queued": last}
            for job_id in deleted.values():
                Job.fetch(job_id, client, serializer=JSONSerializer).delete()
            workspace.open_gate()
            wait_until(
                lambda: len(workspace.done()) == CHUNKS - 1,
                "all chunks but the deleted one are done",
            )
            wait_until(lambda: worker_states(client)[0]["state"] == "idle", "the worker is idle")
            workers["idle"] = worker_states(client)
            resumed = workspace.produce("--resume").out
            wait_until(lambda: len(workspace.done()) == CHUNKS, "the deleted chunk is done")
            wait_until(lambda: not client.exists("chunkq:queues"), "the queue is empty")
            cli.process.send_signal(signal.SIGTERM)
            code = cli.wait().code
        workers["after"] = worker_states(client)
        info["after"] = rq(server.url, "info", "--raw")
        yield Observation(
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
            remaining=every_value(client),
        )


def test_each_job_is_a_queue_named_after_its_output_with_the_right_counts(
    observed: Observation,
) -> None:
    none = {"finished": 0, "deferred": 0, "scheduled": 0, "failed": 0}
    all_queued = {"queued": CHUNKS, "listed": CHUNKS, "fetched": CHUNKS, "started": 0}
    assert observed.counts["before"] == all_queued | none
    fewer = dict.fromkeys(("queued", "listed", "fetched"), CHUNKS - 2)
    assert observed.counts["while"] == fewer | {"started": 2} | none
    assert observed.name.startswith("out.zarr-")


def test_rq_info_shows_the_queue_and_its_worker(observed: Observation) -> None:
    queue = f"queue {observed.name} {CHUNKS}, 0 executing, 0 finished, 0 failed"
    assert observed.info["before"].split("\n") == [queue, ""]
    first, second, *rest = observed.info["while"].split("\n")
    assert first == f"queue {observed.name} {CHUNKS - 2}, 2 executing, 0 finished, 0 failed"
    (worker,) = observed.workers["while"]
    assert second.startswith(f"worker {worker['name']} (")
    assert f"{worker['pid']}) busy {observed.name}." in second
    assert second.endswith("jobs: 0 finished, 0 failed")
    assert rest == [""]
    assert f"{observed.name}: {worker['name']} (busy)" in observed.info["of workers"]
    assert observed.info["after"] == ""


def test_a_busy_worker_is_listed_with_its_current_job(observed: Observation) -> None:
    (worker,) = observed.workers["while"]
    assert (worker["state"], worker["queues"]) == ("busy", [observed.name])
    assert worker["job"] in observed.running
    assert (worker["done"], worker["failed"]) == (0, 0)
    assert worker["host"] == os.uname().nodename
    assert worker["name"].startswith(f"{worker['host']}:cpu:")


def test_an_idle_worker_is_listed_as_idle(observed: Observation) -> None:
    (worker,), (before,) = observed.workers["idle"], observed.workers["while"]
    assert (worker["state"], worker["job"]) == ("idle", None)
    assert (worker["name"], worker["pid"]) == (before["name"], before["pid"])
    assert worker["seen"] > before["seen"]
    # Not the task that was deleted while queued; the one deleted while running may be missing, too.
    assert CHUNKS - 2 <= worker["done"] <= CHUNKS - 1
    assert worker["failed"] == 0


def test_a_worker_that_has_ended_is_not_listed(observed: Observation) -> None:
    assert observed.code == 0
    assert observed.workers["after"] == []


def test_jobs_can_be_fetched_and_read(observed: Observation) -> None:
    (worker,) = observed.workers["while"]
    plan = observed.workspace.item.plan
    for job_id, job in observed.jobs.items():
        assert job["function"] == "chunkq.infer"
        (task,) = job["arguments"]
        assert (task["kind"], task["job"]) == ("infer", str(observed.workspace.job_folder))
        assert tuple(task["chunk"]) in set(plan.indices())
        assert job["origin"] == observed.name
        assert job["enqueued"] is not None
        if job_id in observed.running:
            assert (job["status"], job["worker"]) == (JobStatus.STARTED, worker["name"])
            assert job["started"] >= job["enqueued"]
            assert job["position"] is None
        else:
            assert (job["status"], job["worker"]) == (JobStatus.QUEUED, None)
            assert job["position"] == CHUNKS - 3


def test_a_task_deleted_while_running_completes_and_one_deleted_while_queued_can_be_resumed(
    observed: Observation,
) -> None:
    assert f"{CHUNKS} chunks, {CHUNKS - 1} done, 1 newly queued" in observed.resumed
    assert set(observed.deleted) == {"running", "queued"}
    assert len(observed.workspace.done()) == CHUNKS
    assert set(observed.workspace.computed().values()) == {1}
    assert observed.workspace.finalize().code == 0
    assert observed.workspace.report()["missing"] == []


def test_a_finished_job_leaves_no_keys_in_redis(observed: Observation) -> None:
    (worker,) = observed.workers["while"]
    # RQ keeps the entry of a worker for a minute.
    assert set(observed.remaining) == {f"rq:worker:{worker['name']}", "chunkq:seen"}
    with observed.server.client as client:
        assert 0 < client.ttl(f"rq:worker:{worker['name']}") <= 60


def test_no_stored_value_is_a_pickle(observed: Observation) -> None:
    assert len(observed.stored) > CHUNKS
    for key, values in (observed.stored | observed.remaining).items():
        assert not any(map(is_pickle, values)), key
    # Verify the check with a job in the default format of RQ.
    with observed.server.client as client:
        pickled = Job.create(print, ("x",), connection=client).to_dict()["data"]
    assert is_pickle(pickled)


# Changes by the tools of RQ.


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
    return [Task("infer", *JOB, 0, (number, 0)) for number in range(count)]


def run_all_tasks(executor: RqExecutor, handler: Handler | None = None) -> list[Task]:
    """Run a worker until no task is queued; return the started tasks in order."""
    started: list[Task] = []

    def run(task: Task, attempt: Attempt) -> None:
        started.append(task)
        if handler is not None:
            handler(task, attempt)

    with suppress(ChunkqError):
        executor.run_tasks(run, WorkerOptions("host:cpu:worker", burst=True))
    return started


def fails(task: Task, attempt: Attempt) -> None:
    raise ArithmeticError(f"a poisonous voxel in {task.chunk}")


def reserve_and_expire(executor: RqExecutor, seconds: float = 0.05) -> Lease:
    """Lease a task and wait until the lease expires, in units of a second as RQ does."""
    lease = executor.reserve(WorkerOptions("host:cpu:gone", settings=WorkerSettings(lease=seconds)))
    assert lease is not None
    wait_until(lambda: int(time.time()) > lease.since + seconds, "the lease expires")
    return lease


def test_a_failed_job_has_its_traceback_in_its_latest_result(
    executor: RqExecutor, queue: Queue, client: redis_client.Redis, redis: RedisServer
) -> None:
    executor.submit(tasks(1))
    assert len(run_all_tasks(executor, fails)) == MAX_ATTEMPTS
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
        assert not any(map(is_pickle, values)), key


@pytest.mark.parametrize("how", ["rq requeue --all", "rq requeue ID", "requeue", "registry"])
def test_a_task_that_rq_requeues_is_run(
    how: str, executor: RqExecutor, queue: Queue, client: redis_client.Redis, redis: RedisServer
) -> None:
    executor.submit(tasks(2))
    run_all_tasks(executor, fails)
    failed = sorted(queue.failed_job_registry.get_job_ids())
    assert len(failed) == 2
    if how == "rq requeue --all":
        output = rq(redis.url, "requeue", "--all", "--queue", queue.name)
        assert "Requeueing 2 jobs from failed queue" in output
    elif how == "rq requeue ID":
        rq(redis.url, "requeue", "--queue", queue.name, *failed)
    else:
        for job_id in failed:
            if how == "registry":
                queue.failed_job_registry.requeue(job_id)
            else:
                Job.fetch(job_id, client, serializer=JSONSerializer).requeue()
    assert executor.counts(JOB) == TaskCounts(queued=2)
    assert sorted(run_all_tasks(executor), key=lambda task: task.chunk) == tasks(2)
    assert executor.counts(JOB) == TaskCounts()
    assert not client.keys("rq:job:*")


def test_a_task_that_rq_requeues_can_fail_again(
    executor: RqExecutor, queue: Queue, redis: RedisServer
) -> None:
    executor.submit(tasks(1))
    run_all_tasks(executor, fails)
    rq(redis.url, "requeue", "--all", "--queue", queue.name)
    assert set(run_all_tasks(executor, fails)) == set(tasks(1))
    assert executor.counts(JOB) == TaskCounts(failed=1)
    assert executor.failed(JOB) == tasks(1)
    assert executor.retry(JOB) == 1
    assert run_all_tasks(executor) == tasks(1)


def clean(how: str, queue: Queue, url: str) -> None:
    """Make RQ requeue the jobs of lost workers, as several of its tools do."""
    if how == "rq info":
        rq(url, "info")
    elif how == "a count":
        assert queue.started_job_registry.count == 0
    else:
        clean_registries(queue)


HOW_TO_CLEAN = pytest.mark.parametrize("how", ["rq info", "a count", "clean_registries"])


@HOW_TO_CLEAN
def test_an_expired_lease_is_requeued_by_rq_and_the_task_is_run(
    how: str, executor: RqExecutor, queue: Queue, client: redis_client.Redis, redis: RedisServer
) -> None:
    executor.submit(tasks(2))
    lost = reserve_and_expire(executor)
    clean(how, queue, redis.url)
    assert queue.count == 2
    assert executor.counts(JOB) == TaskCounts(queued=2)
    attempts = {}
    started = run_all_tasks(executor, lambda task, attempt: attempts.update({task: attempt.number}))
    assert set(started) == set(tasks(2))
    assert attempts[lost.task] == 2
    executor.ack(lost)  # the worker was suspended
    assert executor.counts(JOB) == TaskCounts()
    assert not client.keys("rq:job:*")


def test_rq_does_not_change_a_valid_lease(
    executor: RqExecutor, queue: Queue, redis: RedisServer
) -> None:
    executor.submit(tasks(2))
    lease = executor.reserve(WorkerOptions("host:cpu:worker"))
    assert lease is not None
    clean_registries(queue)
    rq(redis.url, "info")
    assert executor.counts(JOB) == TaskCounts(queued=1, running=1)
    executor.ack(lease)
    assert executor.counts(JOB) == TaskCounts(queued=1)


@HOW_TO_CLEAN
def test_a_task_whose_last_lease_expires_is_failed_by_rq_and_can_be_retried(
    how: str, executor: RqExecutor, queue: Queue, redis: RedisServer
) -> None:
    executor.submit(tasks(1))
    for _ in range(MAX_ATTEMPTS - 1):
        lease = executor.reserve(WorkerOptions("host:cpu:worker"))
        assert lease is not None
        executor.nack(lease, ArithmeticError("once more"))
    reserve_and_expire(executor)
    clean(how, queue, redis.url)
    assert executor.counts(JOB) == TaskCounts(failed=1)
    assert executor.failed(JOB) == tasks(1)
    assert executor.retry(JOB) == 1
    assert run_all_tasks(executor) == tasks(1)
    assert executor.counts(JOB) == TaskCounts()


@pytest.mark.parametrize("how", ["rq empty", "empty", "delete"])
def test_an_emptied_queue_keeps_running_tasks_and_can_be_filled_again(
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
    assert executor.counts(JOB) == TaskCounts(running=1)
    executor.renew(WorkerOptions("host:cpu:worker"), [lease])
    assert executor.counts(JOB) == TaskCounts(running=1)
    executor.ack(lease)
    assert executor.counts(JOB) == TaskCounts()
    assert executor.jobs() == {}
    assert executor.submit(tasks(4)) == 4
    assert run_all_tasks(executor) == tasks(4)
    assert set(every_value(client)) == {"rq:worker:host:cpu:worker", "chunkq:seen"}


@pytest.mark.parametrize("how", ["delete", "cancel"])
@pytest.mark.parametrize("ends", ["ack", "nack", "requeue", "release"])
def test_a_task_removed_while_running_leaves_no_keys(
    how: str, ends: str, executor: RqExecutor, queue: Queue, client: redis_client.Redis
) -> None:
    executor.submit(tasks(3))
    lease = executor.reserve(WorkerOptions("host:cpu:worker"))
    assert lease is not None
    job = Job.fetch(rq_id(lease.task), client, serializer=JSONSerializer)
    getattr(job, how)()
    executor.renew(WorkerOptions("host:cpu:worker"), [lease])
    if ends == "nack":
        executor.nack(lease, ArithmeticError("too late"))
    elif ends == "release":
        executor.release("host:cpu:worker")
    else:
        getattr(executor, ends)(lease)
    counts = executor.counts(JOB)
    assert (counts.running, counts.failed) == (0, 0)
    # After resubmission each task is queued once.
    executor.submit(tasks(3))
    assert executor.counts(JOB) == TaskCounts(queued=3)
    started = run_all_tasks(executor)
    assert sorted(started, key=lambda task: task.chunk) == tasks(3)
    assert queue.count == 0
    assert executor.jobs() == {}


@pytest.mark.parametrize("how", ["delete", "cancel"])
def test_a_task_removed_while_queued_is_not_started(
    how: str, executor: RqExecutor, queue: Queue, client: redis_client.Redis
) -> None:
    executor.submit(tasks(3))
    getattr(Job.fetch(queue.job_ids[1], client, serializer=JSONSerializer), how)()
    assert executor.counts(JOB) == TaskCounts(queued=2)
    assert run_all_tasks(executor) == [tasks(3)[0], tasks(3)[2]]
    assert executor.submit(tasks(3)) == 3
    assert run_all_tasks(executor) == tasks(3)


def only_worker(client: redis_client.Redis) -> tuple[str, str | None]:
    """Return the state and the current job of the only worker."""
    (worker,) = Worker.all(client, serializer=JSONSerializer)
    job = worker.get_current_job()
    return worker.get_state(), None if job is None else job.id


def test_a_worker_with_a_lease_is_listed_as_busy(
    executor: RqExecutor, client: redis_client.Redis
) -> None:
    executor.submit(tasks(1))
    options = WorkerOptions("host:cpu:worker")
    with executor.registered(options):
        executor.renew(options, [])
        assert only_worker(client) == ("idle", None)
        lease = executor.reserve(options)
        assert lease is not None
        assert only_worker(client) == ("busy", rq_id(lease.task))
        executor.renew(options, [])  # a heartbeat from before the lease
        executor.renew(options, [lease])
        assert only_worker(client) == ("busy", rq_id(lease.task))
        client.delete("rq:worker:host:cpu:worker")
        executor.renew(options, [lease])
        assert only_worker(client) == ("busy", rq_id(lease.task))
        executor.ack(lease)
        executor.renew(options, [])
        assert only_worker(client) == ("idle", None)
    assert Worker.all(client) == []


def test_the_current_job_of_a_worker_always_exists(
    executor: RqExecutor, client: redis_client.Redis
) -> None:
    executor.submit(tasks(2))
    options = WorkerOptions("host:cpu:worker", depth=2)
    with executor.registered(options):
        first, second = executor.reserve(options), executor.reserve(options)
        assert first is not None
        assert second is not None
        executor.ack(second)
        assert only_worker(client) in [("busy", None), ("busy", rq_id(first.task))]
        executor.renew(options, [first])
        assert only_worker(client) == ("busy", rq_id(first.task))
        executor.ack(first)
        assert only_worker(client)[1] is None


def test_an_id_that_is_listed_twice_is_started_once(executor: RqExecutor, queue: Queue) -> None:
    executor.submit(tasks(2))
    first, second = queue.job_ids
    queue.push_job_id(first)
    queue.push_job_id(second, at_front=True)
    leases = [executor.reserve(WorkerOptions("host:cpu:worker")) for _ in range(4)]
    ids = [rq_id(lease.task) for lease in leases if lease is not None]
    assert sorted(ids) == sorted([first, second])


def test_the_id_of_a_deleted_task_is_skipped(
    executor: RqExecutor, queue: Queue, client: redis_client.Redis
) -> None:
    executor.submit(tasks(2))
    job = Job.fetch(queue.job_ids[0], client, serializer=JSONSerializer)
    job.delete(remove_from_queue=False)
    assert queue.count == 2
    assert run_all_tasks(executor) == tasks(2)[1:]
    assert not client.keys("rq:job:*")


@pytest.mark.parametrize("ends", ["nack", "requeue"])
def test_a_deleted_task_is_not_requeued(
    ends: str, executor: RqExecutor, client: redis_client.Redis
) -> None:
    executor.submit(tasks(1))
    lease = executor.reserve(WorkerOptions("host:cpu:worker"))
    assert lease is not None
    client.delete(f"rq:job:{rq_id(lease.task)}")
    arguments = (ArithmeticError("too late"),) if ends == "nack" else ()
    getattr(executor, ends)(lease, *arguments)
    assert executor.counts(JOB) == TaskCounts()
    assert not client.keys("rq:job:*")
    assert executor.jobs() == {}


@pytest.mark.parametrize("serializer", ["DefaultSerializer", "JSONSerializer"])
def test_a_worker_of_rq_runs_no_task_and_retry_queues_them_again(
    serializer: str, executor: RqExecutor, queue: Queue, redis: RedisServer
) -> None:
    executor.submit(tasks(2))
    command = ("worker", "--burst", "--quiet", "--serializer", f"rq.serializers.{serializer}")
    rq(redis.url, *command, "--worker-class", "rq.SimpleWorker", queue.name)
    assert executor.counts(JOB) == TaskCounts(failed=2)
    assert sorted(executor.failed(JOB), key=lambda task: task.chunk) == tasks(2)
    assert executor.retry(JOB) == 2
    assert sorted(run_all_tasks(executor), key=lambda task: task.chunk) == tasks(2)


def test_a_compressed_message_that_is_not_a_task_is_deleted(
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
        assert run_all_tasks(executor) == []
        assert executor.counts(JOB) == TaskCounts()
        executor.submit(tasks(1))
