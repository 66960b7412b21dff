"""Compare a prediction with the truth: Dice on the held-out half, and a picture.

    python score.py PREDICTION.zarr INPUT.zarr TRUTH.zarr PICTURE.png [--json FILE]

Exit with 1 if a tissue's Dice is below 0.90, with 2 if the files cannot be read or compared.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from template import SPLIT, Volume, dice, held_out_half, training_half

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plane = npt.NDArray[np.uint8]

MIN_DICE = 0.90
TISSUES = {"grey": 1, "white": 2}
# Planes through the caudate and the putamen, which are mostly outside the training half.
AXIAL_Z, CORONAL_Y, SAGITTAL_X = 78, 142, 122

PAPER, INK, FAINT, LINE = "#0b0e12", "#f2f2f2", "#9aa4ae", "#ffd24a"
COLORS = {"grey": "#e8836b", "white": "#8cc6e7"}
DASHES = (0, (4, 3))
FOOTNOTE = (
    "Dice on the held-out front half. One averaged brain: "
    "this shows the pipeline, not how well a network generalizes."
)
WIDTH_PX, DPI = 1400, 140
RIM = 5  # voxels around the brain in the picture
LEFT, RIGHT, GAP, TOP, BOTTOM = 34, 10, 8, 26, 42  # in voxels


class View(NamedTuple):
    """One plane of the volumes; its second axis points up."""

    name: str
    planes: list[Plane]
    # Direction in which the halves meet: across, up, or nowhere if the plane is held out.
    split: str
    at: float


def read_volume(store: Path) -> Volume:
    """Read the array "0" of an OME-Zarr group as uint8."""
    import zarr

    try:
        array = zarr.open_group(store, mode="r")["0"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f'{store}: expected an OME-Zarr group with an array "0" ({error})'
        ) from error
    if not isinstance(array, zarr.Array):
        raise ValueError(f'{store}: expected an array at "0"')
    return np.asarray(array[...]).astype(np.uint8)


def score(result: Volume, truth: Volume) -> dict[str, dict[str, float]]:
    """Return the Dice of each tissue, for the held-out and the training half."""
    halves = {"held_out": held_out_half, "training": training_half}
    return {
        name: {tissue: dice(half(result), half(truth), label) for tissue, label in TISSUES.items()}
        for name, half in halves.items()
    }


def views(volumes: list[Volume]) -> list[View]:
    """Return axial, coronal and sagittal planes, cropped to the brain, as (across, up)."""
    inside = np.argwhere(volumes[0] > 0)
    low = np.maximum(inside.min(0) - RIM, 0)
    high = np.minimum(inside.max(0) + 1 + RIM, volumes[0].shape)
    z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    border = SPLIT - int(low[1]) - 0.5
    return [
        View("axial", [v[AXIAL_Z, y, x].T for v in volumes], "up", border),
        View("coronal", [v[z, CORONAL_Y, x].T for v in volumes], "nowhere", 0),
        View("sagittal", [v[z, y, SAGITTAL_X].T for v in volumes], "across", border),
    ]


def color_image(labels: Plane) -> npt.NDArray[np.float64]:
    """Return the RGB colors of labels, (*shape, 3)."""
    from matplotlib.colors import to_rgb

    table = np.array([to_rgb(c) for c in (PAPER, *COLORS.values())])
    return table[np.minimum(labels, len(TISSUES))]


def mark_halves(axes: "Axes", view: View, extent: tuple[int, ...], labelled: bool) -> None:
    """Dim the training half and draw the border; add texts if `labelled`."""
    width, height = extent
    style: dict[str, Any] = {"color": LINE, "fontsize": 8.5}
    if view.split == "up":
        axes.axhspan(-0.5, view.at, color=PAPER, alpha=0.45, lw=0)
        axes.axhline(view.at, color=LINE, lw=1, ls=DASHES)
        spots = [(1, height - 2, "left", "top"), (1, 1, "left", "bottom")]
    elif view.split == "across":
        axes.axvspan(-0.5, view.at, color=PAPER, alpha=0.45, lw=0)
        axes.axvline(view.at, color=LINE, lw=1, ls=DASHES)
        spots = [(width - 2, height - 2, "right", "top"), (1, height - 2, "left", "top")]
    else:
        spots = [(1, height - 2, "left", "top")]
    if labelled:
        for (across, up, ha, va), text in zip(spots, ("held out", "trained on"), strict=False):
            axes.text(across, up, text, ha=ha, va=va, **style)


def draw(volumes: list[Volume], scores: dict[str, dict[str, float]], picture: Path) -> None:
    """Draw input, result and truth in three views, with a legend, and write them as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = views(volumes)
    column = max(view.planes[0].shape[0] for view in rows)
    heights = [view.planes[0].shape[1] for view in rows]
    wide = LEFT + 3 * column + 2 * GAP + RIGHT
    high = TOP + sum(heights) + 2 * GAP + BOTTOM
    inches = WIDTH_PX / DPI
    figure = Figure(figsize=(inches, inches * high / wide), facecolor=PAPER)

    def write(across: float, up: float, text: str, size: float, **style: Any) -> None:
        style = {"ha": "center", "va": "center", "color": INK, "fontsize": size, **style}
        figure.text(across / wide, up / high, text, **style)

    top = high - TOP
    for view, height in zip(rows, heights, strict=True):
        write(LEFT / 2, top - height / 2, view.name, 13, rotation=90)
        width = view.planes[0].shape[0]
        for index, plane in enumerate(view.planes):
            left = LEFT + index * (column + GAP) + (column - width) / 2
            box = (left / wide, (top - height) / high, width / wide, height / high)
            show_plane(figure, box, plane, view, is_input=index == 0)
        top -= height + GAP
    for index, title in enumerate(("input: T1 intensities", "result: chunkq", "truth")):
        write(LEFT + index * (column + GAP) + column / 2, high - TOP / 2, title, 14)
    draw_legend(figure, scores["held_out"], BOTTOM * 0.64 / high)
    write(wide / 2, BOTTOM * 0.24, FOOTNOTE, 9.5, color=FAINT)
    figure.savefig(picture, dpi=DPI, facecolor=PAPER)


def show_plane(
    figure: "Figure",
    box: tuple[float, float, float, float],
    plane: Plane,
    view: View,
    *,
    is_input: bool,
) -> None:
    """Draw one plane into a box of the figure (left, bottom, width, height in fractions)."""
    from matplotlib.colors import LinearSegmentedColormap

    axes = figure.add_axes(box)
    axes.set_axis_off()
    style: dict[str, Any] = {"origin": "lower", "aspect": "auto"}
    if is_input:
        # Starts with the background color, so that no box is visible around the brain.
        grays = LinearSegmentedColormap.from_list("grays", [PAPER, "white"])
        axes.imshow(plane.T, cmap=grays, vmin=0, vmax=255, interpolation="bilinear", **style)
    else:
        axes.imshow(color_image(plane.T), interpolation="nearest", **style)
    mark_halves(axes, view, plane.shape, labelled=is_input)


def draw_legend(figure: "Figure", held_out: dict[str, float], up: float) -> None:
    """Draw the colors of the tissues with their Dice, at height `up`."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=COLORS[tissue], label=f"{tissue} matter: Dice {held_out[tissue]:.3f}")
        for tissue in TISSUES
    ]
    border: dict[str, Any] = {"color": LINE, "lw": 1.2, "ls": DASHES}
    handles.append(Line2D([], [], label="trained on the dimmed half only", **border))
    style: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 11.5}
    position: dict[str, Any] = {"loc": "center", "bbox_to_anchor": (0.5, up)}
    figure.legend(handles=handles, ncols=3, columnspacing=2.2, **position, **style)


def main() -> int:
    parser = argparse.ArgumentParser(description="Dice on the held-out half, and a picture.")
    for name in ("prediction", "input", "truth", "picture"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--json", type=Path, help="write the Dice values to this file")
    options = parser.parse_args()
    try:
        t1, result, truth = map(read_volume, (options.input, options.prediction, options.truth))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not t1.shape == result.shape == truth.shape:
        shapes = f"{t1.shape}, {result.shape}, {truth.shape}"
        print(f"shapes of input, prediction and truth differ: {shapes}", file=sys.stderr)
        return 2

    scores = score(result, truth)
    for half, values in scores.items():
        name = "held-out front half:" if half == "held_out" else "training back half: "
        print(f"{name} Dice {values['grey']:.4f} grey matter, {values['white']:.4f} white matter")
    if options.json:
        options.json.write_text(json.dumps(scores, indent=2) + "\n")
    draw([t1, result, truth], scores, options.picture)
    print(f"{options.picture}: input, result and truth side by side")

    poor = [tissue for tissue, value in scores["held_out"].items() if value < MIN_DICE]
    if poor:
        print(f"FAILED: Dice below {MIN_DICE} for {' and '.join(poor)} matter", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
