"""Bytes of one image: what is refused as the error of its row."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from chunkq.errors import ErrorCode
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
    assert code_of("nothing://bucket/a.png") == ErrorCode.STORE_UNUSABLE


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
