"""Write RESULTS.md and its plots from the JSON files of the benchmarks.

Run: python benchmarks/results.py FOLDER. A benchmark without a file is listed as not measured.
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

from benchmarks.gpu_table import table as gpu_table
from chunkq import __version__

PAGE = Path(__file__).with_name("RESULTS.md")
LONG = {
    "chunkq": "chunkq's pieces",
    "recompute": "recompute and crop",
    "chunkflow": "chunkflow 1.2.0",
    "checkerboard": "eight checkerboard layers",
    "every_patch": "every patch stored",
}
IMAGE_PARTS = {
    "network": "a network that takes most of the time",
    "decoder": "a network without cost",
}
BLUE, GREY = "#00798c", "#9a9a9a"
Values = Any


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def verdict(good: bool) -> str:
    """Return whether a target was met, with emphasis if not."""
    return "met" if good else "**missed**"


def network(results: Values, folder: Path) -> list[str]:
    """Return the comparison with the bare network, MONAI and a copy."""
    rows = []
    for size in ("small", "large", "basic"):
        if size in results:
            figures = results[size]
            net = "MONAI's BasicUNet, " if size == "basic" else ""
            job = f"{net}{figures['patches']} patches, chunks of {figures['chunk']}³"
            target = 1.05 if size == "small" else 1.03
            rows.append(_comparison(figures, "bare", f"the bare forward loop, {job}", target))
            rows.append(_comparison(figures, "monai", f"MONAI, in memory, {job}", 0.95))
    if copied := results.get("copy"):
        rows.append(_comparison(copied, "copy", "a plain tensorstore copy", 1 / 0.6))
    heads = (
        "compared with", "chunkq", "other", "ratio", "rounds", "CPU time ratio", "at most", "",
    )  # fmt: skip
    lines = table(heads, rows)
    if memory := results.get("memory"):
        lines += ["", "Peak memory of the process (MB) for a volume and one four times as large:"]
        lines += [
            "",
            *table(
                ("", "160³", "640 × 160 × 160", "growth"),
                [
                    (name, *(f"{memory[size][name]:.0f}" for size in ("small", "large", "growth")))
                    for name in ("chunkq", "monai")
                ],
            ),
        ]
    return lines


def _comparison(results: Values, other: str, label: str, target: float) -> tuple[str, ...]:
    """Return a row of chunkq's seconds against another's, with the largest ratio of the target."""
    seconds, ratios = results["seconds"], results["ratios"][other]
    ratio = statistics.median(ratios)
    return (
        label,
        *(f"{seconds[name]:.2f} s" for name in ("chunkq", other)),
        f"{ratio:.3f}",
        f"{len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f}",
        f"{statistics.median(results['cpu_ratios'][other]):.3f}",
        f"{target:.2f}",
        verdict(ratio <= target),
    )


def startup(results: Values, folder: Path) -> list[str]:
    """Return the seconds of a small job, when each of its steps ends, and those of commands."""
    trees = list(results["ratios"])
    rows = []
    for tree in trees:
        ratios, seconds = results["ratios"][tree], results["seconds"]
        ratio = statistics.median(ratios)
        rows.append(
            (
                tree,
                f"{seconds[tree]:.2f} s",
                f"{seconds['script']:.2f} s",
                f"{ratio:.2f}",
                f"{len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f}",
                f"{statistics.median(results['cpu_ratios'][tree]):.2f}",
                f"{results['target_ratio']:.2f}",
                verdict(ratio <= results["target_ratio"]),
            )
        )
    heads = (
        "one chunk, 27 patches", "chunkq", "script", "ratio", "rounds", "CPU time ratio", "at most",
        "",
    )  # fmt: skip
    lines = table(heads, rows)
    used = [f"{name} {seconds:.2f} s" for name, seconds in results["cpu_seconds"].items()]
    lines += ["", f"CPU time of all processes: {', '.join(used)}."]
    for name, marks in results["marks"].items():
        lines += ["", f"Seconds since the start of the command, {name}:", ""]
        ordered = sorted(marks.items(), key=lambda mark: mark[1])
        lines += table(("moment", "s"), [(mark, f"{moment:.2f}") for mark, moment in ordered])
    limit = results["target_seconds"]
    commands = [
        (
            f"`{command}`",
            *(f"{seconds[tree]:.2f} s" for tree in trees),
            f"{limit:.2f} s",
            verdict(seconds["chunkq"] <= limit),
        )
        for command, seconds in results["commands"].items()
    ]
    return [*lines, "", *table(("command", *trees, "at most", ""), commands)]


def hotpath(results: Values, folder: Path) -> list[str]:
    """Return the profile and the memory bandwidth."""
    total = results["profile"]["all"]
    rows = [
        (row["thread"], row["label"], f"{row['seconds']:.3f}", f"{row['seconds'] / total:.1%}")
        for row in results["profile"]["rows"]
    ]
    lines = table(("thread", "function", "s", "share of the run"), rows)
    lines += ["", f"The run took {total:.2f} s. Bandwidth (GB/s, bytes read and written):", ""]
    heads = ("channels", "plain copy", "gather", "blend")
    return lines + table(
        heads,
        [
            (channels, *(f"{rates[label]:.1f}" for label in ("copy", "gather", "blend")))
            for channels, rates in results["bandwidth"].items()
        ],
    )


def borders(results: Values, folder: Path) -> list[str]:
    """Return the comparison of border protocols for each chunk size."""
    sizes = [
        (" × ".join(map(str, item["chunk_voxels"])), item["protocols"])
        for item in results["chunks"]
    ]
    borders_plot(sizes, folder / "borders.png")
    rows = [
        (
            size, LONG[name], figures["patches_computed"], f"{figures['bytes_read'] / 1e6:.0f}",
            f"{figures['bytes_written'] / 1e6:.0f}", f"{figures['seconds_median']:.1f}",
            f"{figures['seconds_by_chunkqs_median']:.2f}", f"{figures['peak_memory_mb']:.0f}",
            f"{figures['largest_difference']:.1e}",
        )
        for size, protocols in sizes
        for name, figures in protocols.items()
    ]  # fmt: skip
    heads = (
        "chunks", "protocol", "patches", "read MB", "written MB", "s", "ratio to chunkq", "peak MB",
        "largest difference",
    )  # fmt: skip
    volume, patch, stride = (
        " × ".join(map(str, results[f"{name}_voxels"])) for name in ("volume", "patch", "strides")
    )
    return [
        f"Volume {volume}, patches {patch} every {stride}, rounds: {results['rounds']}. MB are "
        f"{results['bytes_are']}. Ratios are to chunkq with the same chunks.",
        "",
        *table(heads, rows),
        "",
        f"![border protocols]({folder.name}/borders.png)",
    ]


def borders_plot(sizes: Sequence[tuple[str, Values]], path: Path) -> None:
    """Draw bars for each protocol and chunk size; larger chunks are darker."""
    quantities = (
        ("patches_computed", 1.0, "patches computed"),
        ("bytes_read", 1e-6, "MB read"),
        ("bytes_written", 1e-6, "MB written"),
        ("seconds_median", 1.0, "wall (s)"),
    )
    figure, panels = pyplot.subplots(1, len(quantities), figsize=(13, 4), layout="constrained")
    names, high = list(sizes[0][1]), 0.8 / len(sizes)
    slots = range(len(names))
    for panel, (key, unit, title) in zip(panels, quantities, strict=True):
        for n, (_, protocols) in enumerate(sizes):
            at = [slot + (n - (len(sizes) - 1) / 2) * high for slot in slots]
            colors = [BLUE if name == "chunkq" else GREY for name in names]
            values = [protocols[name][key] * unit for name in names]
            alpha = (n + 1) / len(sizes)
            bars = panel.barh(at, values, high, color=colors, alpha=alpha)
            panel.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.set_yticks(slots, [LONG[name] for name in names] if panel is panels[0] else [])
        panel.margins(x=0.18)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    shades = [Patch(color=GREY, alpha=(n + 1) / len(sizes)) for n in range(len(sizes))]
    labels = [f"chunks {size}" for size, _ in sizes]
    figure.legend(shades, labels, loc="outside lower center", ncols=len(sizes), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def workers(results: Values, folder: Path) -> list[str]:
    """Return the comparison of one worker process with two."""
    share = results["share"]
    rounds = {
        name: " ".join(f"{each:.2f}" for each in ratios)
        for name, ratios in {**results["speedups"], "share": results["shares"]}.items()
    }
    return table(
        ("", "1 → 2 processes", "rounds", "at least", ""),
        [
            ("chunkq", f"{results['chunkq']:.2f} ×", rounds["chunkq"], "", ""),
            ("bare forward loops", f"{results['bare']:.2f} ×", rounds["bare"], "", ""),
            (
                "of the bare loops' gain",
                f"{share:.2f}",
                rounds["share"],
                "0.97",
                verdict(share >= 0.97),
            ),
        ],
    )


def images(results: Values, folder: Path) -> list[str]:
    """Return the comparison with a plain loop over a DataLoader and with Ray Data."""
    targets = {"loader": ("a loop over a DataLoader", 0.95), "ray": ("Ray Data", 1.0)}
    rows = []
    for part, figures in results.items():
        for other, (label, least) in targets.items():
            ratios = figures["ratios"][other]
            ratio = statistics.median(ratios)
            rows.append(
                (
                    f"{label}, {IMAGE_PARTS[part]}",
                    *(f"{figures['rate'][name]:.1f}/s" for name in ("chunkq", other)),
                    f"{ratio:.3f}",
                    f"{len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f}",
                    f"{statistics.median(figures['command_ratios'][other]):.3f}",
                    f"{least:.2f}",
                    verdict(ratio >= least),
                )
            )
    heads = (
        "compared with", "chunkq", "other", "ratio of images per second", "rounds",
        "of whole commands", "at least", "",
    )  # fmt: skip
    return table(heads, rows)


def queues(results: Values, folder: Path) -> list[str]:
    """Return the figures of the queues, including busy shares of the device."""
    heads = ("part", "queue", "measured", "value", "unit", "target", "")
    rows = []
    for f in results:
        target = f"at least {f['least']:g}" if f["least"] is not None else ""
        target = f"at most {f['most']:g}" if f["most"] is not None else target
        met = "**missed**" if f["verdict"] == "MISSED" else f["verdict"]
        rows.append((f["part"], f["queue"], f["label"], number(f["value"]), f["unit"], target, met))
    return table(heads, rows)


def queue_scale(results: Values, folder: Path) -> list[str]:
    """Return the figures of the queues at three sizes."""
    names = list(dict.fromkeys(f["queue"] for f in results))
    labels = list(dict.fromkeys(f["label"] for f in results))
    values = {(f["queue"], f["label"]): f for f in results}
    rows = [
        (label, unit_of(results, label), *(number(values[name, label]["value"]) for name in names))
        for label in labels
    ]
    return table(("measured", "unit", *names), rows)


def unit_of(results: Values, label: str) -> str:
    """Return the unit of the first figure with a label."""
    return str(next(f["unit"] for f in results if f["label"] == label))


def planning(results: Values, folder: Path) -> list[str]:
    """Return the figures of planning.py."""
    return table(
        ("step", "figures"),
        [
            (label, ", ".join(f"{key} {number(value)}" for key, value in figures.items()))
            for label, figures in results.items()
        ],
    )


def predictions(results: Values, folder: Path) -> list[str]:
    """Return the predicted and the measured costs."""
    rows = []
    for job, figures in results.items():
        for label, value in figures.items():
            if isinstance(value, dict) and value["ratio"] is not None:
                good = abs(value["ratio"] - 1) <= 0.1
                numbers = (f"{value['predicted']:,}", f"{value['measured']:,}")
                rows.append((job, label, *numbers, f"{value['ratio']:.3f}", verdict(good)))
    return table(("job", "quantity", "predicted", "measured", "ratio", "within 10 %"), rows)


def scale(results: Values, folder: Path) -> list[str]:
    """Return the simulated limits, the workers until each limit, and the plot."""

    def between(pair: Sequence[float], form: str) -> str:
        return " to ".join(dict.fromkeys(format(value, form) for value in pair))

    rows = [
        (
            item["chunk"], between(item["workers"], "d"), item["limit"],
            ", ".join(item["executors"]), between(item["device_busy"], ".0%"),
            between(item["queue_use"], ".0%"), between(item["store_use"], ".0%"),
            between(item["hours"], ",.0f"),
            f"{item['seal_hours']:.2g}", item["what_to_set"],
        )
        for item in results["limits"]
    ]  # fmt: skip
    heads = (
        "chunk", "workers", "limit", "queues", "device busy", "queue used", "store used", "hours",
        "sealing h", "what to set, with the most workers",
    )  # fmt: skip
    assumed = [
        (f["label"], quantity(f["value"], f["unit"]), f"`--{name.replace('_', '-')}`")
        for name, f in results["inputs"].items()
        if f["from"] == "ASSUMED"
    ]
    files = sorted({f["from"] for f in results["inputs"].values()} - {"ASSUMED", "option"})
    return [
        "Where the limit changes, for the fewest and the most simulated workers that meet it. "
        "Workers complete blocks meanwhile; sealing comes after the last chunk.",
        "",
        *table(heads, rows),
        "",
        *chunk_sizes(results["chunk_sizes"], results["job"]["depth"]),
        "",
        f"![busy share of devices]({folder.name}/scale.png)",
        "",
        *(f"- {note}" for note in results["notes"]),
        "",
        f"Figures come from {', '.join(files)}. {folder.name}/scale.json has all numbers of "
        "workers. Assumed, not measured:",
        "",
        *table(("input", "value", "option"), assumed),
    ]


def chunk_sizes(results: Values, depth: int) -> list[str]:
    """Return the costs of each chunk size, and the workers until each shared resource limits."""
    queues = list(results[0]["queue_bytes"])

    def each(name: str, unit: float = 1.0) -> list[str]:
        return [" / ".join(number(item[name][q] * unit) for q in queues) for item in results]

    def until(start: str) -> list[str]:
        return [
            number(min(v for k, v in item["workers_until_limit"].items() if k.startswith(start)))
            for item in results
        ]

    names = " / ".join(queues)
    return table(
        ("for any number of workers", *(f"chunk {item['chunk']}" for item in results)),
        [
            ("chunks (millions)", *(number(item["chunks"] / 1e6) for item in results)),
            (
                f"memory of a worker, depth {depth} (GB)",
                *(number(item["worker_bytes"] / 1e9) for item in results),
            ),
            (f"queueing all (h): {names}", *each("enqueue_hours")),
            (f"queue size, at most (GB): {names}", *each("queue_bytes", 1e-9)),
            *(
                (f"workers until {label} alone is the limit", *until(label))
                for label in (*(f"queue {q}" for q in queues), "enqueueing", "store", "commits")
            ),
            ("workers until sealing takes longer than the chunks", *until("sealing")),
        ],
    )


def gpu(results: Values, folder: Path) -> list[str]:
    """Return the figures of a GPU, if there was one."""
    if results["device"] is None:
        return ["Not measured: no GPU was available."]
    return [
        f"{results['device']}, torch {results['torch']}",
        "",
        "```text",
        *gpu_table(results["parts"]).splitlines(),
        "```",
    ]


def number(value: float) -> str:
    """Format a number with three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def quantity(value: float, unit: str) -> str:
    """Format a number with its unit, bytes in GB, MB or kB."""
    if unit.startswith("B"):
        for name, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= size:
                return f"{number(value / size)} {name}{unit}"
    return f"{number(value)}/s" if unit == "1/s" else f"{number(value)} {unit}".rstrip()


Section = Callable[[Values, Path], list[str]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "network": ("Against the bare network, MONAI and a copy", network),
    "startup": ("A small job as a whole command", startup),
    "hotpath": ("Where the seconds go", hotpath),
    "borders": ("Border protocols", borders),
    "workers": ("One worker and two", workers),
    "images": ("Photographs, against a loop over a DataLoader and Ray Data", images),
    "queues": ("Queues, and the device kept busy", queues),
    "queue_scale": ("Queues at 10⁴ to 10⁶ tasks", queue_scale),
    "planning": ("Planning", planning),
    "predictions": ("What plan predicts", predictions),
    "scale": ("1 to 4096 workers on 1 PB, simulated", scale),
    "gpu": ("On a GPU", gpu),
}
"""Title and function of the section for each JSON file, by its name without suffix."""


def notes(name: str) -> list[str]:
    """Return the comments on a part: the section of notes.md with its name."""
    path = Path(__file__).with_name("notes.md")
    parts = path.read_text().split("\n## ") if path.exists() else []
    sections = [part.partition("\n")[2].strip() for part in parts if part.split("\n")[0] == name]
    return ["", *sections] if sections else []


def main() -> None:
    """Write the page."""
    folder = Path(sys.argv[1])
    lines = [
        "# Results",
        "",
        f"Written by `make bench` (chunkq {__version__}, Python {platform.python_version()}). "
        "Ratios are medians of interleaved rounds on a virtual machine with two shared cores. Its "
        "speed varies by a third within minutes, so compare ratios, not seconds of two tables. "
        "[README.md](README.md) and the top of each program describe the measurements.",
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
