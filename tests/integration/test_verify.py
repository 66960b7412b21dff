"""`chunkq verify` finds damaged outputs and makes them whole again."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import chunkq
from chunkq.errors import ErrorCode
from chunkq.job.object_checksums import decode_checksums
from chunkq.stages.registry import stages
from tests.harness.files import files_below
from tests.harness.output_damages import DAMAGES, objects_of
from tests.harness.small_job import CHUNKS, small_workspace
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace, run_tasks

SHAPE = (32, 22)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A finished job, which no test changes."""
    workspace = small_workspace(tmp_path_factory.mktemp("sealed"))
    workspace.produce()
    complete(workspace)
    workspace.queue_file.unlink()
    return workspace


@pytest.fixture
def workspace(sealed: Workspace) -> Iterator[Workspace]:
    """The finished job, whose output and job folder are as before the test afterwards."""
    saved = sealed.folder / "saved"
    folders = [sealed.output, sealed.job_folder]
    for folder in folders:
        shutil.copytree(folder, saved / folder.name)
    yield sealed
    for folder in folders:
        shutil.rmtree(folder)
        shutil.move(saved / folder.name, folder)
    shutil.rmtree(saved)
    sealed.queue_file.unlink(missing_ok=True)


def complete(workspace: Workspace) -> None:
    workspace.compute_inline()
    workspace.finalize().ok()


def verify(workspace: Workspace, *options: str, code: int = 0) -> dict[str, Any]:
    result = workspace.call("verify", workspace.output, "--json", *options)
    assert result.code == code, result.err
    report: dict[str, Any] = json.loads(result.out)
    return report


def damages(workspace: Workspace, report: dict[str, Any]) -> dict[Path, str]:
    return {workspace.output / entry["object"]: entry["damage"] for entry in report["damaged"]}


def check_repair(workspace: Workspace, original: dict[str, bytes]) -> None:
    """Repair, complete the job, and compare every byte of the output."""
    report = verify(workspace, "--repair")
    assert report["state"] == "repaired"
    if report["chunks"] or report["others"]:
        assert not workspace.status()["sealed"]
        assert workspace.counts().queued == len(report["chunks"]) == report["queued"]
        complete(workspace)
        workspace.queue_file.unlink()
    assert verify(workspace)["state"] == "sound"
    assert files_below(workspace.output) == original


def damage_and_repair(workspace: Workspace, seed: int) -> str:
    """Damage an output, verify, repair and complete it; return the kind of damage."""
    rng = random.Random(seed)
    original = files_below(workspace.output)
    damage = DAMAGES[seed % len(DAMAGES)]
    expected = damage(rng, objects_of(workspace.output / "0"))
    report = verify(workspace, code=1)
    assert damages(workspace, report) == expected
    check_repair(workspace, original)
    return damage.__name__


@pytest.mark.parametrize("seed", range(len(DAMAGES)))
def test_every_random_damage_is_found_and_repaired(workspace: Workspace, seed: int) -> None:
    damage_and_repair(workspace, seed)


@pytest.mark.proof("verify")
def test_each_of_200_random_damages_is_found_and_repaired(workspace: Workspace) -> None:
    kinds = Counter(damage_and_repair(workspace, seed) for seed in range(200))
    assert set(kinds.values()) == {200 // len(DAMAGES)}


def test_a_sound_output_is_complete_and_changes_nothing(workspace: Workspace) -> None:
    before = files_below(workspace.folder)
    report = verify(workspace)
    assert report["state"] == "sound"
    assert report["objects"] == 3 * 8 * 6
    files = objects_of(workspace.output / "0")
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert report["damaged"] == report["pending"] == report["unverified"] == []
    assert verify(workspace, "--repair")["state"] == "sound"
    assert files_below(workspace.folder) == before


def test_every_object_is_written_by_one_task_of_those_that_the_stages_name(
    workspace: Workspace,
) -> None:
    item, names = workspace.item, Counter[str]()
    for stage in stages():
        for chunk in stage.chunks(item):
            objects = list(stage.stored_objects(item, chunk))
            [commit] = item.ledger.commits(stage.kind, [chunk])
            assert commit.stored is not None
            assert len(decode_checksums(commit.stored, len(objects))) == len(objects)
            names.update(objects)
    assert set(names.values()) == {1}
    assert len(names) == 3 * 8 * 6


def test_only_the_contributors_of_a_damaged_block_are_computed_again(workspace: Workspace) -> None:
    block = (2, 1)
    name = next(workspace_objects(workspace, "finalize", block))
    (workspace.output / name).write_bytes(b"")
    report = verify(workspace, code=1)
    contributors = {".".join(map(str, c)) for c in workspace.item.tasks.contributors(block)}
    assert set(report["chunks"]) == contributors
    assert 1 < len(contributors) < len(CHUNKS)
    assert report["others"] == ["finalize 2.1"]


def test_a_damaged_object_of_one_chunk_costs_one_chunk(workspace: Workspace) -> None:
    original = files_below(workspace.output)
    name = next(workspace_objects(workspace, "infer", (1, 0)))
    (workspace.output / name).unlink()
    report = verify(workspace, code=1)
    assert (report["chunks"], report["others"]) == (["1.0"], [])
    check_repair(workspace, original)


def test_a_repaired_output_is_incomplete_until_it_is_finalized(workspace: Workspace) -> None:
    name = next(workspace_objects(workspace, "infer", (1, 0)))
    (workspace.output / name).unlink()
    verify(workspace, "--repair")
    report = verify(workspace, code=3)
    assert (report["state"], report["pending"]) == ("incomplete", ["infer 1.0"])
    assert zarr.open_group(workspace.output, mode="r").attrs["chunkq"]["state"] == "incomplete"
    workspace.compute_inline()
    report = verify(workspace, code=3)
    assert (report["state"], report["pending"]) == ("incomplete", [])
    workspace.finalize().ok()


def workspace_objects(workspace: Workspace, kind: str, chunk: tuple[int, ...]) -> Iterator[str]:
    """Yield the present names of the objects that a task of a sealed output has stored."""
    item = workspace.item
    [stage] = [stage for stage in stages() if stage.kind == kind]
    for name in stage.stored_objects(item, chunk):
        yield "0/" + name.partition("/")[2]


def test_an_object_in_place_of_one_that_is_not_stored_is_foreign_and_is_deleted(
    tmp_path: Path,
) -> None:
    workspace = small_workspace(tmp_path, skip_empty=0, fill_value=0)
    values = np.zeros(SHAPE, np.float32)
    values[:8, :8] = 1
    zarr.open_array(workspace.folder / "in.zarr", mode="r+")[...] = values
    workspace.produce()
    complete(workspace)
    original = files_below(workspace.output)
    objects = objects_of(workspace.output / "0")
    absent = workspace.output / "0/c/2/7/5"
    assert absent not in objects
    absent.parent.mkdir(parents=True, exist_ok=True)
    absent.write_bytes(objects[0].read_bytes())
    report = verify(workspace, code=1)
    assert damages(workspace, report) == {absent: "foreign"}
    assert report["chunks"] == report["others"] == []
    check_repair(workspace, original)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_metadata_are_restored_with_what_users_have_added(tmp_path: Path, zarr_format: int) -> None:
    workspace = small_workspace(tmp_path, zarr_format=zarr_format)
    workspace.produce()
    complete(workspace)
    for path in (workspace.output, workspace.output / "0"):
        node = zarr.open(path, mode="r+")
        node.attrs["mine"] = {"note": "kept"}
    assert verify(workspace)["state"] == "sound"
    group, array = workspace.output, workspace.output / "0"
    names = ("zarr.json", "zarr.json") if zarr_format == 3 else (".zattrs", ".zarray")
    changed_group = json.loads((group / names[0]).read_text())
    attributes = changed_group["attributes"] if zarr_format == 3 else changed_group
    del attributes["chunkq"]["state"]
    (group / names[0]).write_text(json.dumps(changed_group))
    changed_array = json.loads((array / names[1]).read_text())
    changed_array["fill_value"] = 5
    (array / names[1]).write_text(json.dumps(changed_array))
    report = verify(workspace, code=1)
    assert report["documents"] == {names[0]: "changed", f"0/{names[1]}": "changed"}
    assert report["chunks"] == []
    assert verify(workspace, "--repair")["state"] == "repaired"
    assert verify(workspace)["state"] == "sound"
    for path in (group, array):
        assert zarr.open(path, mode="r").attrs["mine"] == {"note": "kept"}
    assert zarr.open_array(array, mode="r").fill_value == 0
    assert workspace.status()["sealed"]


def test_the_document_of_an_array_that_is_missing_is_restored(workspace: Workspace) -> None:
    original = files_below(workspace.output)
    (workspace.output / "0/zarr.json").unlink()
    (workspace.output / "zarr.json").write_bytes(b"{")
    report = verify(workspace, code=1)
    assert report["documents"] == {"0/zarr.json": "missing", "zarr.json": "damaged"}
    check_repair(workspace, original)


def test_an_output_without_its_array_is_computed_again(workspace: Workspace) -> None:
    original = files_below(workspace.output)
    shutil.rmtree(workspace.output / "0")
    assert len(verify(workspace, code=1)["chunks"]) == len(CHUNKS)
    check_repair(workspace, original)


@pytest.mark.parametrize(
    ("kind", "content"), [("infer", b""), ("infer", b"{}"), ("finalize", None), ("finalize", b"{}")]
)
def test_a_commit_record_that_is_missing_or_damaged_is_found(
    workspace: Workspace, kind: str, content: bytes | None
) -> None:
    original = files_below(workspace.output)
    record = next(iter(sorted((workspace.epoch_folder / "done" / kind / "0").iterdir())))
    if content is None:
        record.unlink()
    else:
        record.write_bytes(content)
    report = verify(workspace, code=1)
    # An empty record counts as none.
    damage = "damaged" if content else "missing"
    task = f"{kind} {record.name}"
    assert report["damaged"] == [{"object": None, "damage": damage, "task": task}]
    check_repair(workspace, original)


def test_an_unfinished_output_is_verified_as_far_as_it_is_computed(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path)
    workspace.produce()
    workspace.compute_inline(lambda index: index != (1, 1))
    report = verify(workspace, code=3)
    assert report["state"] == "incomplete"
    assert "infer 1.1" in report["pending"]
    name = next(
        path for path in objects_of(next(workspace.output.glob("0.*"))) if path.stat().st_size
    )
    name.write_bytes(name.read_bytes()[:-1])
    report = verify(workspace, code=1)
    assert damages(workspace, report) == {name: "damaged"}
    assert verify(workspace, "--repair")["state"] == "repaired"
    complete(workspace)
    other = small_workspace(tmp_path / "other")
    other.produce()
    complete(other)
    assert workspace.stored().keys() == other.stored().keys()
    assert objects_equal(workspace, other)


def objects_equal(first: Workspace, second: Workspace) -> bool:
    contents = [[p.read_bytes() for p in objects_of(w.output / "0")] for w in (first, second)]
    return contents[0] == contents[1]


def test_an_input_that_is_gone_is_named_before_anything_changes(workspace: Workspace) -> None:
    next(iter(objects_of(workspace.output / "0"))).write_bytes(b"")
    before = files_below(workspace.output)
    moved = workspace.folder / "moved.zarr"
    (workspace.folder / "in.zarr").rename(moved)
    try:
        result = workspace.call("verify", workspace.output, "--repair")
        assert result.code != 0
        assert ErrorCode.INPUT_MISSING in result.err
        assert files_below(workspace.output) == before
        assert workspace.status()["sealed"]
    finally:
        moved.rename(workspace.folder / "in.zarr")


def test_an_output_of_an_earlier_version_has_no_checksums(workspace: Workspace) -> None:
    for item in workspace.job.items:
        for stage in stages():
            for commit in list(item.ledger.read_commits(stage.kind)):
                item.ledger.delete_commits(stage.kind, [commit.chunk])
                object.__setattr__(commit, "stored", None)
                item.ledger.commit(commit)
    report = verify(workspace, code=1)
    assert len(report["unverified"]) == len(CHUNKS) + 5
    assert report["damaged"] == report["chunks"] == []


def test_the_function_does_what_the_command_does(workspace: Workspace) -> None:
    original = files_below(workspace.output)
    name = next(workspace_objects(workspace, "infer", (1, 0)))
    (workspace.output / name).unlink()
    steps: list[tuple[int, int]] = []
    report = chunkq.verify(
        workspace.output, progress=lambda done, total: steps.append((done, total))
    )
    assert (report["state"], report["chunks"]) == ("damaged", ["1.0"])
    assert steps[-1] == (11, 11)
    report = chunkq.verify(workspace.output, repair=True, queue=workspace.queue_url)
    assert (report["state"], report["queued"]) == ("repaired", 1)
    complete(workspace)
    assert chunkq.verify(workspace.output)["state"] == "sound"
    assert files_below(workspace.output) == original


def test_the_text_names_what_is_wrong_and_what_to_do(workspace: Workspace) -> None:
    name = next(workspace_objects(workspace, "infer", (1, 0)))
    (workspace.output / name).unlink()
    result = workspace.call("verify", workspace.output)
    assert result.code == 1
    assert f"{name}: missing (infer 1.0)" in result.out
    assert "--repair" in result.out
    result = workspace.call("verify", workspace.output, "--repair")
    assert "chunkq work" in result.ok().out


def test_the_images_of_a_group_are_verified_and_repaired(tmp_path: Path) -> None:
    write_zarr(tmp_path / "first.zarr", random_volume(SHAPE), (8, 8))
    write_zarr(tmp_path / "second.zarr", random_volume((20, 30)), (8, 8))
    workspace = small_workspace(tmp_path, input=["first.zarr", "second.zarr"])
    workspace.produce()
    run_tasks(workspace.job)
    workspace.finalize().ok()
    assert verify(workspace)["state"] == "sound"
    original = files_below(workspace.output)
    expected = {}
    for image in ("first", "second"):
        path = objects_of(workspace.output / image / "0")[-1]
        path.write_bytes(path.read_bytes()[1:])
        expected[path] = "damaged"
    (workspace.output / "OME/zarr.json").unlink()
    report = verify(workspace, code=1)
    assert damages(workspace, report) == expected
    assert report["documents"] == {"OME/zarr.json": "missing"}
    assert {name.partition("/")[0] for name in report["chunks"]} == {"0", "1"}
    verify(workspace, "--repair")
    run_tasks(workspace.job)
    workspace.finalize().ok()
    assert files_below(workspace.output) == original
    assert verify(workspace)["state"] == "sound"


def test_several_outputs_are_verified_and_repaired_in_one_pass(tmp_path: Path) -> None:
    outputs = {"mean": {"channels": "0:2", "combine": "weighted_avg"}, "label": {"combine": "soft"}}
    write_zarr(tmp_path / "other.zarr", random_volume((20, 30)), (8, 8))
    workspace = small_workspace(tmp_path, input=["in.zarr", "other.zarr"], outputs=outputs)
    workspace.produce()
    run_tasks(workspace.job)
    workspace.finalize().ok()
    assert verify(workspace)["state"] == "sound"
    report = workspace.report()
    assert {(seam["output"], seam["axis"]) for seam in report["seams"]} == {
        (name, axis) for name in outputs for axis in "yx"
    }
    original = files_below(workspace.output)
    expected = {}
    for name in outputs:
        path = objects_of(workspace.output / "in" / name / "0")[-1]
        path.write_bytes(path.read_bytes()[1:])
        expected[path] = "damaged"
    (workspace.output / "in/label/zarr.json").unlink()
    (workspace.output / "in/zarr.json").unlink()
    found = verify(workspace, code=1)
    assert damages(workspace, found) == expected
    assert found["documents"] == {"in/label/zarr.json": "missing", "in/zarr.json": "missing"}
    assert len(found["damaged"]) == 2
    assert len({entry["task"] for entry in found["damaged"]}) == 1
    verify(workspace, "--repair")
    run_tasks(workspace.job)
    workspace.finalize().ok()
    assert files_below(workspace.output) == original
    assert verify(workspace)["state"] == "sound"
