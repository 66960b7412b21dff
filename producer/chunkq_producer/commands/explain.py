"""`chunkq explain`."""

from __future__ import annotations

from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem

from chunkq import terminal
from chunkq.errors import ErrorCode, describe_code
from chunkq.job import key_reference
from chunkq.job.key_reference import Key
from chunkq.system.standard_output import print_line, result_stream

MAX_COLUMNS = 88
LABEL_COLUMNS, KEY_COLUMNS = 11, 24
WIDE = 60
"""Columns from which lists show a key and its summary on one line."""
HEADINGS = {
    "input": "Keys of input, where it is a mapping",
    "model_config": "Keys of model_config: {group}",
    "dask_config": "Keys of dask_config",
    "ray_config": "Keys of ray_config",
    "pyramid": "Keys of pyramid",
    "codec": "Keys of codec",
    "outputs.NAME": "Keys of each output in outputs",
    "outputs.NAME.codec": "Keys of codec in an output",
}


def complete_keys(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the paths of keys and the error codes that start with a text, for shells."""
    helps = {entry.path: entry.summary for entry in key_reference.all_keys()}
    helps |= dict.fromkeys(ErrorCode, "error code")
    return [
        CompletionItem(name, help=text)
        for name, text in helps.items()
        if name.startswith(incomplete)
    ]


@click.command()
@click.argument("key", required=False, shell_complete=complete_keys)
def explain(key: str | None) -> None:
    """Explain KEY of the job file, such as strides or model_config.dtype.

    The section of a key may be left out where its name is unique. KEY can also be the code at the
    end of an error message, such as model_unusable. Without KEY, list all keys.
    """
    width = min(terminal.columns(result_stream()) or MAX_COLUMNS, MAX_COLUMNS)
    if key is None:
        entries = key_reference.all_keys()
        lines = [*overview(entries, width), "", *_closing_lines(width)]
    elif (code := key.strip("[]")) in list(ErrorCode):
        text = f"{describe_code(ErrorCode(code))} Remedies are in docs/troubleshooting.md."
        lines = [code, "", *terminal.wrap(f"  {text}", width)]
    else:
        lines = list(explanation(key_reference.find_key(key), width))
    print_line("\n".join(line.rstrip() for line in lines))


def overview(entries: tuple[Key, ...], width: int) -> Iterator[str]:
    """Yield the keys by group, each with a summary."""
    for number, ((section, group), members) in enumerate(key_reference.grouped(entries).items()):
        if number:
            yield ""
        yield HEADINGS.get(section, "{group}").format(group=group)
        pairs = [(entry.path.rpartition(".")[2], _summary(entry)) for entry in members]
        for line in terminal.rows(pairs, width - 2, label=KEY_COLUMNS if width >= WIDE else None):
            yield f"  {line}"


def _summary(entry: Key) -> str:
    return entry.summary + (" (required)" if entry.default is None else "")


def _closing_lines(width: int) -> list[str]:
    text = "`chunkq explain KEY` describes a key, such as strides or model_config.dtype."
    return terminal.wrap(text, width)


def explanation(entry: Key, width: int) -> Iterator[str]:
    """Yield what a key means, its values and an example."""
    yield entry.path
    yield ""
    yield from terminal.wrap(f"  {entry.description}", width)
    yield ""
    default = "required" if entry.default is None else entry.default
    pairs = [("type", entry.type), ("default", default), ("unit", entry.unit or "none")]
    if entry.see is not None:
        pairs.append(("more", f"docs/{entry.see}"))
    plain = [(label, value.replace("`", "")) for label, value in pairs]
    for line in terminal.rows(plain, width - 2, label=LABEL_COLUMNS):
        yield f"  {line}"
    yield ""
    yield "  example"
    yield from (f"    {line}" for line in entry.example.splitlines())
    if any(k.path.startswith(f"{entry.path}.") for k in key_reference.all_keys()):
        inside = tuple(k for k in key_reference.all_keys() if k.path.startswith(f"{entry.path}."))
        yield ""
        yield from overview(inside, width)
