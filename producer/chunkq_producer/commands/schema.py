"""`chunkq schema`."""

from __future__ import annotations

import json

import click

from chunkq.job.job_file import job_schema
from chunkq.system.standard_output import print_line


@click.command()
def schema() -> None:
    """Print the JSON schema of the job file for editors and validators."""
    print_line(json.dumps(job_schema(), indent=1))
