"""Peak memory of scoring on the CPU, measured in a fresh process for each case, against safecrit.account.

Llamas of about 0.1 B and 0.3 B parameters with random weights and a small guard are made on the spot. The
resident set's high-water mark (VmHWM, which /proc/self/clear_refs resets) is read in every phase; the
activations are also measured alone: the peak of the same forward and backward with all weights frozen but one
bias. The bound of the last line: 1.1 x (model + judge + 4 bytes a score + largest gradient + those activations
+ the relaxation's buffers). Loaded weights are mapped files, so they show when they are first used, not when loaded.
The whole process is what `--dry-run` foretells, the libraries' own memory included. The model is scored twice and
the second time is measured, as some of that memory is taken when a kernel is first used.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from safecrit.account import LIBRARIES

SIZES = {"0.1B": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048, "heads": 12}}
SIZES["0.3B"] = {"hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 3584, "heads": 16}
GUARD = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "heads": 4}
PROMPTS, ANSWER_TOKENS, DRAWS, WORDS = 4, 48, 2, 16000
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}verdict: "


def make_tokenizer(words: int = WORDS) -> Any:
    """A byte-level BPE of about `words` tokens: the bytes, pairs of letters, and words of two such pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = list(itertools.product(LETTERS, LETTERS))
    pairs = ["".join(merge) for merge in merges]
    longer = itertools.islice(itertools.product(pairs, pairs), 0, None, 7)
    merges += list(itertools.islice(longer, words - len(pieces) - len(pairs)))
    pieces += ["".join(merge) for merge in merges]
    core = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


def make_model(folder: Path, sizes: dict[str, int], dtype: str, tokenizer: Any, device: str = "cpu") -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    given: dict[str, Any] = {name: size for name, size in sizes.items() if name != "heads"}
    config = LlamaConfig(
        **given,
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"] // 4,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resident(field: str = "VmRSS") -> int:
    """Bytes; VmHWM is the most since the last `reset`."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field + ":"))


def reset() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Peaks:
    """A reporter of progress that notes the high-water mark of every stage."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.stage = ""

    def __call__(self, what: str, unit: str) -> Any:  # noqa: D102
        self.stage = what
        return self

    def __enter__(self) -> Any:
        from safecrit.progress import quiet_reporter

        reset()
        return quiet_reporter(self.stage, "")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.found[self.stage] = resident("VmHWM")


def frozen_pass(model: Any, items: list[Any], checkpointing: bool) -> int:
    """Peak of a forward and backward pass in which one bias of the first layer alone needs a gradient, bytes."""
    from safecrit.activations import checkpointed
    from safecrit.scoring import forward_logits

    model.requires_grad_(False)
    bias = model.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
    for measured in (False, True):
        reset()
        before = resident()
        with checkpointed(model, checkpointing):
            logits, _ = forward_logits(model, items)
            logits.backward(logits.detach())
        del logits
        bias.grad = None
        if measured:
            return resident("VmHWM") - before
    raise AssertionError


def child(root: Path, mode: str) -> dict[str, Any]:
    """Score in this process; bytes by phase, and what the account says."""
    import torch
    import transformers  # noqa: F401

    import safecrit.api.score as api
    from safecrit.account import PHASES, ScorePlan, score_account
    from safecrit.api.judging import JudgeChoice, load_differentiable
    from safecrit.api.scorejob import ScoreJob, ScoreSettings
    from safecrit.chat import encode_prompt
    from safecrit.estimators import Item
    from safecrit.generation import GenerationSettings
    from safecrit.metamodel import read_shape
    from safecrit.models import LoadedModel, load_model
    from safecrit.prompts import prompts_from_texts
    from safecrit.relaxation import CHUNK_BYTES, RelaxationSettings

    guard_choice = JudgeChoice(name=str(root / "guard"), device="cpu")
    texts = [" ".join(LETTERS[n + k] * 4 for k in range(30)) for n in range(PROMPTS)]
    prompts = prompts_from_texts(texts)

    def job_of(loaded: LoadedModel) -> ScoreJob:
        return ScoreJob(
            model=loaded.id,
            judge=guard_choice,
            prompts="",
            generation=GenerationSettings(max_new_tokens=ANSWER_TOKENS, batch_size=PROMPTS),
            scoring=ScoreSettings(
                relaxation=RelaxationSettings(draws=DRAWS),
                batch_size=PROMPTS,
                judge_batch_size=PROMPTS * DRAWS,
                placement="together",
                accumulate_on="device",
                checkpoint=mode,
            ),
        )

    # Scored once before: all libraries are loaded then, oneDNN has compiled its kernels for these shapes (some
    # 100 MiB of code for bfloat16), and all that hangs on the tokenizer is made.
    warm = load_model(str(root / "model"), device="cpu")
    api.score_loaded(warm, load_differentiable(guard_choice), prompts, job_of(warm), root / f"warm-{mode}")
    del warm
    reset()
    base = resident()
    loaded = load_model(str(root / "model"), device="cpu")
    judge = load_differentiable(guard_choice)
    load = resident("VmHWM") - base
    weights = resident() - base
    encoded = [encode_prompt(loaded.tokenizer, list(prompt.messages)) for prompt in prompts]
    items = [
        Item(prompt_ids=tuple(ids), answer_ids=tuple(range(300, 300 + ANSWER_TOKENS)), prompt="", hash="", row=row)
        for row, ids in enumerate(encoded)
    ]
    activations = frozen_pass(loaded.model, items, mode == "on")
    peaks = Peaks()
    api.score_loaded(loaded, judge, prompts, job_of(loaded), root / f"scores-{mode}", peaks)
    model, guard = read_shape(root / "model"), read_shape(root / "guard")
    longest = max(map(len, encoded))
    account = score_account(
        model,
        guard,
        ScorePlan(
            prompts=PROMPTS,
            prompt_tokens=longest,
            answer_tokens=ANSWER_TOKENS,
            judge_tokens=longest + ANSWER_TOKENS,
            mean_prompt_tokens=longest,
            mean_judge_tokens=longest + ANSWER_TOKENS,
            batch_size=PROMPTS,
            judge_batch_size=PROMPTS * DRAWS,
            draws=DRAWS,
            itemsize=model.itemsize,
            judge_itemsize=guard.itemsize,
            checkpointed=mode,  # type: ignore[arg-type]
            cpu=True,
            chunk_bytes=CHUNK_BYTES,
        ),
    )
    parts = {part.name: part.bytes for part in account.parts if part.place == "host"}
    own = {phase: account.in_phase("host", phase) - parts["libraries"] for phase in PHASES}
    bound = activations + sum(
        parts[name]
        for name in (
            "model weights",
            "judge weights",
            "accumulators",
            "largest weight gradient",
            "float32 buffers over the vocabulary",
        )
    )
    return {
        "parameters": model.parameters,
        "libraries": base,
        "parts": parts,
        "measured": {
            "load": load,
            "weights": weights,
            "frozen pass": activations,
            "answer": peaks.found["answering"] - base,
            "score": peaks.found["scoring"] - base,
        },
        "predicted": {
            "load": own["load"],
            "weights": parts["model weights"] + parts["judge weights"],
            "frozen pass": frozen_prediction(model, longest + ANSWER_TOKENS, mode),
            "answer": own["answer"],
            "score": max(own["score.model"], own["score.judge"]),
        },
        "bound": 1.1 * bound,
        "torch": torch.__version__,
    }


def frozen_prediction(model: Any, tokens: int, mode: str) -> int:
    from safecrit.metamodel import activation_bytes

    kept = activation_bytes(
        model, PROMPTS, tokens, model.itemsize, checkpointed=mode == "on", weights_require_grad=False
    )
    return int(kept + PROMPTS * ANSWER_TOKENS * model.vocabulary * model.itemsize)


def run_case(root: Path, mode: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(root), "--checkpointing", mode]
    # glibc otherwise keeps freed blocks of up to 32 MiB, and the resident set shows what was, not what is.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **malloc})
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def whole_process(found: dict[str, Any]) -> tuple[int, int]:
    """Peak of the process over all phases, bytes: measured, and the account's."""
    phases = ("answer", "score")
    measured, foretold = (max(found[side][phase] for phase in phases) for side in ("measured", "predicted"))
    return found["libraries"] + measured, LIBRARIES + foretold


def show(size: str, dtype: str, mode: str, found: dict[str, Any]) -> None:
    print(f"\n{size} ({found['parameters']:,} weights), {dtype}, checkpointed layers {mode}")
    print(f"{'':24}{'measured MiB':>14}{'account MiB':>14}{'ratio':>8}")
    for name, measured in found["measured"].items():
        predicted = found["predicted"][name]
        print(f"{name:24}{measured / 2**20:14.0f}{predicted / 2**20:14.0f}{measured / predicted:8.2f}")
    whole, foretold = whole_process(found)
    print(f"{'whole process':24}{whole / 2**20:14.0f}{foretold / 2**20:14.0f}{whole / foretold:8.2f}")
    score, bound = found["measured"]["score"], found["bound"]
    word = "kept" if score <= bound else "BROKEN"
    print(f"{'bound':24}{score / 2**20:14.0f}{bound / 2**20:14.0f}{score / bound:8.2f}  {word}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", default="off", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=list(SIZES), help="one size only")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="one dtype only")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(child(options.child, options.checkpointing)))
        return
    cases = []
    from timing import write

    tokenizer = make_tokenizer()
    for size, dtype in itertools.product(SIZES, ("bfloat16", "float32")):
        if options.size not in (None, size) or options.dtype not in (None, dtype):
            continue
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder) / "model", SIZES[size], dtype, tokenizer)
            make_model(Path(folder) / "guard", GUARD, dtype, tokenizer)
            for mode in ("off", "on"):
                found = run_case(Path(folder), mode)
                show(size, dtype, mode, found)
                whole, foretold = whole_process(found)
                case = {"size": size, "dtype": dtype, "checkpointing": mode, "whole": whole, "foretold": foretold}
                cases.append(case | found)
    if options.save:
        print(write("score-memory", "cpu", cases=cases))


if __name__ == "__main__":
    main()
