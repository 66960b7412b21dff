"""Log lines of frameworks stay out of the terminal; what the user writes does not."""

import subprocess
import sys
from pathlib import Path

import pytest

ABSL = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"
TENSORFLOW = [
    ABSL,
    "I0000 00:00:1795241221.078388    8965 port.cc:153] oneDNN custom operations are on.",
    "E0000 00:00:1795241221.078388    8965 cuda_dnn.cc:8310] Unable to register cuDNN factory",
    "2026-01-01 08:00:00.123456: I tensorflow/core/platform/cpu_feature_guard.cc:210] AVX2 FMA",
]
ONNX = "\x1b[0;93m2026-01-01 08:00:00.12 [W:onnxruntime:Default, device_discovery.cc:211] GPU\x1b[m"
FRAMEWORK = """\
import os, warnings
os.write(2, {lines!r}.encode())
os.write(2, b"a line of the framework's own\\n")
print("printed by the framework")


def set_default_logger_severity(level):
    print("severity", level)


def old():
    warnings.warn("old() is deprecated", FutureWarning, stacklevel=2)


def risky():
    warnings.warn("risky() is inaccurate", UserWarning, stacklevel=2)
"""


@pytest.fixture
def frameworks(tmp_path: Path) -> Path:
    """Return a folder with modules that are named like frameworks and write log lines."""
    for name, lines in (("tensorflow", TENSORFLOW), ("onnxruntime", [ONNX]), ("torch", [])):
        text = "".join(f"{line}\n" for line in lines)
        (tmp_path / f"{name}.py").write_text(FRAMEWORK.format(lines=text))
    return tmp_path


def run(folder: Path, code: str, *options: str, **environment: str) -> tuple[list[str], list[str]]:
    """Run code in a process that hides log lines; return the lines of its two streams."""
    hide = "from chunkq.system.framework_logs import hide_framework_logs\nhide_framework_logs()\n"
    path = [str(folder), *sys.path]
    result = subprocess.run(
        [sys.executable, *options, "-c", hide + code],
        env={"PYTHONPATH": ":".join(path)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout.splitlines(), result.stderr.splitlines()


def test_a_framework_that_user_code_imports_writes_no_log_lines(frameworks: Path) -> None:
    code = "import sys\nimport tensorflow, onnxruntime\nprint('mine', file=sys.stderr)\n"
    out, err = run(frameworks, code)
    assert err == ["a line of the framework's own"] * 2 + ["mine"]
    assert out == ["printed by the framework"] * 2 + ["severity 3"]


def test_log_lines_are_shown_if_the_user_has_set_a_log_level(frameworks: Path) -> None:
    _, err = run(frameworks, "import tensorflow", TF_CPP_MIN_LOG_LEVEL="0")
    assert err == [*TENSORFLOW, "a line of the framework's own"]


def test_child_processes_inherit_the_log_levels(frameworks: Path) -> None:
    code = "import os\nprint(os.environ['TF_CPP_MIN_LOG_LEVEL'], os.environ['TORCH_CPP_LOG_LEVEL'])"
    assert run(frameworks, code)[0] == ["3 ERROR"]


def test_only_log_lines_are_removed_while_a_framework_is_imported(frameworks: Path) -> None:
    error = "Error: what I0000 means\nI0001 means more\n"
    (frameworks / "tensorflow.py").write_text(f"import os\nos.write(2, {error!r}.encode())\n")
    assert run(frameworks, "import tensorflow")[1] == error.splitlines()


def test_an_error_of_an_import_is_raised(frameworks: Path) -> None:
    (frameworks / "tensorflow.py").write_text("raise ImportError('libcudart is missing')\n")
    code = "try:\n    import tensorflow\nexcept ImportError as error:\n    print(error)\n"
    assert run(frameworks, code) == (["libcudart is missing"], [])


def test_a_missing_framework_is_an_error_as_usual(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "try:\n    import tensorflow.keras\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    assert run(tmp_path, code) == (["No module named 'tensorflow'"], [])


WARNINGS = """\
import typing_extensions, warnings
import torch

torch.old()
torch.risky()
warnings.warn("mine is deprecated", FutureWarning)


@typing_extensions.deprecated("mine is old", category=FutureWarning)
def mine():
    pass


def theirs():
    pass


mine()
theirs.__module__ = "torch.cuda.amp"
typing_extensions.deprecated("theirs is old", category=FutureWarning)(theirs)()
"""


def test_deprecation_warnings_of_frameworks_are_hidden_and_no_others(frameworks: Path) -> None:
    _, err = run(frameworks, WARNINGS)
    text = "\n".join(err)
    shown = ["risky() is inaccurate", "mine is deprecated", "mine is old"]
    assert [line for line in shown if line in text] == shown
    assert "old() is deprecated" not in text
    assert "theirs is old" not in text


def test_the_warning_filters_of_the_user_have_priority(frameworks: Path) -> None:
    assert any("old() is deprecated" in line for line in run(frameworks, WARNINGS, "-Wdefault")[1])
