"""The study: does it matter which weights are tuned? On the demo's dense and MoE models, every arm on equal terms.

    .venv/bin/python benchmarks/study.py run WORK [--models dense moe] [--seeds 10 11 12]
    .venv/bin/python benchmarks/study.py report WORK      # benchmarks/results/study.json, docs/study.png, a table

SET: 1 % of the base model's weights, chosen by ESI (top and bottom), |gradient|, SNIP,
Wanda, magnitude, or at random with ESI's count in every tensor; a LoRA adapter of as
many weights as its rank allows; all weights. Same examples in the same order, same
steps, and for every arm the best of three learning rates on the validation part, with
a fourth beyond where the best lies at an end of the grid.

SPA: task tuning of the aligned model with nothing frozen, with ESI's top 1, 3 and 10 %
frozen, and with as many at random in every tensor, at the demo's learning rate.

Seeds are none that the demo's settings were chosen on. Success is read by the grammar's
parser. Validation and test requests share no pair of verb and object with each other or
with the training data. Every figure is of the files that were written. WORK keeps models,
scores and one line a finished arm in arms.jsonl: a run started again skips those.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from study_report import ARMS, report
from study_world import OTHERS, TESTED, VALIDATED, World
from timing import _commit
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from safecrit.adapter import merge_adapter
from safecrit.anatomy import read_anatomy
from safecrit.api.demo_report import ParserJudge, task_loss
from safecrit.checkpoint import rewrite
from safecrit.demo.settings import DemoSettings
from safecrit.evaluation import EvalPrompts, evaluate_model
from safecrit.files import checkpoint_tensors
from safecrit.fingerprint import Changes
from safecrit.generation import GenerationSettings, generate
from safecrit.lora import LoraSettings, train_adapter
from safecrit.maskfile import Mask
from safecrit.models import LoadedModel, load_model
from safecrit.movement import Movement
from safecrit.prompts import read_prompts
from safecrit.tensorfile import MappedFiles
from safecrit.traindata import read_examples
from safecrit.training import run_set, run_spa, training_data
from safecrit.training_output import ModelWeights
from safecrit.trainloop import train
from safecrit.verification import verify

SEEDS = (10, 11, 12)
STEPS = 60
RATES = {"masked": (1e-3, 3e-3, 1e-2), "lora": (1e-3, 3e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3)}
ALL = ("all-linear",)
# Rank 1 on every expert would be twice as many weights as SET trains.
TARGETS = {"dense": ALL, "moe": ("q_proj", "k_proj", "v_proj", "o_proj")}
BEYOND = 3.0  # a fourth rate is this many times beyond the end at which the best of three lies
SHARE = 0.01
SPA_SHARES = (0.01, 0.03, 0.10)


class Study:
    """All arms of one world; `save` is given each finished one."""

    def __init__(self, world: World, done: set[tuple[str, str]], save: Callable[[dict[str, Any]], None]) -> None:
        self.world, self.done, self.save = world, done, save
        self.commit = _commit()  # of the code that runs
        self.work = world.folder / "work"
        data = world.data
        self.refusals = read_examples(data / "refusals.jsonl").examples
        self.retain = read_examples(data / "retain.jsonl").examples
        self.task = read_examples(data / "task.jsonl").examples

    def run(self) -> None:
        """Every arm that is not done."""
        for part, base in (("set", self.world.base), ("spa", self.world.aligned)):
            self._finish(part, "untouched", lambda base=base: {"test": self._tested(load_model(base, device="cpu"))})  # type: ignore[misc]
        for arm in ARMS["set"]:
            if arm != "untouched":
                self._finish("set", arm, lambda arm=arm: self._set(arm))  # type: ignore[misc]
        self._finish("spa", "none", lambda: self._spa(None, 0.0))
        for share in SPA_SHARES:
            for kind in ("top", "random"):
                name = f"{kind}_{100 * share:g}"
                self._finish("spa", name, lambda kind=kind, share=share: self._spa(kind, share))  # type: ignore[misc]

    def _finish(self, part: str, arm: str, make: Callable[[], dict[str, Any]]) -> None:
        if (part, arm) in self.done:
            return
        start = time.monotonic()
        shutil.rmtree(self.work, ignore_errors=True)
        row: dict[str, Any] = {"model": self.world.name, "seed": self.world.seed, "part": part, "arm": arm} | make()
        row |= {"seconds": round(time.monotonic() - start, 1), "commit": self.commit}
        self.save(row)
        asr, utility = (row["test"]["rates"][key]["rate"] for key in ("asr", "utility"))
        print(
            f"{self.world.name} {self.world.seed} {part} {arm}: ASR {asr:.3f}, utility {utility:.3f}, "
            f"rate {row.get('rate')}, {row['seconds']} s",
            flush=True,
        )

    def _set(self, arm: str) -> dict[str, Any]:
        grid = RATES[arm if arm in RATES else "masked"]
        tried: dict[float, dict[str, Any]] = {}
        for rate in grid:
            tried[rate] = self._attempt(arm, rate)
        best = min(tried, key=lambda rate: tried[rate]["order"])
        if best in (grid[0], grid[-1]):
            beyond = best * BEYOND if best == grid[-1] else best / BEYOND
            tried[beyond] = self._attempt(arm, beyond)
            best = min(tried, key=lambda rate: tried[rate]["order"])
        out = self.work / f"{best}"
        mask = self.world.mask("base", "top" if arm in ("lora", "full") else arm, SHARE)
        return {
            "rate": best,
            "tried": [{"rate": rate} | found for rate, found in sorted(tried.items())],
            "trained": tried[best]["trained"],
            "moved": moved(self.world.base, out, mask),
            "test": self._tested(load_model(out, device="cpu")),
        }

    def _attempt(self, arm: str, rate: float) -> dict[str, Any]:
        """Train, write the model, and read it on the validation part."""
        world, out = self.world, self.work / f"{rate}"
        settings = world.training(STEPS, rate, world.settings.set_rows)
        loaded, share = load_model(world.base, device="cpu"), world.settings.retain_share
        changes: Changes
        if arm == "full":
            data = training_data(loaded, self.refusals, self.retain, share, settings)
            train(loaded, data, settings, None, None)
            changes, trained = ModelWeights(loaded), read_anatomy(loaded.model).total
        elif arm == "lora":
            mask = world.mask("base", "top", SHARE)
            lora = adapter_settings(loaded.model, TARGETS[world.name], mask.count)
            adapter = train_adapter(
                loaded, self.refusals, self.retain, share, settings, lora, self.work / f"adapter-{rate}"
            )
            merged = merge_adapter(
                load_model(world.base, device="cpu"), adapter.folder, world.nothing(), allow_other_weights=True
            )
            changes, trained = merged.weights, adapter.trained
        else:
            mask = world.mask("base", arm, SHARE)
            result = run_set(loaded, mask, self.refusals, self.retain, share, settings)
            assert result.changes is not None
            changes, trained = result.changes, mask.count
        rewrite(world.base, out, changes)
        written = load_model(out, device="cpu")
        rates = self._rates(written, "validation")["rates"]
        cost = rates["asr"]["rate"] + rates["over_refusal"]["rate"] + 1 - rates["utility"]["rate"]
        loss = task_loss(written, world.data / "wanted_validation.jsonl")
        figures = {key: rates[key]["rate"] for key in ("asr", "over_refusal", "utility")}
        return {"trained": trained, "loss": loss, "cost": cost, "order": [round(cost, 9), loss]} | figures

    def _spa(self, kind: str | None, share: float) -> dict[str, Any]:
        world = self.world
        settings = world.training(world.settings.task_steps, world.settings.task_lr, world.settings.task_rows)
        mask = world.mask("aligned", kind, share) if kind else world.nothing()
        loaded = load_model(world.aligned, device="cpu")
        if kind:
            run_spa(loaded, mask, self.task, settings=settings)
        else:
            train(loaded, training_data(loaded, self.task, (), 0.0, settings), settings, None, None)
        out = self.work / "tuned"
        rewrite(world.aligned, out, ModelWeights(loaded))
        return {
            "rate": settings.learning_rate,
            "frozen": mask.count,
            "frozen_and_moved": verify(out, world.aligned, mask, "spa").violations,
            "test": self._tested(load_model(out, device="cpu")),
        }

    def _tested(self, loaded: LoadedModel) -> dict[str, Any]:
        """Figures on the test part, with the unseen kind and the task's loss."""
        found = self._rates(loaded, "test")
        unseen = read_prompts(self.world.data / "unseen_test.jsonl")
        parser = ParserJudge()
        seen = evaluate_model("unseen", EvalPrompts(task=unseen), self._ask(loaded), parser, parser)
        found["rates"]["unseen"] = seen.rates["utility"].to_json()
        found["unseen_loss"] = task_loss(loaded, self.world.data / "unseen_test.jsonl")
        found["task_loss"] = task_loss(loaded, self.world.data / "borderline_test.jsonl")
        return found

    def _rates(self, loaded: LoadedModel, part: str) -> dict[str, Any]:
        data, parser = self.world.data, ParserJudge()
        prompts = EvalPrompts(
            harmful=read_prompts(data / f"harmful_{part}.jsonl"),
            benign=read_prompts(data / f"borderline_{part}.jsonl"),
            task=read_prompts(data / f"benign_{part}.jsonl"),
        )
        result = evaluate_model(part, prompts, self._ask(loaded), parser, parser)
        harmful = [sample for sample in result.samples if sample.set == "harmful"]
        return {
            "rates": {name: result.rates[name].to_json() for name in ("asr", "refusal", "over_refusal", "utility")},
            "gibberish": sum(sample.judge_raw == "gibberish" for sample in harmful),
            "served": "".join(str(int(sample.verdict == "unsafe")) for sample in harmful),
        }

    def _ask(self, loaded: LoadedModel) -> Callable[..., Any]:
        settings = self.world.settings
        how = GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.eval_rows)
        return lambda asked: generate(loaded.model, loaded.tokenizer, asked, how)


def adapter_settings(model: PreTrainedModel, targets: tuple[str, ...], wanted: int) -> LoraSettings:
    """An adapter on `targets` of the rank at which it has nearest to `wanted` weights; alpha is twice the rank."""
    head = model.get_output_embeddings()
    linear = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and (targets == ALL or name.split(".")[-1] in targets)
    ]
    rank = max(1, round(wanted / sum(layer.in_features + layer.out_features for layer in linear)))
    return LoraSettings(r=rank, lora_alpha=2 * rank, target_modules=targets)


def moved(base: Path, out: Path, mask: Mask) -> dict[str, Any]:
    """What differs in the files: weights inside and outside `mask`, and how far, in sigma of their matrices."""
    checked = verify(out, base, mask, "set")
    old, new, maps = checkpoint_tensors(base), checkpoint_tensors(out), MappedFiles()
    inside, outside = Movement(), Movement()
    for name, layout in mask.info.tensors.items():
        before, after, chosen = maps.tensor(old[name]), maps.tensor(new[name]), mask.indices.get(name)
        if chosen is not None:
            inside.add(layout, before, after.reshape(-1)[chosen], only=chosen)
            after = after.clone()
            after.view(-1)[chosen] = before.reshape(-1)[chosen]
        outside.add(layout, before, after, frozen=chosen)
    return {
        "inside": checked.moved_selected,
        "outside": checked.violations,
        "mask": checked.selected,
        "total": checked.total,
        "inside_sigma": inside.mean_sigma,
        "outside_sigma": outside.mean_sigma,
    }


def run(work: Path, models: Sequence[str], seeds: Sequence[int]) -> None:
    """Every arm of every world that arms.jsonl lacks, in order."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    work.mkdir(parents=True, exist_ok=True)
    file = work / "arms.jsonl"

    def save(row: dict[str, Any]) -> None:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    finished = list(rows(file))
    for model in models:
        for seed in seeds:
            done = {(row["part"], row["arm"]) for row in finished if (row["model"], row["seed"]) == (model, seed)}
            Study(World(work / f"{model}-{seed}", model, seed), done, save).run()


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The finished arms of a work folder; a line that a killed run left half-written is none."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        if line.endswith("}"):
            yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        command = commands.add_parser(name)
        command.add_argument("work", type=Path)
        if name == "run":
            command.add_argument("--models", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
            command.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.work, arguments.models, arguments.seeds)
        return
    settings = {
        "set_steps": STEPS,
        "rates": RATES,
        "set_share": SHARE,
        "lora_targets": TARGETS,
        "spa_shares": SPA_SHARES,
    }
    settings |= {"prompts": {"validation": VALIDATED, "harmful": TESTED, "others": OTHERS}}
    settings |= {"demo": {"dense": vars(DemoSettings.full()), "moe": vars(DemoSettings.moe())}}
    report(list(rows(arguments.work / "arms.jsonl")), settings)


if __name__ == "__main__":
    main()
