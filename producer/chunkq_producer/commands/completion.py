"""`chunkq completion`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.system.standard_output import print_text
from chunkq.system.user_folders import data_folder, home_folder

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_CHUNKQ_COMPLETE"
"""Variable with which click calls the command for completions."""
ZSH_SETUP = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n"
"""Loads zsh's completion if the user's file has not done so."""

shell_option = click.option(
    "--shell", type=click.Choice(SHELLS), help="The shell (default: that of $SHELL)."
)


@click.group()
def completion() -> None:
    """Complete commands, options, keys and files with the Tab key, in bash, zsh and fish."""


@completion.command()
@shell_option
def install(shell: str | None) -> None:
    """Install the completion for this user. Repeating it changes nothing."""
    shell = shell or _current_shell()
    script, startup = _script_path(shell), _startup_file(shell)
    line = f". {shlex.quote(str(script))}"
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(_script(shell), encoding="utf-8")
        is_new = startup is not None and _append_line(startup, line)
    except OSError as error:
        raise ChunkqError(
            f"completion: {error.filename} cannot be written: {error.strerror}; save the output "
            f"of `chunkq completion show --shell {shell}` in a file that {shell} loads",
            code=ErrorCode.STORE_UNUSABLE,
        ) from None
    added = f"; added a line to {startup}" if is_new else ""
    print_text(f"wrote {script}{added}; start a new {shell} to use it")


@completion.command()
@shell_option
def show(shell: str | None) -> None:
    """Print the completion script."""
    click.echo(_script(shell or _current_shell()), nl=False)


def _current_shell() -> str:
    """Return the shell of the user. Raises JobError for a shell without completion."""
    name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise JobError(f"--shell: missing, because $SHELL is {name!r}; use {', '.join(SHELLS)}")
    return name


def _script(shell: str) -> str:
    """Return the script of a shell, made by click."""
    from chunkq.cli import cli

    completion_class = get_completion_class(shell)
    if completion_class is None:
        raise JobError(f"--shell: unsupported shell {shell!r}; use {', '.join(SHELLS)}")
    source = completion_class(cli, {}, "chunkq", VARIABLE).source()
    if shell != "zsh":
        return source
    first, _, rest = source.partition("\n")  # `#compdef` must be the first line
    return f"{first}\n{ZSH_SETUP}{rest}"


def _script_path(shell: str) -> Path:
    """Return where the script is written. fish loads it from there; others need a line."""
    if shell == "fish":
        return _config_folder() / "fish" / "completions" / "chunkq.fish"
    return data_folder() / f"completion.{shell}"


def _startup_file(shell: str) -> Path | None:
    """Return the file that a new shell reads, None if it finds the script on its own."""
    if shell == "fish":
        return None
    zsh_folder = os.environ.get("ZDOTDIR", "") if shell == "zsh" else ""
    folder = Path(zsh_folder) if zsh_folder else home_folder()
    return folder / f".{shell}rc"


def _config_folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME", "") or home_folder() / ".config")


def _append_line(file: Path, line: str) -> bool:
    """Append a line to a file unless it has the line; return whether it was appended."""
    text = file.read_text(encoding="utf-8", errors="surrogateescape") if file.exists() else ""
    if line in text.splitlines():
        return False
    with file.open("a", encoding="utf-8") as stream:
        stream.write(f"{'' if not text or text.endswith(chr(10)) else chr(10)}{line}\n")
    return True
