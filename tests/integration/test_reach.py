"""Inputs as users of other systems store and serve them: what is read, and what is refused."""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zarr

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.box import Box
from chunkq.job.parent_groups import unlisted_in_groups
from chunkq.storage.formats.tensorstore_arrays import kvstore
from chunkq.storage.formats.zarr_arrays import TensorStoreArray
from chunkq.storage.images import ImageSource, find_source
from tests.harness.servers.strict_s3 import KEY, SECRET, Bucket, strict_s3
from tests.harness.servers.web import Habits, web_server
from tests.harness.volumes import random_volume, write_zarr

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
SHAPE = (9, 8, 7)
VALUES = random_volume(SHAPE)
IMAGE = {"multiscales": [{"version": "0.4", "datasets": [{"path": "0"}]}]}


def read(source: ImageSource) -> np.ndarray[Any, Any]:
    return source.open().read(Box.of_shape(source.shape))


def refused(
    path: Path | str, code: ErrorCode, *parts: str, access: Access = DEFAULT_ACCESS
) -> None:
    """Assert that an input is refused in one line with a code that contains all parts."""
    with pytest.raises(StoreError) as error:
        find_source(str(path), access=access)
    assert error.value.code is code
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def v2(folder: Path, **changes: Any) -> Path:
    """Write a Zarr v2 array, then change its metadata."""
    write_zarr(folder, VALUES, (4, 4, 4), zarr_format=2)
    change(folder / ".zarray", **changes)
    return folder


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------------- dtypes and codecs


@pytest.mark.parametrize("dtype", ["|u1", "<u1", ">u1", "=u1", "u1", "uint8"])
def test_a_dtype_of_one_byte_has_any_byte_order(tmp_path: Path, dtype: str) -> None:
    source = find_source(str(v2(tmp_path / "in.zarr", dtype=dtype)))
    assert source.dtype == "uint8"
    np.testing.assert_array_equal(read(source), VALUES)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("|b1", "<b1"), ("|b1", ">b1"), ("<u2", "u2"), ("<f2", "float16")]
)
def test_a_dtype_in_another_spelling_is_read(tmp_path: Path, stored: str, dtype: str) -> None:
    values = random_volume(SHAPE, stored)
    folder = write_zarr(tmp_path / "in.zarr", values, (4, 4, 4), zarr_format=2)
    change(folder / ".zarray", dtype=dtype, fill_value=0)
    source = find_source(str(folder))
    assert isinstance(source.open(), TensorStoreArray)
    np.testing.assert_array_equal(read(source), values)


@pytest.mark.parametrize("dtype", ["|O", "|S5", "<U5", "<M8[ns]", "|V4", [["a", "<i4"]], "<x9", 3])
def test_a_dtype_that_is_no_number_is_refused_by_name(tmp_path: Path, dtype: Any) -> None:
    folder = v2(tmp_path / "in.zarr", dtype=dtype)
    refused(folder, ErrorCode.STORE_UNSUPPORTED, str(folder), repr(dtype))


@pytest.mark.parametrize(
    ("codec", "package"),
    [("zfpy", "numcodecs[zfpy]"), ("imagecodecs_jpegxl", "imagecodecs"), ("squeeze9", "package")],
)
@pytest.mark.parametrize("key", ["compressor", "filters"])
def test_a_codec_that_is_not_installed_is_named_with_its_package(
    tmp_path: Path, codec: str, package: str, key: str
) -> None:
    value: Any = {"id": codec}
    folder = v2(tmp_path / "in.zarr", **{key: [value] if key == "filters" else value})
    refused(folder, ErrorCode.PACKAGE_MISSING, f"{folder}/.zarray", repr(codec), package)


def test_a_codec_of_zarr_v3_that_is_not_installed_is_named(tmp_path: Path) -> None:
    folder = write_zarr(tmp_path / "in.zarr", VALUES, (4, 4, 4))
    codecs = [{"name": "bytes"}, {"name": "squeeze9", "configuration": {}}]
    change(folder / "zarr.json", codecs=codecs)
    refused(folder, ErrorCode.PACKAGE_MISSING, f"{folder}/zarr.json", "'squeeze9'")


# ------------------------------------------------------------------------- groups


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("damage", ["unreadable", "deleted", "unlisted", "not consolidated"])
def test_level_0_is_read_whatever_the_consolidated_metadata_say_of_other_arrays(
    tmp_path: Path, zarr_format: int, damage: str
) -> None:
    folder = tmp_path / "img.zarr"
    group = zarr.create_group(folder, zarr_format=zarr_format, attributes=IMAGE)
    group.create_array("0", data=VALUES, chunks=(4, 4, 4))
    other = group.create_array("raw", data=VALUES, chunks=(4, 4, 4))
    document = folder / "raw" / (".zarray" if zarr_format == 2 else "zarr.json")
    if damage == "unreadable":
        codec = {"id": "squeeze9"} if zarr_format == 2 else [{"name": "squeeze9"}]
        change(document, **{"compressor" if zarr_format == 2 else "codecs": codec})
    if damage == "not consolidated":
        assert other.shape == SHAPE
    elif damage == "unlisted":
        (folder / "0").rename(tmp_path / "0")
        zarr.consolidate_metadata(group.store)
        (tmp_path / "0").rename(folder / "0")
    elif damage == "deleted":
        zarr.consolidate_metadata(group.store)
        document.unlink()
    else:
        consolidate_by_hand(folder, zarr_format)
    np.testing.assert_array_equal(read(find_source(str(folder))), VALUES)
    np.testing.assert_array_equal(read(find_source(f"{folder}/0/")), VALUES)


def consolidate_by_hand(folder: Path, zarr_format: int) -> None:
    """Write consolidated metadata that zarr-python would refuse to write."""
    if zarr_format == 2:
        names = (".zgroup", ".zattrs", "0/.zarray", "raw/.zarray")
        documents = {name: json.loads((folder / name).read_text()) for name in names}
        content = {"zarr_consolidated_format": 1, "metadata": documents}
        (folder / ".zmetadata").write_text(json.dumps(content))
        return
    members = {name: json.loads((folder / name / "zarr.json").read_text()) for name in ("0", "raw")}
    change(
        folder / "zarr.json",
        consolidated_metadata={"kind": "inline", "must_understand": False, "metadata": members},
    )


def test_an_array_that_only_consolidated_metadata_list_names_the_missing_document(
    tmp_path: Path,
) -> None:
    group = zarr.create_group(tmp_path / "vol.zarr", zarr_format=2)
    group.create_array("raw", data=VALUES, chunks=(4, 4, 4))
    zarr.consolidate_metadata(group.store)
    (tmp_path / "vol.zarr/raw/.zarray").unlink()
    (tmp_path / "vol.zarr/raw/.zattrs").unlink()
    refused(tmp_path / "vol.zarr/raw", ErrorCode.STORE_UNSUPPORTED, ".zarray", "consolidated")


def test_a_group_without_an_image_is_refused_with_its_members(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "vol.zarr")
    group.create_array("raw", data=VALUES, chunks=(4, 4, 4))
    broken = group.create_array("other", data=VALUES, chunks=(4, 4, 4))
    assert broken.shape == SHAPE
    (tmp_path / "vol.zarr/other/zarr.json").write_text("{")
    refused(tmp_path / "vol.zarr", ErrorCode.STORE_UNSUPPORTED, "Zarr group", "other, raw")
    refused(tmp_path, ErrorCode.STORE_UNSUPPORTED, "vol.zarr")


@pytest.mark.parametrize("name", ["zarr.json", ".zarray"])
def test_a_damaged_document_is_named(tmp_path: Path, name: str) -> None:
    folder = write_zarr(tmp_path / "in.zarr", VALUES, zarr_format=3 if name == "zarr.json" else 2)
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    refused(folder, ErrorCode.STORE_UNSUPPORTED, f"{folder}/{name}", "not JSON")


def test_a_level_that_is_missing_is_named(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "img.zarr", zarr_format=2, attributes=IMAGE)
    refused(tmp_path / "img.zarr", ErrorCode.STORE_MISSING, "img.zarr/0", "level 0")


# ------------------------------------------------------------------------- storage chunks


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("zarr_format", "encoding", "stored", "named"),
    [
        (2, "v2", "/", "."),
        (2, "v2", ".", "/"),
        (3, "default", ".", "/"),
        (3, "default", "/", "."),
        (3, "v2", "/", "."),
        (3, "v2", ".", "/"),
    ],
)
def test_chunks_are_found_under_the_other_separator(
    tmp_path: Path, rank: int, zarr_format: int, encoding: str, stored: str, named: str
) -> None:
    values = random_volume(SHAPE[:rank])
    keys = {"name": encoding, "separator": stored}
    folder = write_zarr(
        tmp_path / "in.zarr", values, (4,) * rank, zarr_format=zarr_format, chunk_key_encoding=keys
    )
    if zarr_format == 2:
        change(folder / ".zarray", dimension_separator=named)
    else:
        declared = {"name": encoding, "configuration": {"separator": named}}
        change(folder / "zarr.json", chunk_key_encoding=declared)
    np.testing.assert_array_equal(read(find_source(str(folder))), values)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_without_any_chunk_is_refused_unless_it_may_be_empty(
    tmp_path: Path, zarr_format: int
) -> None:
    folder = tmp_path / "in.zarr"
    zarr.create_array(folder, shape=SHAPE, chunks=(4, 4, 4), dtype="u1", zarr_format=zarr_format)
    refused(folder, ErrorCode.INPUT_EMPTY, str(folder), "allow_empty")
    (folder / "c/0").mkdir(parents=True)
    refused(folder, ErrorCode.INPUT_EMPTY)
    assert not read(find_source(str(folder), allow_empty=True)).any()


def test_one_chunk_of_a_large_sparse_array_is_enough(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "in.zarr", shape=(10**6,) * 3, chunks=(64,) * 3, dtype="u1"
    )
    array[64 * 777, 64 * 5, 64 * 4321] = 3
    source = find_source(str(tmp_path / "in.zarr"))
    assert "chunk_keys" not in source.options


# ------------------------------------------------------------------------- .npy files


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("values", [VALUES, np.asfortranarray(VALUES.astype(">i2"))])
def test_every_version_of_npy_files_is_read_with_bytes_after_the_array(
    tmp_path: Path, version: tuple[int, int], values: np.ndarray[Any, Any]
) -> None:
    with (tmp_path / "in.npy").open("wb") as file:
        np.lib.format.write_array(file, values, version=version)
        file.write(b"and more")
    np.testing.assert_array_equal(read(find_source(str(tmp_path / "in.npy"))), VALUES)


def test_a_truncated_npy_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "in.npy"
    np.save(path, VALUES)
    size = path.stat().st_size
    for length in (size - 1, size // 2, 20, 0):
        os.truncate(path, length)
        refused(path, ErrorCode.STORE_UNSUPPORTED, str(path))
    np.save(path, VALUES)
    os.truncate(path, size - 1)
    refused(path, ErrorCode.STORE_UNSUPPORTED, f"{size} bytes", f"{size - 1}")


def test_npy_files_of_other_values_and_archives_are_refused(tmp_path: Path) -> None:
    others = {
        "object": np.array([{}], dtype=object),
        "fields": np.zeros(3, dtype=[("a", "u1")]),
        "datetime64": np.zeros(3, dtype="M8[s]"),
        "U3": np.array(["abc"]),
    }
    for name, values in others.items():
        np.save(tmp_path / f"{name}.npy", values, allow_pickle=True)
        refused(tmp_path / f"{name}.npy", ErrorCode.STORE_UNSUPPORTED, "dtype")
    np.savez(tmp_path / "in.npz", VALUES)
    refused(tmp_path / "in.npz", ErrorCode.STORE_UNSUPPORTED, "numpy.save")


# ------------------------------------------------------------------------- outputs in groups


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_output_that_a_group_does_not_list_is_a_warning(
    tmp_path: Path, zarr_format: int
) -> None:
    group = zarr.create_group(tmp_path / "vol.zarr", zarr_format=zarr_format)
    write_zarr(tmp_path / "vol.zarr/inner/pred/0", VALUES, zarr_format=zarr_format)
    name = "0/.zarray" if zarr_format == 2 else "0/zarr.json"
    output = tmp_path / "vol.zarr/inner/pred"
    documents = {name: (output / name).read_text()}
    assert unlisted_in_groups(str(output), zarr_format, documents) == []
    zarr.create_group(tmp_path / "vol.zarr/inner", zarr_format=zarr_format)
    zarr.create_group(output, zarr_format=zarr_format)
    (output).rename(tmp_path / "aside")
    zarr.consolidate_metadata(group.store)
    (tmp_path / "aside").rename(output)
    [warning] = unlisted_in_groups(str(output), zarr_format, documents)
    assert "consolidated" in warning
    assert "inner/pred" in warning
    zarr.consolidate_metadata(group.store)
    assert unlisted_in_groups(str(output), zarr_format, documents) == []
    changed = {name: json.dumps(json.loads(documents[name]) | {"shape": [1, 1, 1]})}
    assert len(unlisted_in_groups(str(output), zarr_format, changed)) == 1
    other = 5 - zarr_format
    warnings = unlisted_in_groups(str(output), other, documents)
    assert all(f"zarr_format: {zarr_format}" in warning for warning in warnings)
    assert warnings


# ------------------------------------------------------------------------- web servers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same volume in several forms."""
    folder = tmp_path_factory.mktemp("served")
    write_zarr(folder / "v3.zarr", VALUES, (4, 4, 4))
    write_zarr(folder / "v2.zarr", VALUES, (4, 4, 4), zarr_format=2)
    write_zarr(folder / "sharded.zarr", VALUES, (4, 4, 4), shards=(8, 8, 8))
    nested = {"name": "v2", "separator": "/"}
    write_zarr(folder / "nested.zarr", VALUES, (4, 4, 4), zarr_format=2, chunk_key_encoding=nested)
    change(folder / "nested.zarr/.zarray", dimension_separator=".")
    group = zarr.create_group(folder / "img.zarr", zarr_format=2, attributes=IMAGE)
    group.create_array("0", data=VALUES, chunks=(4, 4, 4))
    zarr.consolidate_metadata(group.store)
    np.save(folder / "c.npy", VALUES)
    np.save(folder / "f.npy", np.asfortranarray(VALUES))
    sparse = VALUES.copy()
    sparse[:4, :4, :4] = 0
    write_zarr(folder / "sparse.zarr", sparse, (4, 4, 4))
    zarr.create_array(folder / "empty.zarr", shape=SHAPE, chunks=(4, 4, 4), dtype="u1")
    return folder


FORMS = ("v3.zarr", "sharded.zarr", "v2.zarr", "nested.zarr", "img.zarr", "c.npy", "f.npy")


@pytest.mark.parametrize("missing", [404, 403])
def test_a_web_server_without_listing_serves_inputs(served: Path, missing: int) -> None:
    with web_server(served, Habits(missing=missing)) as url:
        for name in FORMS:
            for place in (url, f"{url}/moved"):
                np.testing.assert_array_equal(read(find_source(f"{place}/{name}")), VALUES)
        source = find_source(f"{url}/sparse.zarr")
        assert not read(source)[:4, :4, :4].any()
        assert bool(source.options.get("forbidden_is_missing")) == (missing == 403)
        refused(f"{url}/empty.zarr", ErrorCode.INPUT_EMPTY)
        for name in ("none.zarr", "none.npy"):
            code = ErrorCode.STORE_MISSING if missing == 404 else ErrorCode.STORE_UNUSABLE
            refused(f"{url}/{name}", code, name)


def test_a_refused_chunk_is_no_missing_chunk_where_missing_ones_are_answered_with_404(
    served: Path,
) -> None:
    with web_server(served, Habits(refused="/c/1/1/1")) as url:
        source = find_source(f"{url}/v3.zarr")
        with pytest.raises(ChunkReadError, match="403"):
            read(source)


def test_a_server_that_starts_to_refuse_everything_gives_no_fill_values(served: Path) -> None:
    habits = Habits(missing=403)
    with web_server(served, habits) as url:
        array = find_source(f"{url}/v3.zarr").open()
        habits.refused = "/"
        with pytest.raises(ChunkReadError, match="403"):
            array.read(Box.of_shape(SHAPE))


def test_a_server_without_ranges_is_enough_for_zarr_and_refused_for_npy_and_shards(
    served: Path,
) -> None:
    with web_server(served, Habits(ranges=False)) as url:
        np.testing.assert_array_equal(read(find_source(f"{url}/v3.zarr")), VALUES)
        for name in ("c.npy", "sharded.zarr"):
            refused(f"{url}/{name}", ErrorCode.STORE_UNSUPPORTED, "download")


def test_a_server_that_is_gone_is_not_a_missing_input(served: Path) -> None:
    for name in ("v3.zarr", "c.npy"):
        refused(f"http://127.0.0.1:9/{name}", ErrorCode.STORE_UNUSABLE, "127.0.0.1:9")


# ------------------------------------------------------------------------- S3


KEYS = f"aws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
VARIABLES = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}


@contextmanager
def aws(folder: Path, config: str = "", credentials: str = "", **variables: str) -> Iterator[None]:
    """Replace the AWS configuration and the variables of this process."""
    (folder / ".aws").mkdir(exist_ok=True)
    for name, content in (("config", config), ("credentials", credentials)):
        file = folder / ".aws" / name
        file.unlink(missing_ok=True)
        if content:
            file.write_text(content)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    variables = {"AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true", **variables}
    with mock.patch.dict(os.environ, {**kept, "HOME": str(folder), **variables}, clear=True):
        yield


Configure = Callable[[str], dict[str, Any]]
CONFIGURATIONS: dict[str, Configure] = {
    "variables": lambda url: {"AWS_ENDPOINT_URL": url, **VARIABLES},
    "variables for S3": lambda url: (
        {"AWS_ENDPOINT_URL_S3": url, "AWS_REGION": "us-east-1"} | VARIABLES
    ),
    "default profile": lambda url: {
        "config": f"[default]\nregion = us-east-1\nendpoint_url = {url}\n",
        "credentials": f"[default]\n{KEYS}",
    },
    "services": lambda url: {
        "config": f"[default]\nservices = lab\n[services lab]\ns3 =\n  endpoint_url = {url}\n",
        "credentials": f"[default]\n{KEYS}",
    },
    "named profile": lambda url: {
        "config": f"[profile lab]\nendpoint_url = {url}\n{KEYS}",
        "AWS_PROFILE": "lab",
    },
}


@pytest.mark.parametrize("configure", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_endpoint_and_keys_come_from_variables_and_from_configuration_files(
    served: Path, tmp_path: Path, configure: Configure
) -> None:
    with strict_s3(Bucket(served, can_list=True)) as url, aws(tmp_path, **configure(url)):
        source = find_source("s3://lab/nested.zarr")
        assert isinstance(source.open(), TensorStoreArray)
        np.testing.assert_array_equal(read(source), VALUES)


def test_a_bucket_that_cannot_be_listed_answers_403_for_missing_chunks(
    served: Path, tmp_path: Path
) -> None:
    bucket = Bucket(served)
    with strict_s3(bucket) as url, aws(tmp_path, AWS_ENDPOINT_URL=url, **VARIABLES):
        for name in ("v3.zarr", "nested.zarr", "c.npy"):
            np.testing.assert_array_equal(read(find_source(f"s3://lab/{name}")), VALUES)
        sparse = find_source("s3://lab/sparse.zarr")
        assert not read(sparse)[:4, :4, :4].any()
        refused("s3://lab/empty.zarr", ErrorCode.INPUT_EMPTY)
        refused("s3://lab/none.zarr", ErrorCode.STORE_UNUSABLE, "AccessDenied", "anonymous")
        array = sparse.open()
        bucket.refused = "zarr"
        with pytest.raises(ChunkReadError, match="AccessDenied"):
            array.read(Box.of_shape(SHAPE))


def test_a_public_bucket_is_read_without_credentials(served: Path, tmp_path: Path) -> None:
    bucket = Bucket(served, is_public=True, can_list=True)
    with strict_s3(bucket) as url:
        with aws(tmp_path, AWS_ENDPOINT_URL=url):
            np.testing.assert_array_equal(read(find_source("s3://lab/v3.zarr")), VALUES)
        keys = {"AWS_ACCESS_KEY_ID": "of another server", "AWS_SECRET_ACCESS_KEY": "x"}
        with aws(tmp_path, AWS_ENDPOINT_URL=url, **keys):
            source = find_source("s3://lab/v3.zarr", access=Access(anonymous=True))
            np.testing.assert_array_equal(read(source), VALUES)
            assert source.options["anonymous"] is True
    assert not any(bucket.signed)


def test_an_anonymous_input_does_not_ask_the_instance_metadata_service(
    served: Path, tmp_path: Path
) -> None:
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as service:

        def answer() -> None:
            try:
                while True:
                    connection, _ = service.accept()
                    requests.append(connection.recv(100))
                    connection.close()
            except OSError:
                return

        threading.Thread(target=answer, daemon=True).start()
        place = f"http://127.0.0.1:{service.getsockname()[1]}"
        with (
            strict_s3(Bucket(served, is_public=True, can_list=True)) as url,
            aws(
                tmp_path,
                AWS_ENDPOINT_URL=url,
                AWS_EC2_METADATA_DISABLED="false",
                AWS_EC2_METADATA_SERVICE_ENDPOINT=place,
            ),
        ):
            source = find_source("s3://lab/v3.zarr", access=Access(anonymous=True))
            np.testing.assert_array_equal(read(source), VALUES)
        service.shutdown(socket.SHUT_RDWR)
    assert requests == []


def test_a_bucket_whose_requester_pays_is_read_if_the_job_says_so(
    served: Path, tmp_path: Path
) -> None:
    bucket = Bucket(served, payer=True, can_list=True)
    with strict_s3(bucket) as url, aws(tmp_path, AWS_ENDPOINT_URL=url, **VARIABLES):
        for name in ("v3.zarr", "c.npy"):
            source = find_source(f"s3://lab/{name}", access=Access(requester_pays=True))
            np.testing.assert_array_equal(read(source), VALUES)
        refused("s3://lab/v3.zarr", ErrorCode.STORE_UNUSABLE, "requester_pays")


def test_a_bucket_in_another_region_is_read(served: Path, tmp_path: Path) -> None:
    bucket = Bucket(served, region="eu-west-1", can_list=True)
    variables = {"AWS_DEFAULT_REGION": "us-east-1", **VARIABLES}
    with strict_s3(bucket) as url, aws(tmp_path, AWS_ENDPOINT_URL=url, **variables):
        source = find_source("s3://lab/v3.zarr")
        assert isinstance(source.open(), TensorStoreArray)
        np.testing.assert_array_equal(read(source), VALUES)


def test_an_array_in_the_root_of_a_bucket_is_read(served: Path, tmp_path: Path) -> None:
    bucket = Bucket(served / "v3.zarr", can_list=True)
    with strict_s3(bucket) as url, aws(tmp_path, AWS_ENDPOINT_URL=url, **VARIABLES):
        source = find_source("s3://lab")
        assert isinstance(source.open(), TensorStoreArray)
        np.testing.assert_array_equal(read(source), VALUES)


def test_virtual_addresses_and_certificates_of_other_servers_are_left_to_s3fs(
    tmp_path: Path,
) -> None:
    style = "[default]\ns3 =\n  addressing_style = virtual\n"
    with aws(tmp_path, style, AWS_ENDPOINT_URL="http://127.0.0.1:9", **VARIABLES):
        assert kvstore("s3://lab/in.zarr") is None
    bundle = {"AWS_CA_BUNDLE": "/lab.pem", "AWS_ENDPOINT_URL": "https://127.0.0.1:9"}
    with aws(tmp_path, **bundle, **VARIABLES):
        assert kvstore("s3://lab/in.zarr") is None
    with aws(tmp_path, style, **VARIABLES):
        spec = {"driver": "s3", "bucket": "lab", "path": "in.zarr/"}
        assert kvstore("s3://lab/in.zarr") == {**spec, "aws_credentials": {"type": "environment"}}


PROBLEMS: dict[str, tuple[dict[str, bool], dict[str, str], str]] = {
    "expired": ({"expired": True}, VARIABLES, "ExpiredToken"),
    "unknown key": ({}, {**VARIABLES, "AWS_ACCESS_KEY_ID": "x"}, "InvalidAccessKeyId"),
    "wrong secret": ({}, {**VARIABLES, "AWS_SECRET_ACCESS_KEY": "x"}, "SignatureDoesNotMatch"),
    "no credentials": ({}, {}, "AccessDenied"),
    "half of the credentials": ({}, {"AWS_ACCESS_KEY_ID": KEY}, "AWS_SECRET_ACCESS_KEY"),
    "no profile": ({}, {"AWS_PROFILE": "nobody"}, "nobody"),
}


@pytest.mark.parametrize(("habits", "variables", "part"), PROBLEMS.values(), ids=PROBLEMS)
def test_credentials_that_are_refused_are_one_line_with_the_reason(
    served: Path, tmp_path: Path, habits: dict[str, bool], variables: dict[str, str], part: str
) -> None:
    with (
        strict_s3(Bucket(served, **habits)) as url,
        aws(tmp_path, AWS_ENDPOINT_URL=url, **variables),
    ):
        refused("s3://lab/v3.zarr", ErrorCode.STORE_UNUSABLE, part)
