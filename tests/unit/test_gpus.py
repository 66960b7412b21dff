"""The GPUs of this machine, as the driver's tool lists them."""

import logging
import os
from pathlib import Path

import pytest

from chunkq.system import gpus


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a tool that a test writes, first on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    return tmp_path / "nvidia-smi"


@pytest.mark.parametrize(
    ("script", "listed"),
    [
        ("echo 0; echo 1", ["0", "1"]),
        ("printf '0\\r\\n1\\r\\n'", ["0", "1"]),
        ("echo 'No devices were found'", []),
        ("echo 'No devices were found'; exit 6", []),
        ("echo 'NVIDIA-SMI has failed because it could not reach the driver.'; exit 9", []),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18", []),
        ("echo 0; echo 'Unable to determine the device handle for GPU 1: Unknown Error'", ["0"]),
        ("echo '[N/A]'", []),
        ("printf '\\377\\n0\\n'", ["0"]),
        ("exit 0", []),
    ],
)
def test_only_numbers_that_the_tool_lists_are_gpus(
    tool: Path, script: str, listed: list[str]
) -> None:
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    assert gpus.visible_gpus() == listed


@pytest.mark.parametrize(
    ("script", "warned"),
    [
        ("echo 'No devices were found'; exit 6", []),
        ("echo 'NVIDIA-SMI has failed.'; exit 9", ["NVIDIA-SMI has failed."]),
        ("echo 'Failed to initialize NVML' >&2; exit 18", ["Failed to initialize NVML"]),
        ("echo 0; echo 'Unable to determine GPU 1'", ["Unable to determine GPU 1"]),
        ("echo 0", []),
    ],
)
def test_what_the_tool_reports_besides_numbers_is_a_warning(
    tool: Path, caplog: pytest.LogCaptureFixture, script: str, warned: list[str]
) -> None:
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        gpus.visible_gpus()
    assert len(caplog.records) == len(warned)
    assert all(text in r.getMessage() for text, r in zip(warned, caplog.records, strict=True))


@pytest.mark.parametrize("content", ["#!/bin/sh\nexec sleep 100\n", "#!/missing/interpreter\n"])
def test_a_tool_that_does_not_answer_means_no_gpu_and_a_warning(
    tool: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    tool.write_text(content)
    tool.chmod(0o755)
    monkeypatch.setattr(gpus, "TOOL_SECONDS", 0.2)
    with caplog.at_level(logging.WARNING):
        assert gpus.visible_gpus() == []
    [record] = caplog.records
    assert gpus.VISIBLE in record.getMessage()


@pytest.mark.parametrize(
    ("value", "listed"), [("", []), ("-1", []), ("2, GPU-a1b2", ["2", "GPU-a1b2"])]
)
def test_the_environment_variable_takes_precedence_over_the_tool(
    tool: Path, monkeypatch: pytest.MonkeyPatch, value: str, listed: list[str]
) -> None:
    tool.write_text("#!/bin/sh\necho 0\n")
    tool.chmod(0o755)
    monkeypatch.setenv(gpus.VISIBLE, value)
    assert gpus.visible_gpus() == listed
