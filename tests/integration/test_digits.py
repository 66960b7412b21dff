"""examples/digits runs as its README says: accuracy is shown, a broken file costs its own row."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from tests.harness.workspace import Workspace

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
DIGITS = Path(sys.prefix) / "digits"
"""Folder into which `make test` installs scikit-learn, for its data file alone."""
HELD_OUT = 797


def test_the_example_classifies_the_digits_and_names_the_broken_file(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    paths = os.pathsep.join([str(DIGITS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLE / "prepare.py"), str(folder)]
    prepared = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert prepared.returncode == 0, prepared.stderr
    workspace = Workspace(tmp_path)
    output = tmp_path / "digits.csv"
    result = workspace.run(
        "run", EXAMPLE / "job.yaml", "-i", folder, "-o", output, "-w", "1", "--gpus", "none"
    ).ok()
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == HELD_OUT
    assert {row["path"].split("/")[-2] == row["truth"] for row in rows} == {True}
    correct = [row["label"] == row["truth"] for row in rows]
    assert [row["correct"] == "true" for row in rows] == correct
    assert sum(correct) / HELD_OUT > 0.95
    assert f"{sum(correct) / HELD_OUT:.2%}" in result.out
    [errors] = tmp_path.glob("digits.csv.chunkq/*/errors.parquet")
    assert str(errors) in result.out
    [error] = pq.read_table(errors).to_pylist()
    assert (error["path"], error["code"]) == (str(folder / "7" / "broken.png"), "image_damaged")
