"""The error for a model file that can run code or reach other files."""

from __future__ import annotations

from chunkq.errors import ErrorCode, ModelError


def untrusted(path: str, problem: str, alternative: str = "") -> ModelError:
    """Return the error for a file that needs `trusted: true`.

    `problem` is the predicate of the sentence: what the file can do. `alternative` is advice for a
    form of the network that needs no trust.
    """
    advice = "set trusted: true if you trust the source of the file"
    return ModelError(
        f"model_config.trusted: missing; {path} {problem}; {advice}"
        + (f", or {alternative}" if alternative else ""),
        code=ErrorCode.MODEL_UNTRUSTED,
    )
