"""Pixels of images that threads hold at the same time."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from threading import Lock

import numpy as np
import pytest
from chunkq_worker.images.pixel_budget import PixelBudget
from PIL import Image

from chunkq.images.decoding import decode, pixels_of
from chunkq.images.image_error import ImageError
from tests.harness.waiting import wait_until

TIME = 30.0
"""Seconds until a test that hangs fails."""


def test_threads_hold_at_most_the_limit_or_one_larger_image() -> None:
    budget, lock = PixelBudget(10), Lock()
    held: list[int] = []
    seen: list[list[int]] = []

    def decode_one(pixels: int) -> None:
        with budget.image() as reserve:
            reserve(pixels)
            with lock:
                held.append(pixels)
                seen.append(list(held))
            with lock:
                held.remove(pixels)

    sizes = [3, 4, 25, 1, 9, 2, 25, 5] * 40
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(decode_one, sizes, timeout=TIME))
    assert len(seen) == len(sizes)
    assert all(sum(together) <= 10 or together == [25] for together in seen)


def test_a_large_image_is_not_overtaken() -> None:
    budget = PixelBudget(10)
    order: list[str] = []

    def hold(name: str, pixels: int) -> None:
        with budget.image() as reserve:
            reserve(pixels)
            order.append(name)

    with ThreadPoolExecutor(3) as pool:
        with budget.image() as reserve:
            reserve(8)
            large = pool.submit(hold, "large", 10)
            wait_until(lambda: budget.waiting == 1, "the large image waits")
            small = pool.submit(hold, "small", 1)
            wait_until(lambda: budget.waiting == 2, "both images wait")
            assert order == []
        for future in (large, small):
            future.result(TIME)
    assert order == ["large", "small"]


def test_an_image_that_fails_gives_its_pixels_back() -> None:
    budget = PixelBudget(10)
    for _ in range(3):
        with suppress(ImageError), budget.image() as reserve:
            reserve(10)
            raise ImageError("decode", "damaged: x; replace it")


@pytest.mark.parametrize(
    ("format_name", "dtype"), [("PNG", np.uint8), ("JPEG", np.uint8), ("TIFF", np.uint16)]
)
def test_pixels_are_reserved_once_before_they_are_decoded(format_name: str, dtype: type) -> None:
    file, reserved = BytesIO(), list[int]()
    Image.fromarray(np.zeros((5, 7), dtype)).save(file, format_name)
    assert pixels_of(decode(file.getvalue(), "L", reserved.append)).shape == (5, 7, 1)
    assert reserved == [35]
