"""The example's data: the MNI152 T1 template and its tissue maps, from the nilearn wheel.

Only nilearn's data files are read. The package is not imported, so its dependencies are not
needed: `pip install --no-deps nilearn`.
"""

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.uint8]

AXES = ("z", "y", "x")
# Along y, from the back of the head to the front. Voxels with y < SPLIT train the network, the
# others are held out. Left and right cannot be split: the template is exactly symmetric.
SPLIT_AXIS = 1
SPLIT = 116

_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_MISSING = "MNI152 template is missing; run pip install --no-deps nilearn"


class TemplateMissingError(Exception):
    """nilearn's data files are not installed."""


def data_folder() -> Path:
    """Return nilearn's folder of data files; raise TemplateMissingError without one."""
    spec = importlib.util.find_spec("nilearn")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "datasets" / "data"
        if all((folder / _FILE.format(name)).is_file() for name in ("t1", "gm", "wm")):
            return folder
    raise TemplateMissingError(_MISSING)


def read_map(name: str) -> Volume:
    """Return one of the maps t1, gm, wm, uint8 with axes z, y, x."""
    from nibabel.nifti1 import Nifti1Image

    path = data_folder() / _FILE.format(name)
    image = Nifti1Image.from_filename(path)
    return np.ascontiguousarray(np.asarray(image.dataobj, np.uint8).T)


def load_t1() -> Volume:
    return read_map("t1")


def load_labels() -> Volume:
    """Return the most probable class: 0 background, 1 grey matter, 2 white matter."""
    grey = read_map("gm").astype(np.int16)
    white = read_map("wm").astype(np.int16)
    labels: Volume = np.argmax([255 - grey - white, grey, white], axis=0).astype(np.uint8)
    return labels


def training_half(volume: Volume) -> Volume:
    return volume[:, :SPLIT]


def held_out_half(volume: Volume) -> Volume:
    return volume[:, SPLIT:]


def dice(result: Volume, truth: Volume, label: int) -> float:
    """Return the Dice coefficient of a label: twice the intersection over the sum of both sizes."""
    a, b = result == label, truth == label
    return float(2 * np.count_nonzero(a & b) / max(1, a.sum() + b.sum()))
