"""The example's data: handwritten digits of 8 x 8 pixels, from the scikit-learn wheel.

Only one file of scikit-learn is read. The package is not imported, so its dependencies are not
needed: `pip install --no-deps scikit-learn`.
"""

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SPLIT = 1000
"""The first 1000 images train the network, the other 797 are predicted."""
DEEPEST = 16
"""Value of black ink in the file; white paper is 0."""
_FILE = Path("datasets", "data", "digits.csv.gz")


class DigitsMissingError(Exception):
    """scikit-learn's data files are not installed."""


def data_file() -> Path:
    """Return the file of the digits; raise DigitsMissingError without one."""
    spec = importlib.util.find_spec("sklearn")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(location) / _FILE).is_file():
            return path
    raise DigitsMissingError("the digits are missing; run pip install --no-deps scikit-learn")


def load() -> tuple[Images, Labels]:
    """Return all images (n, 8, 8), black on white as on paper, 0 to 255, and their digits (n)."""
    table = np.loadtxt(data_file(), delimiter=",")
    ink = table[:, :64].reshape(-1, 8, 8) / DEEPEST
    return np.round(255 * (1 - ink)).astype(np.uint8), table[:, 64].astype(np.int64)
