"""The command `chunkq export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chunkq.errors import ErrorCode, JobError, ModelError
from chunkq.install_hint import install_command
from chunkq.paths import absolute, is_url
from chunkq.system.standard_output import print_line, print_text, reserve

if TYPE_CHECKING:
    from chunkq_worker.export.export import BatchSize, Exported


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, help="File to write: FILE.onnx or FILE.pt2.")
@click.option(
    "--batch",
    help="Items in every batch, or `dynamic`. Default: dynamic if the network supports it, else "
    "the job's max_batch_size.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(job: Path, output: str, batch: str | None, overwrite: bool, as_json: bool) -> None:
    """Export the torch network of JOB as ONNX or .pt2, and compare the file with the network.

    JOB is a job file; only its key model_config is needed. The network and the file run on random
    input, and nothing is written if their outputs differ.
    """
    reserve()
    if is_url(output):
        raise JobError("-o: expected a local file, found a URL; write a local file and copy it")
    file = Path(absolute(output, Path.cwd()))
    size = _parse_batch_size(batch)
    try:
        from chunkq_worker.export.export import export_network, load_network_job
    except ImportError as error:
        raise ModelError(
            f"chunkq export: torch is missing ({error}); run `{install_command('export')}`",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    result = export_network(load_network_job(job), file, size, overwrite=overwrite)
    if as_json:
        print_line(json.dumps(_values(result), indent=1))
    else:
        print_text(_text(result))
        print_line(_config(result))


def _parse_batch_size(value: str | None) -> BatchSize:
    if value is None or value == "dynamic":
        return value  # type: ignore[return-value]
    if not value.isdecimal() or not int(value):
        raise JobError(f"--batch: invalid value {value!r}; expected a number above 0 or dynamic")
    return int(value)


def _values(result: Exported) -> dict[str, Any]:
    return {
        "file": str(result.file),
        "bytes": result.size,
        "batch": result.batch or "dynamic",
        "tried": list(result.batch_sizes),
        "largest_difference": result.difference,
        "relative_difference": result.relative,
        "allowed_difference": result.allowed,
        "model_config": result.model_config,
        "notes": list(result.notes),
    }


def _text(result: Exported) -> str:
    kind = f"batches of {result.batch} items" if result.batch else "batches of any size"
    sizes = ", ".join(map(str, result.batch_sizes))
    lines = [
        f"wrote {result.file}: {result.size:,} bytes, for {kind}",
        f"largest difference from the network: {result.difference:.2g}, {result.relative:.1g} of "
        f"the outputs' range, over random batches of {sizes}",
        *(f"note: {note}" for note in result.notes),
        "use it with these lines in the job file:",
    ]
    return "\n".join(lines)


def _config(result: Exported) -> str:
    """Return the section of the job file that names the exported file."""
    import yaml

    text: str = yaml.safe_dump(
        {"model_config": result.model_config}, sort_keys=False, default_flow_style=None, width=1000
    )
    return text.rstrip()
