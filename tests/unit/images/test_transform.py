"""Resizing, cropping and normalizing, against Pillow and NumPy used directly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chunkq.errors import ErrorCode
from chunkq.images.image_error import ImageError
from chunkq.images.image_spec import ImageSpec, Mode
from chunkq.images.transform import Placement, transform

RNG = np.random.default_rng(0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (31, 97)])
def test_the_input_is_that_of_the_usual_loop(shape: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*shape, 3), np.uint8)
    spec = ImageSpec("RGB", 36, (32, 32), 255, MEAN, STD)
    image, (height, width) = Image.fromarray(pixels), shape
    short = min(height, width)
    size = (36 * width // short, 36 * height // short)
    resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    top, left = round((resized.shape[0] - 32) / 2), round((resized.shape[1] - 32) / 2)
    cut = resized[top : top + 32, left : left + 32].astype(np.float32) / 255
    expected = ((cut - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(2, 0, 1)
    values, placement = transform(pixels, spec)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    np.testing.assert_array_equal(values, expected)
    assert placement == Placement(shape, resized.shape[:2], (top, left), (32, 32))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize(
    "keys", [{}, {"resize": 20}, {"crop": (8, 9)}, {"resize": 20, "crop": (16, 12), "scale": 255}]
)
def test_an_image_of_pillow_gives_the_input_of_its_pixels(mode: Mode, keys: Any) -> None:
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = RNG.integers(0, 256, (31, 44, channels), np.uint8)
    image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels)
    spec = ImageSpec(mode, mean=(0.5,) * channels, **keys)
    values, placement = transform(image, spec)
    expected, expected_placement = transform(pixels, spec)
    np.testing.assert_array_equal(values, expected)
    assert placement == expected_placement


def test_deep_pixels_are_resized_as_floats() -> None:
    pixels = RNG.integers(0, 1 << 16, (20, 30, 1)).astype(np.uint16)
    values, _ = transform(pixels, ImageSpec("L", (10, 15), scale=65535))
    image = Image.fromarray(pixels[..., 0].astype(np.float32))
    expected = np.asarray(image.resize((15, 10), Image.Resampling.BILINEAR)) / np.float32(65535)
    np.testing.assert_array_equal(values[0], expected)


def test_an_image_smaller_than_the_crop_is_refused() -> None:
    with pytest.raises(ImageError) as caught:
        transform(np.zeros((8, 20, 3), np.uint8), ImageSpec(crop=(16, 16)))
    assert (caught.value.code, caught.value.stage) == (ErrorCode.IMAGE_UNSUITABLE, "transform")


@pytest.mark.parametrize("shape", [(0, 7, 3), (6, 0, 3)])
def test_an_image_without_pixels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError) as caught:
        transform(np.zeros(shape, np.uint8), ImageSpec(resize=8))
    assert caught.value.code is ErrorCode.IMAGE_UNSUITABLE


def test_a_narrow_image_that_would_become_huge_is_refused() -> None:
    with pytest.raises(ImageError) as caught:
        transform(np.zeros((1, 3000, 3), np.uint8), ImageSpec(resize=1024))
    assert caught.value.code == ErrorCode.IMAGE_UNSUITABLE


@given(
    st.tuples(st.integers(8, 60), st.integers(8, 60)),
    st.tuples(st.integers(16, 40), st.integers(16, 40)),
)
def test_points_go_back_to_where_a_spot_was_drawn(
    shape: tuple[int, int], resized: tuple[int, int]
) -> None:
    spec = ImageSpec("L", resized, (16, 16))
    _, placement = transform(np.zeros((*shape, 1), np.uint8), spec)
    corners = np.array([[-0.5, -0.5], [resized[1] - 0.5, resized[0] - 0.5]])
    edges = placement.to_image(corners - np.array(placement.origin[::-1]))
    np.testing.assert_allclose(edges, [[-0.5, -0.5], [shape[1] - 0.5, shape[0] - 0.5]], atol=1e-9)
