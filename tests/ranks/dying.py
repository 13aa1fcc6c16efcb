"""Run by torchrun: `score`, `set` or `spa`, on a rank of which something goes wrong at a certain batch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from safecrit import scoring
from safecrit.cli import main

inner, calls = scoring.forward_logits, []


def fail(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "hang":
        threading.Event().wait()
    elif how == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory")
    raise ArithmeticError("it went wrong")


def disturbed(*arguments: Any) -> Any:
    calls.append(1)
    if len(calls) == int(at):
        fail(how)
    return inner(*arguments)


if __name__ == "__main__":
    rank, at, how, *command = sys.argv[1:]
    if os.environ["RANK"] == rank:
        if command[0] in ("set", "spa"):
            from safecrit.trainloop import _Trainer

            inner, _Trainer.training_step = _Trainer.training_step, lambda *a: disturbed(*a)
        else:
            scoring.forward_logits = disturbed
    sys.argv = ["safecrit", *command]
    main()
