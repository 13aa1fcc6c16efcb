"""What an interrupted run goes on from: weights and optimizer state, by torch.distributed.checkpoint.

Each rank writes its part; any number of ranks reads it, whether the model is divided or
not. Of SET only the k trained weights' masters and moments are kept, since they give the
weights. Of a dense optimizer the trained parameters are kept under their runtime names,
with torch's portable form of its state (Trainer's own checkpoints hold checkpoint names,
and when it resumes it leaves out all that transformers has fused or renamed).
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from safecrit import distributed
from safecrit.errors import MismatchError, SafecritError
from safecrit.placement import local
from safecrit.sparse import SparseAdamW

_FOLDER = "state"
GO_ON = "Free disk space; the same command then goes on from the last whole checkpoint."
_STEPS, _MASK, _KINDS = "steps", "mask", ("master", "exp_avg", "exp_avg_sq")


def save_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write `folder`/state; all ranks call it. SafecritError where it cannot be written."""
    state = _sparse(optimizer) if isinstance(optimizer, SparseAdamW) else _dense(model, optimizer)
    target = folder / _FOLDER
    _guarded(lambda: save(state, checkpoint_id=target, no_dist=_alone()), f"{target}: cannot be written", GO_ON)


def load_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Continue from `folder`/state, weights and optimizer, in place; all ranks call it.

    Raises MismatchError where it is of another mask, SafecritError where it is of other weights or cannot be read.
    """
    target = folder / _FOLDER
    if not (target / ".metadata").is_file():
        raise SafecritError(f"{target}: is no saved state of this version. Remove {folder} to restart.")
    failed = f"{target}: is of another run, or broken. Remove {folder.parent} to restart"
    try:
        saved = FileSystemReader(target).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise SafecritError(f"{failed} ({_said(error)}).") from error
    if isinstance(optimizer, SparseAdamW):
        _load_sparse(target, saved, optimizer, failed)
        return
    state = _dense(model, optimizer)
    states = state["optimizer"]["state"]
    for name in list(states):  # torch makes one for all; a parameter that never got a gradient had none to save
        if f"weights.{name}" in saved and not any(key.startswith(f"optimizer.state.{name}.") for key in saved):
            del states[name]
    _guarded(lambda: load(state, checkpoint_id=target, no_dist=_alone()), failed)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(strict=False))


def _alone() -> bool:
    return distributed.processes() == 1


def _guarded(do: Callable[[], Any], message: str, advice: str = "") -> None:
    """Run a function of torch.distributed.checkpoint, whose errors are those of any rank, in a class of its own."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # one that a killed run began
            do()
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        where = f" on rank {rank}" if distributed.processes() > 1 else ""
        raise SafecritError(f"{message} ({_said(cause, where)}). {advice}".strip()) from None


def _said(error: BaseException, where: str = "") -> str:
    return f"{type(error).__name__}{where}: {(str(error).splitlines() or [''])[0][:200]}"


def _dense(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"weights": trained, "optimizer": get_optimizer_state_dict(model, optimizer)}


def _digest(optimizer: SparseAdamW) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(optimizer.param_groups[0]["mask"]), dtype=torch.uint8)


def _sparse(optimizer: SparseAdamW) -> dict[str, Any]:
    """The state by parameter, kind, and number of selected entries on lower ranks: `NAME/master/0` and so on."""
    steps, found = [], {}
    for name, _, before, parameter in optimizer.placed():
        state = optimizer.state[parameter]
        steps.append(state.get("step", 0))
        for kind in _KINDS if state else ():
            if len(state[kind]):
                found[f"{name}/{kind}/{before}"] = state[kind]
    return {_STEPS: torch.tensor(steps), _MASK: _digest(optimizer), **found}


def _load_sparse(target: Path, sizes: Mapping[str, Any], optimizer: SparseAdamW, failed: str) -> None:
    """Each rank reads the pieces that its entries lie in; the weights are the masters, rounded."""
    optimizer.attach()
    own = list(optimizer.placed())
    head = {_STEPS: torch.empty(len(own), dtype=torch.int64), _MASK: _digest(optimizer).clone()}
    if any(key not in sizes or sizes[key].size != values.shape for key, values in head.items()):
        raise SafecritError(f"{failed}.")
    _guarded(lambda: load(head, checkpoint_id=target, no_dist=True), failed)
    if not torch.equal(head[_MASK], _digest(optimizer)):
        raise MismatchError(f"{target}: is of another mask. Resume with the mask that it was saved under.")
    pieces: dict[str, list[tuple[int, int, str]]] = {}
    for key, entry in sizes.items():
        if "/" in key:
            kind, _, first = key.rpartition("/")
            pieces.setdefault(kind, []).append((int(first), int(first) + entry.size[0], key))
    found: dict[str, torch.Tensor] = {}
    for name, indices, before, _ in own:
        for start, stop, key in (piece for kind in _KINDS for piece in pieces.get(f"{name}/{kind}", [])):
            if start < before + len(indices) and stop > before:
                found[key] = torch.empty(stop - start)
    _guarded(lambda: load(found, checkpoint_id=target, no_dist=True), failed)
    for (name, indices, before, parameter), step in zip(own, head[_STEPS].tolist(), strict=True):
        if not step:
            continue
        state = optimizer.state[parameter]
        state["step"] = step
        for kind in _KINDS:
            state[kind] = torch.full((len(indices),), torch.nan)
            for start, stop, key in pieces.get(f"{name}/{kind}", []):
                a, b = max(start, before), min(stop, before + len(indices))
                if a < b:
                    state[kind][a - before : b - before] = found[key][a - start : b - start]
            if bool(state[kind].isnan().any()):
                raise SafecritError(f"{failed}.")
            state[kind] = state[kind].to(indices.device)
        entries = local(parameter).view(-1)
        entries[indices.long()] = state["master"].to(entries.dtype)
