"""Train the example's network on the back half of the template; export it for chunkq.

    python train.py [--out FOLDER] [--check]    writes unet.ts and unet.onnx
    python train.py --weights unet.ts           writes only unet.onnx, without training

The front half (y >= SPLIT) is not used for training. --check scores both halves afterwards.
Requires `pip install '.[demo,export]'`.
"""

import argparse
import io
import itertools
import math
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import template
import torch
from network import CLASSES, UNet3d
from template import dice
from torch import Tensor, nn

STEPS = 360
FREEZE_AT = 0.6  # share of the steps after which batch norm no longer changes
BATCH = 4
PATCH = 40
LEARNING_RATE = 1e-2
SEED = 7
THREADS = 2
WINDOW = 64
SCRIPT, GRAPH = "unet.ts", "unet.onnx"


def random_patches(t1: Tensor, truth: Tensor, rng: np.random.Generator) -> Iterator[list[Tensor]]:
    """Yield endless batches of raw patches and their tissue maps, each centered on brain."""
    corners = np.maximum(np.argwhere(t1[0].numpy() > 0) - PATCH // 2, 0)
    corners = np.minimum(corners, np.array(t1.shape[1:]) - PATCH)
    while True:
        pairs = []
        for corner in corners[rng.integers(len(corners), size=BATCH)]:
            box = (slice(None), *(slice(int(c), int(c) + PATCH) for c in corner))
            pairs.append(augment(t1[box], truth[box], rng))
        yield [torch.stack(column) for column in zip(*pairs, strict=True)]


def augment(raw: Tensor, truth: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mirror randomly and vary the gain by 2 % (scanners vary more)."""
    flips = tuple(axis for axis in (1, 2, 3) if rng.random() < 0.5)
    gain = rng.uniform(0.98, 1.02)
    return (raw.flip(flips) * gain).clamp(0, 255), truth.flip(flips)


def loss_of(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the cross entropy with the tissue maps as soft labels, e.g. 60 % grey matter."""
    return nn.functional.cross_entropy(logits, truth)


def training_data() -> tuple[Tensor, Tensor]:
    """Return T1 and the three tissue maps of the back half, channels first."""
    grey, white = (template.training_half(template.read_map(name)) for name in ("gm", "wm"))
    maps = np.stack([255 - grey - white, grey, white]).astype(np.float32) / 255
    t1 = template.training_half(template.load_t1()).astype(np.float32)
    return torch.from_numpy(t1[None]), torch.from_numpy(maps)


def train(steps: int) -> UNet3d:
    """Train on the back half with fixed seeds; return the network in eval mode."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    t1, truth = training_data()

    # With this memory layout, convolutions of few channels are about twice as fast.
    net: UNet3d = UNet3d().train()
    net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    adam = torch.optim.AdamW(net.parameters(), LEARNING_RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, LEARNING_RATE, steps, pct_start=0.15)
    started, recent = time.perf_counter(), math.nan
    for step, (raw, target) in enumerate(
        itertools.islice(random_patches(t1, truth, rng), steps), 1
    ):
        if step == int(FREEZE_AT * steps):
            # From now on train the network with constant norms, as it is exported.
            net.settle()
        loss = loss_of(net.logits(raw), target)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        rate.step()
        recent = loss.item() if math.isnan(recent) else 0.95 * recent + 0.05 * loss.item()
        if step % 20 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {recent:.4f}  {time.perf_counter() - started:.0f} s")
    net.eval()
    return net


def load_weights(path: Path) -> UNet3d:
    """Return the network of a TorchScript file that `write_torchscript` wrote."""
    net = UNet3d().eval().fold()
    net.load_state_dict(torch.jit.load(str(path)).state_dict())  # type: ignore[no-untyped-call]
    return net


def write_torchscript(net: UNet3d, path: Path) -> None:
    """Write a folded network as TorchScript; the same weights give the same bytes."""
    traced_file, cleaned = io.BytesIO(), io.BytesIO()
    # Traced, not scripted: a script stores its constants in the random order of a set.
    sample = torch.zeros(1, 1, WINDOW, WINDOW, WINDOW)
    with torch.no_grad():
        traced = torch.jit.trace(net, sample)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, traced_file)
    with zipfile.ZipFile(traced_file) as source, zipfile.ZipFile(cleaned, "w") as target:
        for entry in source.infolist():
            # Debug entries contain paths of the training machine, and the id is a hash over
            # them; loading does not need them.
            if not entry.filename.endswith((".debug_pkl", "/serialization_id")):
                target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry))
    replace_file(path, cleaned.getvalue())


def write_onnx(net: UNet3d, path: Path) -> None:
    """Write a folded network as ONNX for batches of any size, weights included."""
    sample = torch.zeros(2, 1, WINDOW, WINDOW, WINDOW)  # the exporter would fix a batch size of 1
    program = torch.onnx.export(
        net,
        (sample,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["raw"],
        output_names=["probabilities"],
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    # The metadata of nodes contains stack traces of the exporting machine.
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]
    for tensor in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del tensor.metadata_props[:]
    replace_file(path, model.SerializeToString(deterministic=True))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def window_starts(size: int) -> list[int]:
    """Return the starts of half-overlapping windows; the last one ends with the volume."""
    return [*range(0, size - WINDOW, WINDOW // 2), size - WINDOW]


def predict(path: Path, t1: template.Volume) -> template.Volume:
    """Compute the job of job.yaml without chunkq in one process, as its expected result."""
    net = torch.jit.load(str(path)).eval()  # type: ignore[no-untyped-call]
    profile = torch.exp(-((torch.arange(WINDOW) - (WINDOW - 1) / 2) ** 2) / (2 * (WINDOW / 8) ** 2))
    weight = profile[:, None, None] * profile[:, None] * profile
    total = torch.zeros(len(CLASSES), *t1.shape)
    for corner in itertools.product(*map(window_starts, t1.shape)):
        z, y, x = (slice(c, c + WINDOW) for c in corner)
        raw = torch.from_numpy(t1[z, y, x].astype(np.float32))
        with torch.inference_mode():
            total[:, z, y, x] += weight * net(raw[None, None])[0]
    # Not divided by the summed weights, which are equal for all classes of a voxel.
    labels: template.Volume = total.numpy().argmax(0).astype(np.uint8)
    return labels


def check(path: Path) -> None:
    """Predict the volume and print the Dice of both halves."""
    started = time.perf_counter()
    result, truth = predict(path, template.load_t1()), template.load_labels()
    print(f"volume predicted in {time.perf_counter() - started:.0f} s")
    halves = {"training": template.training_half, "held-out": template.held_out_half}
    for name, half in halves.items():
        grey, white = (dice(half(result), half(truth), label) for label in (1, 2))
        print(f"{name} half: Dice {grey:.4f} grey, {white:.4f} white matter")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the example's network.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--weights", type=Path, help="only write this trained unet.ts as ONNX")
    parser.add_argument("--check", action="store_true", help="predict the volume, print Dice")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    files = {options.out / GRAPH: write_onnx}
    try:
        if options.weights:
            net = load_weights(options.weights)
        else:
            net = train(options.steps).fold()
            files = {options.out / SCRIPT: write_torchscript, **files}
    except template.TemplateMissingError as error:
        print(error, file=sys.stderr)
        return 1
    for file, write in files.items():
        write(net, file)
        print(f"{file}: {file.stat().st_size // 1000} kB")
    if options.check:
        check(options.weights or options.out / SCRIPT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
