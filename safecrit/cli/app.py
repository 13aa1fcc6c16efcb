"""The command tree. Order here is the order in `--help`: find, act, check, start."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import typer

from safecrit.cli.apply import apply
from safecrit.cli.combine import combine
from safecrit.cli.compare import compare
from safecrit.cli.demo import demo
from safecrit.cli.doctor import doctor
from safecrit.cli.evaluate import evaluate
from safecrit.cli.inspect import inspect
from safecrit.cli.mask import mask
from safecrit.cli.merge import merge
from safecrit.cli.perturb import perturb
from safecrit.cli.report import report
from safecrit.cli.run import run
from safecrit.cli.score import score
from safecrit.cli.train import set_, spa
from safecrit.cli.verify import verify


def example(*lines: str) -> str:
    """An `Examples:` paragraph that keeps its line breaks."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


D = "safecrit-demo"
EXAMPLES = {
    "score": (
        f"safecrit score {D}/models/base --judge {D}/models/guard --prompts {D}/data/harmful_train.jsonl -o my-scores",
    ),
    "mask": (
        "safecrit mask my-scores --top 1% -o my-mask.safetensors",
        f"safecrit mask {D}/scores/base --random 1% --seed 1 -o random.safetensors",
    ),
    "inspect": (f"safecrit inspect {D}/masks/base_top.safetensors", f"safecrit inspect {D}/scores/base"),
    "compare": (f"safecrit compare {D}/masks/base_top.safetensors {D}/masks/base_random.safetensors",),
    "combine": (
        f"safecrit combine {D}/masks/aligned_top_10.safetensors minus {D}/masks/aligned_top_1.safetensors \\",
        "  -o my-ring.safetensors",
    ),
    "set": (
        f"safecrit set {D}/models/base --mask {D}/masks/base_top.safetensors --data {D}/data/refusals.jsonl \\",
        f"  --retain {D}/data/retain.jsonl --retain-share 0.75 --lr 3e-3 --batch-size 16 -o my-safer",
    ),
    "spa": (
        f"safecrit spa {D}/models/aligned --mask {D}/masks/aligned_top_10.safetensors --data {D}/data/task.jsonl \\",
        "  --steps 50 --lr 1e-4 --batch-size 16 -o my-adapted",
        f"safecrit spa {D}/models/aligned --mask {D}/masks/aligned_top_10.safetensors --data {D}/data/task.jsonl \\",
        "  --use-peft --lora-r 8 --steps 50 --lr 1e-3 --batch-size 16 -o my-lora",
    ),
    "merge": (
        f"safecrit merge {D}/models/aligned my-lora/safecrit/adapter --mask {D}/masks/aligned_top_10.safetensors \\",
        "  -o my-merged",
    ),
    "apply": (f"safecrit apply {D}/models/base my-safer/safecrit/delta.safetensors -o my-copy",),
    "eval": (
        f"safecrit eval {D}/models/set_top --baseline {D}/models/base --prompts {D}/data/harmful_test.jsonl \\",
        f"  --judge {D}/models/guard --limit 100 -o my-results",
    ),
    "verify": (
        f"safecrit verify {D}/models/set_top --base {D}/models/base --mask {D}/masks/base_top.safetensors --mode set",
    ),
    "perturb": (
        f"safecrit perturb {D}/models/aligned --mask {D}/masks/aligned_top_1.safetensors \\",
        f"  --scores {D}/scores/aligned --prompts {D}/data/harmful_test.jsonl --task {D}/data/benign_test.jsonl \\",
        f"  --judge {D}/models/guard --noise 0.38,1,2 --limit 100 --max-new-tokens 32 -o my-perturbation",
    ),
    "report": (f"safecrit report {D}/scores/base {D}/masks/base_top.safetensors -o my-report",),
    "doctor": ("safecrit doctor",),
    "run": ("safecrit run --init Qwen/Qwen2.5-0.5B-Instruct -o recipe.yaml", "safecrit run recipe.yaml --dry-run"),
    "demo": ("safecrit demo", "safecrit demo --quick", "safecrit demo --moe -o safecrit-demo-moe"),
}

CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "max_content_width": 110,
}
app = typer.Typer(
    help="Find the weights of a language model that carry its safety, and act on exactly those.",
    epilog=example("safecrit demo --quick", "safecrit score --help"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "score": score,
    "mask": mask,
    "inspect": inspect,
    "compare": compare,
    "combine": combine,
    "set": set_,
    "spa": spa,
    "merge": merge,
    "apply": apply,
    "eval": evaluate,
    "verify": verify,
    "perturb": perturb,
    "report": report,
    "demo": demo,
    "run": run,
    "doctor": doctor,
}
for name, command in COMMANDS.items():
    app.command(name, epilog=example(*EXAMPLES[name]), context_settings=CONTEXT)(command)


def _version(wanted: bool) -> None:
    if wanted:
        from safecrit import __version__

        typer.echo(f"safecrit {__version__}")
        raise typer.Exit


RANKED = ("score", "mask", "set", "spa", "eval", "run")


@app.callback()
def options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Find the weights of a language model that carry its safety, and act on exactly those."""
    from safecrit import faults
    from safecrit.errors import SafecritError

    command = context.invoked_subcommand
    if faults.launched() and int(os.environ["WORLD_SIZE"]) > 1 and command not in RANKED:
        raise SafecritError(
            f"`safecrit {command}` runs in one process: start it without torchrun. Several are for {', '.join(RANKED)}."
        )
