"""`chunkq export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chunkq.errors import JobError, ModelError
from chunkq.paths import absolute, is_url

if TYPE_CHECKING:
    from chunkq_worker.export import Batch, Exported


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, help="File to write: FILE.onnx or FILE.pt2.")
@click.option(
    "--batch",
    help="Items in every batch, or `dynamic`; by default dynamic where the network allows it, "
    "else the job's max_batch_size.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(job: Path, output: str, batch: str | None, overwrite: bool, as_json: bool) -> None:
    """Write the torch network of JOB as ONNX or .pt2, tried against the network itself.

    JOB is a job file; of its keys only model_config is needed. Both are run on random input, and
    nothing is written if they differ.
    """
    if is_url(output):
        raise JobError("-o: name a local file, and copy it where it is to be")
    file = Path(absolute(output, Path.cwd()))
    size = _batch(batch)
    try:
        from chunkq_worker.export import export_network, load_network_job
    except ImportError as error:
        raise ModelError(
            f"chunkq export needs torch ({error}); pip install 'chunkq[export]'"
        ) from None
    done = export_network(load_network_job(job), file, size, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(_values(done), indent=1))
    else:
        click.echo(_text(done))


def _batch(given: str | None) -> Batch:
    if given is None or given == "dynamic":
        return given  # type: ignore[return-value]
    if not given.isdecimal() or not int(given):
        raise JobError(f"--batch: {given!r} is neither a number above 0 nor dynamic")
    return int(given)


def _values(done: Exported) -> dict[str, Any]:
    return {
        "file": str(done.file),
        "bytes": done.size,
        "batch": done.batch or "dynamic",
        "tried": list(done.tried),
        "largest_difference": done.difference,
        "relative_difference": done.relative,
        "allowed_difference": done.allowed,
        "model_config": done.model_config,
        "notes": list(done.notes),
    }


def _text(done: Exported) -> str:
    import yaml

    takes = f"batches of {done.batch}" if done.batch else "batches of any size"
    sizes = ", ".join(map(str, done.tried))
    lines = [
        f"wrote {done.file}: {done.size:,} bytes, for {takes}",
        f"largest difference from the network: {done.difference:.2g}, {done.relative:.1g} of the "
        f"outputs' range, over random batches of {sizes}",
        *(f"note: {note}" for note in done.notes),
        "use it with these lines in the job file:",
    ]
    config = yaml.safe_dump(
        {"model_config": done.model_config}, sort_keys=False, default_flow_style=None, width=1000
    )
    return "\n".join([*lines, config.rstrip()])
