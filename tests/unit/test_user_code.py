import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from chunkq.errors import JobError
from chunkq.plan import Plan
from chunkq.user_code import load_blend_weights, load_names, select_name
from chunkq.weights import ArrayWeights, ProductWeights
from tests.strategies import plan_for


def weights_plan(path: Path, text: str | None, name: str = "mine") -> Plan:
    """A plan over 2-D patches of 4 × 6 whose weights come from a file with this text."""
    if text is not None:
        path.write_text(text)
    return plan_for((9, 9), (4, 6), weight_function=[str(path), name])


def refusal(plan: Plan) -> str:
    with pytest.raises(JobError) as caught:
        load_blend_weights(plan)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # A user's folder and modules stay for good: not for the tests that follow.
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path / "weights.py"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_users_function_is_called_with_the_output_patch_shape(path: Path) -> None:
    text = "import numpy as np\ndef mine(shape):\n    return np.arange(1, 25).reshape(shape)"
    weights = load_blend_weights(weights_plan(path, text))
    assert isinstance(weights, ArrayWeights)
    assert np.array_equal(weights.array, np.arange(1, 25).reshape(4, 6))
    assert weights.array.dtype == np.float64


def test_the_margin_is_cut_from_a_users_weights(path: Path) -> None:
    path.write_text(
        "import numpy as np\ndef mine(shape):\n    return np.arange(1, 25).reshape(shape)"
    )
    plan = plan_for(
        (9, 9),
        (4, 6),
        inference_type="crop_margin",
        margin=[1, 2],
        weight_function=[str(path), "mine"],
    )
    weights = load_blend_weights(plan)
    assert isinstance(weights, ArrayWeights)
    assert weights.array.tolist() == [[9, 10], [15, 16]]


def test_nested_lists_will_do(path: Path) -> None:
    weights = load_blend_weights(weights_plan(path, "def mine(shape):\n    return [[1] * 6] * 4"))
    assert isinstance(weights, ArrayWeights)
    assert weights.array.tolist() == [[1] * 6] * 4


def test_a_built_in_needs_no_file() -> None:
    weights = load_blend_weights(plan_for((9,), (3,), weight_function=["weight_linear"]))
    assert isinstance(weights, ProductWeights)
    assert np.exp(weights.profiles[0]) == pytest.approx([1, 2, 1])


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("np.zeros(s)", "gave 0.0 at [0, 0]; weights must be finite and positive"),
        ("np.where(np.indices(s)[1] == 2, -1, 1)", "gave -1.0 at [0, 2]; weights must be"),
        ("np.where(np.indices(s).sum(0) == 8, np.nan, 1)", "gave nan at [3, 5]; weights must be"),
        ("np.where(np.indices(s)[0] == 1, np.inf, 1)", "gave inf at [1, 0]; weights must be"),
        ("np.ones(3)", "gave shape [3]; the output patch is [4, 6]"),
        ("np.ones((6, 4))", "gave shape [6, 4]; the output patch is [4, 6]"),
        ("1.0", "gave shape []; the output patch is [4, 6]"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("s.missing", "raised AttributeError: 'tuple' object has no attribute 'missing'"),
        ("'many'", "raised ValueError: could not convert string to float: 'many'"),
        ("None", "gave shape []; the output patch is [4, 6]"),  # NumPy reads None as NaN
    ],
)
def test_weights_that_cannot_be_used_are_refused(path: Path, body: str, complaint: str) -> None:
    line = refusal(weights_plan(path, f"import numpy as np\ndef mine(s):\n    return {body}\n"))
    assert line.startswith(f"weight_function: mine of {path} {complaint}")
    assert "\n" not in line


def test_a_name_that_is_no_function_is_refused(path: Path) -> None:
    line = refusal(weights_plan(path, "mine = 3"))
    assert line == (
        f"weight_function: mine of {path} raised TypeError: 'int' object is not callable"
    )


def test_a_missing_file_is_named(path: Path) -> None:
    assert refusal(weights_plan(path, None)) == f"weight_function: no file {path}"


@pytest.mark.parametrize("text", ["def mine(:", "x = (", "\x00"])
def test_a_file_that_is_no_python_is_refused(path: Path, text: str) -> None:
    line = refusal(weights_plan(path, text))
    assert line.startswith(f"weight_function: {path} is not Python: ")


def test_a_file_that_raises_is_refused_with_what_it_raised(path: Path) -> None:
    line = refusal(weights_plan(path, "import no_such_module"))
    assert line == (
        f"weight_function: {path} raised ModuleNotFoundError: No module named 'no_such_module'"
    )


def test_a_missing_name_lists_the_names_there_are(path: Path) -> None:
    text = "import math\n_hidden = 1\ndef yours(shape): ...\ndef theirs(shape): ..."
    line = refusal(weights_plan(path, text))
    assert line == f"weight_function: {path} has no 'mine'; it defines math, theirs, yours"


def test_an_empty_file_defines_nothing(path: Path) -> None:
    line = refusal(weights_plan(path, ""))
    assert line == f"weight_function: {path} has no 'mine'; it defines nothing"


def test_a_file_knows_where_it_lies_and_is_not_run_as_a_script(path: Path) -> None:
    path.write_text("here = __file__\nscript = __name__ == '__main__'\n")
    names = load_names(str(path), "model_config.class_file")
    assert select_name(names, "here", str(path), "model_config.class_file") == str(path)
    assert select_name(names, "script", str(path), "model_config.class_file") is False


def test_a_file_may_import_its_neighbours_and_define_dataclasses(path: Path) -> None:
    (path.parent / "neighbour_of_weights.py").write_text("number = 7")
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from neighbour_of_weights import number\n"
        "@dataclasses.dataclass\n"
        "class Config:\n"
        "    width: int = number\n"
    )
    names = load_names(str(path), "weight_function")
    assert names["Config"]().width == 7


def test_the_key_that_named_the_file_leads_the_message(path: Path) -> None:
    with pytest.raises(JobError, match=r"^model_config.class_file: no file "):
        load_names(str(path), "model_config.class_file")


def test_a_file_may_lie_behind_a_url() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/userfile/names.py", b"x = 5")
    assert load_names("memory://userfile/names.py", "weight_function")["x"] == 5


def test_a_message_of_several_lines_is_told_in_one(path: Path) -> None:
    line = refusal(weights_plan(path, "def mine(shape):\n    raise ValueError('one\\ntwo')"))
    assert "\n" not in line
