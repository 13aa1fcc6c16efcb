"""What this machine and installation can do: versions, devices, backends with reasons, every op checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from safecrit import ops
from safecrit.outputs import environment
from safecrit.strided import Strided


@dataclass(frozen=True)
class OpCheck:
    """One op on one backend: `ok` where it agrees with the reference; `detail` says on what, or what went wrong."""

    op: str
    backend: str
    ok: bool
    detail: str


def facts() -> list[tuple[str, str]]:
    """Versions and devices, as (name, value)."""
    about = environment()
    found = [("python", about["python"]), ("platform", about["platform"]), *about["versions"].items()]
    found.append(("cores", str(os.cpu_count())))
    found.append(("torch threads", str(torch.get_num_threads())))
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found.append((f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"))
    if not torch.cuda.is_available():
        found.append(("cuda", "none: everything runs on the CPU"))
    found.append(("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"))
    return found


def check_ops() -> list[OpCheck]:
    """Run every usable backend of every op on a small odd-sized input and compare it with the reference."""
    checks = []
    for row in ops.backends():
        if not row.available or row.op not in _CHECKS:
            continue
        device = torch.device("cuda" if row.backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu")
        try:
            wrong = _CHECKS[row.op](row.backend, device)
        except (RuntimeError, ValueError) as error:
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        checks.append(
            OpCheck(row.op, row.backend, wrong is None, wrong or f"agrees with the reference on {device.type}")
        )
    return checks


def _made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _differ(name: str, ours: torch.Tensor, reference: torch.Tensor, bound: float) -> str | None:
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    if ours.shape != reference.shape:
        return f"{name}: shape {tuple(ours.shape)} instead of {tuple(reference.shape)}"
    worst = float((ours - reference).abs().max()) if ours.numel() else 0.0
    return None if worst <= bound else f"{name}: differs from the reference by {worst:.2g}, allowed {bound:.2g}"


def _esi_accumulate(backend: str, device: torch.device) -> str | None:
    grad = _made(37, 129).bfloat16()
    grad[3, 5] = torch.nan
    results = []
    for name, place in ((backend, device), ("reference", torch.device("cpu"))):
        acc = _made(37, 129, seed=1).to(place)
        bad = ops.esi_accumulate_(acc, grad.to(place), 0.02, "signed", backend=name)  # type: ignore[arg-type]
        results.append((acc, bad))
    if results[0][1] != 1:
        return f"counted {results[0][1]} non-finite entries, there is 1"
    return _differ("sum", results[0][0], results[1][0], 1e-6)


def _matrix_std(backend: str, device: torch.device) -> str | None:
    parts = [Strided(0, (24, 5), (35, 1)), Strided(5, (24, 30), (35, 1))]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = (_made(24, 35) + 3).to(dtype)
        ours = ops.matrix_std(weight.to(device), parts, backend=backend)  # type: ignore[arg-type]
        expected = torch.stack([weight[:, :5].double().std(), weight[:, 5:].double().std()])
        if wrong := _differ(f"std of {dtype}", ours, expected, 1e-12):
            return wrong
    return None


def _select_top(backend: str, device: torch.device) -> str | None:
    scores = [_made(1001), _made(57, 11, seed=1)]
    found = ops.select_top([score.to(device) for score in scores], 100, backend=backend)  # type: ignore[arg-type]
    flat = torch.cat([score.reshape(-1).abs() for score in scores])
    expected = torch.sort(flat, descending=True, stable=True).indices[:100].sort().values
    chosen = torch.cat([found.indices[0].cpu(), found.indices[1].cpu() + 1001])
    return None if torch.equal(chosen, expected) else "selected other entries than a full sort"


def _rank_counts(backend: str, device: torch.device) -> str | None:
    scores = [_made(1001), _made(57, 11, seed=1)]
    ours = ops.rank_counts([score.to(device) for score in scores], backend=backend)  # type: ignore[arg-type]
    expected = ops.rank_counts(scores, backend="reference")
    return None if torch.equal(ours, expected) else "counted otherwise than the reference"


def _select_random(backend: str, device: torch.device) -> str | None:
    ours = ops.select_random([1001, 627], 100, 7, backend=backend)  # type: ignore[arg-type]
    expected = ops.select_random([1001, 627], 100, 7, backend="reference")
    same = all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    return None if same else "selected other entries than the reference"


def _gather(backend: str, device: torch.device) -> str | None:
    values, indices = _made(1001), torch.arange(0, 1001, 3)
    out = torch.ones(len(indices), device=device)
    ops.gather_(out, values.to(device), indices.to(device), add=True, backend=backend)  # type: ignore[arg-type]
    return _differ("out", out, 1 + values[indices], 0.0)


def _adamw(backend: str, device: torch.device, *, masked: bool) -> str | None:
    weight, grad = _made(513), _made(513, seed=1)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    stepped = torch.nn.Parameter(weight.clone())
    stepped.grad = grad.clone()
    torch.optim.AdamW([stepped], **settings).step()
    settings |= {"step": 1, "backend": backend}
    selected, ours = torch.arange(0, 513, 3), weight.clone().to(device)
    if masked:
        expected = stepped.detach().clone()
        expected[selected] = weight[selected]
        bits = ops.bits_from_indices(selected, 513).to(device)
        zeros = torch.zeros_like(ours)
        ops.masked_adamw_(ours, grad.to(device), zeros, zeros.clone(), bits, **settings)
    else:
        expected = weight.clone()
        expected[selected] = stepped.detach()[selected]
        some, master = grad[selected].to(device), weight[selected].to(device)
        zeros = torch.zeros_like(some)
        ops.sparse_adamw_(ours, selected.to(device), some, master, zeros, zeros.clone(), **settings)
    kept = expected == weight
    if not torch.equal(ours.cpu()[kept], weight[kept]):
        return "an entry moved that must not"
    return _differ("weight", ours, expected, 1e-6)


def _bits(backend: str, device: torch.device) -> str | None:
    indices = torch.tensor([0, 3, 7, 8, 1000])
    bits = ops.bits_from_indices(indices, 1001, backend=backend)  # type: ignore[arg-type]
    again = ops.indices_from_bits(bits, 1001, backend=backend)  # type: ignore[arg-type]
    return None if torch.equal(again, indices) else "indices did not survive the round trip"


_CHECKS: dict[str, Callable[[str, torch.device], str | None]] = {
    "esi_accumulate_": _esi_accumulate,
    "matrix_std": _matrix_std,
    "select_top": _select_top,
    "rank_counts": _rank_counts,
    "select_random": _select_random,
    "gather_": _gather,
    "sparse_adamw_": lambda backend, device: _adamw(backend, device, masked=False),
    "masked_adamw_": lambda backend, device: _adamw(backend, device, masked=True),
    "bits_from_indices": _bits,
    "indices_from_bits": _bits,
}
