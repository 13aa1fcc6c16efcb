"""`safecrit perturb`: noise on selected weights against the same noise elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

Noise = Annotated[str, typer.Option("--noise", metavar="R,...", help="Sizes of the noise, in sigma of each matrix.")]
ScoreFolder = Annotated[
    Path | None,
    typer.Option("--scores", metavar="DIR", help="Score folder: its bottom weights, and the predicted change of S."),
]
Bottom = Annotated[
    Path | None, typer.Option("--bottom", metavar="MASK", help="Mask of the bottom weights, instead of --scores.")
]
Benign = Annotated[
    str | None, typer.Option("--benign", metavar="FILE", help="Harmless prompts: over-refusal; utility with answers.")
]
Task = Annotated[str | None, typer.Option("--task", metavar="FILE", help="Prompts with answers: utility.")]
Judge = Annotated[
    str, typer.Option("--judge", metavar="JUDGE", help="refusal (phrases), or any judge that `eval` takes.")
]
Draws = Annotated[int, typer.Option("--draws", min=1, help="Draws of the noise at each size.")]


def perturb(
    context: typer.Context,
    model: o.ModelArgument,
    mask: o.MaskFile,
    prompts: o.Prompts,
    output: o.OutputFolder = None,
    noise: Noise = "0.38,1,2",
    scores: ScoreFolder = None,
    bottom: Bottom = None,
    judge: Judge = "refusal",
    benign: Benign = None,
    task: Task = None,
    draws: Draws = 1,
    limit: o.Limit = None,
    max_new_tokens: o.MaxNewTokens = 512,
    batch_size: o.BatchSize = "auto",
    seed: o.Seed = 0,
    judge_format: o.JudgeFormat = None,
    judge_template: o.JudgeTemplate = None,
    judge_base_url: o.JudgeUrl = None,
    refusal_patterns: o.RefusalPatterns = None,
    safe_word: o.SafeWord = None,
    unsafe_word: o.UnsafeWord = None,
    verdict_prefix: o.VerdictPrefix = None,
    controversial: o.Controversial = "unsafe",
    system_prompt: o.SystemPrompt = None,
    chat_template_kwargs: o.TemplateKwargs = None,
    think_end_token: o.ThinkEnd = None,
    allow_other_weights: o.AllowOtherWeights = False,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Test whether a mask's weights carry safety: noise there, on as many random ones, and on the bottom ones.

    The weights come back bit for bit after every arm, which is verified. An
    interrupted run goes on with the arms that are left.
    """
    from safecrit.api.perturb import PerturbJob, check_inputs, run_perturb
    from safecrit.errors import CheckFailed
    from safecrit.generation import GenerationSettings
    from safecrit.outputs import default_output, open_output
    from safecrit.plots import perturbation_curves

    sink = Sink(as_json=as_json, quiet=quiet)
    settings = o.resolved(context)
    job = PerturbJob(
        model=model,
        mask=mask,
        judge=o.judge_choice(settings, device=device),
        prompts=prompts,
        noise=_sizes(noise),
        scores=scores,
        bottom=bottom,
        benign=benign,
        task=task,
        draws=draws,
        seed=seed,
        limit=limit,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        allow_other_weights=allow_other_weights,
        generation=GenerationSettings(
            max_new_tokens=max_new_tokens,
            batch_size=o.batch_size(batch_size),
            seed=seed,
            chat=o.chat_settings(settings),
        ),
    )
    check_inputs(job)
    folder = open_output(output or default_output("perturb", model), "perturb", settings, overwrite=overwrite)
    results = run_perturb(job, folder.path, sink.progress)
    perturbation_curves(folder.path / "perturbation.png", results)
    folder.finish()
    if "bottom" not in {arm["kind"] for arm in results["arms"]}:
        sink.note("No bottom arms: they need --scores or --bottom.")
    _print(results, sink)
    sink.line(f"Results: {folder.path}/results.json, figure perturbation.png with its numbers in perturbation.csv")
    if results["problems"]:
        raise CheckFailed("; ".join(results["problems"]) + ".")


def _sizes(text: str) -> tuple[float, ...]:
    from safecrit.errors import SafecritError

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise SafecritError(f"--noise {text}: give sizes in sigma, such as 0.38,1,2.") from error


def _print(results: dict[str, Any], sink: Sink) -> None:
    from safecrit.api.perturb import table

    info = results["settings"]["mask"]
    header, rows = table(results)
    sink.table(f"Noise of r sigma on {info['count']:,} of {info['total']:,} weights; 95 % intervals", header, rows)
    if "dS predicted" in header:
        sink.line("dS: change of the judge's mean score; predicted to first order from the scores, for small r.")
    sink.line("Weights restored bit for bit after every arm: yes (sha256 of all tensors in memory).")
    sink.result(results)
