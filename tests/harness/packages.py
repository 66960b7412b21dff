"""Packages that extend chunkq by entry points, as installed in a folder."""

from pathlib import Path


def install_package(site: Path, name: str, entry_points: str) -> None:
    """Write the metadata of a package into a folder, which is to be put on `sys.path`."""
    info = site / f"{name}-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(entry_points)
