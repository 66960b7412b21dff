"""Measure what a user gets on a GPU: jobs from store to store, beside a bare loop and MONAI.

Run: python benchmarks/gpu.py [PART ...] [--tree PATH] [--json FILE]. Contestants take turns on one
GPU. Those of this tree share a process; `before` is chunkq from another checkout, in a second
process. A ratio is the median of the ratios of each round. Parts that do not fit into --seconds are
left out. The JSON file and a table beside it (.txt) are written after every part. Without a CUDA
device there are no figures; --rehearse runs tiny cases on the CPU to test the script.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu_cases, gpu_commands
from benchmarks.gpu_cases import CASES, Case
from benchmarks.gpu_server import HERE, RequestError, Server
from benchmarks.gpu_table import table

Figures = dict[str, Any]
START_SECONDS = 180.0
SECONDS = 345.0
OPTIONS: tuple[Mapping[str, Any], ...] = (
    {},
    {"precision": "float16", "channels_last": True},
    {"precision": "float16", "channels_last": True, "compile": True},
    {"precision": "bfloat16", "channels_last": True, "compile": True},
    {"precision": "float16"},
    {"precision": "bfloat16"},
    {"precision": "tf32", "compile": True},
    {"precision": "float16", "channels_last": True, "cuda_graph": True},
    {"precision": "tf32", "channels_last": True},
    {"precision": "tf32", "cuda_graph": True},
    {"precision": "float32"},
)
"""Options of chunkq that are compared with a user's loop, the most promising first."""
OPTION_ROUNDS = 2
GOAL_RATIO, GOAL_AGREEMENT = 0.6, 0.999
"""Largest share of the seconds of a user's float32 loop, and least share of equal labels."""


class Session:
    """The processes, folder and remaining time of one call of this program."""

    def __init__(
        self, folder: Path, device: str, tree: Path | None, seconds: float, *, is_rehearsal: bool
    ) -> None:
        self.folder, self.device, self._is_rehearsal = folder, device, is_rehearsal
        self._end = time.monotonic() + seconds
        trees = {"now": HERE} | ({"before": tree.resolve()} if tree else {})
        self.servers = {
            name: Server(path, folder, device, is_rehearsal=is_rehearsal)
            for name, path in trees.items()
        }

    def left(self) -> float:
        """Return the seconds left."""
        return self._end - time.monotonic()

    def case(self, name: str) -> Case:
        case = CASES[name]
        return gpu_cases.rehearsed(case) if self._is_rehearsal else case

    def ask(self, do: str, name: str, case: str, volume: str, limit: float, **options: Any) -> Any:
        """Ask the process that has a contestant; `before` is chunkq of the other tree."""
        server = self.servers["before" if name == "before" else "now"]
        if name == "before":
            name, options = "chunkq", options | {"tree": "before"}
        return server.ask(limit, do=do, name=name, case=case, volume=volume, **options)

    def contestants(self, *names: str) -> list[str]:
        """Return the names with `before` after `chunkq`, if there is another tree."""
        has_before = "before" in self.servers
        return [n for name in names for n in (name, *(["before"] if name == "chunkq" else []))
                if n != "before" or has_before]  # fmt: skip


def race(
    session: Session,
    case: str,
    volume: str,
    names: Sequence[str],
    rounds: int,
    seconds: float,
    *,
    warm_up: bool,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Figures:
    """Run contestants in turns; return their figures and chunkq's ratios to the others.

    A contestant that fails has its traceback instead. Rounds stop after `seconds`.
    """
    end = time.monotonic() + min(seconds, session.left())
    turns: list[dict[str, Figures]] = []
    errors: Figures = {}
    order = list(names)
    for number in range(rounds + warm_up):
        turn: dict[str, Figures] = {}
        for name in order:
            if name in errors or (turns and time.monotonic() > end):
                continue
            own = dict((options or {}).get(name, {}))
            contestant = own.pop("contestant", name)
            try:
                limit = max(10.0, end - time.monotonic() + 10)
                turn[name] = session.ask("run", contestant, case, volume, limit, **own)
            except RequestError as error:
                errors[name] = str(error)
                print(f"{case} {volume} {name}:\n{error}", flush=True)
        if number or not warm_up:
            turns.append(turn)
        order.append(order.pop(0))
        if time.monotonic() > end:
            break
    return {
        "voxels": session.case(case).edges[volume] ** 3,
        "rounds": len(turns),
        "contestants": {name: summary(turns, name) for name in names if name not in errors},
        "ratios": {
            other: compared(turns, "chunkq", other)
            for other in names
            if other != "chunkq" and other not in errors and "chunkq" in names
        },
        "errors": errors,
    }


def summary(turns: Sequence[Mapping[str, Figures]], name: str) -> Figures:
    """Return the median seconds of a contestant and the other figures of its last run."""
    figures = [turn[name] for turn in turns if name in turn]
    if not figures:
        return {}
    seconds = [one["seconds"] for one in figures]
    return figures[-1] | {
        "seconds": statistics.median(seconds),
        "seconds_of_each_round": seconds,
        "patches_per_second": figures[-1]["patches"] / statistics.median(seconds),
    }


def compared(turns: Sequence[Mapping[str, Figures]], name: str, other: str) -> Figures:
    """Return the median and the values of the ratios of seconds in each round with both."""
    ratios = [
        turn[name]["seconds"] / turn[other]["seconds"]
        for turn in turns
        if name in turn and other in turn
    ]
    return {"median": statistics.median(ratios) if ratios else None, "of_each_round": ratios}


def speed(session: Session, case: str, rounds: int, seconds: float) -> Figures:
    """Run all contestants over the middle volume, after one untimed run each."""
    names = session.contestants("bare", "chunkq", "monai", "plain")
    return race(session, case, "middle", names, rounds, seconds, warm_up=True)


def counts(session: Session, case: str, seconds: float) -> Figures:
    """Return launches, copies, synchronizations and the busy share of each contestant."""
    result: Figures = {}
    end = time.monotonic() + min(seconds, session.left())
    for name in session.contestants("chunkq", "bare", "monai"):
        if result and time.monotonic() > end:
            break
        try:
            limit = max(20.0, end - time.monotonic() + 20)
            figures = session.ask("profile", name, case, "middle", limit)
        except RequestError as error:
            result[name] = {"error": str(error)}
            print(f"{case} counts {name}:\n{error}", flush=True)
            continue
        result[name] = figures | (per_unit(figures) if "kernels" in figures else {})
    return result


def per_unit(figures: Figures) -> Figures:
    """Return the counts of a trace per patch, chunk, input byte and output byte."""
    patches = figures["patches"]
    result: Figures = {
        "kernels_per_patch": figures["kernels"] / patches,
        "launches_per_patch": figures["launches"] / patches,
    }
    if "bytes" in figures:
        moved, chunks = figures["bytes"], figures["chunks"]
        if figures["syncs"] is not None:
            result["syncs_per_chunk"] = figures["syncs"] / chunks
            result["syncs_elsewhere_per_chunk"] = figures["syncs_elsewhere"] / chunks
        result |= {
            "up_per_byte_read": figures["up"] / moved["input"],
            "down_per_byte_written": figures["down"] / (moved["output"] + moved["pieces_written"]),
        }
    return result


def depths(session: Session, case: str) -> Figures:
    """Compare numbers of chunks in flight, and of threads that finalize blocks."""
    pairs = ((4, 2), (6, 4), (8, 6), (12, 8))
    options = {
        f"{depth} in flight, {threads} finalizing": {
            "contestant": "chunkq",
            "depth": depth,
            "finalizers": threads,
        }
        for depth, threads in pairs
    }
    names = ("bare", *options)
    return race(session, case, "middle", names, 3, 40.0, warm_up=True, options=options)


def large(session: Session) -> Figures:
    """Run the demo's U-Net over half a gigavoxel."""
    names = session.contestants("chunkq", "bare", "monai")
    return race(session, "unet", "large", names, 2, 100.0, warm_up=False)


def host_sums(session: Session) -> Figures:
    """Compare with MONAI's sums on the host, over a small volume."""
    options = {"monai": {"sums": "cpu"}}
    names = ("chunkq", "monai")
    return race(session, "unet", "small", names, 2, 40.0, warm_up=True, options=options)


def precision(session: Session) -> Figures:
    """Compare float32 and tf32 averages with whole-volume references."""
    result: Figures = {}
    server = session.servers["now"]
    for case in CASES:
        names = ["float32"] if session.device == "cpu" else ["float32", "tf32"]
        try:
            result[case] = server.ask(
                60.0, do="precision", case=case, volume="check", precisions=names
            )
        except RequestError as error:
            result[case] = {"error": str(error)}
            print(f"precision {case}:\n{error}", flush=True)
    return result


def same_bytes(session: Session) -> Figures:
    """Compare the bytes of one worker, of two, and of a killed one: real commands."""
    case = session.case("unet")
    return gpu_commands.same_bytes(case, "small", session.folder, session.device, 120.0)


def command(session: Session) -> Figures:
    """Time the command `chunkq run` on the large volume."""
    case = session.case("unet")
    return gpu_commands.timed(case, "large", session.folder, session.device, 120.0)


def options(session: Session, case: str, seconds: float) -> Figures:
    """Compare options of chunkq with a user's plain float32 loop: seconds and labels.

    In each round one option runs right before the loop and one right after it, and an option's
    ratio is the median over the rounds. Labels are compared with those of the loop without TF32.
    Options that do not fit into `seconds` are left out.
    """
    end = time.monotonic() + min(seconds, session.left())
    own = {"precision": session.case(case).precision}
    variants = [{**own, **option} for option in OPTIONS if _is_usable(session, option)]
    variants = [option for n, option in enumerate(variants) if option not in variants[:n]]
    labels: dict[str, Figures] = {}
    result: Figures = {"options": labels}
    try:
        # After the loop with torch's defaults, so that nothing is run for the first time.
        session.ask("run", "plain", case, "middle", 120.0)
        result["float32"] = session.ask("run", "plain", case, "middle", 120.0, tf32=False)
    except RequestError as error:
        return {"error": str(error)}
    for first in range(0, len(variants), 2):
        pair = {_label(option): option for option in variants[first : first + 2]}
        if time.monotonic() > end:
            labels |= {label: {"error": "no time was left"} for label in pair}
            continue
        labels |= _beside_the_loop(session, case, pair, result["float32"])
    return result


def _beside_the_loop(
    session: Session, case: str, pair: Mapping[str, Mapping[str, Any]], float32: Figures
) -> Figures:
    """Return the figures of one or two options; their networks are released afterwards."""
    errors: Figures = {}
    turns: list[dict[str, Figures]] = []
    first, *second = pair
    for number in range(OPTION_ROUNDS + 1):
        turn: dict[str, Figures] = {}
        order = [first, "plain", *second] if number % 2 else [*second, "plain", first]
        for name in order:
            if name in errors or (name == "plain" and not number):
                continue
            contestant = "plain" if name == "plain" else "chunkq"
            try:
                turn[name] = session.ask(
                    "run", contestant, case, "middle", 120.0, **pair.get(name, {})
                )
            except RequestError as error:
                errors[name] = str(error)
                print(f"{case} {name}:\n{error}", flush=True)
        if number:  # the first runs load and warm up
            turns.append(turn)
    result: Figures = {}
    for label, option in pair.items():
        figures = summary(turns, label)
        if not figures or label in errors:
            result[label] = {"error": errors.get(label, "was not run")}
            continue
        result[label] = figures | judged(
            compared(turns, label, "plain"),
            figures["seconds"] / float32["seconds"],
            session.servers["now"].ask(
                60.0, do="agreement", one=float32["output"], other=figures["output"]
            )["equal"],
        )
        session.servers["now"].ask(30.0, do="release", name="chunkq", case=case, **option)
    return result


def judged(ratio: Figures, float32_ratio: float, equal: float) -> Figures:
    """Return an option's ratios, its share of equal labels, and whether it reaches the goal.

    `ratio` is to the loop with torch's defaults, `float32_ratio` to the loop without TF32.
    """
    is_fast = ratio["median"] is not None and ratio["median"] <= GOAL_RATIO
    return {
        "ratio": ratio,
        "float32_ratio": float32_ratio,
        "equal": equal,
        "reaches_goal": is_fast and equal >= GOAL_AGREEMENT,
    }


def _is_usable(session: Session, option: Mapping[str, Any]) -> bool:
    """Return whether an option is supported by the device."""
    on_gpu_only = option.get("cuda_graph") or option.get("precision") in ("float16", "tf32")
    return session.device == "cuda" or not on_gpu_only


def _label(option: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in option.items())


def tune(session: Session) -> Figures:
    """Run the command `chunkq tune` for the demo's U-Net; return its table."""
    seconds = 10.0 if session.device == "cpu" else 55.0
    case = session.case("unet")
    return gpu_commands.tuned(case, "middle", session.folder, session.device, seconds)


Part = Callable[[Session], Figures]
PARTS: dict[str, tuple[float, Part]] = {
    "unet": (45.0, lambda session: speed(session, "unet", 5, 40.0)),
    "nnunet": (45.0, lambda session: speed(session, "nnunet", 3, 55.0)),
    "unet depths": (30.0, lambda session: depths(session, "unet")),
    "nnunet depths": (40.0, lambda session: depths(session, "nnunet")),
    "unet counts": (15.0, lambda session: counts(session, "unet", 20.0)),
    "nnunet counts": (15.0, lambda session: counts(session, "nnunet", 20.0)),
    "same bytes": (50.0, same_bytes),
    "precision": (20.0, precision),
    "large": (60.0, large),
    "command": (45.0, command),
    "host sums": (25.0, host_sums),
    "unet options": (60.0, lambda session: options(session, "unet", 90.0)),
    "nnunet options": (60.0, lambda session: options(session, "nnunet", 120.0)),
    "tune": (60.0, tune),
}
"""Seconds that must be left for a part to start, and the part."""


def write_inputs(session: Session) -> None:
    """Write all volumes and the networks' files."""
    gpu_cases.write_networks(session.folder)
    cases = [session.case(name) for name in CASES]
    volumes = {case.edges[name]: (case, name) for case in cases for name in case.edges}
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(gpu_cases.write_volume, case, name, session.folder)
            for case, name in volumes.values()
        ]
        for future in futures:
            future.result()


def measure(session: Session, names: Sequence[str], save: Callable[[Figures], None]) -> Figures:
    """Run parts while time is left; save all figures after each."""
    parts: Figures = {}
    figures: Figures = {"device": None, "parts": parts, "seconds": {}}
    write_inputs(session)
    for name, server in session.servers.items():
        if name == "now":
            setup = server.ask(START_SECONDS, do="setup")
            figures |= {"device": setup["gpu"], "torch": setup["torch"], "numpy": np.__version__}
    print(f"{session.left():.0f} s left after the start", flush=True)
    for name in names:
        needed, part = PARTS[name]
        if session.left() < needed:
            parts[name] = {"error": f"{session.left():.0f} s left, {needed:.0f} s needed"}
            continue
        started = time.monotonic()
        try:
            parts[name] = part(session)
        except Exception:
            parts[name] = {"error": traceback.format_exc()}
            traceback.print_exc()
        figures["seconds"][name] = time.monotonic() - started
        print(table({name: parts[name]}), end="", flush=True)
        print(f"  part {figures['seconds'][name]:.0f} s, {session.left():.0f} s left", flush=True)
        save(figures)
    return figures


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--tree", type=Path, help="another checkout, measured as `before`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where volumes and outputs go")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()

    def save(figures: Figures) -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
            arguments.json.with_suffix(".txt").write_text(table(figures.get("parts", {})))

    if not arguments.rehearse and not _has_gpu():
        print("no CUDA device: nothing measured; use --rehearse to test the script on the CPU")
        save({"device": None})
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        session = Session(
            Path(folder),
            "cpu" if arguments.rehearse else "cuda",
            arguments.tree,
            arguments.seconds,
            is_rehearsal=arguments.rehearse,
        )
        try:
            save(measure(session, arguments.parts or list(PARTS), save))
        finally:
            for server in session.servers.values():
                server.close()


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia*")) or shutil.which("nvidia-smi") is not None


if __name__ == "__main__":
    main()
