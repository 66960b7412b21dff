"""Keys of a job whose network sees each image whole."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from chunkq.images.image_spec import ImageSpec
from chunkq.job.fields import Section, key_doc

GUIDE = "guides/images.md"
MAX_SIDE = 1 << 16
"""Longest side of the input of a network, in pixels."""

Keep = Literal["none", "logits", "features"]
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _as_size(value: object) -> object:
    """Return [h, w] as a tuple. Raise PydanticCustomError for what is no size."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_side, value)):
        return tuple(value)
    if _is_side(value):
        return value
    raise PydanticCustomError("size", "expected a number of pixels, or [height, width]")


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIDE


def _as_values(value: object) -> object:
    """Return one value per channel as a tuple; one number stands for all channels."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Size = Annotated[
    Side | tuple[Side, Side],
    BeforeValidator(_as_size, json_schema_input_type=Side | tuple[Side, Side]),
]
Values = Annotated[
    tuple[Number, ...],
    Field(min_length=1),
    BeforeValidator(_as_values, json_schema_input_type=Number | tuple[Number, ...]),
]


class ImageConfig(Section):
    """How the pixels of an image become the input of the network, in the order of these keys."""

    mode: Annotated[
        Literal["L", "RGB", "RGBA"],
        key_doc(
            "Images",
            "Channels of the input: gray (`L`), colors, or colors and opacity. Images with other "
            "channels are converted.",
            example="L",
            unit=None,
            see=GUIDE,
        ),
    ] = "RGB"
    resize: Annotated[
        Size | None,
        key_doc(
            "Images",
            "Length of the shorter side after resizing, or `[height, width]`. Bilinear and "
            "antialiased, as in Pillow and torchvision.",
            example=256,
            unit="pixels",
            omitted="images keep their size",
            see=GUIDE,
        ),
    ] = None
    crop: Annotated[
        Size | None,
        key_doc(
            "Images",
            "Side of the square that is cut from the center, or `[height, width]`.",
            example=224,
            unit="pixels",
            omitted="nothing is cut off",
            see=GUIDE,
        ),
    ] = None
    scale: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False),
        key_doc(
            "Images",
            "Divisor of the pixels, 255 for values from 0 to 1.",
            example=255,
            unit="value of a pixel",
            see=GUIDE,
        ),
    ] = 1.0
    mean: Annotated[
        Values | None,
        key_doc(
            "Images",
            "Subtracted from each channel of the divided pixels. One number stands for all "
            "channels.",
            example=[0.485, 0.456, 0.406],
            unit="value after `scale`",
            omitted="0",
            see=GUIDE,
        ),
    ] = None
    std: Annotated[
        Values | None,
        key_doc(
            "Images",
            "Divisor of each channel after that.",
            example=[0.229, 0.224, 0.225],
            unit="value after `scale`",
            omitted="1",
            see=GUIDE,
        ),
    ] = None

    pad_to_multiple: Annotated[
        Side,
        key_doc(
            "Images",
            "Height and width are padded at the bottom and the right with black pixels to a "
            "multiple of this, for networks that halve images several times.",
            example=32,
            unit="pixels",
            see=GUIDE,
        ),
    ] = 1

    def spec(self) -> ImageSpec:
        """Return the steps from pixels to the input of the network."""
        crop = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        channels = ImageSpec(self.mode).channels
        mean, std = (_per_channel(values, channels) for values in (self.mean, self.std))
        return ImageSpec(self.mode, self.resize, crop, self.scale, mean, std, self.pad_to_multiple)

    def problems(self) -> list[str]:
        """Return one line per mistake in the combination of the keys."""
        channels, problems = ImageSpec(self.mode).channels, []
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, channels):
                problems.append(
                    f"image.{key}: found {len(values)} values; expected one per channel of mode "
                    f"{self.mode}, which has {channels}, or a single one"
                )
        if self.std is not None and not all(value > 0 for value in self.std):
            problems.append("image.std: expected values greater than 0; fix them")
        if self.crop is not None and self.resize is not None:
            crop, resize = self.spec().crop or (0, 0), self.resize
            # Of a resized shorter side, the longer one can have any length.
            fits = (
                min(crop) <= resize
                if isinstance(resize, int)
                else all(c <= n for c, n in zip(crop, resize, strict=True))
            )
            if not fits:
                problems.append(
                    f"image.crop: {list(crop)} is larger than the resized image "
                    f"({resize if isinstance(resize, int) else list(resize)}); use a smaller crop, "
                    "or a larger resize"
                )
        return problems


def _per_channel(values: tuple[float, ...] | None, channels: int) -> tuple[float, ...]:
    if values is None:
        return ()
    return values * channels if len(values) == 1 else values


class PeaksConfig(Section):
    """How the keypoints of an image are found in the maps that the network returns."""

    threshold: Annotated[
        Number,
        key_doc(
            "Images",
            "Smallest value of a map at a keypoint.",
            example=0.3,
            unit="value of a map",
            see=GUIDE,
        ),
    ] = 0.2
    refinement: Annotated[
        Literal["integral", "none"],
        key_doc(
            "Images",
            "How a keypoint is placed between pixels of a map: `integral`, the center of mass of "
            "the 5 x 5 pixels around the largest one; `none`, on that pixel.",
            example="none",
            unit=None,
            see=GUIDE,
        ),
    ] = "integral"
    stride: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False),
        key_doc(
            "Images",
            "Pixels of the network's input per pixel of a map.",
            example=4,
            unit="pixels",
            omitted="the size of the input divided by that of the maps",
            see=GUIDE,
        ),
    ] = None
    multiple: Annotated[
        bool,
        key_doc(
            "Images",
            "Whether a map can have several keypoints, one per animal: all local maxima, instead "
            "of the largest value.",
            example=True,
            unit=None,
            see=GUIDE,
        ),
    ] = False

    @property
    def is_changed(self) -> bool:
        """Whether a key has another value than its default."""
        return self != PeaksConfig()


class TruthConfig(Section):
    """Where the true label of each image is: in its path, or in a column of the list."""

    regex: Annotated[
        str | None,
        key_doc(
            "Images",
            "Regular expression that is searched in the path; its first group is the label.",
            example="n[0-9]+-([^/]+)/",
            unit=None,
            omitted="none; set it or `column`",
            see=GUIDE,
        ),
    ] = None
    column: Annotated[
        str | None,
        key_doc(
            "Images",
            "Column of the list with the label, as a name or as the number of a class.",
            example="label",
            unit=None,
            omitted="none; set it or `regex`",
            see=GUIDE,
        ),
    ] = None

    def problems(self) -> list[str]:
        """Return one line per mistake."""
        if (self.regex is None) == (self.column is None):
            keys = "both" if self.regex is not None else "neither"
            return [f"truth: expected regex or column, found {keys}; set one of them"]
        if self.regex is None:
            return []
        try:
            pattern = re.compile(self.regex)
        except re.error as error:
            return [f"truth.regex: not a regular expression: {error}; fix it"]
        if pattern.groups < 1:
            return ["truth.regex: has no group; put the label into parentheses, such as ([^/]+)/"]
        return []
