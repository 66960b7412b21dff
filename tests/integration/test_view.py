"""`chunkq view` serves an output and its input to a viewer on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
import tifffile
import uvicorn
import zarr
from chunkq_producer.view.layers import Layer, axes_of, dimensions_of, layer_of, layers_of, link
from chunkq_producer.view.served import Served, ServedFolder
from chunkq_producer.view.server import application, listen, new_token

from chunkq.access import DEFAULT_ACCESS
from chunkq.convert import convert, plan_conversion
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.box import Box
from chunkq.job.job_handle import open_job
from chunkq.storage.formats import gzip_file
from chunkq.storage.images import find_source
from chunkq.writers.base import WriterOptions
from tests.harness.browser import Page, chromium
from tests.harness.nifti import write_nifti
from tests.harness.processes import RunningCommand
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.waiting import TIMEOUT, wait_until
from tests.harness.workspace import Workspace, run_tasks

ROOT = Path(__file__).parents[2]
SIZE = 96
VIEWPORT = (1000, 557)
CENTERS = ((249, 174), (749, 174), (749, 429))
"""Middle of the sections along z, y and x in the page (x, y); a voxel is one pixel."""
CLASSES = """
import numpy as np

def net(batch):
    scores = [batch < 60, (batch >= 60) & (batch < 140), batch >= 140]
    return np.stack(scores, axis=1).astype(np.float32)
"""


def ball(size: int = SIZE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A ball that is bright in its middle."""
    offsets = np.indices((size,) * 3) - size // 2
    return np.clip(220 - 4 * np.sqrt((offsets**2).sum(axis=0)), 0, 255).astype(np.uint8)


def finished(
    folder: Path, source: str, size: int, *, is_finalized: bool = True, **changes: Any
) -> Workspace:
    """Run a job that stores labels of three classes, or create it only."""
    (folder / "net.py").write_text(CLASSES)
    chunk = [size // 2] * 3
    values = {
        "input": source,
        "output": "out.zarr",
        "inference_type": "patch",
        "combine": "soft",
        "chunksize": chunk,
        "storage_chunks": [size // 4] * 3,
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": "net.py",
            "class_name": "net",
            "dtype": "float32",
            "model_input_shape": chunk,
            "model_output_shape": [3, *chunk],
        },
    }
    changed = {key: value for key, value in (values | changes).items() if value is not None}
    workspace = Workspace(folder, changed)
    workspace.produce()
    if is_finalized:
        run_tasks(workspace.job)
        workspace.finalize().ok()
    return workspace


@contextmanager
def serving(served: Mapping[str, Served]) -> Iterator[str]:
    """Serve in a thread; yield the address with the token."""
    listening, token = listen(), new_token()
    config = uvicorn.Config(application(token, served), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/{token}"
    finally:
        server.should_exit = True
        thread.join()


def fetch(url: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Return status, content and headers of a response."""
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, error.read(), {k.lower(): v for k, v in error.headers.items()}


@pytest.fixture(scope="module", params=["local", "memory"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of a folder with a file of ten digits; the file above it is secret."""
    folder = tmp_path_factory.mktemp("served")
    root = str(folder / "data") if request.param == "local" else "memory://served/data"
    filesystem, inner = fsspec.core.url_to_fs(root)
    filesystem.makedirs(f"{inner}/sub", exist_ok=True)
    filesystem.pipe_file(f"{inner}/sub/digits", b"0123456789")
    filesystem.pipe_file(f"{inner.rpartition('/')[0]}/secret", b"secret")
    if request.param == "local":
        (folder / "data" / "link").symlink_to(folder / "secret")
    with serving({"0": ServedFolder(root, DEFAULT_ACCESS)}) as base:
        yield base


@pytest.mark.parametrize(
    ("requested", "status", "content"),
    [
        (None, 200, b"0123456789"),
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=-3", 206, b"789"),
        ("bytes=10-12", 416, None),
    ],
)
def test_parts_of_objects_are_served(
    server: str, requested: str | None, status: int, content: bytes | None
) -> None:
    headers = {"Range": requested} if requested else {}
    answer = fetch(f"{server}/0/sub/digits", **headers)
    assert answer[0] == status
    if content is not None:
        assert answer[1] == content


def test_pages_of_other_origins_may_read(server: str) -> None:
    _, _, headers = fetch(f"{server}/0/sub/digits", Origin="https://example.org")
    assert headers["access-control-allow-origin"] == "*"
    asked = {
        "Origin": "https://example.org",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "range",
    }
    status, _, headers = fetch(f"{server}/0/sub/digits", "OPTIONS", **asked)
    assert status == 200
    assert "range" in headers["access-control-allow-headers"].lower()
    status, content, headers = fetch(f"{server}/0/sub/digits", "HEAD")
    assert (status, content, headers["content-length"]) == (200, b"", "10")


@pytest.mark.parametrize(
    "path",
    ["0/none", "0/sub", "0/", "1/sub/digits", "0/../secret", "0/%2e%2e/secret", "0/link", "0"],
)
def test_nothing_else_is_served(server: str, path: str) -> None:
    assert fetch(f"{server}/{path}")[0] == 404


def test_the_path_must_have_the_token_and_the_host_must_be_this_machine(server: str) -> None:
    base, _, token = server.rpartition("/")
    assert len(token) > 20
    for wrong in ("x" * len(token), "%C3%A9", token[:-1]):
        assert fetch(f"{base}/{wrong}/0/sub/digits")[0] == 404
    assert fetch(f"{server}/0/sub/digits", Host="attacker.example")[0] == 400
    assert fetch(f"{server}/0/sub/digits", "POST")[0] == 405


@pytest.fixture(scope="module")
def of_tiff(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A finished job over a TIFF file with a voxel size."""
    folder = tmp_path_factory.mktemp("tiff")
    tifffile.imwrite(
        folder / "in.ome.tif",
        ball(32),
        metadata={
            "axes": "ZYX",
            "PhysicalSizeX": 0.5,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": 0.5,
            "PhysicalSizeYUnit": "µm",
            "PhysicalSizeZ": 2,
            "PhysicalSizeZUnit": "µm",
        },
    )
    return finished(folder, "in.ome.tif", 32)


def test_layers_have_types_voxel_sizes_and_ranges(of_tiff: Workspace) -> None:
    layers = layers_of(of_tiff.job)
    assert [(layer.name, layer.type) for layer in layers] == [
        ("in.ome.tif", "image"), ("out.zarr", "segmentation"),
    ]  # fmt: skip
    low, high = layers[0].window or (0, 0)
    assert low < high
    assert np.percentile(ball(32), 1) == low
    assert dimensions_of(axes_of(of_tiff.job)) == {
        "x": [pytest.approx(5e-7), "m"], "y": [pytest.approx(5e-7), "m"],
        "z": [pytest.approx(2e-6), "m"],
    }  # fmt: skip


def test_an_input_of_any_format_is_served_as_an_image(of_tiff: Workspace) -> None:
    layers = layers_of(of_tiff.job)
    served = {str(number): layer.served for number, layer in enumerate(layers)}
    with serving(served) as base:
        image = zarr.open_group(f"{base}/0", mode="r")
        assert isinstance(image, zarr.Group)
        scale = image.attrs["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"]  # type: ignore[index, call-overload]
        assert scale[0]["scale"] == [2, 0.5, 0.5]
        array = zarr.open_array(f"{base}/0/0", mode="r", zarr_format=3)
        np.testing.assert_array_equal(array[...], ball(32))
        labels = zarr.open_array(f"{base}/1/0", mode="r", zarr_format=3)
        np.testing.assert_array_equal(labels[...], read_output(str(of_tiff.output)))
        assert fetch(f"{base}/0/0/c/9/0/0")[0] == 404
        assert fetch(f"{base}/0/0/c/0/0")[0] == 404


@pytest.mark.parametrize(
    ("keys", "window"),
    [({"activation": "softmax"}, (0, 1)), ({"activation": "none"}, None)],
)
def test_averages_are_images_and_arrays_without_axes_get_those_of_the_output(
    tmp_path: Path, keys: dict[str, str], window: tuple[float, float] | None
) -> None:
    write_zarr(tmp_path / "in.zarr", random_volume((16, 16, 16), "uint8"), (8, 8, 8))
    workspace = finished(tmp_path, "in.zarr", 16, combine="weighted_avg", **keys)
    states = [layer.as_state(f"http://h/{n}/") for n, layer in enumerate(layers_of(workspace.job))]
    source, output = states
    dimensions = {axis: [1.0, ""] for axis in "zyx"}
    assert source["source"] == {
        "url": "zarr://http://h/0/", "transform": {"outputDimensions": dimensions},
    }  # fmt: skip
    assert (output["type"], output["source"]) == ("image", "zarr://http://h/1/")
    shown = tuple(output["shaderControls"]["normalized"]["range"])
    assert shown == window or (window is None and 0 <= shown[0] < shown[1] <= 1.5)
    state = json.loads(unquote(link("p", states, dimensions).removeprefix("p#!")))
    assert state["layers"] == states


def test_a_voxel_of_an_array_without_axes_of_its_own_has_its_size() -> None:
    axes = (
        Axis("z", "space", 4, "micrometer", -2.0, 6.0), Axis("y", "space", 4, None, 0.5),
        Axis("x", "space", 4, "nanometer", 8.0),
    )  # fmt: skip
    layer = Layer("out", "image", "zarr", ServedFolder("/", DEFAULT_ACCESS), axes=axes)
    transform = layer.as_state("u")["source"]["transform"]
    micro, nano = pytest.approx(2e-6), pytest.approx(8e-9)
    assert transform["outputDimensions"] == {"z": [micro, "m"], "y": [0.5, ""], "x": [nano, "m"]}
    assert transform["matrix"] == [[pytest.approx(-2e-6), 0, 0, 3], [0, 0.5, 0, 0], [0, 0, nano, 0]]


def test_each_output_of_several_is_a_layer(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", random_volume((16, 16, 16), "uint8"), (8, 8, 8))
    outputs = {"score": {"channels": "0:2", "activation": "softmax"}, "label": {"combine": "soft"}}
    workspace = finished(tmp_path, "in.zarr", 16, combine=None, outputs=outputs)
    layers = layers_of(workspace.job)
    assert {layer.name: layer.type for layer in layers} == {
        "in.zarr": "image", "score": "image", "label": "segmentation",
    }  # fmt: skip
    served = {str(number): layer.served for number, layer in enumerate(layers)}
    with serving(served) as base:
        for number, layer in enumerate(layers[1:], start=1):
            document = json.loads(fetch(f"{base}/{number}/zarr.json")[1])
            path = workspace.output / layer.name / "zarr.json"
            assert document == json.loads(path.read_text())


def printed_by(command: RunningCommand) -> dict[str, Any]:
    """Return what the command prints before it serves."""
    wait_until(lambda: command.output().endswith("\n"), "it has printed the link")
    printed: dict[str, Any] = json.loads(command.output())
    return printed


def test_the_command_prints_a_link_and_serves_until_it_is_interrupted(of_tiff: Workspace) -> None:
    with of_tiff.start("view", of_tiff.output, "--no-open", "--json") as command:
        printed = printed_by(command)
        assert printed["url"].startswith("https://neuroglancer-demo.appspot.com/#!{")
        address = printed["layers"][1]["source"].removeprefix("zarr://")
        assert address.startswith("http://127.0.0.1:")
        document = json.loads(fetch(f"{address}zarr.json")[1])
        assert document == json.loads((of_tiff.output / "zarr.json").read_text())
        command.process.send_signal(signal.SIGINT)
        assert command.wait().code in (0, 130)


def test_a_folder_that_is_no_page_is_refused(of_tiff: Workspace) -> None:
    result = of_tiff.call("view", of_tiff.output, "--no-open", "--page", of_tiff.folder)
    assert result.code == 1
    assert "--page" in result.err


@pytest.mark.parametrize("name", ["seg.nii.gz", "seg.tif", "seg.h5"])
def test_an_output_that_is_a_file_is_served_as_an_image(tmp_path: Path, name: str) -> None:
    write_zarr(tmp_path / "in.zarr", random_volume((16, 16, 16), "uint8"), (8, 8, 8))
    workspace = finished(tmp_path, "in.zarr", 16, output=name, is_finalized=False)
    job = open_job(str(tmp_path / f"{name}.chunkq"))
    running = layers_of(job)[1]
    assert (running.name, running.type) == (name, "segmentation")
    run_tasks(job)
    workspace.call("finalize", name).ok()
    layer = layers_of(job)[1]
    assert (layer.name, layer.type) == (name, "segmentation")
    with serving({"1": layer.served}) as base:
        array = zarr.open_array(f"{base}/1/0", mode="r", zarr_format=3)
        source = find_source(str(tmp_path / name)).open()
        expected = source.read(Box.of_shape(source.shape))
        np.testing.assert_array_equal(array[...], expected)
        assert len(np.unique(expected)) > 1


def test_a_file_that_cannot_be_read_by_region_is_refused_with_the_command_to_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gzip_file, "WHOLE_BYTES", 1000)
    write_nifti(tmp_path / "scan.nii.gz", random_volume((16, 16, 16)))
    with pytest.raises(StoreError, match=r"chunkq convert .*scan\.nii\.gz scan\.zarr") as caught:
        layer_of(find_source(str(tmp_path / "scan.nii.gz")))
    assert caught.value.code is ErrorCode.STORE_UNSUPPORTED


# ------------------------------------------------------------------------- precomputed volumes


def test_a_precomputed_output_is_shown_beside_its_input_in_nanometers(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", random_volume((16, 16, 16), "uint8"), (8, 8, 8))
    outputs = {"score": {"channels": "0:2", "activation": "softmax"}, "label": {"combine": "soft"}}
    finished(
        tmp_path, "in.zarr", 16, combine=None, outputs=outputs, output="precomputed://out",
        is_finalized=False,
    )  # fmt: skip
    job = open_job(f"{tmp_path}/out.chunkq")
    nanometer = [pytest.approx(1e-9), "m"]
    assert dimensions_of(axes_of(job)) == dict.fromkeys("xyz", nanometer)
    layers = layers_of(job)
    states = [layer.as_state(f"http://h/{n}/") for n, layer in enumerate(layers)]
    source, label, score = states
    assert (source["type"], source["source"]) == ("image", "zarr://http://h/0/")
    assert (label["type"], label["source"]) == ("segmentation", "precomputed://http://h/1/")
    assert (score["type"], score["source"]) == ("image", "precomputed://http://h/2/")
    assert score["shaderControls"]["normalized"]["range"] == [0, 1]
    with serving({str(number): layer.served for number, layer in enumerate(layers)}) as base:
        image = json.loads(fetch(f"{base}/0/zarr.json")[1])["attributes"]["ome"]["multiscales"][0]
        units = [(axis["name"], axis["unit"]) for axis in image["axes"]]
        assert units == [(name, "nanometer") for name in "zyx"]
        info = json.loads(fetch(f"{base}/1/info")[1])
        assert info["chunkq"]["state"] == "incomplete"
        key = info["scales"][0]["key"]
        assert key == f"1_1_1.{job.record.epoch}"
        run_tasks(job)
        assert fetch(f"{base}/1/{key}/0-4_0-4_0-4")[0] == 200


def test_a_volume_without_a_job_is_one_layer(tmp_path: Path, of_tiff: Workspace) -> None:
    for name, is_labels in (("image", False), ("labels", True)):
        target = f"precomputed://{tmp_path}/{name}"
        source = {"path": str(of_tiff.output)}
        convert(plan_conversion(source, target, is_labels=is_labels, options=WriterOptions()))
        source_of_volume = find_source(target)
        layer = layer_of(source_of_volume)
        assert layer.as_state("http://h/")["source"] == "precomputed://http://h/"
        assert layer.type == ("segmentation" if is_labels else "image")
        assert (layer.window is None) == is_labels
        dimensions = dimensions_of(source_of_volume.stored_axes)
        assert dimensions["z"] == [pytest.approx(2e-6), "m"]
    with of_tiff.start(
        "view", f"precomputed://{tmp_path}/labels", "--no-open", "--json"
    ) as command:
        (printed,) = printed_by(command)["layers"]
        assert printed["type"] == "segmentation"
        address = printed["source"].removeprefix("precomputed://")
        assert json.loads(fetch(f"{address}info")[1])["type"] == "segmentation"


@pytest.mark.parametrize("name", ["nothing.zarr", "job.yaml"])
def test_a_path_with_neither_a_job_nor_an_image_is_one_line(of_tiff: Workspace, name: str) -> None:
    of_tiff.call("view", name, "--no-open").refused(2, ErrorCode.JOB_MISSING, name)


def test_napari_shows_images_and_labels(
    of_tiff: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, Any, dict[str, Any]]] = []

    class Viewer:
        def add_image(self, data: Any, **options: Any) -> None:
            shown.append(("image", data, options))

        def add_labels(self, data: Any, **options: Any) -> None:
            shown.append(("labels", data, options))

    napari = types.SimpleNamespace(Viewer=Viewer, run=lambda: None)
    monkeypatch.setitem(sys.modules, "napari", napari)  # type: ignore[arg-type]
    of_tiff.call("view", of_tiff.output, "--napari").ok()
    assert [kind for kind, *_ in shown] == ["image", "labels"]
    for (_, data, options), expected in zip(
        shown, (ball(32), read_output(str(of_tiff.output))), strict=True
    ):
        assert options["scale"] == [2, 0.5, 0.5]
        np.testing.assert_array_equal(np.asarray(data), expected)
        np.testing.assert_array_equal(data[3], expected[3])
        np.testing.assert_array_equal(data[1:9, -1, ::2], expected[1:9, -1, ::2])
        assert data[2, 3, 4] == expected[2, 3, 4]


def test_a_missing_napari_is_one_line(of_tiff: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "napari", None)  # type: ignore[arg-type]
    result = of_tiff.call("view", of_tiff.output, "--napari")
    assert result.code == 1
    assert ErrorCode.PACKAGE_MISSING in result.err


# ------------------------------------------------------------------------- a real page


@pytest.mark.proof("view")
@pytest.mark.parametrize("output", ["out.zarr", "precomputed://out"])
def test_neuroglancer_in_a_browser_shows_the_input_and_its_labels(
    tmp_path: Path, output: str
) -> None:
    page = built_page(tmp_path / "npm")
    write_zarr(tmp_path / "in.zarr", ball(), (32, 32, 32))
    classes = ["outside", "shell", "core"]
    workspace = finished(
        tmp_path, "in.zarr", SIZE, output=output, classes=classes, is_finalized=False
    )
    run_tasks(open_job(f"{tmp_path}/{output.rpartition('/')[2]}.chunkq"))
    workspace.call("finalize", output).ok()
    with (
        workspace.start("view", output, "--no-open", "--json", "--page", page) as command,
        chromium(tmp_path / "profile") as address,
    ):
        url = printed_by(command)["url"]
        picture = tmp_path / "page.png"
        pixels, names = asyncio.run(shown_pixels(address, url, picture))
    assert names == ("shell,core" if output.startswith("precomputed") else "none")
    for x, y in CENTERS:
        nothing, outer, bright_outer, inner = (
            pixels[y - offset, x - offset] for offset in (34, 26, 16, 10)
        )
        assert np.ptp(nothing) == 0, "class 0 has no color"
        assert nothing[0] < 40, "the input is dark there"
        for pixel in (outer, bright_outer, inner):
            assert np.ptp(pixel) > 20, "the other classes have a color"
        assert hue(outer) == hue(bright_outer) != hue(inner)
        assert outer.sum() < bright_outer.sum(), "the input shines through"
        assert (pixels[y - 60, x - 60] == 128).all(), "nothing outside of the volume"


def hue(pixel: np.ndarray[Any, Any]) -> int:
    """Return which color is the strongest."""
    return int(pixel.argmax())


def built_page(folder: Path) -> Path:
    """Build the page from the npm package, as `deploy/neuroglancer` says."""
    source = ROOT / "deploy/neuroglancer"
    folder.mkdir()
    for name in ("package.json", "build.mjs"):
        (folder / name).write_bytes((source / name).read_bytes())
    environment = {**os.environ, "npm_config_cache": str(folder / "cache")}
    for command in (
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"],
        ["node", "build.mjs", "page"],
    ):
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder / "page"


NAMES = """(() => {
    const group = viewer.layerManager.managedLayers[1].layer.displayState.segmentationGroupState;
    const names = group.value.segmentPropertyMap.value;
    return names ? [1n, 2n].map(segment => names.getSegmentLabel(segment)).join() : "none";
})()"""


async def shown_pixels(address: str, url: str, picture: Path) -> tuple[np.ndarray[Any, Any], str]:
    """Open a page and wait until it has drawn all data.

    Return its picture (y, x, RGB), and the names of segments 1 and 2 of the second layer.
    """
    import aiohttp
    from PIL import Image

    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as socket,
    ):
        page = Page(session, socket)
        size = dict(zip(("width", "height"), VIEWPORT, strict=True))
        await page.call(
            "Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, mobile=False, **size
        )
        await page.call("Page.navigate", url=url)
        async with asyncio.timeout(TIMEOUT):
            while not await page.evaluate("!!(window.viewer && viewer.isReady())"):
                await asyncio.sleep(0.5)
        await page.screenshot(picture)
        names = await page.evaluate(NAMES)
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB")).astype(int), names
