"""Jobs whose output is a Neuroglancer precomputed volume, written block by block by the workers."""

import json
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore as ts
from chunkq_producer.job_status import job_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkq.convert import convert, plan_conversion
from chunkq.create import CheckedJob, check_job, create_job
from chunkq.errors import ChunkqError, ErrorCode, MissingJobError
from chunkq.finalize import finalize_job
from chunkq.geometry.axes import Axis, scaled
from chunkq.geometry.box import Box
from chunkq.job.job_handle import JobHandle, open_job
from chunkq.job.job_reading import load_job
from chunkq.job.output_layouts import PrecomputedLayout, StoredImage
from chunkq.queue.contract.executor import Attempt
from chunkq.repair import repair_output
from chunkq.stages.registry import stage_of, stages
from chunkq.storage.images import find_source
from chunkq.verify import verify_job
from chunkq.writers.base import WriterOptions
from tests import reference as ref
from tests.harness.files import files_below
from tests.harness.networks import toy_model
from tests.harness.nifti import write_nifti
from tests.harness.small_job import small_volume
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.waiting import wait_until
from tests.harness.workspace import EPOCH, Workspace, run_inline, run_tasks
from tests.integration.test_outputs import COARSE, scaled_workspace, write_with_axes

Voxels = npt.NDArray[Any]
SHAPE = (13, 17, 11)
PATCH = (6, 6, 6)
SCALE = 100.0
LABELS: dict[str, Any] = {"combine": "soft", "pyramid": {"levels": "auto"}}
AVERAGES: dict[str, Any] = {"pyramid": {"levels": 3}}


def job_in(folder: Path, output: str = "precomputed://out", **changes: Any) -> dict[str, Any]:
    """Write a volume of three axes and a network; return a job whose chunks overlap."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "in.zarr").exists():
        write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8, 8))
    scheme, separator, name = output.rpartition("://")
    return {
        "input": str(folder / "in.zarr"),
        "output": output if scheme == "memory" else f"{scheme}{separator}{folder}/{name}",
        "inference_type": "sliding_window",
        "strides": [3, 4, 3],
        "weight_function": ["weight_gaussian"],
        "chunksize": [8, 8, 8],
        "storage_chunks": [4, 2, 4],
        "threads": 1,
        "model_config": toy_model(folder, PATCH, scale=SCALE),
    } | changes


def info_of(volume: Path | str) -> dict[str, Any]:
    filesystem, inner = fsspec.core.url_to_fs(str(volume))
    values: dict[str, Any] = json.loads(filesystem.cat_file(f"{inner}/info"))
    return values


def scales(volume: Path) -> list[Voxels]:
    """Return the voxels of all scales, read by tensorstore: ([c,] z, y, x)."""
    found = []
    for number in range(len(info_of(volume)["scales"])):
        spec = {
            "driver": "neuroglancer_precomputed",
            "kvstore": {"driver": "file", "path": f"{volume}/"},
            "scale_index": number,
        }
        store = ts.open(spec, open=True, read=True).result()
        values = np.asarray(store.read().result()).T
        found.append(values if len(values) > 1 else values[0])
    return found


def stored(volume: Path) -> dict[str, bytes]:
    """Return the files of a volume, without the job's epoch."""
    files = files_below(volume)
    return files | {"info": EPOCH.sub(b"", files["info"])}


# ------------------------------------------------------------------------- voxels


@st.composite
def jobs(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, ...], int]:
    """Draw keys of a job, the shape of its volume, and the channels of its network."""
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.lists(st.integers(5, 13), min_size=rank, max_size=rank)))
    chunk = [draw(st.sampled_from((6, 8))) for _ in shape]
    keys: dict[str, Any] = {
        "strides": [draw(st.integers(2, 4)) for _ in shape],
        "chunksize": chunk,
        "storage_chunks": [draw(st.sampled_from([1, 2, edge])) for edge in chunk],
    }
    keys["combine"] = draw(st.sampled_from(("weighted_avg", "soft")))
    if keys["combine"] == "weighted_avg":
        keys["output_dtype"] = draw(st.sampled_from(("float32", "float16", "uint8", "int16")))
        if keys["output_dtype"] in ("uint8", "int16"):
            keys["range"] = [-1.5, 2.0]
    if rank > 1:
        keys["pyramid"] = {"levels": 2}
    return keys, shape, draw(st.sampled_from((1, 3)))


@given(jobs())
@settings(
    max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_every_scale_has_the_voxels_of_the_reference(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, Any], tuple[int, ...], int]
) -> None:
    keys, shape, channels = case
    folder, patch = tmp_path_factory.mktemp("job"), (4,) * len(shape)
    volume = random_volume(shape)
    write_zarr(folder / "in.zarr", volume)
    run_inline(
        {
            "input": str(folder / "in.zarr"),
            "output": f"precomputed://{folder}/out",
            "inference_type": "sliding_window",
            "threads": 1,
            "model_config": toy_model(folder, patch, channels=channels, scale=SCALE),
            **keys,
        }
    )
    network = ref.predictor("box_blur", channels, patch)
    expected = ref.reference(
        ref.sliding_window(shape, patch, tuple(keys["strides"])),
        volume,
        lambda values, start: network(values / SCALE, start),
        keys["combine"],
    )
    level, *others = scales(folder / "out")
    level = level.reshape((channels if keys["combine"] == "weighted_avg" else 1, *shape))
    if keys["combine"] == "soft":
        assert level.dtype == np.uint32
        is_clear = expected.margin_of_decision > 1e-5
        np.testing.assert_array_equal(level[0][is_clear], expected.labels[is_clear])
    elif "range" in keys:
        assert level.dtype == keys["output_dtype"]
        codes = ref.quantized(expected.average, -1.5, 2.0, keys["output_dtype"])
        assert np.abs(level.astype(int) - codes.astype(int)).max() <= 1
    else:
        assert level.dtype == np.float32
        step = 1e-3 if keys["output_dtype"] == "float16" else 1e-5
        np.testing.assert_allclose(level, expected.average, rtol=step, atol=step)
    for other in others:
        method = "mode" if keys["combine"] == "soft" else "mean"
        factors = tuple(2 if n > 1 else 1 for n in shape)
        level = ref.reduce_cells(level, factors, method)  # type: ignore[arg-type]
        np.testing.assert_array_equal(other.reshape(level.shape), level)


@pytest.mark.parametrize("keys", [LABELS, AVERAGES], ids=["labels", "averages"])
def test_a_volume_has_the_voxels_of_a_zarr_output_of_the_same_job(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    run_inline(job_in(tmp_path, "out.zarr", **keys))
    job, report = run_inline(job_in(tmp_path, **keys))
    np.testing.assert_array_equal(scales(tmp_path / "out")[0], read_output(tmp_path / "out.zarr"))
    assert report["missing"] == []
    assert job_status(job, None).sealed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["info", *(scale["key"] for scale in info_of(tmp_path / "out")["scales"])]
    )
    source = find_source(f"precomputed://{tmp_path}/out")
    assert [axis.name for axis in source.axes if axis.kind == "space"] == ["z", "y", "x"]


# ------------------------------------------------------------------------- metadata


def image_with_units(path: Path, scale: list[float], translation: list[float]) -> None:
    """Write an OME-Zarr image in micrometers."""
    import zarr

    group = zarr.create_group(path)
    write_zarr(path / "0", random_volume(SHAPE), (8, 8, 8))
    transformations = [
        {"type": "scale", "scale": scale},
        {"type": "translation", "translation": translation},
    ]
    dataset = {"path": "0", "coordinateTransformations": transformations}
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": [dataset]}],
    }


def test_scales_have_voxel_sizes_in_nanometers_and_offsets_in_voxels(tmp_path: Path) -> None:
    keys = job_in(tmp_path, roi=[[4, None], None, None], storage_chunks=[4, 4, 4], **AVERAGES)
    image_with_units(tmp_path / "image.zarr", [0.04, 0.008, 0.008], [0.4, 0.08, -0.016])
    run_inline(keys | {"input": str(tmp_path / "image.zarr")})
    first, second, third = info_of(tmp_path / "out")["scales"]
    assert first["key"] == "8_8_40"
    assert first["resolution"] == [8, 8, 40]
    assert first["voxel_offset"] == [-2, 10, 14]
    assert first["size"] == [11, 17, 9]
    assert (second["resolution"], second["voxel_offset"]) == ([16, 16, 40], [-1, 5, 14])
    assert (third["resolution"], third["voxel_offset"]) == ([32, 32, 40], [-1, 2, 14])


def test_an_output_of_another_resolution_begins_at_the_corner_of_the_input(tmp_path: Path) -> None:
    workspace = scaled_workspace(
        tmp_path, "pyramid", COARSE, input="image.zarr", output="precomputed://out"
    )
    write_with_axes(tmp_path / "image.zarr", (32, 22))
    run_inline(workspace.folder / "job.json")
    for name, kind in {"coarse": "image", "doubt": "segmentation"}.items():
        values = info_of(tmp_path / "out" / name)
        (scale,) = values["scales"]
        assert values["type"] == kind
        assert (scale["key"], scale["resolution"]) == ("4000_1000_1000", [4000, 1000, 1000])
        assert (scale["size"], scale["voxel_offset"]) == ([11, 16, 1], [5, 10, 0])
    assert not any("begins at voxel" in line for line in check_job_of(workspace).warnings)


def check_job_of(workspace: Workspace) -> CheckedJob:
    return check_job(load_job(workspace.folder / "job.json"))


@pytest.mark.parametrize(("scale", "offset"), [("1/4", 8), ("1/2", 4), (1, 2), (2, 1), (4, 0)])
def test_a_finer_or_coarser_volume_has_the_offset_of_its_corner(scale: Any, offset: int) -> None:
    axis = Axis("x", "space", 32, "nanometer", 10.0, 20.0)
    factor = Fraction(scale)
    image = StoredImage(None, None, ((scaled(axis, factor),),), (), (float(factor),))  # type: ignore[arg-type]
    (first,) = PrecomputedLayout().first_voxels(image)
    assert first == pytest.approx(2 / float(factor))
    assert int(first) == offset


def test_names_of_classes_are_properties_of_segments(tmp_path: Path) -> None:
    names = ["nothing", "grey", "white"]
    keys = job_in(tmp_path, combine="soft", classes=names)
    job, _ = run_inline(keys)
    path = tmp_path / "out" / info_of(tmp_path / "out")["segment_properties"] / "info"
    assert json.loads(path.read_text()) == {
        "@type": "neuroglancer_segment_properties",
        "inline": {
            "ids": ["1", "2"],
            "properties": [{"id": "label", "type": "label", "values": names[1:]}],
        },
    }
    assert scales(tmp_path / "out")[0].shape == SHAPE
    written = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_text("{}")):
        damage()
        found = verify_job(job)
        assert [document.name for document, _ in found.documents] == ["segment_properties/info"]
        repair_output(job, found)
        continued = create_job(check_job(load_job(keys)))
        finalize_job(continued, worker="again")
        assert path.read_bytes() == written
        assert verify_job(continued).is_sound
    run_inline(job_in(tmp_path / "numbers", combine="soft"))
    assert "segment_properties" not in info_of(tmp_path / "numbers" / "out")


def test_each_image_of_a_list_is_a_volume(tmp_path: Path) -> None:
    keys = job_in(tmp_path, **LABELS)
    for name in ("left", "right"):
        write_zarr(tmp_path / f"{name}.zarr", random_volume((8 + len(name), 9, 8)))
    job, _ = run_inline(keys | {"input": [str(tmp_path / f"{n}.zarr") for n in ("left", "right")]})
    assert sorted(os.listdir(tmp_path / "out")) == ["left", "right"]
    for name in ("left", "right"):
        assert scales(tmp_path / "out" / name)[0].shape == (8 + len(name), 9, 8)
    assert job_status(job, None).sealed
    assert verify_job(job).is_sound


def test_axes_in_the_order_of_the_network_are_stored_as_x_y_z(tmp_path: Path) -> None:
    keys = job_in(tmp_path, strides=[4, 4, 4], storage_chunks=[2, 4, 8])
    run_inline(keys)
    expected = scales(tmp_path / "out")[0]
    turned = job_in(tmp_path / "turned", strides=[4, 4, 4], storage_chunks=[8, 4, 2])
    run_inline(turned | {"input": {"path": turned["input"], "order": "xyz"}})
    np.testing.assert_allclose(scales(tmp_path / "turned" / "out")[0], expected, atol=1e-5)
    assert info_of(tmp_path / "turned" / "out")["scales"][0]["chunk_sizes"] == [[8, 4, 2]]


# ------------------------------------------------------------------------- workers and kills


def test_three_workers_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    one = small_volume(tmp_path / "one", **LABELS)
    run_inline(one.folder / "job.json")
    three = small_volume(tmp_path / "three", **LABELS)
    three.produce()
    assert three.work("-w", "3").code == 0
    assert three.status()["level_parts_done"] > 0
    three.call("finalize", "precomputed://out").ok()
    assert without_digest(stored(one.output)) == without_digest(stored(three.output))
    for command in ("status", "report", "verify"):
        assert three.call(command, "precomputed://out").code == 0
        assert three.call(command, three.output).code == 0


def without_digest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "info"}


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    undisturbed = small_volume(tmp_path / "undisturbed", **LABELS)
    run_inline(undisturbed.folder / "job.json")
    killed = small_volume(tmp_path / "killed", **LABELS)
    killed.produce()
    lease = {"CHUNKQ_WORKER_SETTINGS": '{"lease": 1, "same_signal": 0}'}
    with killed.start("work", "--gpus", "none", "-w", "1", TOY_DELAY="0.05", **lease):
        wait_until(lambda: len(killed.done("finalize")) > 0, "a block is written")
    before = killed.done() | killed.done("downsample")
    killed.call("produce", "--resume", killed.job_file).ok()
    assert killed.work("--job", "precomputed://out", **lease).code == 0
    killed.finalize().ok()
    after = killed.done() | killed.done("downsample")
    assert {name: after[name] for name in before} == before
    assert without_digest(stored(killed.output)) == without_digest(stored(undisturbed.output))


def test_a_sealing_that_was_cut_off_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = job_in(tmp_path, **LABELS)
    job = create_job(check_job(load_job(keys)))
    run_tasks(job)
    running = info_of(tmp_path / "out")
    assert running["chunkq"]["state"] == "incomplete"
    assert {scale["key"].rpartition(".")[2] for scale in running["scales"]} == {job.record.epoch}
    rename, renamed = os.rename, list[str]()

    def interrupted(source: str, target: str) -> None:
        if source.endswith(f".{job.record.epoch}"):
            if renamed:
                raise KeyboardInterrupt
            renamed.append(target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finalize_job(job, worker="cut off")
    assert not job_status(job, None).sealed
    continued = create_job(check_job(load_job(keys)))
    assert job_status(continued, None).sealed
    assert verify_job(continued).is_sound
    assert len(scales(tmp_path / "out")) == len(running["scales"])


# ------------------------------------------------------------------------- epochs


def test_a_replaced_job_cannot_reach_the_voxels_of_the_new_one(tmp_path: Path) -> None:
    keys = job_in(tmp_path, **LABELS)
    old = create_job(check_job(load_job(keys)))
    target = old.items[0].outputs[0]
    _ = target.target  # open, as in a process that is suspended
    new = create_job(check_job(load_job(keys)), overwrite=True)
    run_tasks(new)
    finalize_job(new, worker="new")
    expected = stored(tmp_path / "out")
    box = Box((0, 0, 0), (4, 2, 4))
    target.write(box, np.full(box.shape, 7, np.uint8))
    assert without_epochs(stored(tmp_path / "out")) == expected
    with pytest.raises(MissingJobError):
        finalize_job(old, worker="old")
    again = create_job(check_job(load_job(keys)))
    assert stored(tmp_path / "out") == expected
    assert verify_job(again).is_sound


def without_epochs(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: text for name, text in files.items() if "." not in name.partition("/")[0]}


def test_in_a_bucket_a_job_that_replaces_another_has_scales_of_its_own(tmp_path: Path) -> None:
    output = f"memory://precomputed-{tmp_path.name}/out"
    keys = job_in(tmp_path, "memory://x", **LABELS) | {"output": f"precomputed://{output}"}
    run_inline(job_in(tmp_path, **LABELS))
    local = without_digest(stored(tmp_path / "out"))
    filesystem, inner = fsspec.core.url_to_fs(output)

    def objects() -> dict[str, bytes]:
        return {
            name.removeprefix(f"{inner}/"): filesystem.cat_file(name)
            for name in filesystem.find(inner)
        }

    run_inline(keys)
    assert without_digest(objects()) == local
    job = create_job(check_job(load_job(keys)), overwrite=True)
    run_tasks(job)
    finalize_job(job, worker="second")
    epoch = job.record.epoch
    assert without_digest(objects()) == {
        name.replace("/", f".{epoch}/", 1): content for name, content in local.items()
    }
    assert info_of(output)["scales"][0]["key"] == f"1_1_1.{epoch}"
    assert verify_job(job).is_sound
    assert job_status(job, None).sealed


@pytest.mark.parametrize("first", ["out", "precomputed://out"])
def test_a_path_with_an_output_of_the_other_format_is_replaced_with_overwrite_only(
    first: str, tmp_path: Path
) -> None:
    (second,) = {"out", "precomputed://out"} - {first}
    run_inline(job_in(tmp_path, first))
    keys = job_in(tmp_path, second)
    with pytest.raises(ChunkqError, match="the format of the output") as caught:
        create_job(check_job(load_job(keys)))
    assert caught.value.code is ErrorCode.OUTPUT_OF_OTHER_JOB
    job = create_job(check_job(load_job(keys)), overwrite=True)
    run_tasks(job)
    finalize_job(job, worker="second")
    assert (tmp_path / "out" / "info").exists() == (second != "out")
    assert (tmp_path / "out" / "zarr.json").exists() == (second == "out")


def test_a_folder_that_is_no_volume_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    checked = check_job(load_job(job_in(tmp_path)))
    for overwrite in (False, True):
        with pytest.raises(ChunkqError) as caught:
            create_job(checked, overwrite=overwrite)
        assert caught.value.code is ErrorCode.OUTPUT_EXISTS
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


# ------------------------------------------------------------------------- verify


def blocks(job: JobHandle) -> Iterator[Path]:
    """Yield the files of all scales that hold voxels."""
    for path in sorted(Path(job.output.path).rglob("*_*_*")):
        if path.is_file():
            yield path


@pytest.mark.parametrize("damage", ["changed", "deleted", "foreign", "scale document", "info"])
def test_damages_are_found_and_repaired_with_the_same_bytes(damage: str, tmp_path: Path) -> None:
    keys = job_in(tmp_path, **LABELS)
    job, _ = run_inline(keys)
    original = files_below(tmp_path / "out")
    everywhere = list(blocks(job))
    assert verify_job(job).is_sound
    assert verify_job(job).objects >= len(everywhere)
    victims = [everywhere[0], everywhere[-1]]
    if damage == "info":
        values = info_of(tmp_path / "out")
        values["scales"][0]["resolution"][0] = 3
        values["mesh"] = "mesh"  # a key of the user
        (tmp_path / "out" / "info").write_text(json.dumps(values))
    elif damage == "scale document":
        (tmp_path / "out" / "1_1_1" / "chunkq.json").unlink()
    elif damage == "foreign":
        (tmp_path / "out" / "1_1_1" / "90-94_0-2_0-4").write_bytes(b"x")
        (tmp_path / "out" / "1_1_1" / "0-5_0-2_0-4").write_bytes(b"x")
    else:
        for path in victims:
            path.unlink() if damage == "deleted" else path.write_bytes(b"x" + path.read_bytes())
    found = verify_job(job)
    assert not found.is_sound
    if damage in ("changed", "deleted"):
        names = {str(path.relative_to(tmp_path / "out")) for path in victims}
        assert {problem.name for problem in found.problems} == names
    repair_output(job, found)
    continued = create_job(check_job(load_job(keys)))
    run_tasks(continued)
    finalize_job(continued, worker="again")
    if damage == "info":
        assert info_of(tmp_path / "out").pop("mesh") == "mesh"
        values = info_of(tmp_path / "out")
        del values["mesh"]
        assert values == json.loads(original["info"])
    else:
        assert files_below(tmp_path / "out") == original
    assert verify_job(continued).is_sound


def test_every_object_belongs_to_one_task(tmp_path: Path) -> None:
    job, _ = run_inline(job_in(tmp_path, **AVERAGES))
    names = [
        name
        for stage in stages()
        if not stage.is_temporary
        for chunk in stage.chunks(job.items[0])
        for name in stage.stored_objects(job.items[0], chunk)
    ]
    assert len(names) == len(set(names))
    folder = f".{job.record.epoch}/"
    present = {str(path.relative_to(tmp_path / "out")) for path in blocks(job)}
    assert present <= {name.replace(folder, "/") for name in names}


# ------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"storage_shards": [8, 8, 8]}, ["storage_shards", "remove"]),
        ({"codec": "zstd"}, ["codec", "remove"]),
        ({"zarr_format": 2}, ["zarr_format", "remove"]),
        ({"fill_value": 3}, ["fill_value", "remove"]),
        (
            {"skip_empty": 0, "output_dtype": "uint8", "range": [-1, 1]},
            ["fill_value: stored as 128", "set fill_value: -1"],
        ),
        ({"output": "precomputed:///a/seg.nii.gz"}, ["NIfTI", "precomputed://seg"]),
        ({"output": "precomputed:///a/out.zarr"}, ["Zarr", "precomputed://out"]),
    ],
)
def test_what_a_volume_cannot_hold_is_refused_before_work_starts(
    keys: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ChunkqError) as caught:
        check_job(load_job(job_in(tmp_path) | keys))
    (line,) = str(caught.value).splitlines()
    assert all(word in line for word in words)
    assert not (tmp_path / "out.chunkq").exists()


def test_time_axes_and_a_fourth_axis_are_refused_with_the_next_step(tmp_path: Path) -> None:
    keys = job_in(tmp_path)
    write_zarr(tmp_path / "series.zarr", random_volume((3, *SHAPE)))
    series = {"path": str(tmp_path / "series.zarr"), "axes": "tzyx"}
    four = {"input": str(tmp_path / "series.zarr"), "strides": [1, 3, 4, 3]}
    four |= {"chunksize": [2, 8, 8, 8], "storage_chunks": [1, 4, 4, 4]}
    four["model_config"] = keys["model_config"] | {
        "model_input_shape": [1, 2, *PATCH],
        "model_output_shape": [3, 2, *PATCH],
    }
    for changes, word in (({"input": series}, "chunkq convert"), (four, "Zarr")):
        with pytest.raises(ChunkqError, match=word) as caught:
            check_job(load_job(keys | changes))
        assert caught.value.code is ErrorCode.STORE_UNSUPPORTED
    one = {**series, "time": 1}
    assert check_job(load_job(keys | {"input": one})).costs.chunks


def test_an_axis_that_runs_backwards_is_refused(tmp_path: Path) -> None:
    keys = job_in(tmp_path)
    write_nifti(tmp_path / "scan.nii", random_volume(SHAPE), affine=np.diag([1, 2, 3, 1]))
    turned = {"path": str(tmp_path / "scan.nii"), "orientation": "LPS"}
    with pytest.raises(ChunkqError, match="backwards") as caught:
        check_job(load_job(keys | {"input": turned}))
    assert caught.value.code is ErrorCode.STORE_UNSUPPORTED


# ------------------------------------------------------------------------- other commands


def test_an_output_is_converted_with_its_meaning(tmp_path: Path) -> None:
    job, _ = run_inline(job_in(tmp_path, output_dtype="uint8", range=[0, 2]))
    for target in ("out.zarr", "out.nii.gz"):
        plan = plan_conversion(
            {"path": f"precomputed://{tmp_path}/out"},
            f"{tmp_path}/{target}",
            options=WriterOptions(),
        )
        convert(plan)
        assert plan.writer.image.values is not None
        assert plan.writer.image.values.scale == pytest.approx(2 / 255)
    voxels = find_source(f"{tmp_path}/out.zarr").open()
    np.testing.assert_array_equal(
        voxels.read(Box.of_shape(voxels.shape)), scales(tmp_path / "out")[0]
    )
    run_inline(job_in(tmp_path / "labels", combine="soft"))
    conversion = plan_conversion(
        {"path": f"{tmp_path}/labels/out"}, f"{tmp_path}/seg.nii.gz", options=WriterOptions()
    )
    assert conversion.writer.image.is_labels
    incomplete = create_job(check_job(load_job(job_in(tmp_path / "incomplete"))))
    run_tasks(incomplete)
    with pytest.raises(ChunkqError) as caught:
        plan_conversion(
            {"path": f"precomputed://{tmp_path}/incomplete/out"},
            f"{tmp_path}/other.zarr",
            options=WriterOptions(),
        )
    assert caught.value.code is ErrorCode.STORE_UNUSABLE
    assert job.output.is_sealed()


def test_a_volume_is_the_input_of_another_job(tmp_path: Path) -> None:
    run_inline(job_in(tmp_path, combine="soft"))
    keys = job_in(tmp_path, "second.zarr") | {"input": f"precomputed://{tmp_path}/out"}
    _, report = run_inline(keys)
    assert report["missing"] == []


def test_a_job_with_a_damaged_level_below_says_so(tmp_path: Path) -> None:
    job = create_job(check_job(load_job(job_in(tmp_path, **LABELS))))
    run_tasks(job)
    for chunk in stage_of("finalize").chunks(job.items[0]):
        stage_of("finalize").run(job.items[0], chunk, Attempt(1, "here"))
    for path in blocks(job):
        path.write_bytes(b"x")
    with pytest.raises(ChunkqError):
        finalize_job(open_job(job.folder.path), worker="last")
