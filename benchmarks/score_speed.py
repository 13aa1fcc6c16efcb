"""What scoring costs on the CPU: the accumulating hooks, and the whole of `score` against a plain loop.

A Llama of 97 M float32 weights and a guard of 19 M are made on the spot, with random weights; prompts
and answers have about 64 tokens each. The plain loop is what one writes first: one prompt at a time, answered
greedily; for every draw a forward through model, relaxation and guard and a backward through all three, every
gradient kept; then sigma times each of them is added up. A second loop takes all draws of a prompt through the
guard in one batch, with one backward. Loops and `score` must agree on the sums before they are timed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from bandwidth import bandwidth
from score_memory import make_model, make_tokenizer
from timing import machine, write

from safecrit.anatomy import read_anatomy
from safecrit.api.judging import JudgeChoice, load_differentiable
from safecrit.api.score import score_loaded
from safecrit.api.scorejob import ScoreJob, ScoreSettings
from safecrit.chat import encode_prompt
from safecrit.estimators import Item, RelaxedEstimator
from safecrit.generation import GenerationSettings, generate
from safecrit.gradients import GradientStream
from safecrit.judges.presets import GuardOptions
from safecrit.models import LoadedModel, load_model
from safecrit.prompts import Prompt, prompts_from_texts
from safecrit.relaxation import RelaxationSettings, noise_seed
from safecrit.scoring import Scorer

MODEL = {"hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 1952, "heads": 12}
GUARD = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "heads": 4}
WORDS, TOKENS, DRAWS, BATCH = 32000, 64, 8, 16


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def spread(times: list[float]) -> dict[str, float]:
    cuts = quantiles(times, n=5, method="inclusive")
    return {"median": median(times), "p20": cuts[0], "p80": cuts[-1]}


# -- the hooks --------------------------------------------------------------------------------------------------------


def hook_cost(loaded: LoadedModel, repeats: int) -> dict[str, Any]:
    """Seconds of a backward over 8 x 128 tokens that keeps its gradients, and of one that adds and frees them."""
    model = loaded.model
    anatomy = read_anatomy(model)
    stream = GradientStream(model, anatomy)
    eligible = {entry.parameter for entry in anatomy.eligible}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(300, 16000, (8, 128), generator=generator)
    upstream: torch.Tensor | None = None

    def backward() -> float:
        nonlocal upstream
        logits = model(input_ids=tokens, use_cache=False).logits
        if upstream is None:
            upstream = torch.randn(logits.shape, generator=generator) / 1000
        return seconds(lambda: logits.backward(upstream))

    def plain() -> float:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in eligible)
        spent = backward()
        model.zero_grad()
        return spent

    def hooked() -> float:
        with stream:
            return backward()

    plain(), hooked()
    stream.reset()
    pairs = [(plain(), hooked()) for _ in range(repeats)]
    without, with_ = spread([pair[0] for pair in pairs]), spread([pair[1] for pair in pairs])
    return {
        "weights": sum(entry.layout.numel for entry in anatomy.eligible),
        "plain_s": without,
        "hooked_s": with_,
        "added_s": median(pair[1] - pair[0] for pair in pairs),
        "added_share": median(pair[1] / pair[0] for pair in pairs) - 1,
    }


# -- the whole of score -----------------------------------------------------------------------------------------------


class PlainLoop:
    """One prompt at a time, every gradient kept; the noise is drawn as `score` draws it where `same_noise`."""

    def __init__(self, loaded: LoadedModel, judge: Any, same_noise: bool = False) -> None:
        self.model, self.tokenizer, self.judge, self.same_noise = loaded.model, loaded.tokenizer, judge, same_noise
        self.anatomy = read_anatomy(self.model)
        parameters = dict(self.model.named_parameters())
        self.weights = {entry.name: parameters[entry.parameter] for entry in self.anatomy.eligible}
        self.sigma = {name: float(weight.detach().std()) for name, weight in self.weights.items()}
        self.sums = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.table = judge.model.get_input_embeddings().weight.detach()
        self.dead = torch.tensor(sorted(self.judge.vocabulary.special))
        self.rows = self.model.get_output_embeddings().weight.shape[0]
        eligible = {entry.parameter for entry in self.anatomy.eligible}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in eligible)

    def answer(self, ids: list[int]) -> list[int]:
        """TOKENS tokens, greedily."""
        with torch.no_grad():
            made: Any = self.model.generate(  # type: ignore[operator]
                torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=0
            )
        return list(made[0, len(ids) :].tolist())

    def noise(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """Gumbel noise of all draws, [DRAWS, T, V]."""
        drawn = torch.empty(DRAWS, *shape)
        if self.same_noise:
            for draw in range(DRAWS):
                drawn[draw].uniform_(generator=torch.Generator().manual_seed(noise_seed(0, name, draw)))
        else:
            drawn.uniform_()
        return -torch.log(-torch.log(drawn.clamp_(torch.finfo(torch.float32).tiny, 1 - 2**-24)))

    def gradient(self, prompt: Prompt, ids: list[int], answer: list[int], together: bool) -> None:
        """Add one prompt; its draws one after the other through model and guard, or `together` in one batch."""
        noise = self.noise(prompt.hash, (len(answer), self.rows))
        entry = self.judge.read(prompt.conversation, self.tokenizer.decode(answer), answer)
        embedded = self.table[torch.tensor(entry.ids)]
        before, after = embedded[: entry.answer.start], embedded[entry.answer.stop :]
        for drawn in noise[None] if together else noise[:, None]:
            logits = self.model(torch.tensor([ids + answer]), use_cache=False).logits[0, len(ids) - 1 : -1]
            p = torch.softmax((logits.index_fill(1, self.dead, -torch.inf) + drawn) / 0.3, dim=-1)
            rows = [torch.cat([before, relaxed, after]) for relaxed in p @ self.table]
            verdicts = self.judge.verdicts([entry] * len(rows), rows)
            ((verdicts[:, 0] - verdicts[:, 1]).sum() / DRAWS).backward()
        for name, weight in self.weights.items():
            assert weight.grad is not None
            self.sums[name].add_(weight.grad, alpha=self.sigma[name])
        self.model.zero_grad()


def whole_cost(root: Path, prompts_timed: int, loop_timed: int) -> dict[str, Any]:
    """Prompts a second of `score` and of the plain loop, whole and the gradient pass alone."""
    loaded = load_model(str(root / "model"), device="cpu")
    # Two words of one token each, as real guards have.
    words = GuardOptions(safe_words=("ab",), unsafe_words=("cd",))
    choice = JudgeChoice(name=str(root / "guard"), device="cpu", guard=words)
    judge = load_differentiable(choice)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [
        " ".join(letters[(n + k) % 26] + letters[(n * 7 + k) % 26] for k in range(26)) for n in range(prompts_timed)
    ]
    prompts = prompts_from_texts(texts)
    relaxation = RelaxationSettings(draws=DRAWS)
    generation = GenerationSettings(max_new_tokens=TOKENS, batch_size=BATCH)
    job = ScoreJob(
        model=loaded.id,
        judge=choice,
        prompts="",
        generation=generation,
        scoring=ScoreSettings(relaxation=relaxation, batch_size=BATCH, placement="together", accumulate_on="device"),
    )
    encoded = [encode_prompt(loaded.tokenizer, list(prompt.messages)) for prompt in prompts]
    few = prompts[:BATCH]
    items = [
        Item(prompt_ids=tuple(ids), answer_ids=answer.ids, prompt=prompt.conversation, hash=prompt.hash, row=prompt.row)
        for prompt, ids, answer in zip(
            few, encoded[:BATCH], generate(loaded.model, loaded.tokenizer, few, generation), strict=True
        )
    ]
    estimator = RelaxedEstimator(loaded.model, loaded.tokenizer, judge, relaxation)
    stream = GradientStream(loaded.model, read_anatomy(loaded.model))

    def ours() -> None:
        stream.reset()
        Scorer(loaded.model, estimator, stream, items, batch_size=BATCH).run()

    ours()
    loop = PlainLoop(loaded, judge, same_noise=True)
    for n, (item, prompt) in enumerate(zip(items, few, strict=True)):
        loop.gradient(prompt, list(item.prompt_ids), list(item.answer_ids), together=n % 2 == 0)
    apart = sum(float((stream.accumulators[n] - sums).double().square().sum()) for n, sums in loop.sums.items())
    size = sum(float(sums.double().square().sum()) for sums in loop.sums.values())
    if not (apart / size) ** 0.5 < 1e-5:
        raise SystemExit(f"score and the plain loop differ by {(apart / size) ** 0.5:.1e}")
    ours_gradient = [seconds(ours) / BATCH for _ in range(3)]
    loop = PlainLoop(loaded, judge)
    times: dict[str, list[float]] = {name: [] for name in ("answer", "together", "one by one")}
    for prompt, ids in zip(prompts[:loop_timed], encoded, strict=False):
        start = time.perf_counter()
        answer = loop.answer(ids)
        times["answer"].append(time.perf_counter() - start)
        for name in ("together", "one by one"):
            times[name].append(seconds(partial(loop.gradient, prompt, ids, answer, name == "together")))
    runs = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            one = partial(score_loaded, loaded, judge, prompts, job, Path(folder))
            runs.append(seconds(one) / prompts_timed)
    whole = {
        name: [a + g for a, g in zip(times["answer"], times[name], strict=True)] for name in times if name != "answer"
    }
    return {
        "model_weights": sum(p.numel() for p in loaded.model.parameters()),
        "guard_weights": sum(p.numel() for p in judge.model.parameters()),
        "prompt_tokens": sum(map(len, encoded)) / len(encoded),
        "difference": (apart / size) ** 0.5,
        "seconds_a_prompt": {
            "score": spread(runs),
            "score, gradient pass": spread(ours_gradient),
            "loop, answer": spread(times["answer"]),
            "loop, draws one by one, gradient pass": spread(times["one by one"]),
            "loop, draws together, gradient pass": spread(times["together"]),
        },
        "times_faster": {
            "than draws one by one": median(whole["one by one"]) / median(runs),
            "than draws together": median(whole["together"]) / median(runs),
            "gradient pass, than draws one by one": median(times["one by one"]) / median(ours_gradient),
            "gradient pass, than draws together": median(times["together"]) / median(ours_gradient),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=48, help="prompts of a timed run of score")
    parser.add_argument("--loop-prompts", type=int, default=12, help="prompts of the plain loop")
    parser.add_argument("--repeats", type=int, default=9, help="backwards of each kind")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    copy = bandwidth("cpu", 1 << 27)[0]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(WORDS)
        make_model(Path(folder) / "model", MODEL, "float32", tokenizer)
        make_model(Path(folder) / "guard", GUARD, "float32", tokenizer)
        hooks = hook_cost(load_model(str(Path(folder) / "model"), device="cpu"), options.repeats)
        whole = whole_cost(Path(folder), options.prompts, options.loop_prompts)
    hooks["bound_s"] = 1.3 * hooks["weights"] * 10 / (copy.gigabytes_per_second * 1e9)
    print(f"{machine('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"copy {copy.gigabytes_per_second:.1f} GB/s")
    print(json.dumps({"hooks": hooks, "whole": whole}, indent=2))
    if options.save:
        print(
            write("score-speed", "cpu", copy_gigabytes_per_second=copy.gigabytes_per_second, hooks=hooks, whole=whole)
        )


if __name__ == "__main__":
    main()
