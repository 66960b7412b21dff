"""Process of the `chunkq` command, also run as `python -m chunkq`."""

import gc
import sys

from chunkq.system.interrupts import end_on_signals, raise_on_signals


def run() -> int:
    """Run the command and return its exit code, with which the process then ends.

    Freezing all objects spares the interpreter's end a search for unreachable ones. It takes an
    eighth of the time of short commands.
    """
    raise_on_signals()
    try:
        from chunkq.cli import main  # after the handlers are set

        code = main()
    except KeyboardInterrupt:
        from chunkq.errors import InterruptedCommandError

        sys.stderr.write(f"chunkq: interrupted [{InterruptedCommandError.code}]\n")
        code = InterruptedCommandError.exit_code
    end_on_signals(code)
    gc.freeze()
    # If Ctrl-C came while Python executed a string, as it does to define a dataclass, it would end
    # `python -m` by a signal in place of the exit code. The next string makes it forget that.
    exec("")
    return code


if __name__ == "__main__":
    sys.exit(run())
