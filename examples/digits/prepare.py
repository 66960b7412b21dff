"""Write the held-out digits as PNG files, and one that is broken.

    python prepare.py FOLDER        writes FOLDER/DIGIT/NUMBER.png and FOLDER/7/broken.png

A second run writes the same files again.
"""

import argparse
import sys
from pathlib import Path

import digits
from PIL import Image

BROKEN = Path("7", "broken.png")
"""The first half of a PNG file."""


def write_images(folder: Path) -> int:
    """Write the images; return how many there are, without the broken one."""
    pixels, labels = digits.load()
    for number in range(digits.SPLIT, len(labels)):
        path = folder / str(labels[number]) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(path)
    content = path.read_bytes()
    (folder / BROKEN).write_bytes(content[: len(content) // 2])
    return len(labels) - digits.SPLIT


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the example's images.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder: Path = parser.parse_args().folder
    try:
        count = write_images(folder)
    except (digits.DigitsMissingError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder}: {count} images of 8 x 8 pixels, and {BROKEN}, which is broken")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
