"""The `chunkq` command. Each subcommand is imported only when it is called."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from chunkq import __version__
from chunkq.errors import (
    ChunkqError,
    ErrorCode,
    IncompleteError,
    InterruptedCommandError,
    suggestion,
)
from chunkq.install_hint import package_hint
from chunkq.lazy_imports import COMMANDS, INTERNAL_COMMANDS, load, without_collection
from chunkq.system.framework_logs import hide_framework_logs
from chunkq.system.standard_output import discard_results, print_line, results_of_command
from chunkq.terminal import print_error

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

STORAGE_CLIENTS = frozenset({"botocore", "aiobotocore", "aiohttp"})
"""Packages whose errors mean that a bucket is unreachable or denies access."""
PYDANTIC_PLUGINS = "PYDANTIC_DISABLE_PLUGINS"
"""Environment variable with the names of plugins that pydantic does not load."""
MAX_HELP_COLUMNS = 80
MIN_LIST_COLUMNS = 60
"""Columns below which the text of an option is below its name."""


class HelpFormatter(click.HelpFormatter):
    """Formatter of help texts that splits no words on narrow terminals."""

    def __init__(self, width: int | None = None, max_width: int | None = None) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(width=width or min(columns, max_width or MAX_HELP_COLUMNS) - 2)

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Write names and their texts: beside each other, or below on a narrow terminal."""
        if self.width >= MIN_LIST_COLUMNS:
            super().write_dl(rows, col_max, col_spacing)
            return
        for name, text in rows:
            self.write(f"{'':>{self.current_indent}}{name}\n")
            with self.indentation():
                self.write_text(text)


class Context(click.Context):
    """Context of a command, with the help of `HelpFormatter`."""

    formatter_class = HelpFormatter


class LazyGroup(click.Group):
    """Click group that imports a command when it is called."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None for an unknown name."""
        targets = {name: target for name, (target, _) in COMMANDS.items()} | INTERNAL_COMMANDS
        if cmd_name not in targets:
            return None
        with without_collection():
            command: click.Command = load(targets[cmd_name])
            # The first collection of all that was imported takes a tenth of short commands.
            gc.freeze()
        command.context_class = Context
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that start with a text without importing them."""
        from click.shell_completion import CompletionItem  # for shells only

        commands = [
            CompletionItem(name, help=text)
            for name, (_, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Call a command; report a signal that ends it as an error, with the command's name."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            where = f"{ctx.invoked_subcommand}: " if ctx.invoked_subcommand else ""
            raise InterruptedCommandError(f"{where}interrupted") from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command; the error for an unknown one suggests the nearest name."""
        known = {*COMMANDS, *INTERNAL_COMMANDS}
        if args and args[0] not in known and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{suggestion(args[0], list(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="chunkq")
def cli() -> None:
    """Run neural-network inference on volumes that are larger than one machine's memory.

    On one machine, use init, plan and run. On several machines, replace run by produce, work on
    each machine, and finalize.
    """


def main() -> int:
    """Run the command and return its exit code. A `ChunkqError` prints one line per problem."""
    hide_framework_logs()
    # To find plugins, pydantic reads the metadata of all packages, a twentieth of short commands.
    os.environ.setdefault(PYDANTIC_PLUGINS, "__all__")
    with results_of_command():
        return _run()


def _run() -> int:
    try:
        code = cli(prog_name="chunkq", standalone_mode=False)
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        print_error(text.getvalue().rstrip("\n"))
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        discard_results()
        return 1
    except (KeyboardInterrupt, click.Abort):
        print_error(f"chunkq: interrupted [{InterruptedCommandError.code}]")
        return InterruptedCommandError.exit_code
    except Exception as error:
        reported = as_chunkq_error(error)
        for line in str(reported).splitlines():
            print_error(f"chunkq: {line} [{reported.code}]")
        if "--json" in sys.argv[1:]:
            print_line(json.dumps(_as_document(reported)))
        return reported.exit_code
    return code if isinstance(code, int) else 0  # of `Context.exit`


def _as_document(error: ChunkqError) -> dict[str, Any]:
    """Return an error as the JSON document of `--json`, with the missing chunks if any."""
    document: dict[str, Any] = {"error": {"code": error.code, "message": str(error)}}
    if isinstance(error, IncompleteError):
        document["missing"] = list(error.missing)
    return document


def as_chunkq_error(error: Exception) -> ChunkqError:
    """Return the error to report. Re-raise an error that comes from a bug in chunkq."""
    if isinstance(error, ChunkqError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    package = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and package not in STORAGE_CLIENTS:
        raise error
    reason = " ".join(str(error).split()) or type(error).__name__
    return ChunkqError(f"storage: {reason}", code=ErrorCode.STORAGE_FAILED)


def _missing_package(error: ModuleNotFoundError) -> ChunkqError:
    """Return the error for a package that an extra of chunkq installs; re-raise for any other."""
    hint = package_hint(error)
    if hint is None:
        raise error
    return ChunkqError(f"missing package {hint}", code=ErrorCode.PACKAGE_MISSING)
