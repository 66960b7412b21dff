"""PyTorch and TensorFlow in one Python process with triton installed, in both orders."""

import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PREPARE = """
import sys
import numpy as np
import chunkq

def predict(**keys):
    with chunkq.Predictor.from_config({
        "inference_type": "patch",
        "chunksize": [8, 8],
        "threads": 1,
        "model_config": {"model_input_shape": [8, 8], **keys},
    }) as predictor:
        output = predictor.predict(np.full((8, 8), 3, np.float32)).probabilities
    np.testing.assert_allclose(output, np.full((1, 8, 8), 7), atol=1e-5)

def torch_class(file="torch_net.py", **keys):
    predict(runtime="torch", type="class", class_file=file, class_name="Net", **keys)

def keras_class():
    predict(runtime="tensorflow", type="class", class_file="keras_net.py", class_name="Net")
"""
TORCH = """\
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2 + 1
"""
KERAS = """\
import keras

class Net(keras.Model):
    def call(self, x):
        return keras.ops.relu(x) * 2 + 1
"""
JOB = """\
model_config:
  {runtime: torch, type: class, class_file: both_net.py, class_name: Net, model_input_shape: [8, 8]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "torch_net.py").write_text(TORCH)
    (tmp_path / "both_net.py").write_text("import tensorflow\n" + TORCH)
    (tmp_path / "keras_net.py").write_text(KERAS)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    """Run a new Python process; fail if it crashes."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_triton_is_installed_for_these_tests() -> None:
    has_wheels = (sys.platform, platform.machine()) == ("linux", "x86_64")
    assert find_spec("triton") is not None or not has_wheels


def test_a_compiled_torch_predictor_runs_after_a_tensorflow_predictor(folder: Path) -> None:
    run(folder, "-c", PREPARE + "keras_class()\ntorch_class(compile=True)\nimport triton\n")


@pytest.mark.proof("frameworks")
def test_a_tensorflow_predictor_runs_after_a_torch_predictor(folder: Path) -> None:
    run(folder, "-c", PREPARE + "torch_class()\nkeras_class()\nimport triton\n")


def test_after_the_user_imported_tensorflow_torch_exports_run_without_triton(
    folder: Path,
) -> None:
    run(folder, "-m", "chunkq", "export", "job.yaml", "-o", "net.pt2", "--batch", "1")
    body = (
        "import tensorflow\n"
        "predict(runtime='torch', type='exported', model_file='net.pt2')\n"
        "keras_class()\n"
        "assert sys.modules['triton'] is None\n"
    )
    run(folder, "-c", PREPARE + body)


@pytest.mark.proof("frameworks")
def test_a_torch_network_whose_file_imports_tensorflow_can_be_compiled(folder: Path) -> None:
    run(folder, "-c", PREPARE + "torch_class('both_net.py', compile=True)\nkeras_class()\n")
