import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from chunkq.blend.weights import ArrayWeights, ProductWeights, Weights
from chunkq.errors import ErrorCode, JobError
from chunkq.job.user_code import load_blend_weights, load_names, select_name
from tests.strategies import JobPlan, plan_for


def weights_plan(path: Path, text: str | None, name: str = "blend") -> JobPlan:
    """Return a plan with patches of 4 × 6 voxels whose weights come from a file with this text."""
    if text is not None:
        path.write_text(text)
    return plan_for((9, 9), (4, 6), weight_function=[str(path), name])


def load(plan: JobPlan) -> Weights:
    return load_blend_weights(plan.job.weight_function, plan)


def problem(plan: JobPlan) -> str:
    """Return the only problem of a weight function that cannot be used."""
    with pytest.raises(JobError) as error:
        load(plan)
    assert error.value.code is ErrorCode.JOB_INVALID
    (line,) = error.value.problems
    assert "\n" not in line
    return line


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Remove the user's modules, so that the tests do not affect each other.
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path / "weights.py"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_users_function_gets_the_shape_of_the_output_patch(path: Path) -> None:
    text = "import numpy as np\ndef blend(shape):\n    return np.arange(1, 25).reshape(shape)"
    weights = load(weights_plan(path, text))
    assert isinstance(weights, ArrayWeights)
    assert np.array_equal(weights.array, np.arange(1, 25).reshape(4, 6))
    assert weights.array.dtype == np.float64


def test_the_margin_is_cropped_from_the_users_weights(path: Path) -> None:
    path.write_text(
        "import numpy as np\ndef blend(shape):\n    return np.arange(1, 25).reshape(shape)"
    )
    plan = plan_for(
        (9, 9),
        (4, 6),
        inference_type="crop_margin",
        margin=[1, 2],
        weight_function=[str(path), "blend"],
    )
    weights = load(plan)
    assert isinstance(weights, ArrayWeights)
    assert weights.array.tolist() == [[9, 10], [15, 16]]


def test_the_users_function_may_return_nested_lists(path: Path) -> None:
    weights = load(weights_plan(path, "def blend(shape):\n    return [[1] * 6] * 4"))
    assert isinstance(weights, ArrayWeights)
    assert weights.array.tolist() == [[1] * 6] * 4


def test_a_built_in_weight_function_needs_no_file() -> None:
    weights = load(plan_for((9,), (3,), weight_function=["weight_linear"]))
    assert isinstance(weights, ProductWeights)
    assert np.exp(weights.profiles[0]) == pytest.approx([1, 2, 1])


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        ("np.zeros(s)", "returned 0.0 at [0, 0]; "),
        ("np.where(np.indices(s)[1] == 2, -1, 1)", "returned -1.0 at [0, 2]; "),
        ("np.where(np.indices(s).sum(0) == 8, np.nan, 1)", "returned nan at [3, 5]; "),
        ("np.where(np.indices(s)[0] == 1, np.inf, 1)", "returned inf at [1, 0]; "),
        ("np.ones(3)", "returned shape [3]; expected the output patch, [4, 6]"),
        ("np.ones((6, 4))", "returned shape [6, 4]; expected the output patch, [4, 6]"),
        ("1.0", "returned shape []; expected the output patch, [4, 6]"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("s.missing", "raised AttributeError: 'tuple' object has no attribute 'missing'"),
        ("'many'", "raised ValueError: could not convert string to float: 'many'"),
        ("None", "returned shape []; expected the output patch, [4, 6]"),  # NumPy reads None as NaN
    ],
)
def test_weights_that_cannot_be_used_are_rejected(path: Path, body: str, fragment: str) -> None:
    line = problem(weights_plan(path, f"import numpy as np\ndef blend(s):\n    return {body}\n"))
    assert line.startswith(f"weight_function: blend of {path} {fragment}")


def test_a_name_that_is_not_a_function_is_rejected(path: Path) -> None:
    line = problem(weights_plan(path, "blend = 3"))
    assert line == (
        f"weight_function: blend of {path} raised TypeError: 'int' object is not callable"
    )


def test_a_missing_file_is_reported_with_its_path(path: Path) -> None:
    line = problem(weights_plan(path, None))
    assert line.startswith(f"weight_function: no file {path}; ")


@pytest.mark.parametrize("text", ["def blend(:", "x = (", "\x00"])
def test_a_file_that_is_not_python_is_rejected(path: Path, text: str) -> None:
    line = problem(weights_plan(path, text))
    assert line.startswith(f"weight_function: {path} is not Python: ")


def test_the_error_of_a_file_that_raises_is_reported(path: Path) -> None:
    line = problem(weights_plan(path, "import no_such_module"))
    assert line == (
        f"weight_function: {path} raised ModuleNotFoundError: No module named 'no_such_module'"
    )


def test_the_error_for_a_missing_name_lists_the_public_names(path: Path) -> None:
    text = "import math\n_hidden = 1\ndef window(shape): ...\ndef gauss(shape): ..."
    line = problem(weights_plan(path, text))
    assert line.startswith(f"weight_function: {path} has no 'blend'; ")
    assert line.endswith(" gauss, math, window")


def test_the_error_for_a_missing_name_in_an_empty_file_lists_nothing(path: Path) -> None:
    line = problem(weights_plan(path, ""))
    assert line.startswith(f"weight_function: {path} has no 'blend'; ")
    assert line.endswith(" nothing")


def test_a_file_has_its_path_in_file_and_is_not_run_as_a_script(path: Path) -> None:
    path.write_text("location = __file__\nscript = __name__ == '__main__'\n")
    names = load_names(str(path), "model_config.class_file")
    assert select_name(names, "location", str(path), "model_config.class_file") == str(path)
    assert select_name(names, "script", str(path), "model_config.class_file") is False


def test_a_file_may_import_modules_of_its_folder_and_define_dataclasses(path: Path) -> None:
    (path.parent / "sibling_of_weights.py").write_text("number = 7")
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from sibling_of_weights import number\n"
        "@dataclasses.dataclass\n"
        "class Config:\n"
        "    width: int = number\n"
    )
    names = load_names(str(path), "weight_function")
    assert names["Config"]().width == 7


def test_the_message_begins_with_the_key_of_the_file(path: Path) -> None:
    with pytest.raises(JobError, match=rf"^model_config\.class_file: .*{path}"):
        load_names(str(path), "model_config.class_file")


def test_a_file_may_have_a_url() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/userfile/names.py", b"x = 5")
    assert load_names("memory://userfile/names.py", "weight_function")["x"] == 5


def test_an_error_message_of_several_lines_is_printed_in_one(path: Path) -> None:
    line = problem(weights_plan(path, "def blend(shape):\n    raise ValueError('one\\ntwo')"))
    assert line.endswith("ValueError: one two")
