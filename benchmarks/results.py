"""RESULTS.md and its plots, from the JSON files that the benchmarks wrote.

Run: python benchmarks/results.py FOLDER. What has no file there is named as not measured.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

from chunkq import __version__

PAGE = Path(__file__).with_name("RESULTS.md")
PROTOCOLS = ("chunkq", "recompute", "chunkflow", "checkerboard", "every_patch")
LONG = {
    "chunkq": "chunkq's bands",
    "recompute": "recompute and crop",
    "chunkflow": "chunkflow 1.2.0",
    "checkerboard": "eight checkerboard layers",
    "every_patch": "every patch stored",
}
BLUE, GREY = "#00798c", "#9a9a9a"
Values = Any


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def verdict(good: bool) -> str:
    """Whether a target was met, as a word that stands out where not."""
    return "met" if good else "**missed**"


def network(found: Values, folder: Path) -> list[str]:
    """Beside the bare network, MONAI and a copy."""
    targets = {"bare": ("the bare forward loop", 1.03), "monai": ("MONAI, in memory", 0.95)}
    rows = []
    for part, (label, most) in targets.items():
        if part in found:
            own = found[part]
            seconds = own["seconds"]
            spread = f"{min(own['ratios']):.2f} to {max(own['ratios']):.2f}"
            rows.append(
                (
                    label, f"{seconds['chunkq']:.2f} s", f"{seconds[part]:.2f} s",
                    f"{own['ratio']:.3f}", spread, f"at most {most}", verdict(own["ratio"] <= most),
                )
            )  # fmt: skip
    if copied := found.get("copy"):
        speed = 1 / copied["ratio"]
        rows.append(
            (
                "a plain tensorstore copy, as a speed", f"{copied['seconds']['chunkq']:.2f} s",
                f"{copied['seconds']['copy']:.2f} s", f"{speed:.2f}",
                f"{1 / max(copied['ratios']):.2f} to {1 / min(copied['ratios']):.2f}",
                "at least 0.6", verdict(speed >= 0.6),
            )
        )  # fmt: skip
    heads = ("beside", "chunkq", "the other", "ratio", "rounds", "asked for", "")
    lines = table(heads, rows)
    if memory := found.get("memory"):
        lines += ["", "Peak memory of the process (MB), over a volume and one four times as large:"]
        lines += [
            "",
            *table(
                ("", "160³", "640 × 160 × 160", "growth"),
                [
                    (who, *(f"{memory[size][who]:.0f}" for size in ("small", "large", "growth")))
                    for who in ("chunkq", "monai")
                ],
            ),
        ]
    return lines


def hotpath(found: Values, folder: Path) -> list[str]:
    """The profile, and the memory's bandwidth."""
    whole = found["profile"]["all"]
    rows = [
        (row["thread"], row["what"], f"{row['seconds']:.3f}", f"{row['seconds'] / whole:.1%}")
        for row in found["profile"]["rows"]
    ]
    lines = table(("thread", "what", "s", "of the whole"), rows)
    lines += ["", f"The whole run took {whole:.2f} s. Bandwidth (GB/s, bytes in and out):", ""]
    heads = ("channels", "plain copy", "gather", "blend")
    return lines + table(
        heads,
        [
            (channels, *(f"{rates[what]:.1f}" for what in ("copy", "gather", "blend")))
            for channels, rates in found["bandwidth"].items()
        ],
    )


def borders(found: Values, folder: Path) -> list[str]:
    """The border protocols side by side."""

    def of(name: str, key: str) -> float:
        return float(found[f"{name}_{key}"])

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3), layout="constrained")
    wanted = (
        ("patches_computed", 1.0, "patches computed"),
        ("bytes_written", 1e-6, "MB written"),
        ("seconds_by_chunkqs_median", 1.0, "wall, by chunkq's"),
    )
    for panel, (key, unit, title) in zip(panels, wanted, strict=True):
        values = [of(name, key) * unit for name in PROTOCOLS]
        colours = [BLUE if name == "chunkq" else GREY for name in PROTOCOLS]
        bars = panel.barh([LONG[name] for name in PROTOCOLS], values, color=colours)
        panel.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.margins(x=0.18)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
        if panel is not panels[0]:
            panel.set_yticklabels([])
    figure.savefig(folder / "borders.png", dpi=110)
    pyplot.close(figure)
    rows = [
        (
            LONG[name], int(of(name, "patches_computed")), f"{of(name, 'bytes_read') / 1e6:.0f}",
            f"{of(name, 'bytes_written') / 1e6:.0f}", f"{of(name, 'seconds_median'):.1f}",
            f"{of(name, 'seconds_by_chunkqs_median'):.2f}", f"{of(name, 'peak_memory_mb'):.0f}",
            f"{of(name, 'largest_difference'):.1e}",
        )
        for name in PROTOCOLS
    ]  # fmt: skip
    heads = (
        "protocol", "patches", "read MB", "written MB", "s", "by chunkq's", "peak MB",
        "largest difference",
    )  # fmt: skip
    size = " × ".join(map(str, found["volume_voxels"]))
    chunk = " × ".join(map(str, found["chunk_voxels"]))
    return [
        f"Volume {size}, chunks {chunk}, rounds: {found['rounds']}. Bytes: {found['bytes_are']}.",
        "",
        *table(heads, rows),
        "",
        f"![border protocols]({folder.name}/borders.png)",
    ]


def workers(found: Values, folder: Path) -> list[str]:
    """One worker and two."""
    own, bare = found["chunkq"], found["bare"]
    return table(
        ("", "1 → 2 processes", "asked for", ""),
        [
            ("chunkq", f"{own:.2f} ×", "at least 1.85 ×", verdict(own >= 1.85)),
            ("bare forward loops: what the machine gives", f"{bare:.2f} ×", "", ""),
        ],
    )


def queues(found: Values, folder: Path) -> list[str]:
    """Queue figures; busy shares of the device among them."""
    heads = ("part", "queue", "what", "value", "unit", "asked for", "")
    rows = []
    for f in found:
        asked = f"at least {f['least']:g}" if f["least"] is not None else ""
        asked = f"at most {f['most']:g}" if f["most"] is not None else asked
        shown = "**missed**" if f["verdict"] == "MISSED" else f["verdict"]
        rows.append((f["part"], f["queue"], f["what"], number(f["value"]), f["unit"], asked, shown))
    return table(heads, rows)


def queue_scale(found: Values, folder: Path) -> list[str]:
    """Queues at three sizes."""
    names = list(dict.fromkeys(f["queue"] for f in found))
    whats = list(dict.fromkeys(f["what"] for f in found))
    values = {(f["queue"], f["what"]): f for f in found}
    rows = [
        (what, found_unit(found, what), *(number(values[name, what]["value"]) for name in names))
        for what in whats
    ]
    return table(("what", "unit", *names), rows)


def found_unit(found: Values, what: str) -> str:
    return str(next(f["unit"] for f in found if f["what"] == what))


def planning(found: Values, folder: Path) -> list[str]:
    """Planning, as planning.py prints it."""
    return table(
        ("what", "figures"),
        [
            (label, ", ".join(f"{key} {number(value)}" for key, value in figures.items()))
            for label, figures in found.items()
        ],
    )


def predictions(found: Values, folder: Path) -> list[str]:
    """What plan says and what came."""
    rows = []
    for job, figures in found.items():
        for what, value in figures.items():
            if isinstance(value, dict) and value["ratio"] is not None:
                good = abs(value["ratio"] - 1) <= 0.1
                numbers = (f"{value['predicted']:,}", f"{value['measured']:,}")
                rows.append((job, what, *numbers, f"{value['ratio']:.3f}", verdict(good)))
    return table(("job", "what", "predicted", "measured", "ratio", "within 10 %"), rows)


def scale(found: Values, folder: Path) -> list[str]:
    """The simulation's table and plot."""
    shown = [row for row in found["rows"] if row["executor"] != "sqlite"]
    rows = [
        (
            row["executor"], row["chunk"], row["workers"], number(row["chunks_per_s"]),
            f"{row['device_busy']:.0%}", f"{row['queue_use']:.1%}", f"{row['store_use']:.0%}",
            f"{row['hours']:,.1f}", f"{row['finalizer_hours']:,.1f}", row["limit"], row["advice"],
        )
        for row in shown
    ]  # fmt: skip
    heads = (
        "executor", "chunk", "workers", "chunks/s", "device", "queue", "store", "hours",
        "finalizing h", "limit", "what to set",
    )  # fmt: skip
    assumed = [
        f"{name} {number(figure['value'])} {figure['unit']}"
        for name, figure in found["inputs"].items()
        if figure["from"] == "ASSUMED"
    ]
    return [
        "Assumed, not measured: " + "; ".join(assumed) + ".",
        "",
        f"![how busy devices are]({folder.name}/scale.png)",
        "",
        *table(heads, rows),
        "",
        *(f"- {note}" for note in found["notes"]),
    ]


def gpu(found: Values, folder: Path) -> list[str]:
    """A GPU's figures, if there was one."""
    if found["device"] is None:
        return ["No GPU was to be had: nothing is measured on one, and the CUDA path has not run."]
    parts = ((name, f"`{json.dumps(part)}`") for name, part in found["parts"].items())
    return [f"{found['device']}, torch {found['torch']}", "", *table(("part", "figures"), parts)]


def number(value: float) -> str:
    """A number in few digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


Section = Callable[[Values, Path], list[str]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "network": ("Against the bare network, MONAI and a copy", network),
    "hotpath": ("Where the seconds go", hotpath),
    "borders": ("Border protocols", borders),
    "workers": ("One worker and two", workers),
    "queues": ("Queues, and the device kept busy", queues),
    "queue_scale": ("Queues at 10⁴ to 10⁶ tasks", queue_scale),
    "planning": ("Planning", planning),
    "predictions": ("What plan predicts", predictions),
    "scale": ("1 to 4096 workers on 1 PB, simulated", scale),
    "gpu": ("On a GPU", gpu),
}
"""A JSON file's name without its end -> its title, and what writes its lines."""


def notes(name: str) -> list[str]:
    """What is to be said of a part, by hand, from notes.md: its section of that name."""
    path = Path(__file__).with_name("notes.md")
    parts = path.read_text().split("\n## ") if path.exists() else []
    found = [part.partition("\n")[2].strip() for part in parts if part.split("\n")[0] == name]
    return ["", *found] if found else []


def main() -> None:
    """Write the page."""
    folder = Path(sys.argv[1])
    lines = [
        "# Results",
        "",
        f"Written by `make bench` (chunkq {__version__}, Python {platform.python_version()}). "
        "Ratios are medians of interleaved rounds on a virtual machine with two shared cores, "
        "whose speed drifts by a third within minutes: trust ratios, not seconds of two tables. "
        "How each is measured is said in [README.md](README.md) and at the top of each program.",
    ]
    for name, (title, section) in SECTIONS.items():
        path = folder / f"{name}.json"
        lines += ["", f"## {title}", ""]
        if path.exists():
            lines += section(json.loads(path.read_text()), folder)
        else:
            lines.append(f"Not measured yet: `python benchmarks/{name}.py --json {name}.json`.")
        lines += notes(name)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
