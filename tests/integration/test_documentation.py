"""The pages of docs/ that a reader follows: they are followed here."""

from pathlib import Path

import nibabel
import numpy as np
import zarr

from tests.harness.documents import run_page
from tests.harness.workspace import Workspace


def test_the_examples_of_tiff_and_hdf5_run_as_they_stand(tmp_path: Path) -> None:
    commands = run_page(
        "docs/guides/files.md",
        tmp_path,
        Workspace(tmp_path).process_env,
        without="TIFF",
        shown_as="/home/me/files",
        has_begun=lambda: True,
    )
    assert commands == 2


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


def test_the_page_about_nifti_runs_as_it_stands(tmp_path: Path) -> None:
    commands = run_page(
        "docs/guides/nifti.md",
        tmp_path,
        Workspace(tmp_path).process_env,
        without="Compressed files",
        shown_as="/home/me/nifti",
        has_begun=lambda: False,
    )
    assert commands == 3
    scan, labels = (nibabel.load(tmp_path / name) for name in ("scan.nii.gz", "labels.nii.gz"))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(labels.affine, scan.affine)
    bright = scan.get_fdata() / 200
    is_clear = np.abs(bright - 0.5) > 1e-5
    np.testing.assert_array_equal(labels.get_fdata()[is_clear], bright[is_clear] > 0.5)


def test_the_page_on_empty_space_runs_as_it_stands(tmp_path: Path) -> None:
    commands = run_page(
        "docs/guides/empty-space.md",
        tmp_path,
        Workspace(tmp_path).process_env,
        without="From Python",
        shown_as="/home/me",
        has_begun=lambda: True,
    )
    assert commands == 3
    scores = zarr.open_array(tmp_path / "scores.zarr" / "0", mode="r")
    values = scores[:]
    assert scores.fill_value == -1
    assert (values[48:] == -1).all()
    assert (values[15:26, 19:30, 19:30] > 0).all()


def test_the_page_on_several_outputs_runs_as_it_stands(tmp_path: Path) -> None:
    commands = run_page(
        "docs/guides/outputs.md",
        tmp_path,
        Workspace(tmp_path).process_env,
        without="From Python",
        shown_as="/home/me/outputs",
        has_begun=lambda: True,
    )
    assert commands == 2
    assert (tmp_path / "volumes" / "bright" / "info").exists()
    bright = zarr.open_group(tmp_path / "result.zarr" / "bright", mode="r")
    assert bright["0"].shape == (64, 96, 96)
    assert bright.attrs["ome"]["image-label"]["properties"][1]["class"] == "bright"  # type: ignore[call-overload, index]


def test_the_example_of_a_region_runs_as_it_stands(tmp_path: Path) -> None:
    commands = run_page(
        "docs/guides/regions.md",
        tmp_path,
        Workspace(tmp_path).process_env,
        without="A picture",
        shown_as="/home/me/regions",
        has_begun=lambda: True,
    )
    assert commands == 2
