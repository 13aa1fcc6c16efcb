"""The command line: one file a command. Nothing heavy is imported before a command runs, so `--help` is instant."""

from __future__ import annotations

import os
import sys
import traceback

INTERRUPTED = 130


def main() -> None:
    """Run the command line; known errors become one message and their exit code.

    As one rank of several, rank 0 alone prints, and what fails on any of them ends all, with one message.
    """
    from safecrit import faults
    from safecrit.cli.app import app
    from safecrit.cli.sink import report_error
    from safecrit.errors import SafecritError

    debug = "--debug" in sys.argv
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if faults.launched() and not debug:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DistributedDataParallel's advice, from every rank
    if faults.launched() and os.environ["RANK"] != "0" and not debug:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    try:
        try:
            app()
        except SystemExit as end:
            if not end.code and faults.watching():
                from safecrit import distributed

                distributed.finish()
            if end.code == INTERRUPTED:  # Typer's way to pass Ctrl-C on
                sys.stderr.write("\ninterrupted: finished files are whole; run the same command again to go on.\n")
                if faults.watching():
                    faults.end("", INTERRUPTED)  # threads that wait for other ranks outlive no usual exit
            raise
    except SafecritError as error:
        if debug:
            traceback.print_exc()
        if not error.exit_code:
            sys.stderr.write(f"{error}\n")
        elif faults.watching():
            faults.fail(error, str(error), error.exit_code)
        else:
            report_error(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if not faults.watching():
            raise
        faults.fail(error, f"{error}\n{traceback.format_exc()}", 1)
