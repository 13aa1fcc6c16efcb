"""Run by torchrun: several command lines, given as JSON, one after another in one process group."""

from __future__ import annotations

import json
import os
import sys

from safecrit import distributed
from safecrit.cli.app import app


def main() -> None:
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    distributed.start(60)
    for command in json.loads(sys.argv[1]):
        app(command, standalone_mode=False)
    distributed.finish()


if __name__ == "__main__":
    main()
