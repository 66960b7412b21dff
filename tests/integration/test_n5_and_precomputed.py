"""N5 and Neuroglancer precomputed volumes as inputs: levels, axes, codecs, damage and servers."""

import contextlib
import gzip
import itertools
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import tensorstore as ts
import yaml

from chunkq.access import Access
from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.box import Box
from chunkq.storage.formats.tensorstore_arrays import FetchedArray, StoreArray
from chunkq.storage.images import ImageSource, find_source
from chunkq.storage.selection import Selection
from tests.harness.input_combinations import Voxels
from tests.harness.servers.certificate import write_certificate
from tests.harness.servers.moto import moto_server
from tests.harness.servers.strict_s3 import KEY, SECRET, Bucket, strict_s3
from tests.harness.servers.web import Habits, web_server
from tests.harness.volumes import random_volume, read_output
from tests.harness.workspace import Workspace, run_inline
from tests.integration.test_reach import VARIABLES, aws

SHAPE = (9, 8, 7)
VALUES = random_volume(SHAPE)
SHARDING = {
    "@type": "neuroglancer_uint64_sharded_v1",
    "hash": "identity",
    "preshift_bits": 1,
    "minishard_bits": 1,
    "shard_bits": 2,
    "minishard_index_encoding": "gzip",
    "data_encoding": "gzip",
}
NETWORK = """
import numpy as np


def network(batch):
    return batch.astype(np.float32)


def ramp(batch):
    x = batch.astype(np.float32)
    return x + np.arange(x.shape[-1], dtype=np.float32)
"""


def write_n5(folder: Path, values: Voxels = VALUES, **attributes: Any) -> Path:
    """Write an N5 dataset of values z, y, x; then add attributes."""
    metadata = {"blockSize": [4] * values.ndim, "compression": {"type": "gzip"}}
    write("n5", folder, values.T, metadata=metadata)
    change(folder / "attributes.json", **attributes)
    return folder


def write_precomputed(
    folder: Path, values: Voxels = VALUES, key: str = "4_4_40", **scale: Any
) -> Path:
    """Write or extend a volume with a scale of values ([c,] z, y, x)."""
    stored = values.T if values.ndim == 4 else values.T[..., np.newaxis]
    scale = {
        "key": key,
        "size": stored.shape[:3],
        "resolution": [4, 4, 40],
        "chunk_size": [4, 4, 4],
        "encoding": "raw",
        "sharding": None,
        **scale,
    }
    multiscale = {"type": "image", "num_channels": stored.shape[3]}
    write(
        "neuroglancer_precomputed", folder, stored,
        scale_metadata=scale, multiscale_metadata=multiscale,
    )  # fmt: skip
    return folder


def write(driver: str, folder: Path, values: Voxels, **metadata: Any) -> None:
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder}/"}, **metadata}
    shape = values.shape if driver == "n5" else None
    store = ts.open(spec, create=True, dtype=values.dtype, shape=shape).result()
    store[ts.d[:].translate_to[0]].write(values).result()


def change(file: Path, **changes: Any) -> None:
    """Change members of a JSON document; None removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def change_scale(folder: Path, **changes: Any) -> None:
    info = json.loads((folder / "info").read_text())
    info["scales"][0] |= changes
    (folder / "info").write_text(json.dumps(info))


def read(source: ImageSource) -> Voxels:
    array = source.open()
    return array.read(Box.of_shape(array.shape))


def refused(path: Path | str, code: ErrorCode, *parts: str, level: int | str | None = None) -> None:
    """Assert that an input is refused in one line with a code that contains all parts."""
    with pytest.raises(StoreError) as error:
        find_source(str(path), Selection(level=level))
    assert error.value.code is code
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def blocks_of(folder: Path) -> list[Path]:
    """Return the files of blocks and shards."""
    files = filter(Path.is_file, folder.rglob("*"))
    return sorted(f for f in files if f.name not in ("attributes.json", "info"))


# ------------------------------------------------------------------------- jobs


def workspace_over(folder: Path, input: Any, shape: list[int], function: str) -> Workspace:
    (folder / "network.py").write_text(NETWORK)
    model = {
        "runtime": "numpy",
        "type": "class",
        "class_file": "network.py",
        "class_name": function,
        "model_input_shape": shape,
    }
    values = {"input": input, "output": "out.zarr", "threads": 1, "model_config": model}
    return Workspace(folder, values)


def ome_of(output: Path) -> dict[str, Any]:
    image: dict[str, Any] = json.loads((output / "zarr.json").read_text())
    return dict(image["attributes"]["ome"]["multiscales"][0])


@pytest.mark.parametrize("order", [None, "xyz"])
@pytest.mark.parametrize("kind", ["n5", "precomputed"])
def test_a_job_reads_z_y_x_and_writes_size_position_and_unit_of_the_voxels(
    tmp_path: Path, kind: str, order: str | None
) -> None:
    if kind == "n5":
        transform = {"axes": ["z", "y", "x"], "scale": [40.0, 4.0, 4.0],
                     "translate": [-80.0, 0.0, 400.0], "units": ["nm"] * 3}  # fmt: skip
        write_n5(tmp_path / "in", transform=transform)
    else:
        write_precomputed(tmp_path / "in", voxel_offset=[100, 0, -2])
    keys = {"path": f"{kind}://in"} | ({"order": order} if order else {})
    workspace = workspace_over(tmp_path, keys, [3, 4, 5], "ramp")
    with contextlib.chdir(tmp_path):
        run_inline(workspace.values)
    seen = VALUES.T if order else VALUES
    ramp = np.arange(seen.shape[2]) % 5
    np.testing.assert_array_equal(read_output(workspace.output), seen + ramp.astype(np.float32))
    image, direction = ome_of(workspace.output), slice(None, None, -1 if order else 1)
    assert [axis["name"] for axis in image["axes"]] == list("zyx")[direction]
    assert {axis["unit"] for axis in image["axes"]} == {"nanometer"}
    scale, translation = image["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [40.0, 4.0, 4.0][direction]
    assert translation["translation"] == [-80.0, 0.0, 400.0][direction]


def test_channels_come_before_the_spatial_axes_and_feed_the_network(tmp_path: Path) -> None:
    values = random_volume((3, *SHAPE), "uint16")
    write_precomputed(tmp_path / "ng", values)
    write_n5(tmp_path / "in.n5", values, axes=["x", "y", "z", "c"])
    for name in ("ng", "in.n5"):
        keys = {"path": name, "channels": [2, 0]}
        workspace = workspace_over(tmp_path, keys, [2, 4, 4, 4], "network")
        workspace.values["output"] = f"{name}.zarr"
        workspace.values["model_config"]["model_output_shape"] = [2, 4, 4, 4]
        with contextlib.chdir(tmp_path):
            run_inline(workspace.values)
        np.testing.assert_array_equal(read_output(tmp_path / f"{name}.zarr"), values[[2, 0]])


def test_plan_names_the_axes_and_what_they_were_found_in(tmp_path: Path) -> None:
    write_precomputed(tmp_path / "ng")
    workspace = workspace_over(tmp_path, "precomputed://ng", [4, 4, 4], "network")
    workspace.write_job()
    answer = workspace.call("plan", "job.json").ok()
    assert "z 9, y 8, x 7, named by precomputed metadata" in answer.out


def test_a_scheme_of_a_format_is_no_output(tmp_path: Path) -> None:
    write_n5(tmp_path / "in.n5")
    workspace = workspace_over(tmp_path, "in.n5", [4, 4, 4], "network")
    workspace.write_job(output="n5://out.n5")
    workspace.call("plan", "job.json").refused(2, "output", "n5://")


# ------------------------------------------------------------------------- N5


def test_levels_of_a_group_are_found_by_number_and_name(tmp_path: Path) -> None:
    half = VALUES[::2, ::2, ::2]
    write_n5(tmp_path / "x.n5/raw/s0")
    write_n5(tmp_path / "x.n5/raw/s1", half, downsamplingFactors=[2, 2, 2])
    group = f"{tmp_path}/x.n5/raw"
    np.testing.assert_array_equal(read(find_source(group)), VALUES)
    for level in (1, "s1"):
        source = find_source(group, Selection(level=level))
        np.testing.assert_array_equal(read(source), half)
        assert [axis.scale for axis in source.axes] == [2.0] * 3
        assert [axis.translation for axis in source.axes] == [0.5] * 3
    assert find_source(f"{group}/s1").path == source.path
    for level in (2, "s2", "s1/"):
        refused(group, ErrorCode.STORE_UNSUPPORTED, "s0, s1", level=level)
    refused(f"{group}/s0", ErrorCode.STORE_UNSUPPORTED, "level", level=0)
    refused(f"n5://{tmp_path}/x.n5", ErrorCode.STORE_UNSUPPORTED, "raw")


def test_levels_are_those_that_multiscales_lists(tmp_path: Path) -> None:
    write_n5(tmp_path / "x.n5/full")
    write_n5(tmp_path / "x.n5/s0", VALUES[::2])
    datasets = [{"path": "full"}, {"path": "gone"}]
    (tmp_path / "x.n5/attributes.json").write_text(
        json.dumps({"n5": "2.5.0", "multiscales": [{"name": "raw", "datasets": datasets}]})
    )
    np.testing.assert_array_equal(read(find_source(f"{tmp_path}/x.n5")), VALUES)
    refused(tmp_path / "x.n5", ErrorCode.STORE_MISSING, "gone", "level 1", level=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"compression": {"type": "gzip", "level": -1, "useZlib": False, "unknown": [1]}},
        {"compression": None, "compressionType": "gzip"},
    ],
)
def test_attributes_of_other_writers_and_of_older_versions_are_read(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_n5(tmp_path / "in.n5", n5="1.0.0", **changes)
    np.testing.assert_array_equal(read(find_source(str(tmp_path / "in.n5"))), VALUES)


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "lz4": ({"compression": {"type": "lz4", "blockSize": 65536}}, "'lz4'"),
    "jpeg": ({"compression": {"type": "jpeg"}}, "'jpeg'"),
    "no type of the compression": ({"compression": {}}, "compression"),
    "string": ({"dataType": "string"}, "'string'"),
    "object": ({"dataType": "object"}, "'object'"),
    "no block size": ({"blockSize": None}, "blockSize"),
    "block of another rank": ({"blockSize": [4, 4]}, "blockSize"),
    "block of 0": ({"blockSize": [4, 4, 0]}, "blockSize"),
    "text for a size": ({"dimensions": [4, 4, "x"]}, "dimensions"),
    "negative size": ({"dimensions": [4, 4, -4]}, "dimensions"),
}


@pytest.mark.parametrize(("changes", "part"), INVALID.values(), ids=INVALID)
def test_attributes_that_cannot_be_read_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    write_n5(tmp_path / "in.n5", **changes)
    document = f"{tmp_path}/in.n5/attributes.json"
    refused(tmp_path / "in.n5", ErrorCode.STORE_UNSUPPORTED, document, part)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_damaged_attributes_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "attributes.json").write_bytes(content)
    refused(tmp_path, ErrorCode.STORE_UNSUPPORTED, f"{tmp_path}/attributes.json")


@pytest.mark.parametrize("mode", [1, 2])
def test_blocks_of_varying_length_and_of_objects_are_no_voxels(tmp_path: Path, mode: int) -> None:
    write_n5(tmp_path / "in.n5")
    block = tmp_path / "in.n5/0/0/0"
    content = struct.pack(">H", mode) + block.read_bytes()[2:]
    block.write_bytes(content[:16] + struct.pack(">I", 64) + content[16:])
    source = find_source(str(tmp_path / "in.n5"))
    with pytest.raises(ChunkReadError) as error:
        read(source)
    assert error.value.code is ErrorCode.INPUT_UNREADABLE


# ------------------------------------------------------------------------- precomputed


def test_scales_are_levels_by_number_and_key(tmp_path: Path) -> None:
    half = VALUES[:, ::2, ::2]
    write_precomputed(tmp_path / "ng", voxel_offset=[100, 0, -20])
    write_precomputed(
        tmp_path / "ng", half, "8_8_40", resolution=[8, 8, 40], voxel_offset=[50, 0, -20]
    )
    np.testing.assert_array_equal(read(find_source(f"{tmp_path}/ng")), VALUES)
    for level in (1, "8_8_40"):
        source = find_source(f"precomputed://{tmp_path}/ng", Selection(level=level))
        np.testing.assert_array_equal(read(source), half)
        assert [axis.scale for axis in source.axes] == [40.0, 8.0, 8.0]
        assert [axis.translation for axis in source.axes] == [-800.0, 0.0, 400.0]
    for level in (2, "9_9_40"):
        refused(tmp_path / "ng", ErrorCode.STORE_UNSUPPORTED, "4_4_40, 8_8_40", level=level)


def test_the_key_of_a_scale_needs_no_quotes_in_yaml(tmp_path: Path) -> None:
    write_precomputed(tmp_path / "ng")
    write_precomputed(tmp_path / "ng", VALUES[::2], "8_8_80", resolution=[8, 8, 80])
    workspace = workspace_over(tmp_path, "ng", [4, 4, 4], "network")
    job = yaml.safe_dump(workspace.values).replace("input: ng", "input: {path: ng, level: 8_8_80}")
    (tmp_path / "job.yaml").write_text(job)
    with contextlib.chdir(tmp_path):
        run_inline("job.yaml")
    np.testing.assert_array_equal(read_output(workspace.output), VALUES[::2])


def test_a_scale_is_read_beside_others_that_are_not_supported(tmp_path: Path) -> None:
    write_precomputed(tmp_path / "ng")
    info = json.loads((tmp_path / "ng/info").read_text())
    info["scales"] += [info["scales"][0] | {"key": "x", "encoding": "kempressed"}, {"key": "y"}]
    info["scales"][0] |= {"jpeg_quality": 75, "hidden": True}
    info["mesh"] = "mesh"
    (tmp_path / "ng/info").write_text(json.dumps(info))
    np.testing.assert_array_equal(read(find_source(str(tmp_path / "ng"))), VALUES)
    refused(tmp_path / "ng", ErrorCode.STORE_UNSUPPORTED, "'kempressed'", level=1)
    refused(tmp_path / "ng", ErrorCode.STORE_UNSUPPORTED, "info", "size", level="y")


def test_the_key_of_a_scale_can_lead_to_a_folder_beside_the_volume(tmp_path: Path) -> None:
    write_precomputed(tmp_path / "ng")
    (tmp_path / "ng/4_4_40").rename(tmp_path / "shared")
    change_scale(tmp_path / "ng", key="../shared")
    np.testing.assert_array_equal(read(find_source(str(tmp_path / "ng"))), VALUES)


def test_lossy_blocks_are_read(tmp_path: Path) -> None:
    smooth = np.add.outer(np.add.outer(np.arange(9), np.arange(8)), np.arange(7)).astype("u1") * 9
    write_precomputed(tmp_path / "ng", smooth, encoding="jpeg", jpeg_quality=98)
    values = read(find_source(str(tmp_path / "ng"))).astype(int)
    assert np.abs(values - smooth).max() < 12


@pytest.mark.parametrize("suffix", [".gz", ".br"])
def test_blocks_in_compressed_files_are_read_or_refused_by_name(
    tmp_path: Path, suffix: str
) -> None:
    write_precomputed(tmp_path / "ng")
    for block in blocks_of(tmp_path / "ng"):
        block.with_name(block.name + suffix).write_bytes(gzip.compress(block.read_bytes()))
        block.unlink()
    if suffix == ".br":
        refused(tmp_path / "ng", ErrorCode.STORE_UNSUPPORTED, ".br")
    else:
        np.testing.assert_array_equal(read(find_source(str(tmp_path / "ng"))), VALUES)


@pytest.mark.parametrize("kind", ["neuroglancer_annotations_v1", "neuroglancer_legacy_mesh"])
def test_other_data_of_neuroglancer_are_no_volume(tmp_path: Path, kind: str) -> None:
    (tmp_path / "info").write_text(json.dumps({"@type": kind}))
    refused(tmp_path, ErrorCode.STORE_UNSUPPORTED, kind.removeprefix("neuroglancer_"))


def test_a_folder_with_another_file_named_info_is_no_volume(tmp_path: Path) -> None:
    for content in ("hello", "[1]", '{"name": "x"}'):
        (tmp_path / "info").write_text(content)
        refused(tmp_path, ErrorCode.STORE_UNSUPPORTED, "holds no array")


def test_metadata_that_change_the_voxels_change_the_identity(tmp_path: Path) -> None:
    write_precomputed(tmp_path / "ng")
    write_n5(tmp_path / "in.n5")
    sources = [find_source(f"{tmp_path}/{name}") for name in ("ng", "in.n5")]
    before = [source.identity() for source in sources]
    change(tmp_path / "ng/info", mesh="mesh")
    change(tmp_path / "in.n5/attributes.json", comment="new")
    assert [source.identity() for source in sources] == before
    change_scale(tmp_path / "ng", voxel_offset=[4, 0, 0])
    change(tmp_path / "in.n5/attributes.json", blockSize=[8, 4, 4])
    after = [source.identity() for source in sources]
    assert None not in after
    assert not set(after) & set(before)


def test_damaged_metadata_change_the_identity(tmp_path: Path) -> None:
    write_precomputed(tmp_path / "ng")
    write_n5(tmp_path / "in.n5")
    for name, document in (("ng", "info"), ("in.n5", "attributes.json")):
        source = find_source(f"{tmp_path}/{name}")
        before, file = source.identity(), tmp_path / name / document
        file.write_bytes(file.read_bytes()[:-5])
        assert source.identity() not in (None, before)


@pytest.mark.parametrize("sharding", [None, SHARDING])
def test_blocks_are_kept_in_the_cache_of_the_process(
    tmp_path: Path, sharding: dict[str, Any] | None
) -> None:
    write_precomputed(tmp_path / "ng", sharding=sharding)
    write_n5(tmp_path / "in.n5")
    for name in ("ng", "in.n5"):
        source = find_source(f"{tmp_path}/{name}")
        assert source.storage == (4, 4, 4)
        array = source.open(cached=True)
        np.testing.assert_array_equal(array.read(Box.of_shape(SHAPE)), VALUES)
        for block in blocks_of(tmp_path / name):
            block.unlink()
        np.testing.assert_array_equal(array.read(Box.of_shape(SHAPE)), VALUES)


# ------------------------------------------------------------------------- missing and damaged


FORMS: dict[str, Callable[[Path], Path]] = {
    "n5": write_n5,
    "precomputed": write_precomputed,
    "precomputed with shards": lambda folder: write_precomputed(folder, sharding=SHARDING),
    "precomputed as png": lambda folder: write_precomputed(folder, encoding="png"),
    "precomputed as jpeg": lambda folder: write_precomputed(folder, encoding="jpeg"),
    "precomputed segmentation": lambda folder: write_precomputed(
        folder,
        VALUES.astype("u4"),
        encoding="compressed_segmentation",
        compressed_segmentation_block_size=[2, 2, 2],
    ),
}
each_form = pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)


@each_form
def test_missing_blocks_are_zero_and_an_array_without_any_is_refused(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    folder = write(tmp_path / "in")
    whole = read(find_source(str(folder)))
    blocks = blocks_of(folder)
    blocks[0].unlink()
    partial = read(find_source(str(folder)))
    is_missing = partial != whole
    assert is_missing.any()
    assert not partial[is_missing].any()
    for block in blocks[1:]:
        block.unlink()
    refused(folder, ErrorCode.INPUT_EMPTY, str(folder), "allow_empty")
    assert not read(find_source(str(folder), allow_empty=True)).any()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_blocks_that_exist_are_listed_as_presented(tmp_path: Path, suffix: str) -> None:
    write_n5(tmp_path / "in.n5")
    write_precomputed(tmp_path / "ng", voxel_offset=[100, 0, -20])
    write_precomputed(tmp_path / "c", random_volume((2, *SHAPE)), voxel_offset=[-3, 0, 0])
    write_precomputed(tmp_path / "sharded", sharding=SHARDING)
    for name, block in (
        ("in.n5", "1/0/2"), ("ng/4_4_40", "104-107_0-4_-12--11"), ("c/4_4_40", "1-4_0-4_8-9"),
    ):  # fmt: skip
        (tmp_path / name / block).unlink()
    if suffix:
        for block_file in [*blocks_of(tmp_path / "ng"), *blocks_of(tmp_path / "c")]:
            file = block_file.with_name(block_file.name + suffix)
            file.write_bytes(gzip.compress(block_file.read_bytes()))
            block_file.unlink()
    for name, channels in (("in.n5", ()), ("ng", ()), ("c", (0,))):
        stored = find_source(f"{tmp_path}/{name}").stored_chunks()
        assert stored is not None
        expected = set(
            itertools.product(*(range(1) for _ in channels), range(3), range(2), range(2))
        )
        assert set(map(tuple, stored.indices.tolist())) == expected - {(*channels, 2, 0, 1)}
    assert find_source(f"{tmp_path}/sharded").stored_chunks() is None


@each_form
@pytest.mark.parametrize("length", [0, 3, 0.5, -1])
def test_a_truncated_block_never_gives_other_voxels(
    tmp_path: Path, write: Callable[[Path], Path], length: float
) -> None:
    source = find_source(str(write(tmp_path / "in")))
    whole = read(source)
    for block in blocks_of(tmp_path / "in"):
        content = block.read_bytes()
        kept = int(len(content) * length) if length == 0.5 else int(length)
        block.write_bytes(content[:kept])
    with contextlib.suppress(ChunkReadError):
        np.testing.assert_array_equal(read(source), whole)
        assert length == -1  # the last byte of a PNG file can be missing


# ------------------------------------------------------------------------- servers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same volume in several forms."""
    folder = tmp_path_factory.mktemp("served")
    write_n5(folder / "a.n5")
    write_n5(folder / "g.n5/s0")
    write_precomputed(folder / "ng", voxel_offset=[100, 0, -20])
    write_precomputed(folder / "sharded", sharding=SHARDING)
    sparse = VALUES.copy()
    sparse[:4, :4, :4] = 0
    write_n5(folder / "sparse.n5", sparse)
    write_precomputed(folder / "sparse", sparse)
    for path in ("sparse.n5/0/0/0", "sparse/4_4_40/0-4_0-4_0-4"):
        (folder / path).unlink(missing_ok=True)
    for name in ("a.n5", "ng"):
        shutil.copytree(folder / name, folder / f"empty-{name}")
        for block in blocks_of(folder / f"empty-{name}"):
            block.unlink()
    return folder


@pytest.mark.parametrize("missing", [404, 403])
def test_a_web_server_without_listing_serves_n5_and_precomputed(served: Path, missing: int) -> None:
    with web_server(served, Habits(missing=missing)) as url:
        for name in ("a.n5", "g.n5", "ng"):
            source = find_source(f"{url}/{name}")
            assert isinstance(source.open(), FetchedArray)
            np.testing.assert_array_equal(read(source), VALUES)
        np.testing.assert_array_equal(read(find_source(f"n5://{url}/moved/a.n5")), VALUES)
        for name in ("sparse.n5", "sparse"):
            source = find_source(f"{url}/{name}")
            assert not read(source)[:4, :4, :4].any()
            assert bool(source.options.get("forbidden_is_missing")) == (missing == 403)
        for name in ("empty-a.n5", "empty-ng"):
            refused(f"{url}/{name}", ErrorCode.INPUT_EMPTY)
        if missing == 404:
            np.testing.assert_array_equal(read(find_source(f"{url}/sharded")), VALUES)
        else:
            refused(f"{url}/sharded", ErrorCode.STORE_UNSUPPORTED, "shards")


@pytest.mark.parametrize(("name", "block"), [("a.n5", "/1/1/1"), ("ng", "/104-107_4-8_-16--12")])
def test_a_refused_block_is_an_error_where_missing_ones_are_answered_with_404(
    served: Path, name: str, block: str
) -> None:
    habits = Habits()
    with web_server(served, habits) as url:
        source = find_source(f"{url}/{name}")
        habits.refused = block
        with pytest.raises(ChunkReadError, match="403"):
            read(source)


@pytest.mark.parametrize("name", ["a.n5", "ng"])
def test_a_server_that_starts_to_refuse_everything_gives_no_zeros(served: Path, name: str) -> None:
    habits = Habits(missing=403)
    with web_server(served, habits) as url:
        array = find_source(f"{url}/{name}").open()
        habits.refused = "/"
        with pytest.raises(ChunkReadError, match="403"):
            array.read(Box.of_shape(SHAPE))


def test_a_server_without_ranges_is_enough_unless_there_are_shards(served: Path) -> None:
    with web_server(served, Habits(ranges=False)) as url:
        for name in ("a.n5", "ng"):
            np.testing.assert_array_equal(read(find_source(f"{url}/{name}")), VALUES)
        refused(f"{url}/sharded", ErrorCode.STORE_UNSUPPORTED, "download")


@pytest.mark.parametrize("is_public", [False, True])
def test_a_bucket_is_read_by_tensorstore_with_and_without_credentials(
    served: Path, tmp_path: Path, is_public: bool
) -> None:
    bucket = Bucket(served, is_public=is_public, can_list=True)
    variables = {} if is_public else VARIABLES
    with strict_s3(bucket) as url, aws(tmp_path, AWS_ENDPOINT_URL=url, **variables):
        for name in ("a.n5", "g.n5", "ng", "sharded"):
            source = find_source(f"s3://lab/{name}")
            assert isinstance(source.open(), StoreArray)
            np.testing.assert_array_equal(read(source), VALUES)
        np.testing.assert_array_equal(read(find_source("precomputed://s3://lab/ng")), VALUES)
        refused("s3://lab/empty-ng", ErrorCode.INPUT_EMPTY)
    assert any(bucket.signed) != is_public


def test_a_bucket_that_cannot_be_listed_answers_403_for_missing_blocks(
    served: Path, tmp_path: Path
) -> None:
    bucket = Bucket(served)
    with strict_s3(bucket) as url, aws(tmp_path, AWS_ENDPOINT_URL=url, **VARIABLES):
        for name in ("a.n5", "g.n5", "ng"):
            np.testing.assert_array_equal(read(find_source(f"s3://lab/{name}")), VALUES)
        sparse = find_source("s3://lab/sparse")
        assert not read(sparse)[:4, :4, :4].any()
        refused("s3://lab/empty-a.n5", ErrorCode.INPUT_EMPTY)
        for kind in ("n5", "precomputed"):
            refused(f"{kind}://s3://lab/none", ErrorCode.STORE_UNUSABLE, "AccessDenied")
        array = sparse.open()
        bucket.refused = "sparse"
        with pytest.raises(ChunkReadError, match="AccessDenied"):
            array.read(Box.of_shape(SHAPE))


def test_a_bucket_whose_requester_pays_is_read_if_the_job_says_so(
    served: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    bucket = Bucket(served, payer=True, can_list=True)
    inputs = [{"path": f"{path}", "requester_pays": True}
              for path in ("n5://s3://lab/a.n5", "s3://lab/ng")]  # fmt: skip
    with strict_s3(bucket) as url, aws(tmp_path / "home", AWS_ENDPOINT_URL=url, **VARIABLES):
        workspace = workspace_over(tmp_path, inputs, [4, 4, 4], "network")
        with contextlib.chdir(tmp_path):
            run_inline(workspace.values)
    for name in ("a", "ng"):
        np.testing.assert_array_equal(read_output(workspace.output / name), VALUES)


@pytest.fixture(scope="module")
def moto(served: Path) -> Iterator[str]:
    """A server of S3 with the files of the folder in the bucket `lab`."""
    with moto_server() as url:
        filesystem = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=url)
        public = {"ACL": "public-read"}
        filesystem.mkdir("lab", acl="public-read")
        for file in filter(Path.is_file, served.rglob("*")):
            filesystem.pipe_file(f"lab/{file.relative_to(served)}", file.read_bytes(), **public)
        for file in filter(Path.is_file, (served / "ng").rglob("*")):
            name = f"lab/gzip/{file.relative_to(served / 'ng')}"
            content = gzip.compress(file.read_bytes())
            filesystem.pipe_file(name, content, ContentEncoding="gzip", **public)
        yield url


@pytest.mark.parametrize("variables", [VARIABLES, {}], ids=["signed", "anonymous"])
@pytest.mark.parametrize("access", [Access(), Access(requester_pays=True)], ids=["", "fetched"])
def test_moto_serves_n5_and_precomputed_also_with_the_content_encoding_gzip(
    moto: str, tmp_path: Path, variables: dict[str, str], access: Access
) -> None:
    with aws(tmp_path, AWS_ENDPOINT_URL=moto, **variables):
        for name in ("a.n5", "g.n5", "ng", "gzip"):
            source = find_source(f"s3://lab/{name}", access=access)
            assert isinstance(source.open(), FetchedArray) == access.requester_pays
            np.testing.assert_array_equal(read(source), VALUES)


def test_a_job_reads_n5_and_precomputed_of_a_server_with_tls(served: Path, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    with web_server(served, tls=(certificate, key)) as url:
        inputs = [f"n5://{url}/a.n5", f"{url}/ng"]
        workspace = workspace_over(tmp_path, inputs, [4, 4, 4], "network")
        workspace.write_job()
        options = ("--queue", "inprocess://tls")
        workspace.run("run", "job.json", *options, SSL_CERT_FILE=str(certificate)).ok()
    for name in ("a", "ng"):
        np.testing.assert_array_equal(read_output(workspace.output / name), VALUES)
