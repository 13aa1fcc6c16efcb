"""The golden files and the values they hold. After a version change, `python -m tests.golden.make` writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from safecrit.delta import Delta, TensorDelta
from safecrit.layout import Matrix, TensorLayout
from safecrit.maskfile import Mask, MaskInfo
from safecrit.scorefile import write_scores
from safecrit.strided import Strided

HERE = Path(__file__).resolve().parent
EMBEDDING, DOWN, FUSED = "embed.weight", "layers.0.down.weight", "layers.0.qkv.weight"


def layouts() -> dict[str, TensorLayout]:
    """A plain matrix, a fused one of two patterns, and an embedding that is not eligible."""
    fused = tuple(Matrix(part, 0, None, Strided(3 * i, (4, 3), (6, 1))) for i, part in enumerate("qk"))
    return {
        EMBEDDING: TensorLayout((5, 4), (Matrix("embedding", None, None, Strided.whole((5, 4))),), False, "embedding"),
        DOWN: TensorLayout((10, 10), (Matrix("down", 0, 2, Strided.whole((10, 10))),), True),
        FUSED: TensorLayout((4, 6), fused, True),
    }


def mask() -> Mask:
    """Indices are smaller for one tensor (2 x 4 bytes against 13), bits for the other (3 against 11 x 4)."""
    info = MaskInfo(
        tensors=layouts(),
        mode="top",
        total=144,
        eligible=124,
        share=0.1,
        threshold_bits=0x3F800000,
        tied=3,
        tied_selected=2,
        fingerprint="sha256:" + "0" * 64,
        model="tiny",
        scoring={"method": "esi", "draws": 8},
        prompt_hashes=["0123456789abcdef"],
    )
    indices = {DOWN: torch.tensor([7, 99]), FUSED: torch.tensor([0, 1, 2, 3, 5, 8, 13, 21, 22, 23])}
    return Mask(indices, info)


def scores() -> dict[str, torch.Tensor]:
    """Multiples of 1/8, exact in every dtype."""
    return {
        DOWN: (torch.arange(100, dtype=torch.float32).reshape(10, 10) - 50) / 8,
        FUSED: (12 - torch.arange(24, dtype=torch.float32).reshape(4, 6)) / 8,
    }


def score_info() -> dict[str, object]:
    """As little of score.json as there must be."""
    return {"model": {"id": "tiny", "revision": None, "fingerprint": "sha256:" + "0" * 64}, "method": "esi"}


def delta() -> Delta:
    """A bfloat16 tensor and a float32 one."""
    half, full = torch.tensor([1.5, -0.0], dtype=torch.bfloat16), torch.tensor([0.25])
    return Delta(
        base="sha256:" + "1" * 64,
        result="sha256:" + "2" * 64,
        tensors={
            DOWN: TensorDelta((10, 10), torch.tensor([7, 99]), half, half.flip(0)),
            FUSED: TensorDelta((4, 6), torch.tensor([23]), full, -full),
        },
        info={"mode": "set"},
    )


def write(folder: Path) -> None:
    """All golden files, into `folder`."""
    mask().save(folder / "mask.safetensors")
    mask().save(folder / "sharded" / "mask.safetensors", shard_bytes=8)
    write_scores(folder / "scores", scores().items(), layouts(), score_info(), torch.bfloat16, shard_bytes=200)
    delta().save(folder / "delta.safetensors")


if __name__ == "__main__":
    write(HERE)
