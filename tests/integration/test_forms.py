"""One network in every form, and every step around it, through the whole pipeline with bands."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from chunkq.errors import ModelError, PredictionError
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
    """A job over overlapping patches; `model` among `more` is merged into `model_config`."""
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


def truth(predict: Predict) -> npt.NDArray[np.float64]:
    """The naive reference: `predict` takes and gives (1, C, *P)."""
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
def test_one_network_gives_the_same_volume_in_every_form(
    form: Form, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make_folder = tmp_path_factory.mktemp
    found, expected = run(form, tmp_path, make_folder), by_torch_class(make_folder)
    assert found.shape == (CHANNELS, *SHAPE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=form.within)


def test_that_volume_is_the_references(tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = truth(models.predict)
    assert expected.std() > 0.1
    np.testing.assert_allclose(by_torch_class(tmp_path_factory.mktemp), expected, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------- steps around it


OUTER_CHECK = "    assert type(batch).__name__ == 'ndarray', type(batch)\n"
STEPS = {
    "preprocessing": f"{OUTER_CHECK}    return (batch * 0.5 + 3)[:, :, ::-1]\n",
    "preprocessing_protected": "    return batch * 2 - 10\n",
    "postprocessing_protected": "    return batch * 3 + 1\n",
    "postprocessing": f"{OUTER_CHECK}    return (batch + 0.25)[:, ::-1]\n",
}


def steps_file(folder: Path, bodies: dict[str, str]) -> dict[str, str]:
    path = folder / "steps.py"
    text = "".join(f"def {name}(batch):\n{body}\n" for name, body in bodies.items())
    path.write_text(f"import numpy as np\n\n{text}")
    return {"processing_steps": str(path)}


def with_steps(names: list[str]) -> Predict:
    """The network between the named steps, one patch at a time, by NumPy and torch."""
    step: dict[str, Predict] = {}
    for name, body in STEPS.items():
        made: dict[str, Any] = {}
        exec(f"def {name}(batch):\n{body if name in names else '    return batch'}", made)
        step[name] = made[name]

    def predict(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        given = step["preprocessing_protected"](step["preprocessing"](batch))
        outputs = models.predict(np.ascontiguousarray(given))
        return step["postprocessing"](step["postprocessing_protected"](outputs))

    return predict


@pytest.mark.parametrize("names", [[name] for name in STEPS] + [list(STEPS)], ids="+".join)
@pytest.mark.parametrize("form", FORM_BY_RUNTIME, ids=lambda form: form.runtime)
def test_every_step_works_on_every_runtime(
    form: Form, names: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = steps_file(tmp_path, {name: STEPS[name] for name in names})
    found = run(form, tmp_path, tmp_path_factory.mktemp, model=model)
    expected = truth(with_steps(names))
    np.testing.assert_allclose(found, expected, rtol=0, atol=max(form.within, 1e-5))


BAD_STEPS = {
    "changes how many items there are": (
        ("preprocessing", "return batch[:2]"),
        (ModelError, "preprocessing returned 2 items, expected 4"),
    ),
    "changes how many items there are on the device": (
        ("postprocessing_protected", "return batch[:2]"),
        (ModelError, "postprocessing_protected returned 2 items, expected 4"),
    ),
    "gives no array": (
        ("postprocessing", "return list(batch)"),
        (ModelError, "postprocessing returned list, expected an array"),
    ),
    "changes the shape of the result": (
        ("postprocessing", "return batch[:, :2]"),
        (ModelError, "returned shape [4, 2, 8, 8, 8]"),
    ),
    "raises": (
        ("preprocessing_protected", "raise KeyError('mean')"),
        (ModelError, "raised KeyError"),
    ),
    "gives NaN at once": (
        ("preprocessing", "return np.where(batch == batch.max(), np.nan, batch)"),
        (PredictionError, "model_config.processing_steps: preprocessing returned NaN or infinity"),
    ),
    "gives NaN at last": (
        ("postprocessing", "return np.log(np.where(batch > 1, 0, 1))"),
        (PredictionError, "model_config.processing_steps: postprocessing returned NaN or infinity"),
    ),
    "gives NaN on the device": (
        ("postprocessing_protected", "return batch * float('nan')"),
        (PredictionError, "the network with its protected steps returned NaN or infinity"),
    ),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("what", BAD_STEPS)
@pytest.mark.parametrize("form", FORM_BY_RUNTIME, ids=lambda form: form.runtime)
def test_a_step_that_breaks_the_batch_is_one_line_that_names_it(
    form: Form, what: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (name, body), (kind, words) = BAD_STEPS[what]
    model = steps_file(tmp_path, {name: f"    {body}\n"})
    values = job_of(form, tmp_path, tmp_path_factory.mktemp, model=model)
    with pytest.raises(kind) as caught:
        run_inline(values)
    line = str(caught.value)
    assert words in line
    assert "\n" not in line
