"""The model files and the job file of examples/brain are consistent."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from chunkq.job.job_reading import load_job

EXAMPLE = Path(__file__).parents[2] / "examples" / "brain"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_onnx_file_and_the_torchscript_file_compute_the_same_output() -> None:
    script = torch.jit.load(str(EXAMPLE / "unet.ts")).eval()
    session = onnxruntime.InferenceSession(EXAMPLE / "unet.onnx")
    for size in (1, 3):
        batch = np.random.default_rng(size).integers(0, 256, (size, 1, 64, 64, 64))
        raw = batch.astype(np.float32)
        with torch.inference_mode():
            expected = script(torch.from_numpy(raw)).numpy()
        [outputs] = session.run(None, {"raw": raw})
        assert outputs.shape == (size, 3, 64, 64, 64)
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)


def test_the_onnx_file_is_self_contained_and_has_no_metadata_of_its_build() -> None:
    model = onnx.load(EXAMPLE / "unet.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    graph = model.graph
    assert all(not tensor.external_data for tensor in graph.initializer)
    parts = (model, graph, *graph.node, *graph.value_info, *graph.initializer)
    assert all(not part.metadata_props and not part.doc_string for part in parts)


def test_the_job_uses_the_onnx_file() -> None:
    job = load_job(EXAMPLE / "job.yaml")
    assert (job.model.runtime, job.model.model_file) == ("onnx", str(EXAMPLE / "unet.onnx"))
