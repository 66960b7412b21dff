"""RESULTS.md and its plots, from the JSON files that the benchmarks wrote.

Run: python benchmarks/results.py FOLDER. What has no file there is named as not measured.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

from chunkq import __version__

PAGE = Path(__file__).with_name("RESULTS.md")
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
    rows = []
    for size in ("small", "large", "basic"):
        if size in found:
            own = found[size]
            net = "MONAI's BasicUNet, " if size == "basic" else ""
            job = f"{net}{own['patches']} patches, chunks of {own['chunk']}³"
            rows.append(_beside(own, "bare", f"the bare forward loop, {job}", 1.03))
            rows.append(_beside(own, "monai", f"MONAI, in memory, {job}", 0.95))
    if copied := found.get("copy"):
        rows.append(_beside(copied, "copy", "a plain tensorstore copy", 1 / 0.6))
    heads = (
        "beside", "chunkq", "the other", "ratio", "rounds", "of processor time", "at most", "",
    )  # fmt: skip
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


def _beside(found: Values, other: str, label: str, most: float) -> tuple[str, ...]:
    """A row of chunkq's seconds beside another's, with the ratio that is asked for."""
    seconds, ratios = found["seconds"], found["ratios"][other]
    ratio = statistics.median(ratios)
    return (
        label,
        *(f"{seconds[who]:.2f} s" for who in ("chunkq", other)),
        f"{ratio:.3f}",
        f"{len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f}",
        f"{statistics.median(found['cpu_ratios'][other]):.3f}",
        f"{most:.2f}",
        verdict(ratio <= most),
    )


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
    """The border protocols side by side, for chunks of each size."""
    sizes = [(" × ".join(map(str, of["chunk_voxels"])), of["protocols"]) for of in found["chunks"]]
    borders_plot(sizes, folder / "borders.png")
    rows = [
        (
            size, LONG[name], own["patches_computed"], f"{own['bytes_read'] / 1e6:.0f}",
            f"{own['bytes_written'] / 1e6:.0f}", f"{own['seconds_median']:.1f}",
            f"{own['seconds_by_chunkqs_median']:.2f}", f"{own['peak_memory_mb']:.0f}",
            f"{own['largest_difference']:.1e}",
        )
        for size, protocols in sizes
        for name, own in protocols.items()
    ]  # fmt: skip
    heads = (
        "chunks", "protocol", "patches", "read MB", "written MB", "s", "by chunkq's", "peak MB",
        "largest difference",
    )  # fmt: skip
    volume, patch, stride = (
        " × ".join(map(str, found[f"{name}_voxels"])) for name in ("volume", "patch", "strides")
    )
    return [
        f"Volume {volume}, patches {patch} every {stride}, rounds: {found['rounds']}. MB are "
        f"{found['bytes_are']}. Ratios are to chunkq with the same chunks.",
        "",
        *table(heads, rows),
        "",
        f"![border protocols]({folder.name}/borders.png)",
    ]


def borders_plot(sizes: Sequence[tuple[str, Values]], path: Path) -> None:
    """Bars for each protocol, one for each chunk size, the larger the darker."""
    wanted = (
        ("patches_computed", 1.0, "patches computed"),
        ("bytes_read", 1e-6, "MB read"),
        ("bytes_written", 1e-6, "MB written"),
        ("seconds_median", 1.0, "wall (s)"),
    )
    figure, panels = pyplot.subplots(1, len(wanted), figsize=(13, 4), layout="constrained")
    names, high = list(sizes[0][1]), 0.8 / len(sizes)
    places = range(len(names))
    for panel, (key, unit, title) in zip(panels, wanted, strict=True):
        for n, (_, protocols) in enumerate(sizes):
            at = [place + (n - (len(sizes) - 1) / 2) * high for place in places]
            colours = [BLUE if name == "chunkq" else GREY for name in names]
            values = [protocols[name][key] * unit for name in names]
            alpha = (n + 1) / len(sizes)
            bars = panel.barh(at, values, high, color=colours, alpha=alpha)
            panel.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.set_yticks(places, [LONG[name] for name in names] if panel is panels[0] else [])
        panel.margins(x=0.18)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    shades = [Patch(color=GREY, alpha=(n + 1) / len(sizes)) for n in range(len(sizes))]
    labels = [f"chunks {size}" for size, _ in sizes]
    figure.legend(shades, labels, loc="outside lower center", ncols=len(sizes), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
    """Where the simulation's limit changes, from how many workers each could be one, its plot."""

    def between(pair: Sequence[float], form: str) -> str:
        return " to ".join(dict.fromkeys(format(value, form) for value in pair))

    rows = [
        (
            of["chunk"], between(of["workers"], "d"), of["limit"], ", ".join(of["executors"]),
            between(of["device_busy"], ".0%"), between(of["queue_use"], ".0%"),
            between(of["store_use"], ".0%"), between(of["hours"], ",.0f"),
            f"{of['seal_hours']:.2g}", of["what_to_set"],
        )
        for of in found["limits"]
    ]  # fmt: skip
    heads = (
        "chunk", "workers", "limit", "queues", "device busy", "queue used", "store used", "hours",
        "sealing h", "what to set, with the most workers",
    )  # fmt: skip
    assumed = [
        (f["what"], quantity(f["value"], f["unit"]), f"`--{name.replace('_', '-')}`")
        for name, f in found["inputs"].items()
        if f["from"] == "ASSUMED"
    ]
    files = sorted({f["from"] for f in found["inputs"].values()} - {"ASSUMED", "option"})
    return [
        "Where the limit changes: from the smallest crew that meets it to the largest of those "
        "tried. Workers complete blocks meanwhile; sealing comes after the last chunk.",
        "",
        *table(heads, rows),
        "",
        *chunk_sizes(found["chunk_sizes"], found["job"]["depth"]),
        "",
        f"![how busy devices are]({folder.name}/scale.png)",
        "",
        *(f"- {note}" for note in found["notes"]),
        "",
        f"Figures come from {', '.join(files)}; all crews tried are in {folder.name}/scale.json. "
        "Assumed, not measured:",
        "",
        *table(("what", "value", "option"), assumed),
    ]


def chunk_sizes(found: Values, depth: int) -> list[str]:
    """What a chunk size means, and from how many workers on what all share is the limit."""
    queues = list(found[0]["queue_bytes"])

    def each(name: str, unit: float = 1.0) -> list[str]:
        return [" / ".join(number(of[name][q] * unit) for q in queues) for of in found]

    def until(start: str) -> list[str]:
        return [
            number(min(v for k, v in of["workers_until_limit"].items() if k.startswith(start)))
            for of in found
        ]

    named = " / ".join(queues)
    return table(
        ("whatever the number of workers", *(f"chunk {of['chunk']}" for of in found)),
        [
            ("chunks (millions)", *(number(of["chunks"] / 1e6) for of in found)),
            (
                f"memory of a worker, depth {depth} (GB)",
                *(number(of["worker_bytes"] / 1e9) for of in found),
            ),
            (f"queueing all (h): {named}", *each("enqueue_hours")),
            (f"the queue, at most (GB): {named}", *each("queue_bytes", 1e-9)),
            *(
                (f"workers from which {what} would be the limit, were it alone", *until(what))
                for what in (*(f"queue {q}" for q in queues), "enqueueing", "store", "commits")
            ),
            ("workers from which sealing takes longer than the chunks", *until("sealing")),
        ],
    )


def gpu(found: Values, folder: Path) -> list[str]:
    """A GPU's figures, if there was one."""
    if found["device"] is None:
        return ["No GPU was to be had: nothing is measured on one, and the CUDA path has not run."]
    parts = ((name, f"`{json.dumps(part)}`") for name, part in found["parts"].items())
    return [f"{found['device']}, torch {found['torch']}", "", *table(("part", "figures"), parts)]


def number(value: float) -> str:
    """A number in few digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def quantity(value: float, unit: str) -> str:
    """A number with its unit, bytes in GB, MB or kB."""
    if unit.startswith("B"):
        for name, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{number(value / size)} {name}{unit}"
    return f"{number(value)}/s" if unit == "1/s" else f"{number(value)} {unit}".rstrip()


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
