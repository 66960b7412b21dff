"""How to convert files of formats that cannot be read."""

from __future__ import annotations

from types import MappingProxyType

READERS: MappingProxyType[str, tuple[str, str]] = MappingProxyType(
    {
        ".mgz": ("MGH", "np.asarray(nibabel.load({path!r}).dataobj)"),
        ".mrc": ("MRC", "mrcfile.read({path!r})"),
        ".nrrd": ("NRRD", "nrrd.read({path!r})[0]"),
        ".mha": ("MetaImage", "SimpleITK.GetArrayFromImage(SimpleITK.ReadImage({path!r}))"),
        ".png": ("PNG", "imageio.v3.imread({path!r})"),
        ".jpg": ("JPEG", "imageio.v3.imread({path!r})"),
    }
)
"""Suffix -> (name of the format, Python expression that reads a file as an array)."""


def conversion(path: str) -> str | None:
    """Return how to convert a file of a known format, None for other files."""
    for suffix, (name, reader) in READERS.items():
        if path.lower().endswith(suffix):
            array = reader.format(path=path)
            return (
                f"is a {name} file, which cannot be read; convert it: "
                f"`zarr.create_array('volume.zarr', data={array})`"
            )
    return None
