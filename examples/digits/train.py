"""Train the example's network on the first 1000 digits and export it for chunkq, in seconds.

    python train.py [--out FOLDER]      writes digits.onnx

Requires `pip install '.[export]'` and `pip install --no-deps scikit-learn`.
"""

import argparse
import os
import sys
from pathlib import Path

import digits
import numpy as np
import torch
from torch import Tensor, nn

EPOCHS = 15
BATCH = 50
LEARNING_RATE = 1e-2
SEED = 7
NETWORK = "digits.onnx"


def network() -> nn.Sequential:
    """Return a network: images (n, 1, 8, 8) of 0 (black) to 1 (white) -> logits (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(32 * 4 * 4, 10),
    )


def tensors() -> tuple[Tensor, Tensor]:
    """Return all images (n, 1, 8, 8), 0 to 1, and their digits (n)."""
    pixels, labels = digits.load()
    return torch.from_numpy(pixels[:, None].astype(np.float32) / 255), torch.from_numpy(labels)


def train(images: Tensor, labels: Tensor) -> nn.Sequential:
    """Train with fixed seeds; shift each batch by up to one pixel."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    net = network()
    adam = torch.optim.AdamW(net.parameters(), LEARNING_RATE)
    steps = EPOCHS * (len(images) // BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, LEARNING_RATE, steps)
    for _ in range(EPOCHS):
        for numbers in np.array_split(rng.permutation(len(images)), len(images) // BATCH):
            chosen = torch.from_numpy(numbers)
            shift = tuple(int(n) for n in rng.integers(-1, 2, 2))
            batch = images[chosen].roll(shift, dims=(2, 3))
            loss = nn.functional.cross_entropy(net(batch), labels[chosen])
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            rate.step()
    return net.eval()


def write_onnx(net: nn.Sequential, path: Path) -> None:
    """Write the network as ONNX for batches of any size, completely or not at all."""
    program = torch.onnx.export(
        net,
        (torch.zeros(2, 1, 8, 8),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["image"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    # The metadata contain stack traces of the exporting machine.
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]
    for tensor in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del tensor.metadata_props[:]
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.SerializeToString(deterministic=True))
    os.replace(partial, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the example's network.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)  # more are slower for so small a network
    torch.use_deterministic_algorithms(True)
    try:
        images, labels = tensors()
    except digits.DigitsMissingError as error:
        print(error, file=sys.stderr)
        return 1
    net = train(images[: digits.SPLIT], labels[: digits.SPLIT])
    with torch.inference_mode():
        guesses = net(images[digits.SPLIT :]).argmax(1)
    correct = int((guesses == labels[digits.SPLIT :]).sum())
    print(f"held-out digits: {correct} of {len(guesses)} correct")
    write_onnx(net, out / NETWORK)
    print(f"{out / NETWORK}: {(out / NETWORK).stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
