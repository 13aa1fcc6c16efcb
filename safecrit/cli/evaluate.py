"""`safecrit eval`: attack success, over-refusal and utility, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

if TYPE_CHECKING:
    from safecrit.results import Evaluation

Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders or Hub ids.")]
Prompts = Annotated[str | None, typer.Option("--prompts", metavar="FILE", help="Harmful prompts: attack success rate.")]
Benign = Annotated[
    str | None,
    typer.Option("--benign", metavar="FILE", help="Harmless prompts: over-refusal; utility where it has answers."),
]
Task = Annotated[
    str | None, typer.Option("--task", metavar="FILE", help="Prompts with answers: utility by exact match.")
]
Baseline = Annotated[
    str | None, typer.Option("--baseline", metavar="MODEL", help="Compare the others with this one, paired.")
]
Judge = Annotated[
    str,
    typer.Option(
        "--judge",
        metavar="JUDGE",
        help="refusal (phrases), a guard's or classifier's folder or Hub id, a preset, labels:FILE, or openai:NAME.",
    ),
]
MaxAsr = Annotated[float | None, typer.Option("--max-asr", min=0, max=1, help="Exit 3 where ASR is above this.")]
MaxOver = Annotated[
    float | None, typer.Option("--max-over-refusal", min=0, max=1, help="Exit 3 where over-refusal is above this.")
]


def evaluate(
    context: typer.Context,
    model: Models,
    output: o.OutputFolder = None,
    prompts: Prompts = None,
    benign: Benign = None,
    task: Task = None,
    baseline: Baseline = None,
    judge: Judge = "refusal",
    limit: o.Limit = None,
    max_new_tokens: o.MaxNewTokens = 512,
    batch_size: o.BatchSize = "auto",
    max_asr: MaxAsr = None,
    max_over_refusal: MaxOver = None,
    judge_format: o.JudgeFormat = None,
    judge_template: o.JudgeTemplate = None,
    judge_base_url: o.JudgeUrl = None,
    safe_word: o.SafeWord = None,
    unsafe_word: o.UnsafeWord = None,
    verdict_prefix: o.VerdictPrefix = None,
    controversial: o.Controversial = "unsafe",
    system_prompt: o.SystemPrompt = None,
    chat_template_kwargs: o.TemplateKwargs = None,
    think_end_token: o.ThinkEnd = None,
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
    """Measure attack success, over-refusal and utility of models on the same prompts.

    Every share has a 95 % Wilson interval; answers the judge failed on are
    counted apart and never as safe. Answers lie in samples.jsonl only.
    """
    from safecrit.api.evaluate import EvalJob, check_inputs, run_eval
    from safecrit.generation import GenerationSettings
    from safecrit.outputs import default_output, open_output
    from safecrit.results import EvalSettings, check, results_json, write_evaluation

    sink = Sink(as_json=as_json, quiet=quiet)
    settings = o.resolved(context)
    job = EvalJob(
        models=tuple(model),
        judge=o.judge_choice(settings, device=device),
        prompts=prompts,
        benign=benign,
        task=task,
        baseline=baseline,
        limit=limit,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        generation=GenerationSettings(
            max_new_tokens=max_new_tokens, batch_size=o.batch_size(batch_size), chat=o.chat_settings(settings)
        ),
        settings=EvalSettings(max_asr=max_asr, max_over_refusal=max_over_refusal),
    )
    check_inputs(job)
    folder = open_output(output or default_output("eval", model[0]), "eval", settings, overwrite=overwrite)
    evaluation = run_eval(job, sink.progress)
    write_evaluation(folder.path, evaluation)
    folder.finish()
    _print(evaluation, results_json(evaluation), sink)
    sink.line(f"Results: {folder.path}/results.json, answers in samples.jsonl")
    check(evaluation)


def share(rate: dict[str, Any] | None) -> str:
    """`12.0 % [9.1, 15.7]`, or nothing where it was not measured."""
    if rate is None or rate["rate"] is None:
        return "-"
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _print(evaluation: Evaluation, results: dict[str, Any], sink: Sink) -> None:
    columns = (("asr", "ASR"), ("refusal", "refusal"), ("over_refusal", "over-refusal"), ("utility", "utility"))
    measured = [(key, label) for key, label in columns if any(key in model for model in results["models"].values())]
    rows = []
    for name, figures in results["models"].items():
        failed = sum(failure["count"] for failure in figures["judge_failures"].values())
        rows.append((name, *(share(figures.get(key)) for key, _ in measured), failed))
    sink.table("Rates with 95 % Wilson intervals", ("model", *(label for _, label in measured), "judge failures"), rows)
    for key, label in measured:
        rates = [figures[key] for figures in results["models"].values() if figures.get(key)]
        counted = dict.fromkeys(f"{rate['n']} {rate['denominator']}" for rate in rates)
        sink.line(f"{label}: of {' / '.join(counted)}")
    if results["paired"]:
        sink.line()
    for row in results["paired"]:
        sink.line(
            f"{row['model']} - {row['baseline']}, {row['figure']}: {100 * row['difference']:+.1f} points "
            f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}], McNemar p = {row['p']:.2g} (n = {row['n']})"
        )
    sink.result(results)
