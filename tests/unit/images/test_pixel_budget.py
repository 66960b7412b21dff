"""Pixels of images that threads hold at the same time."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from chunkq_worker.images.pixel_budget import PixelBudget
from PIL import Image

from chunkq.images.decoding import decode, pixels_of
from chunkq.images.image_error import ImageError
from tests.harness.waiting import wait_until

TIME = 30.0
"""Seconds until a test that hangs fails."""


def hold(budget: PixelBudget, pixels: int) -> None:
    with budget.image() as reserve:
        reserve(pixels)


@pytest.mark.parametrize(("held", "pixels"), [(6, 5), (1, 25), (25, 1)])
def test_an_image_waits_until_there_is_room_or_until_it_is_alone(held: int, pixels: int) -> None:
    budget = PixelBudget(10)
    with ThreadPoolExecutor(1) as pool:
        with budget.image() as reserve:
            reserve(held)
            future = pool.submit(hold, budget, pixels)
            wait_until(lambda: budget.waiting or future.done(), "the image waits or is held")
            assert not future.done()
        future.result(TIME)


def test_images_are_held_together_up_to_the_limit() -> None:
    budget = PixelBudget(10)
    with ThreadPoolExecutor(1) as pool, budget.image() as reserve:
        reserve(6)
        pool.submit(hold, budget, 4).result(TIME)


def test_a_large_image_is_not_overtaken() -> None:
    budget = PixelBudget(10)
    order: list[str] = []

    def note(name: str, pixels: int) -> None:
        with budget.image() as reserve:
            reserve(pixels)
            order.append(name)

    with ThreadPoolExecutor(3) as pool:
        with budget.image() as reserve:
            reserve(8)
            large = pool.submit(note, "large", 10)
            wait_until(lambda: budget.waiting == 1, "the large image waits")
            small = pool.submit(note, "small", 1)
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
