"""The command line: one file a command. Nothing heavy is imported before a command runs, so `--help` is instant."""

from __future__ import annotations

import os
import sys
import traceback

INTERRUPTED = 130


def main() -> None:
    """Run the command line; known errors become one message and their exit code."""
    from safecrit.cli.app import app
    from safecrit.cli.sink import report_error
    from safecrit.errors import SafecritError

    debug = "--debug" in sys.argv
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Typer's way to pass Ctrl-C on
            sys.stderr.write("\ninterrupted: finished files are whole; run the same command again to go on.\n")
        raise
    except SafecritError as error:
        if debug:
            traceback.print_exc()
        if error.exit_code:
            report_error(str(error))
        else:
            sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
