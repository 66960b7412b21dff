import json
from dataclasses import replace
from pathlib import Path

from benchmarks.scale_inputs import Inputs, collect, from_queues
from benchmarks.scale_limits import Row, regimes

ROW = Row("rq", 512, 1, 4, 1.0, {"device": 1.0, "queue": 0.1}, 0.1, 0.0, 9.0, 0.5)


def figure(part: str, queue: str, label: str, value: float) -> dict[str, object]:
    return {"part": part, "queue": queue, "label": label, "value": value}


def test_of_a_queues_figures_the_one_with_most_tasks_is_used() -> None:
    figures = from_queues(
        [
            figure("scale", "ray", "drain from 1,000,000 tasks", 300.0),
            figure("scale", "ray", "drain from 10,000 tasks", 900.0),
            figure("scale", "ray", "size for 10,000 tasks", 700.0),
            figure("memory", "rq", "memory of queued tasks", 500.0),
            figure("memory", "rq", "disk of queued tasks, log rewritten", 400.0),
            figure("work", "rq", "`chunkq work -w 2`, 1,728 chunks committed before", 200.0),
        ]
    )
    assert figures == {
        "ray_tasks_per_s": (1_000_000, 300.0),
        "ray_task_bytes": (10_000, 700.0),
        "rq_task_bytes": (100_000, 500.0),
    }


def test_figures_without_a_measurement_are_marked_as_assumed(tmp_path: Path) -> None:
    rate = "tasks that do nothing, 2 processes, depth 4"
    drained = [figure("drain", name, f"20,000 {rate}", 50.0) for name in ("rq", "ray")]
    (tmp_path / "queues.json").write_text(json.dumps(drained))
    scaled = [figure("scale", "rq", "drain from 1,000,000 tasks", 40.0)]
    (tmp_path / "queue_scale.json").write_text(json.dumps(scaled))
    collected = collect(
        tmp_path, bucket=False, patch=64, cpu=False, options={"store_latency_s": 1.0}
    )
    assert collected.inputs == replace(
        Inputs(), rq_tasks_per_s=40.0, ray_tasks_per_s=50.0, store_latency_s=1.0
    )
    names = ("rq_tasks_per_s", "ray_tasks_per_s", "dask_tasks_per_s", "store_latency_s")
    assert [collected.sources[name] for name in names] == [
        "queue_scale.json",
        "queues.json",
        "ASSUMED",
        "option",
    ]


def test_numbers_of_workers_with_the_same_limit_form_one_regime() -> None:
    queue = {"device": 0.5, "queue": 1.0}
    rows = [
        ROW,
        replace(ROW, workers=4, hours=2.0),
        replace(ROW, workers=16, hours=0.4),
        replace(ROW, executor="ray"),
        replace(ROW, executor="ray", workers=4, hours=3.0, uses=queue),
        replace(ROW, executor="ray", workers=16, hours=3.0, uses=queue),
        replace(ROW, executor="sqlite"),
    ]
    summary = [(r.executors, r.fewest.workers, r.most.workers, r.most.limit) for r in regimes(rows)]
    assert summary == [
        (("ray",), 1, 1, "device"),
        (("rq",), 1, 4, "device"),
        (("ray",), 4, 16, "queue"),
        (("rq",), 16, 16, "sealing"),
    ]
    equal = regimes([ROW, replace(ROW, executor="dask", queue_use=0.3)])
    assert [(r.executors, r.most.queue_use) for r in equal] == [(("rq", "dask"), 0.3)]
