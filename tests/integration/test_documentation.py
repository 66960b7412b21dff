"""The pages of docs/ that a reader follows: they are followed here."""

from pathlib import Path

import zarr

from tests.harness.documents import run_page
from tests.harness.workspace import Workspace


def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    stopped = tmp_path / "stopped.zarr.chunkq"
    commands = run_page(
        "docs/tutorial.md",
        tmp_path,
        workspace.process_env,
        without="Install",
        shown_as="/home/me/tutorial",
        has_begun=lambda: any(stopped.glob("*/done/infer/*/*")),
    )
    assert commands == 10
    labels = zarr.open_array(tmp_path / "labels.zarr" / "0", mode="r")
    volume = zarr.open_array(tmp_path / "volume.zarr", mode="r")
    assert labels.shape == volume.shape
    assert (tmp_path / "labels.png").read_bytes().startswith(b"\x89PNG")


def test_the_guide_to_n5_and_precomputed_volumes_runs_as_it_stands(tmp_path: Path) -> None:
    commands = run_page(
        "docs/guides/n5-precomputed.md",
        tmp_path,
        Workspace(tmp_path).process_env,
        without="",
        shown_as="",
        has_begun=lambda: True,
    )
    assert commands == 2
    assert zarr.open_array(tmp_path / "bright.zarr" / "0", mode="r").shape == (20, 30, 40)
