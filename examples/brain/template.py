"""The data of the example: the MNI152 T1 template and its tissue maps, from the nilearn wheel.

nilearn itself is never imported (it would pull in scikit-learn and more): only its data files
are read, so `pip install --no-deps nilearn` is enough.
"""

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.uint8]

AXES = ("z", "y", "x")
# Along y, from the back of the head to the front. Voxels y < SPLIT train the network, the rest is
# held out. Never left against right: the template is exactly symmetric, the halves are equal.
SPLIT_AXIS = 1
SPLIT = 116

_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_MISSING = "the MNI152 template comes with nilearn's wheel: pip install --no-deps nilearn"


class TemplateMissingError(Exception):
    """nilearn's data files are not installed."""


def data_folder() -> Path:
    spec = importlib.util.find_spec("nilearn")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "datasets" / "data"
        if all((folder / _FILE.format(name)).is_file() for name in ("t1", "gm", "wm")):
            return folder
    raise TemplateMissingError(_MISSING)


def read_map(name: str) -> Volume:
    """One of the maps t1, gm, wm as stored in the wheel, its axes turned to z, y, x."""
    from nibabel.nifti1 import Nifti1Image

    path = data_folder() / _FILE.format(name)
    image = Nifti1Image.from_filename(path)
    return np.ascontiguousarray(np.asarray(image.dataobj, np.uint8).T)


def load_t1() -> Volume:
    return read_map("t1")


def load_labels() -> Volume:
    """0 background, 1 grey, 2 white: the most probable one, background being what is left over."""
    grey = read_map("gm").astype(np.int16)
    white = read_map("wm").astype(np.int16)
    labels: Volume = np.argmax([255 - grey - white, grey, white], axis=0).astype(np.uint8)
    return labels


def training_half(volume: Volume) -> Volume:
    return volume[:, :SPLIT]


def held_out_half(volume: Volume) -> Volume:
    return volume[:, SPLIT:]


def dice(result: Volume, truth: Volume, label: int) -> float:
    """Twice the shared voxels over the sum of both: 1 is perfect."""
    ours, theirs = result == label, truth == label
    return float(2 * np.count_nonzero(ours & theirs) / max(1, ours.sum() + theirs.sum()))
