"""Run one network in every format, with every processing step, through the whole pipeline."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from chunkq.errors import ChunkqError, ErrorCode, ModelError, PredictionError
from tests import models
from tests import reference as ref
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import run_inline
from tests.models import CHANNELS, FORMS, PATCH, Form

SHAPE, STRIDES = (20, 18, 14), (5, 6, 6)
FORM_BY_RUNTIME = [
    next(form for form in FORMS if form.runtime == name)
    for name in dict.fromkeys(form.runtime for form in FORMS)
]
MakeFolder = Callable[[str], Path]
Predict = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def job_of(form: Form, folder: Path, make_folder: MakeFolder, **more: Any) -> dict[str, Any]:
    """Return a job over overlapping patches; the key `model` of `more` extends `model_config`."""
    model = models.keys_of(form, "float32", make_folder) | {"max_batch_size": 4}
    return {
        "input": str(write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8, 8))),
        "output": str(folder / "out.zarr"),
        "inference_type": "sliding_window",
        "strides": list(STRIDES),
        "weight_function": ["weight_gaussian"],
        "chunksize": [10, 9, 8],
        "storage_chunks": [5, 3, 4],
        "threads": 1,
        "model_config": model | more.pop("model", {}),
        **more,
    }


def run(form: Form, folder: Path, make_folder: MakeFolder, **more: Any) -> npt.NDArray[Any]:
    job, report = run_inline(job_of(form, folder, make_folder, **more))
    assert report["patches"] == report["planned_patches"] == 4 * 3 * 2
    assert report["bytes"]["pieces_read"] > 0
    return read_output(job.folder.output)


def expected_average(predict: Predict) -> npt.NDArray[np.float64]:
    """Return the average of the naive reference; `predict` maps (1, 1, *P) to (1, C, *P)."""
    setup = ref.sliding_window(SHAPE, PATCH, STRIDES)

    def of_patch(patch: npt.NDArray[np.float64], start: tuple[int, ...]) -> Any:
        return predict(patch.astype(np.float32)[None, None])[0]

    return ref.reference(
        setup, random_volume(SHAPE), of_patch, "weighted_avg", "weight_gaussian"
    ).average


@cache
def by_torch_class(make_folder: MakeFolder) -> npt.NDArray[Any]:
    return run(FORMS[0], make_folder("by_torch_class"), make_folder)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_network_gives_the_same_output_in_every_form(
    form: Form, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make_folder = tmp_path_factory.mktemp
    output, expected = run(form, tmp_path, make_folder), by_torch_class(make_folder)
    assert output.shape == (CHANNELS, *SHAPE)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, expected, rtol=0, atol=form.tolerance)


def test_the_output_of_the_torch_class_equals_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    expected = expected_average(models.predict)
    assert expected.std() > 0.1
    np.testing.assert_allclose(by_torch_class(tmp_path_factory.mktemp), expected, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------- processing steps


ASSERT_NUMPY = "    assert type(batch).__name__ == 'ndarray', type(batch)\n"
STEPS = {
    "preprocessing": f"{ASSERT_NUMPY}    return (batch * 0.5 + 3)[:, :, ::-1]\n",
    "preprocessing_protected": "    return batch * 2 - 10\n",
    "postprocessing_protected": "    return batch * 3 + 1\n",
    "postprocessing": f"{ASSERT_NUMPY}    return (batch + 0.25)[:, ::-1]\n",
}


def steps_file(folder: Path, bodies: dict[str, str]) -> dict[str, str]:
    path = folder / "steps.py"
    text = "".join(f"def {name}(batch):\n{body}\n" for name, body in bodies.items())
    path.write_text(f"import numpy as np\n\n{text}")
    return {"processing_steps": str(path)}


def with_steps(names: list[str]) -> Predict:
    """Return the network with the named steps, for one patch at a time."""
    step: dict[str, Predict] = {}
    for name, body in STEPS.items():
        namespace: dict[str, Any] = {}
        exec(f"def {name}(batch):\n{body if name in names else '    return batch'}", namespace)
        step[name] = namespace[name]

    def predict(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        inputs = step["preprocessing_protected"](step["preprocessing"](batch))
        outputs = models.predict(np.ascontiguousarray(inputs))
        return step["postprocessing"](step["postprocessing_protected"](outputs))

    return predict


@pytest.mark.parametrize("names", [[name] for name in STEPS] + [list(STEPS)], ids="+".join)
@pytest.mark.parametrize("form", FORM_BY_RUNTIME, ids=lambda form: form.runtime)
def test_every_step_works_on_every_runtime(
    form: Form, names: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = steps_file(tmp_path, {name: STEPS[name] for name in names})
    output = run(form, tmp_path, tmp_path_factory.mktemp, model=model)
    expected = expected_average(with_steps(names))
    np.testing.assert_allclose(output, expected, rtol=0, atol=max(form.tolerance, 1e-5))


Mistake = tuple[str, str, type[ChunkqError], str]
"""Name and body of a step, the error, and a regular expression that matches its message."""
BAD_STEPS: dict[str, Mistake] = {
    "changes the number of items": (
        "preprocessing",
        "return batch[:2]",
        ModelError,
        r"model_config\.processing_steps: preprocessing\b(?=.*\b4\b)(?=.*\b2\b)",
    ),
    "changes the number of items on the device": (
        "postprocessing_protected",
        "return batch[:2]",
        ModelError,
        r"model_config\.processing_steps: postprocessing_protected\b(?=.*\b4\b)(?=.*\b2\b)",
    ),
    "returns no array": (
        "postprocessing",
        "return list(batch)",
        ModelError,
        r"model_config\.processing_steps: postprocessing\b.*\blist\b",
    ),
    "changes the shape of the result": (
        "postprocessing",
        "return batch[:, :2]",
        ModelError,
        r"\[4, 2, 8, 8, 8\].*\[4, 3, 8, 8, 8\].*model_config\.model_output_shape",
    ),
    "raises": (
        "preprocessing_protected",
        "raise KeyError('mean')",
        ModelError,
        r"\bKeyError\b.*mean",
    ),
    "returns NaN before the network": (
        "preprocessing",
        "return np.where(batch == batch.max(), np.nan, batch)",
        PredictionError,
        r"^model_config\.processing_steps: preprocessing\b.*\bNaN\b",
    ),
    "returns NaN after the network": (
        "postprocessing",
        "return np.log(np.where(batch > 1, 0, 1))",
        PredictionError,
        r"^model_config\.processing_steps: postprocessing\b.*\bNaN\b",
    ),
    "returns NaN on the device": (
        "postprocessing_protected",
        "return batch * float('nan')",
        PredictionError,
        r"^the network\b.*\bprotected\b.*\bNaN\b",
    ),
}
CODES = {
    ModelError: ErrorCode.MODEL_UNUSABLE,
    PredictionError: ErrorCode.PREDICTION_INVALID,
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("mistake", BAD_STEPS)
@pytest.mark.parametrize("form", FORM_BY_RUNTIME, ids=lambda form: form.runtime)
def test_a_step_that_breaks_the_batch_is_an_error_of_one_line(
    form: Form, mistake: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, body, kind, pattern = BAD_STEPS[mistake]
    model = steps_file(tmp_path, {name: f"    {body}\n"})
    values = job_of(form, tmp_path, tmp_path_factory.mktemp, model=model)
    with pytest.raises(kind, match=pattern) as error:
        run_inline(values)
    assert error.value.code is CODES[kind]
    assert "\n" not in str(error.value)
