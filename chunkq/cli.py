"""The `chunkq` command: sub-commands by name, each imported only when it is called."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from types import MappingProxyType

import click

from chunkq import __version__
from chunkq.errors import ChunkqError, ErrorCode, nearest

COMMANDS: MappingProxyType[str, tuple[str, str]] = MappingProxyType(
    {
        "init": ("chunkq_producer.commands.init:init", "Write a commented job file."),
        "plan": ("chunkq_producer.commands.plan:plan", "Say what a job will cost."),
        "tune": ("chunkq_worker.tune.command:tune", "Find a job's fastest settings."),
        "produce": ("chunkq_producer.commands.produce:produce", "Cut a job, fill the queue."),
        "work": ("chunkq_worker.commands:work", "Take chunks from the queue and compute them."),
        "status": ("chunkq_producer.commands.status:status", "Show how far jobs are."),
        "finalize": ("chunkq_producer.commands.finalize:finalize", "Complete and seal an output."),
        "report": ("chunkq_producer.commands.report:report", "Say where the time went."),
        "run": ("chunkq_producer.commands.run:run", "All of it on this machine."),
        "retry": ("chunkq_producer.commands.retry:retry", "Queue failed chunks afresh."),
        "cancel": ("chunkq_producer.commands.cancel:cancel", "Take a job off the queue."),
        "jobs": ("chunkq_producer.commands.jobs:jobs", "List the jobs on a queue."),
        "redis": ("chunkq_producer.commands.redis:redis", "Start a Redis server for a queue."),
        "export": ("chunkq_worker.export_command:export", "Write a network as ONNX or .pt2."),
        "schema": ("chunkq_producer.commands.schema:schema", "Print the job file's JSON schema."),
    }
)
"""Name -> where it is and what `--help` says, so that help imports none of them."""

STORAGE_CLIENTS = frozenset({"botocore", "aiobotocore", "aiohttp"})
"""Packages whose errors come from a bucket that is away or refuses."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and loads one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a job's life."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Add the nearest name to click's own complaint."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{nearest(args[0], list(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="chunkq")
def cli() -> None:
    """Run a trained network over volumes that fit no machine."""


def main() -> int:
    """Run the command; returns its exit code. A user's mistake is one line, no traceback."""
    try:
        cli(prog_name="chunkq", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        # The reader of our output went away; the interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("chunkq: interrupted", err=True)
        return 130
    except Exception as error:
        known = _as_chunkq_error(error)
        for line in str(known).splitlines():
            click.echo(f"chunkq: {line} [{known.code}]", err=True)
        if "--json" in sys.argv[1:]:
            click.echo(json.dumps({"error": {"code": known.code, "message": str(known)}}))
        return known.exit_code
    return 0


def _as_chunkq_error(error: Exception) -> ChunkqError:
    """Return the error for the user; raises the error itself if it is a bug in chunkq."""
    if isinstance(error, ChunkqError):
        return error
    package = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and package not in STORAGE_CLIENTS:
        raise error
    reason = " ".join(str(error).split()) or type(error).__name__
    return ChunkqError(f"storage: {reason}", code=ErrorCode.STORAGE_FAILED)
