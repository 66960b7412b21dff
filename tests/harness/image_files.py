"""Images of ten classes in formats that Pillow reads, and files that are damaged in many ways."""

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image

CLASSES = 10
EDGE = 16
"""Height and width of the input of `NETWORK`."""

PATTERN = f'''
import numpy as np

CLASSES, EDGE = {CLASSES}, {EDGE}


def patterns():
    """Return a pattern of each class, float32 (class, channel, row, column), in -1 to 1."""
    coarse = np.random.default_rng(5).uniform(-1, 1, (CLASSES, 3, 4, 4)).astype(np.float32)
    return coarse.repeat(EDGE // 4, axis=2).repeat(EDGE // 4, axis=3)
'''
NETWORK = (
    PATTERN
    + '''

class Net:
    """Correlate an image with the pattern of each class."""

    def __init__(self):
        self.weights = patterns().reshape(CLASSES, -1) / 32

    def __call__(self, x):
        return self.forward(x)

    def forward(self, x):
        return np.asarray(x, np.float32).reshape(len(x), -1) @ self.weights.T
'''
)
"""Source of a network of the runtime numpy, (n, 3, EDGE, EDGE) -> (n, CLASSES), float32."""

Pixels = npt.NDArray[np.uint8]


def patterns() -> npt.NDArray[np.float32]:
    """Return the patterns of `PATTERN`."""
    names: dict[str, Callable[[], npt.NDArray[np.float32]]] = {}
    exec(PATTERN, names)
    return names["patterns"]()


ALL_PATTERNS = patterns()
FORMATS = (
    ("png", "PNG", "RGB"), ("jpg", "JPEG", "RGB"), ("jpeg", "JPEG", "L"), ("webp", "WEBP", "RGB"),
    ("bmp", "BMP", "RGB"), ("tif", "TIFF", "RGB"), ("png", "PNG", "P"), ("png", "PNG", "RGBA"),
    ("jpg", "JPEG", "turned"), ("gif", "GIF", "P"),
)  # fmt: skip
"""Suffix, format and mode of the files, in turns. `turned` has an orientation in its EXIF."""
ORIENTATION = 0x0112


def class_of(number: int) -> int:
    """Return the true class of an image."""
    return number * 7 % CLASSES


def pixels_of(number: int) -> Pixels:
    """Return the pixels (H, W, 3) of an image: the pattern of its class, with noise."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(EDGE, 3 * EDGE, 2)
    pattern = ALL_PATTERNS[class_of(number)].transpose(1, 2, 0)
    base = Image.fromarray((128 + 90 * pattern).astype(np.uint8)).resize((int(width), int(height)))
    noise = rng.normal(0, 30, (height, width, 3))
    return (np.asarray(base) + noise).clip(0, 255).astype(np.uint8)


def image_file(number: int) -> tuple[str, bytes]:
    """Return the suffix and the content of a good image."""
    suffix, kind, mode = FORMATS[number % len(FORMATS)]
    image = Image.fromarray(pixels_of(number))
    if mode == "turned":
        exif = Image.Exif()
        exif[ORIENTATION] = 1 + number % 8
        return suffix, encoded(image, kind, exif=exif)
    return suffix, encoded(image.convert(mode), kind)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as a file."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ------------------------------------------------------------------------- damages


def truncated(number: int) -> bytes:
    content = encoded(Image.fromarray(pixels_of(number)), "JPEG")
    return content[: len(content) * 2 // 3]


def another_format(number: int) -> bytes:
    return encoded(Image.fromarray(pixels_of(number)), "PNG")


def cmyk(number: int) -> bytes:
    return encoded(Image.fromarray(pixels_of(number)).convert("CMYK"), "JPEG")


def huge(number: int) -> bytes:
    """Return a PNG file that declares 60 000 x 60 000 pixels and has none."""
    return png_file(60_000, 60_000, b"")


def bad_checksum(number: int) -> bytes:
    """Return a PNG file one bit of whose pixels is wrong."""
    content = bytearray(another_format(number))
    content[len(content) // 2] ^= 1
    return bytes(content)


def png_file(width: int, height: int, pixels: bytes) -> bytes:
    """Return a PNG file of 8 bits gray with compressed pixels as they are."""

    def part(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (part(b"IHDR", header), part(b"IDAT", pixels), part(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@dataclass(frozen=True)
class Damage:
    """A way in which an image of a list is not like the others.

    suffix   of its name
    content  of its file; None: there is no file
    code     of the error of its row; None: it is a good image
    """

    suffix: str
    content: Callable[[int], bytes] | None
    code: str | None


DAMAGES = {
    "truncated": Damage("jpg", truncated, "image_damaged"),
    "wrong_suffix": Damage("jpg", another_format, None),
    "empty": Damage("png", lambda number: b"", "image_damaged"),
    "text": Damage("jpg", lambda number: b"<html>403 Forbidden</html>\n", "image_damaged"),
    "cmyk": Damage("jpg", cmyk, None),
    "huge": Damage("png", huge, "image_too_large"),
    "checksum": Damage("png", bad_checksum, "image_damaged"),
    "permission": Damage("png", another_format, "image_missing"),
    "missing": Damage("jpg", None, "image_missing"),
    "folder": Damage("png", None, "image_missing"),
    "trick": Damage("png", None, "store_unusable"),
}
"""What is wrong with an image -> how.

The caller denies access to `permission`, makes the folder with an image's name, and replaces the
path of `trick` by one that names no image.
"""


@dataclass(frozen=True)
class ListedImage:
    """One row of a generated list.

    name     path below the list's folder, such as `class_3/000017.jpg`
    label    number of the true class
    damage   key of `DAMAGES`; "" for a good image
    content  of the file; None without one
    """

    number: int
    name: str
    label: int
    damage: str
    content: bytes | None


def generated_images(count: int, damaged: int) -> list[ListedImage]:
    """Return `count` images of ten classes, `damaged` of which are so, at places that vary."""
    places = sorted(random.Random(count).sample(range(count), damaged))
    names = list(DAMAGES)
    damage_of = {place: names[n % len(names)] for n, place in enumerate(places)}
    return [listed_image(number, damage_of.get(number, "")) for number in range(count)]


def listed_image(number: int, damage: str = "") -> ListedImage:
    """Return the row of an image."""
    label = class_of(number)
    if damage:
        how = DAMAGES[damage]
        content = how.content(number) if how.content is not None else None
        return ListedImage(
            number, f"class_{label}/{number:06}.{how.suffix}", label, damage, content
        )
    suffix, content = image_file(number)
    return ListedImage(number, f"class_{label}/{number:06}.{suffix}", label, "", content)
