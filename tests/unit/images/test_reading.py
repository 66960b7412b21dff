"""Bytes of one image: what is refused as the error of its row."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest

from chunkq.errors import ErrorCode, StoreError
from chunkq.images import reading
from chunkq.images.image_error import ImageError
from chunkq.images.reading import read_image


def code_of(path: str) -> ErrorCode:
    with pytest.raises(ImageError) as caught:
        read_image(path)
    return caught.value.code


def test_the_content_of_a_file_is_returned(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"content")
    assert read_image(f"{tmp_path}/a.png") == b"content"
    (tmp_path / "link.png").symlink_to("a.png")
    assert read_image(f"{tmp_path}/link.png") == b"content"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name in ("pipe.png", "folder.png", "loop.png", "missing.png", "x\0y.png", "x" * 300):
        assert code_of(f"{tmp_path}/{name}") == ErrorCode.IMAGE_MISSING
    assert code_of("/dev/zero") == ErrorCode.IMAGE_MISSING
    assert code_of("") == ErrorCode.IMAGE_MISSING


def test_a_url_of_an_unknown_scheme_is_an_error_of_its_row() -> None:
    for path in ("nothing://bucket/a.png", "simplecache::file:///dev/zero", "zip://a::s3://b/c"):
        assert code_of(path) == ErrorCode.STORE_UNUSABLE


def test_a_name_that_no_object_can_have_is_an_error_of_its_row() -> None:
    for path in ("s3://Bad Bucket/a.png", "s3://bucket", "s3://"):
        assert code_of(path) == ErrorCode.IMAGE_MISSING


def test_messages_of_rows_do_not_depend_on_the_process(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(ImageError) as caught:
            read_image(str(tmp_path))
        return str(caught.value)

    first, descriptors = message(), os.listdir("/proc/self/fd")
    with open(tmp_path / "other", "w"):  # takes the number of the descriptor
        assert message() == first
    assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EMFILE, "Too many open files"),
        ConnectionError("refused"),
        TimeoutError(),
    ],
)
def test_a_storage_that_fails_is_no_error_of_the_image(
    failure: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise failure

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StoreError) as caught:
        read_image(f"{tmp_path}/a.png")
    assert f"{tmp_path}/a.png" in str(caught.value)


def test_an_object_of_a_bucket_takes_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a.png", b"content")
    memory.pipe_file("/bucket/empty.png", b"")

    class Bucket:
        def cat_file(self, path: str, start: int, end: int) -> bytes:
            requests.append(f"get {path}")
            content: bytes = memory.cat_file(path)[start:end]
            if not content:
                raise OSError(errno.EINVAL, "range not satisfiable")
            return content

        def size(self, path: str) -> int:
            requests.append(f"size {path}")
            return int(memory.size(path))

    def open_bucket(path: str, access: object) -> tuple[Bucket, str]:
        return Bucket(), path.removeprefix("s3:/")

    monkeypatch.setattr(reading, "open_filesystem", open_bucket)
    assert read_image("s3://bucket/a.png") == b"content"
    assert requests == ["get /bucket/a.png"]
    assert read_image("s3://bucket/empty.png") == b""
    assert requests[1:] == ["get /bucket/empty.png", "size /bucket/empty.png"]


class Endless(BaseHTTPRequestHandler):
    """A server that declares no size and does not stop, and one small image."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        with suppress(OSError):
            while self.path != "/small.png":
                self.wfile.write(b"x" * 1024)
            self.wfile.write(b"content")

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_server_that_does_not_stop_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 10_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert code_of(f"{url}/a.png") == ErrorCode.IMAGE_TOO_LARGE
            assert read_image(f"{url}/small.png") == b"content"
        finally:
            server.shutdown()
            thread.join()


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 6)
    (tmp_path / "a.png").write_bytes(b"content")
    assert code_of(f"{tmp_path}/a.png") == ErrorCode.IMAGE_TOO_LARGE
    fsspec.filesystem("memory").pipe_file("/images/a.png", b"content")
    assert code_of("memory://images/a.png") == ErrorCode.IMAGE_TOO_LARGE
    monkeypatch.setattr(reading, "MAX_BYTES", 7)
    assert read_image("memory://images/a.png") == b"content"
