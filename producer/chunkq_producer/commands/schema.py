"""`chunkq schema`."""

from __future__ import annotations

import json

import click

from chunkq.job.job_file import job_schema


@click.command()
def schema() -> None:
    """Print the JSON schema of the job file for editors and validators."""
    click.echo(json.dumps(job_schema(), indent=1))
