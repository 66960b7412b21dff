"""Write tests/fixtures/sleap-nn.npz: confidence maps of sleap-nn, and the peaks that it finds.

`make parity` runs this file in an environment with sleap-nn. It imports nothing of chunkq.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sleap_nn.inference import Predictor
from sleap_nn.inference.ops.peaks import find_global_peaks, find_local_peaks

TARGET = Path(__file__).parents[1] / "fixtures" / "sleap-nn.npz"
THRESHOLD = 0.2


def maps(folder: Path, model: str, video: str, frames: list[int]) -> torch.Tensor:
    """Return the confidence maps (frame, keypoint, y, x) of a trained model."""
    predictor = Predictor.from_model_paths([str(folder / "models" / model)], device="cpu")
    outputs = predictor.predict(
        str(folder / video), frames=frames, make_labels=False, return_confmaps=True
    )
    return torch.cat([one.pred_confmaps for one in outputs])


def main(folder: Path) -> None:
    """Write the maps of one animal with global peaks, and of two animals with local peaks."""
    one = maps(folder, "single", "one.mp4", [0, 7])
    two = maps(folder, "bottomup", "two.mp4", [1, 9])
    values = {"one": one.numpy(), "two": two.numpy()}
    for refinement in ("integral", "none"):
        chosen = refinement if refinement == "integral" else None
        points, scores = find_global_peaks(one, THRESHOLD, chosen)
        values |= {f"one {refinement}": points.numpy(), f"one {refinement} scores": scores.numpy()}
        points, scores, frames, keypoints = find_local_peaks(two, THRESHOLD, chosen)
        columns = (frames[:, None], keypoints[:, None], points, scores[:, None])
        values[f"two {refinement}"] = torch.cat([c.double() for c in columns], dim=1).numpy()
    np.savez_compressed(TARGET, **values)
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
