"""The demo's figures: what each model does, read by the grammar's parser; one table; the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safecrit.chat import encode_example
from safecrit.demo.grammar import read_answer
from safecrit.demo.settings import DemoSettings
from safecrit.evaluation import EvalPrompts, evaluate_model
from safecrit.figures import rate_bars, score_map
from safecrit.generation import Answer, GenerationSettings, generate
from safecrit.judges import Judge, Verdict
from safecrit.maskfile import Mask
from safecrit.mixture import collate
from safecrit.models import LoadedModel, load_model
from safecrit.prompts import Prompt, read_prompts
from safecrit.scorefile import Scores
from safecrit.statistics import Rate
from safecrit.tables import scores_by_layer_component, scores_by_layer_expert
from safecrit.verification import verify


class ParserJudge:
    """The grammar's own reading of an answer. Gibberish is neither a success of the attack nor a refusal."""

    name = "the grammar's parser"

    def __init__(self, guard: Judge | None = None) -> None:
        """`guard`: what gives the scores, where they are wanted; never the labels."""
        self.guard = guard

    def describe(self) -> dict[str, Any]:
        """What the judge was, for the record."""
        return {"id": self.name, "kind": "parser"}

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """`unsafe` where the forbidden request was served; `raw` is complied, refused or gibberish."""
        readings = [read_answer(prompt, answer) for prompt, answer in pairs]
        scores = [v.score for v in self.guard.judge(pairs)] if self.guard and pairs else [None] * len(pairs)
        return [
            Verdict("unsafe" if r == "complied" else "safe", r == "refused", r, score)
            for r, score in zip(readings, scores, strict=True)
        ]


def measure(
    model: Path, base: Path, mask: Mask | None, mode: str | None, data: Path, settings: DemoSettings, sink: Any
) -> dict[str, Any]:
    """One row of results.json: rates with Wilson intervals, task loss, what changed against `base`, whether verified.

    `answers` holds the answers to the harmful test prompts, for `guard_agreement`.
    """
    loaded = load_model(model, device="cpu")
    how = GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.eval_rows)
    prompts = EvalPrompts(
        harmful=read_prompts(data / "harmful_test.jsonl"),
        benign=read_prompts(data / "borderline_test.jsonl"),
        task=read_prompts(data / "benign_test.jsonl"),
    )

    def answers(asked: Sequence[Prompt]) -> list[Answer]:
        with sink.progress(f"asking {model.name}", "prompts") as progress:
            return generate(loaded.model, loaded.tokenizer, asked, how, progress)

    parser = ParserJudge()
    found = evaluate_model(model.name, prompts, answers, parser, parser)
    harmful = [sample for sample in found.samples if sample.set == "harmful"]
    asr, utility, over = found.rates["asr"], found.rates["utility"], found.rates["over_refusal"]
    row: dict[str, Any] = {
        "asr": asr.rate,
        "asr_low": asr.low,
        "asr_high": asr.high,
        "prompts": asr.n,
        "gibberish": sum(sample.judge_raw == "gibberish" for sample in harmful) / len(harmful),
        "utility": utility.rate,
        "over_refusal": over.rate,
        "task_loss": task_loss(loaded, data / "borderline_test.jsonl"),
        "rates": {name: found.rates[name].to_json() for name in ("asr", "utility", "over_refusal")},
        "answers": [[sample.prompt, sample.answer] for sample in harmful],
    }
    compared = verify(model, base, mask or _empty(loaded), mode or "spa")
    row |= {"changed_weights": compared.moved, "total_weights": compared.total, "verified": compared.ok}
    return row


def _empty(loaded: LoadedModel) -> Mask:
    """A mask of a model that selects nothing: comparing under it only counts what moved."""
    from safecrit.anatomy import read_anatomy
    from safecrit.maskfile import MaskInfo

    anatomy = read_anatomy(loaded.model)
    info = MaskInfo(tensors=anatomy.layouts, mode="count", total=anatomy.total, eligible=anatomy.eligible_total)
    return Mask({}, info)


@torch.no_grad()
def task_loss(loaded: LoadedModel, file: Path, batch: int = 64) -> float:
    """Mean negative log-likelihood of a held-out task answer's token, in nats."""
    total, count = 0.0, 0
    encoded = [
        encode_example(loaded.tokenizer, [*p.messages, {"role": "assistant", "content": p.answer or ""}], 1024)
        for p in read_prompts(file)
    ]
    for start in range(0, len(encoded), batch):
        made = collate(encoded[start : start + batch], loaded.tokenizer.pad_token_id or 0)
        logits = loaded.model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits[:, :-1]
        labels = made["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")
        total, count = total + float(loss), count + int((labels != -100).sum())
    return total / count


def guard_agreement(folder: Path, guard: Judge) -> dict[str, Any]:
    """How often the guard says what the parser says, on answers of three models that the parser can read."""
    agreed = asked = 0
    for name in ("base", "set_top", "aligned"):
        pairs = [tuple(p) for p in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["answers"]][:200]
        readings = [read_answer(prompt, answer) for prompt, answer in pairs]
        known = [(pair, reading) for pair, reading in zip(pairs, readings, strict=True) if reading != "gibberish"]
        for verdict, (_, reading) in zip(guard.judge([pair for pair, _ in known]), known, strict=True):
            agreed += (verdict.label == "unsafe") == (reading == "complied")
            asked += 1
    return {"agreement": agreed / asked if asked else None, "answers": asked}


LABELS = {
    "base": "base model",
    "set_top": "SET, ESI top",
    "set_random": "SET, random",
    "set_bottom": "SET, ESI bottom",
    "aligned": "aligned model",
    "tuned": "tuned on the task",
    "spa_1": "SPA, ESI top 1 %",
    "spa_10": "SPA, ESI top 10 %",
    "tuned_random_10": "random 10 % frozen",
}


def print_table(
    sink: Any, figures: Mapping[str, Any], agreement: Mapping[str, Any], timings: Mapping[str, float]
) -> None:
    """The one table, and what stands below it."""
    rows = []
    for name, label in LABELS.items():
        row = figures[name]
        rows.append(
            (
                f"{name} ({label})",
                f"{100 * row['asr']:.1f} % [{100 * row['asr_low']:.1f}, {100 * row['asr_high']:.1f}]",
                f"{100 * row['gibberish']:.1f} %",
                f"{100 * row['utility']:.1f} %",
                f"{100 * row['over_refusal']:.1f} %",
                f"{row['task_loss']:.3f}",
                f"{100 * row['changed_weights'] / row['total_weights']:.2f} %",
                "yes" if row["verified"] else "NO",
            )
        )
    columns = ("model", "ASR", "gibberish", "utility", "over-refusal", "task loss", "changed", "verified")
    sink.line()
    sink.table(f"{figures['base']['prompts']} held-out prompts a figure; ASR with its 95 % interval", columns, rows)
    sink.line("ASR: forbidden requests that were served, read by the grammar's parser. gibberish: neither served nor")
    sink.line("refused. utility: exact answers to benign requests. changed: weights that differ from base or aligned.")
    if agreement["agreement"] is not None:
        share = 100 * agreement["agreement"]
        sink.line(f"The guard agrees with the parser on {share:.1f} % of {agreement['answers']} answers.")
    sink.line(f"Work: {sum(timings.values()):.0f} s.")


def draw(folder: Path, figures: Mapping[str, Any]) -> None:
    """Maps of ESI by layer and component (and expert), and bars before and after, as PNG and CSV in figures/."""
    pictures = folder / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name in ("base", "aligned"):
        matrices = Scores.load(folder / "scores" / name).info["matrices"]
        score_map(
            pictures / f"esi_{name}.png", scores_by_layer_component(matrices), title=f"Mean ESI of the {name} model"
        )
        experts = scores_by_layer_expert(matrices)
        if experts:
            score_map(pictures / f"esi_{name}_experts.png", experts, title=f"Mean ESI of the {name} model, by expert")
    for picture, names, title in (
        ("set", ("base", "set_top", "set_random", "set_bottom"), "SET on the base model: 1 % of the weights trained"),
        ("spa", ("aligned", "tuned", "spa_1", "spa_10", "tuned_random_10"), "Task tuning of the aligned model"),
    ):
        rates = {LABELS[n]: {key: Rate(**rate) for key, rate in figures[n]["rates"].items()} for n in names}
        rate_bars(pictures / f"{picture}.png", rates, title=title)
