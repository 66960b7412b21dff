"""`chunkq run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from typing_extensions import override

from chunkq.errors import InterruptedCommandError
from chunkq.system.standard_output import reserve
from chunkq_producer.commands.options import (
    config_option,
    input_option,
    job_argument,
    output_option,
    queue_option,
)
from chunkq_producer.early_process import early_start
from chunkq_producer.engine_names import ENGINES

if TYPE_CHECKING:
    Choice = click.Choice[str]
else:
    Choice = click.Choice  # not generic before click 8.2


class EngineChoice(Choice):
    """Value of --executor, with a proposal for other words."""

    @override
    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            from chunkq.job.hints import value_hint  # for a message only

            hint = value_hint("executor", value, list(ENGINES))
            self.fail(f"{error.message.rstrip('.')}{hint}", param, ctx)


@click.command()
@job_argument
@config_option
@click.option(
    "-e", "--executor", "engine", type=EngineChoice(list(ENGINES)),
    help="Kind of queue (default: sqlite, a local file). dask and ray start a local cluster.",
)  # fmt: skip
@queue_option
@input_option
@output_option
@click.option(
    "-w", "--workers", type=click.IntRange(1),
    help="Worker processes per GPU; without a GPU, in total (default: 1).",
)  # fmt: skip
@click.option("--gpus", default="all", show_default=True, help="GPUs to use: all, none, or 0,1.")
@click.option(
    "--depth", type=click.IntRange(1),
    help="Chunks per process that are read, computed or written at the same time.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Delete the output and start again.")
def run(
    job: Path | None,
    config: Path | None,
    engine: str | None,
    queue: str | None,
    input_: str | None,
    output: str | None,
    workers: int | None,
    gpus: str,
    depth: int | None,
    overwrite: bool,
) -> None:
    """Run JOB, a YAML or JSON job file, on this machine: produce, work and finalize.

    To continue an interrupted run, use the same command again.
    """
    reserve()
    try:
        with early_start(engine, queue, workers) as start:
            # Imported here, while the workers start.
            from chunkq.job.job_reading import load_job, select_job_file
            from chunkq_producer.run_display import RunDisplay
            from chunkq_producer.runner import run_job
            from chunkq_producer.worker_command import RunOptions

            with RunDisplay() as display:
                result = run_job(
                    load_job(select_job_file(job, config), input=input_, output=output),
                    engine=engine,
                    queue=queue,
                    options=RunOptions(workers, gpus, depth),
                    overwrite=overwrite,
                    emit=display,
                    start=start,
                )
    except KeyboardInterrupt:  # before the workers begin, or after they have ended
        rerun = "the same command" + (" without --overwrite" if overwrite else "")
        raise InterruptedCommandError(f"run: interrupted; run {rerun} to continue") from None
    if result.is_leader:
        from chunkq_producer.commands.finalize import print_result

        print_result(result.job, result.report)
