"""The error for model files that can run code or reach other files without `trusted: true`."""

from __future__ import annotations

from chunkq.errors import ErrorCode, ModelError


def untrusted(path: str, contents: str, instead: str = "") -> ModelError:
    """Return the error for a file of which `contents` says what it can do.

    `instead` names a form of the network that cannot do it.
    """
    advice = "set trusted: true if you trust where the file comes from"
    return ModelError(
        f"model_config.trusted: missing; {path} {contents}; {advice}"
        + (f", or {instead}" if instead else ""),
        code=ErrorCode.MODEL_UNTRUSTED,
    )
