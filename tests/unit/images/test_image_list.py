"""Lists of images: patterns, folders, tables."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from chunkq.errors import ErrorCode, StoreError
from chunkq.images.image_list import find_images, join_lists

NAMES = ("b.png", "a.jpg", "sub/c.TIF", "notes.txt", "sub/d.webp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def relative(folder: Path, paths: list[str]) -> list[str]:
    return [path.removeprefix(f"{folder}/") for path in paths]


def test_a_folder_has_its_images_sorted_and_nothing_else(folder: Path) -> None:
    images = find_images(str(folder))
    assert relative(folder, images.paths) == ["a.jpg", "b.png", "sub/c.TIF", "sub/d.webp"]


def test_a_folder_has_the_images_of_every_common_format(tmp_path: Path) -> None:
    formats = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "QOI")
    Image.init()
    suffixes = {s for s, name in Image.registered_extensions().items() if name in formats}
    names = sorted(f"image{suffix}" for suffix in suffixes - {".avifs"})
    for name in names:
        (tmp_path / name).touch()
    assert relative(tmp_path, find_images(str(tmp_path)).paths) == names


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*.png", ["b.png"]), ("**/*.webp", ["sub/d.webp"]), ("[ab].*", ["a.jpg", "b.png"])],
)
def test_a_pattern_has_its_files_sorted(folder: Path, pattern: str, expected: list[str]) -> None:
    assert relative(folder, find_images(f"{folder}/{pattern}").paths) == expected


def test_one_file_is_one_row(folder: Path) -> None:
    assert relative(folder, find_images(f"{folder}/b.png").paths) == ["b.png"]


def test_a_name_that_is_not_unicode_is_a_row_with_its_bytes_as_text(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))).touch()
    (tmp_path / "é\n.png").touch()
    for path in (tmp_path, tmp_path / "*"):
        assert relative(tmp_path, find_images(str(path)).paths) == ["\\xff.png", "é\n.png"]


def test_a_pattern_of_a_bucket_has_no_folders() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a.png", "sub/b.png", "c.txt"):
        memory.pipe_file(f"/pattern/{name}", b"")
    paths = find_images("memory://pattern/*").paths
    assert paths == ["memory://pattern/a.png", "memory://pattern/c.txt"]
    paths = find_images("memory://pattern").paths
    assert paths == ["memory://pattern/a.png", "memory://pattern/sub/b.png"]


def test_rows_of_a_path_can_be_left_out(folder: Path) -> None:
    images = find_images(str(folder))
    assert images.without("other") is images
    assert len(images.without(f"{folder}/a.jpg")) == len(images) - 1


def test_a_file_whose_name_looks_like_a_pattern_is_one_row(folder: Path) -> None:
    (folder / "x[1].png").write_bytes(b"")
    assert relative(folder, find_images(f"{folder}/x[1].png").paths) == ["x[1].png"]
    (folder / "x[1].csv").write_text("path\na.png\n")
    assert relative(folder, find_images(f"{folder}/x[1].csv").paths) == ["a.png"]


def test_a_csv_keeps_its_order_and_its_columns(folder: Path) -> None:
    text = "site,path\n7,b.png\n3,s3://bucket/x.png\n5,/data/y.png\n"
    (folder / "list.csv").write_text(text)
    images = find_images(f"{folder}/list.csv")
    assert images.paths == [f"{folder}/b.png", "s3://bucket/x.png", "/data/y.png"]
    assert images.table.column_names == ["path", "site"]
    assert images.table.column("site").to_pylist() == [7, 3, 5]


def test_paths_of_a_table_are_absolute_and_local_urls_are_paths(folder: Path) -> None:
    paths = ["../x.png", "file:///dev/zero", "FILE://localhost/a.png", "S3://bucket/x.png"]
    (folder / "list.txt").write_text("\n".join(paths))
    assert find_images(f"{folder}/list.txt").paths == [
        f"{folder}/../x.png", "/dev/zero", "/a.png", "s3://bucket/x.png",
    ]  # fmt: skip
    url = f"memory://{folder}/list.txt"
    fsspec.filesystem("memory").pipe_file(f"{folder}/list.txt", b"../x.png\na.png\n")
    inner = url.removesuffix("/list.txt")
    parent = inner.rpartition("/")[0]
    assert find_images(url).paths == [f"{parent}/x.png", f"{inner}/a.png"]


def test_a_parquet_table_of_another_writer_is_read(folder: Path) -> None:
    table = pa.table(
        {
            "path": pa.array(["a.jpg", None]).dictionary_encode(),
            "label": pa.array(["cat", "dog"], pa.large_string()),
        }
    )
    pq.write_table(table, folder / "list.parquet")
    images = find_images(f"{folder}/list.parquet")
    assert images.paths == [f"{folder}/a.jpg", ""]
    assert images.table.schema.field("label").type == pa.string()


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.list_(pa.string_view())], ids=str)
def test_a_column_is_copied_or_refused_before_work_starts(folder: Path, kind: pa.DataType) -> None:
    pq.write_table(
        pa.table({"path": ["a.jpg"], "other": pa.array([None], kind)}), folder / "list.parquet"
    )
    if pa.types.is_list(kind):
        with pytest.raises(StoreError) as caught:
            find_images(f"{folder}/list.parquet")
        assert caught.value.code == ErrorCode.IMAGE_LIST_INVALID
    else:
        table = find_images(f"{folder}/list.parquet").table
        assert table.take(pa.array([0])).column("other").to_pylist() == [None]


def test_a_long_csv_has_texts_of_several_lines(folder: Path) -> None:
    count = (1 << 20) // 64  # more than a block of pyarrow
    rows = "".join(f'{n}.png,"a\nb\n{n:060}"\n' for n in range(count))
    (folder / "list.csv").write_text(f"path,note\n{rows}")
    table = find_images(f"{folder}/list.csv").table
    assert table.column("note").to_pylist() == [f"a\nb\n{n:060}" for n in range(count)]


def test_a_text_file_has_one_path_per_line(folder: Path) -> None:
    (folder / "list.txt").write_text("\ufeff b.png \r\n\nsub/d.webp\n", newline="")
    assert relative(folder, find_images(f"{folder}/list.txt").paths) == ["b.png", "sub/d.webp"]


@pytest.mark.parametrize(
    "content",
    ["file\na.jpg\n", "path\n", "", "path,path\na,b\n", "path,chunkq:truth\na,b\n"],
    ids=["no column", "no row", "empty", "twice", "reserved"],
)
def test_a_table_without_usable_paths_is_refused(folder: Path, content: str) -> None:
    (folder / "list.csv").write_text(content)
    with pytest.raises(StoreError) as caught:
        find_images(f"{folder}/list.csv")
    assert caught.value.code == ErrorCode.IMAGE_LIST_INVALID


def test_a_pattern_or_file_without_an_image_is_refused(folder: Path) -> None:
    for path in ("*.bmp", "missing.png", "missing.csv", "missing"):
        with pytest.raises(StoreError) as caught:
            find_images(f"{folder}/{path}")
        assert caught.value.code == ErrorCode.IMAGE_LIST_INVALID


def test_lists_are_joined_in_order_with_all_columns(folder: Path) -> None:
    (folder / "list.csv").write_text("path,site\nb.png,7\n")
    joined = join_lists([find_images(f"{folder}/a.jpg"), find_images(f"{folder}/list.csv")])
    assert relative(folder, joined.paths) == ["a.jpg", "b.png"]
    assert joined.table.column("site").to_pylist() == [None, 7]
