"""The figures of the page Concepts, computed with chunkq's own plan of a small 2-D job.

Each function returns an SVG for the light or the dark scheme of the site.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from chunkq.blend.weight_profiles import LOG_PROFILES
from chunkq.geometry.box import Box
from chunkq.job.job_parsing import parse_job
from chunkq.job.resolve import resolve
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume

SCHEMES = MappingProxyType({"light": "#22252b", "dark": "#e2e4e9"})
"""Scheme of the site -> color of lines and text."""
BLUE, ORANGE, GREEN, PURPLE = "#4c83d6", "#e07b24", "#3f9c5a", "#9a6bc9"
VOLUME, CHUNK, STORAGE, PATCH, STRIDE = 96, 48, 16, 24, 12


def plan(**keys: Any) -> Plan:
    """Return the plan of a 2-D job over 96 × 96 voxels, some of its keys changed."""
    model = {
        "runtime": "numpy",
        "type": "class",
        "class_file": "/net.py",
        "class_name": "net",
        "model_input_shape": [PATCH, PATCH],
    }
    job = {
        "input": "/in.zarr",
        "output": "/out.zarr",
        "inference_type": "sliding_window",
        "strides": [STRIDE, STRIDE],
        "chunksize": [CHUNK, CHUNK],
        "storage_chunks": [STORAGE, STORAGE],
        **keys,
    }
    job["model_config"] = model | keys.get("model_config", {})
    return resolve(parse_job(job), Volume((VOLUME, VOLUME), "uint8"))


def patch(scheme: str) -> str:
    """Draw one patch: input, output, margin, and the voxels that are kept."""
    cropped = plan(
        inference_type="crop_margin",
        strides=None,
        margin=[4, 4],
        model_config={"model_input_shape": [40, 40], "model_output_shape": [32, 32]},
    )
    first = cropped.chunk((0, 0))
    patch = next(p for p in cropped.patches(first) if min(p.target.start) > 0)
    source = patch.source
    inset = [(p - q) // 2 for p, q in zip((40, 40), cropped.output_patch, strict=True)]
    output = Box(
        tuple(s + i for s, i in zip(source.start, inset, strict=True)),
        tuple(s - i for s, i in zip(source.stop, inset, strict=True)),
    )
    with _figure(scheme, 4.4, 4.4) as (axes, svg):
        _box(axes, source, BLUE, alpha=0.15)
        _box(axes, output, ORANGE, alpha=0.2)
        _box(axes, patch.target, GREEN, alpha=0.35)
        _text(axes, source, f"input patch {_size(source)}", BLUE, "top")
        _text(axes, output, f"output patch {_size(output)}", ORANGE, "top")
        _text(axes, patch.target, f"kept {_size(patch.target)}", GREEN, "middle")
        axes.annotate(
            "margin 4",
            xy=(output.stop[1] - 2, np.mean([output.start[0], output.stop[0]])),
            xytext=(source.stop[1] + 3, np.mean([output.start[0], output.stop[0]])),
            va="center",
            arrowprops={"arrowstyle": "->", "color": SCHEMES[scheme]},
        )
        _frame(axes, source, right=16)
    return svg[0]


def chunk(scheme: str) -> str:
    """Draw a chunk: its block, the patches it owns, what they read and where they write."""
    sliding = plan(pad_width=[8, 8], pad_mode="reflect")
    own = sliding.chunk((0, 0))
    with _figure(scheme, 4.4, 4.4) as (axes, svg):
        _blocks(axes, sliding, scheme)
        _box(axes, own.block, BLUE, alpha=0.2)
        _box(axes, own.halo, PURPLE, alpha=0.0, line="--")
        _box(axes, own.region, ORANGE, alpha=0.0, line="-.")
        starts = []
        for owned in sliding.patches(own):
            starts.append(owned.target.start)
            if len(set(owned.numbers)) == 1:
                _box(axes, owned.source, SCHEMES[scheme], alpha=0.0, width=0.8)
        axes.plot([s[1] for s in starts], [s[0] for s in starts], "o", color=BLUE, markersize=4)
        _legend(
            axes,
            [
                (BLUE, "block of chunk (0, 0)"),
                (SCHEMES[scheme], "input patches that it owns\n(those on the diagonal)"),
                (BLUE, "dots: where the output of\nits patches starts"),
                (PURPLE, "input it reads"),
                (ORANGE, "voxels its patches write"),
            ],
        )
        _frame(axes, sliding.chunk((0, 0)).halo, VOLUME)
    return svg[0]


def band(scheme: str) -> str:
    """Draw a block: its overlap region, its interior, the storage chunks the region touches."""
    sliding = plan()
    own = sliding.chunk((1, 1))
    with _figure(scheme, 4.4, 4.4) as (axes, svg):
        _blocks(axes, sliding, scheme)
        for box in own.touched_boxes:
            _box(axes, box, ORANGE, alpha=0.18, width=0)
        for box in own.band_boxes:
            _box(axes, box, ORANGE, alpha=0.5, width=0)
        _box(axes, own.interior, GREEN, alpha=0.0)
        _box(axes, own.block, BLUE, alpha=0.0, width=2)
        for line in range(own.block.start[0], own.block.stop[0], STORAGE):
            axes.plot([CHUNK, VOLUME], [line, line], ":", color=SCHEMES[scheme], linewidth=0.6)
            axes.plot([line, line], [CHUNK, VOLUME], ":", color=SCHEMES[scheme], linewidth=0.6)
        _legend(
            axes,
            [
                (BLUE, "block (1, 1)"),
                (ORANGE, "band: patches of lower\nchunks write here, too"),
                (f"{ORANGE}40", "rest of the storage chunks\nthat the band touches"),
                (GREEN, "interior: written by\nthis chunk alone"),
            ],
        )
        _frame(axes, Box((0, 0), (VOLUME, VOLUME)), VOLUME)
    return svg[0]


def pieces(scheme: str) -> str:
    """Draw the pieces that chunk (0, 0) sends to its upper neighbors."""
    sliding = plan()
    own = sliding.chunk((0, 0))
    with _figure(scheme, 4.4, 4.4) as (axes, svg):
        _blocks(axes, sliding, scheme)
        _box(axes, own.block, BLUE, alpha=0.2)
        colors = (ORANGE, GREEN, PURPLE)
        entries = [(BLUE, "block of chunk (0, 0)")]
        middle = np.mean([own.block.start, own.block.stop], axis=0)
        for sent, color in zip(sliding.outgoing_pieces(own), colors, strict=True):
            _box(axes, sent.box, color, alpha=0.45)
            end = np.mean([sent.box.start, sent.box.stop], axis=0)
            axes.annotate(
                "",
                xy=(end[1], end[0]),
                xytext=(middle[1], middle[0]),
                arrowprops={"arrowstyle": "->", "color": SCHEMES[scheme]},
            )
            entries.append((color, f"piece {sent.name} for block {sent.target}"))
        _legend(axes, entries)
        _frame(axes, Box((0, 0), (VOLUME, VOLUME)), VOLUME)
    return svg[0]


def weights(scheme: str) -> str:
    """Draw the built-in profiles, and the normalized weights of overlapping patches."""
    with _style(scheme):
        figure = Figure(figsize=(8.6, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        voxels = np.arange(64)
        for name, profile in LOG_PROFILES.items():
            values = np.exp(profile(64))
            left.plot(voxels, values / values.max(), label=name)
        left.set(title="profiles, largest weight = 1", xlabel="voxel of the patch", ylim=(0, 1.05))
        left.legend(fontsize=7, frameon=False, loc="lower center")
        own = np.exp(LOG_PROFILES["weight_gaussian"](64))
        starts = range(0, 129, 32)
        total = np.zeros(192)
        for start in starts:
            total[start : start + 64] += own
        for start in starts:
            right.plot(np.arange(start, start + 64), own / total[start : start + 64])
        right.plot(np.arange(192), np.ones(192), "--", color=SCHEMES[scheme], label="their sum")
        right.set(title="gaussian, divided by Σ w, stride 32", xlabel="voxel of the volume")
        right.legend(fontsize=7, frameon=False, loc="center right")
        return _svg(figure)


FIGURES: MappingProxyType[str, Callable[[str], str]] = MappingProxyType(
    {"patch": patch, "chunk": chunk, "band": band, "pieces": pieces, "weights": weights}
)
"""File name -> what draws it."""


@contextmanager
def _style(scheme: str) -> Iterator[None]:
    """Draw in the colors of a scheme; the same input gives the same bytes."""
    ink = SCHEMES[scheme]
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    colors = dict.fromkeys(keys, ink)
    with mpl.rc_context({**colors, "font.size": 9, "svg.hashsalt": "chunkq"}):
        yield


@contextmanager
def _figure(scheme: str, width: float, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Yield axes in voxels, axis 0 downwards; the list receives the SVG at the end."""
    with _style(scheme):
        figure = Figure(figsize=(width, height))
        axes, svg = figure.subplots(), [""]
        axes.set_aspect("equal")
        yield axes, svg
        svg[0] = _svg(figure)


def _svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    file = io.StringIO()
    figure.savefig(
        file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
    )
    return file.getvalue()


def _box(
    axes: Axes, box: Box, color: str, *, alpha: float, width: float = 1.4, line: str = "-"
) -> None:
    """Draw a box of voxels: filled with `alpha`, outlined `width` points wide."""
    corner, (rows, columns) = (box.start[1], box.start[0]), box.shape
    axes.add_patch(Rectangle(corner, columns, rows, facecolor=color, alpha=alpha, linewidth=0))
    axes.add_patch(
        Rectangle(
            corner, columns, rows, fill=False, edgecolor=color, linewidth=width, linestyle=line
        )
    )


def _blocks(axes: Axes, of: Plan, scheme: str) -> None:
    """Outline every block of a plan and write its index into it."""
    for index in of.indices():
        block = of.chunk(index).block
        _box(axes, block, SCHEMES[scheme], alpha=0.0, width=0.8)
        axes.text(block.stop[1] - 2, block.stop[0] - 2, str(index), ha="right", va="bottom")


def _text(axes: Axes, box: Box, text: str, color: str, where: str) -> None:
    middle = np.mean([box.start, box.stop], axis=0)
    row = box.start[0] + 1 if where == "top" else middle[0]
    axes.text(middle[1], row, text, color=color, ha="center", va=where.replace("middle", "center"))


def _size(box: Box) -> str:
    return " × ".join(map(str, box.shape))


def _legend(axes: Axes, entries: list[tuple[str, str]]) -> None:
    handles = [Rectangle((0, 0), 1, 1, color=color, label=text) for color, text in entries]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def _frame(axes: Axes, box: Box, least: int = 0, *, right: int = 0) -> None:
    """Show a box and the voxels below `least`, axis 0 downwards."""
    low, high = min(box.start), max(*box.stop, least)
    axes.set(xlim=(low - 2, high + 2 + right), ylim=(high + 2, low - 2))
    axes.set(xlabel="axis 1 (voxels)", ylabel="axis 0 (voxels)")
    axes.spines[["top", "right"]].set_visible(False)
