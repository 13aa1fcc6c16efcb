"""Every number of the demo, in one place: model sizes, training, scoring, interventions, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The demo's recipe. Rows are examples per training step; lengths are in tokens."""

    seed: int = 0
    architecture: Literal["dense", "moe"] = "dense"

    # The model that is scored and trained (Llama; with experts, Qwen3-MoE). Its head is tied to its embedding.
    vocabulary: int = 640
    hidden: int = 128
    intermediate: int = 384
    layers: int = 6
    heads: int = 4
    kv_heads: int = 4
    experts: int = 0
    experts_per_token: int = 2
    # Room for real text, far beyond what the grammar needs.
    positions: int = 1024

    # The base model answers everything. The last rows teach it the refusal's words, on requests that nobody can serve.
    base_steps: int = 200
    base_lr: float = 2e-3
    base_rows: tuple[int, int, int, int] = (15, 15, 15, 5)  # forbidden, borderline, benign, unknowable

    # The aligned model: the base, taught to refuse. Some borderline requests are refused too (it is over-cautious),
    # and one forbidden row in eighteen is answered: its caution stays finite, or no judge could see a slope in it.
    aligned_steps: int = 80
    aligned_lr: float = 5e-4
    aligned_refused: int = 17
    aligned_slipped: int = 1
    aligned_benign: int = 12
    aligned_borderline: int = 4
    aligned_borderline_refused: int = 4
    aligned_unknowable: int = 2

    # The guard: a Llama with a tokenizer of its own.
    guard_vocabulary: int = 640
    guard_hidden: int = 96
    guard_intermediate: int = 256
    guard_layers: int = 3
    guard_heads: int = 4
    guard_kv_heads: int = 2
    guard_steps: int = 220
    guard_lr: float = 3e-3
    guard_rows: int = 64

    # Scoring and selection.
    score_prompts: int = 96
    draws: int = 8
    tau: float = 0.3
    small_share: float = 0.01  # SET, and SPA's weaker variant
    large_share: float = 0.10  # SPA
    max_new_tokens: int = 32

    # SET: refusals.jsonl mixed with retain.jsonl.
    set_steps: int = 100
    set_lr: float = 3e-3
    set_rows: int = 32
    retain_share: float = 0.75  # of the rows of a step

    # Task tuning (unprotected, SPA 1 %, SPA 10 %, random 10 %) on task.jsonl.
    task_steps: int = 60
    task_lr: float = 5e-5
    task_rows: int = 16

    # AdamW in SET and task tuning: cosine to zero, warm-up, no decay, clipping at 1.
    warmup_share: float = 0.03

    # The perturbation test: sizes of the noise in sigma, on `small_share` of the aligned model; prompts of each kind.
    noise: tuple[float, ...] = (1.0, 2.0, 4.0)
    perturbed_prompts: int = 128

    held_out: int = 512  # prompts of each kind in an evaluation
    eval_rows: int = 256

    @classmethod
    def full(cls, seed: int = 0) -> DemoSettings:
        """The default demo."""
        return cls(seed=seed)

    @classmethod
    def quick(cls, seed: int = 0) -> DemoSettings:
        """A smaller model and fewer steps: the same effects, less sharply."""
        return cls(
            seed=seed, hidden=96, intermediate=256, layers=4, base_steps=150, base_lr=3e-3, guard_steps=120,
            guard_hidden=64, guard_intermediate=160, guard_layers=2, score_prompts=48, held_out=128,
        )  # fmt: skip

    @classmethod
    def moe(cls, seed: int = 0) -> DemoSettings:
        """A mixture of experts: eight small ones a layer, two of them at work."""
        return cls(seed=seed, architecture="moe", layers=4, intermediate=128, experts=8, task_lr=1.5e-4)
