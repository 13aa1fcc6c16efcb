"""`safecrit eval`: attack success, over-refusal and utility, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

if TYPE_CHECKING:
    from safecrit.results import Evaluation

Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL...", help="Folders, Hub ids or openai:NAME; none with --answers."),
]
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
    list[str] | None,
    typer.Option(
        "--judge",
        metavar="JUDGE",
        help="refusal (phrases, the default), a guard's or classifier's folder or Hub id, a preset, labels:FILE, or "
        "openai:NAME; repeat to compare judges.",
    ),
]
Answers = Annotated[
    list[str] | None,
    typer.Option("--answers", metavar="FILE", help="Judge answers made elsewhere (columns prompt, answer)."),
]
Used = Annotated[
    list[Path] | None,
    typer.Option("--mask", metavar="MASK|SCORES", help="Warn where its prompts or judge are used again; repeatable."),
]
Text = Annotated[str | None, typer.Option("--text", metavar="FILE", help="Perplexity of this UTF-8 text.")]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="A,B", help="Tasks of lm-evaluation-harness, names or YAML files."),
]
Samples = Annotated[
    int, typer.Option("--samples", min=0, help="Sampled answers a harmful prompt; adds ASR at N. [default: one greedy]")
]
BaseUrl = Annotated[str | None, typer.Option("--base-url", metavar="URL", help="Server of models called openai:NAME.")]
Prefill = Annotated[
    str, typer.Option("--prefill", metavar="TEXT", help="Attack: answers to harmful prompts begin with this.")
]
Card = Annotated[
    bool, typer.Option("--card", help="Write the figures into the model cards of the outputs of set, spa and merge.")
]
MaxAsr = Annotated[float | None, typer.Option("--max-asr", min=0, max=1, help="Exit 3 where ASR is above this.")]
MaxOver = Annotated[
    float | None, typer.Option("--max-over-refusal", min=0, max=1, help="Exit 3 where over-refusal is above this.")
]


def evaluate(
    context: typer.Context,
    model: Models = None,
    output: o.OutputFolder = None,
    prompts: Prompts = None,
    benign: Benign = None,
    task: Task = None,
    baseline: Baseline = None,
    judge: Judge = None,
    answers: Answers = None,
    mask: Used = None,
    text: Text = None,
    tasks: Tasks = None,
    samples: Samples = 0,
    prefill: Prefill = "",
    base_url: BaseUrl = None,
    seed: o.Seed = 0,
    limit: o.Limit = None,
    max_new_tokens: o.MaxNewTokens = 512,
    batch_size: o.BatchSize = "auto",
    max_asr: MaxAsr = None,
    max_over_refusal: MaxOver = None,
    card: Card = False,
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
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    dist_timeout: o.DistTimeout = o.DIST_TIMEOUT_S,
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
    from safecrit import distributed
    from safecrit.api.evaluate import EvalJob, check_inputs, find_cards, run_eval
    from safecrit.cardfigures import add_evaluation
    from safecrit.generation import GenerationSettings
    from safecrit.outputs import default_output, open_output
    from safecrit.results import EvalSettings, check, results_json, write_evaluation

    sink = Sink(as_json=as_json, quiet=quiet)
    asked = o.resolved(context)
    first, *others = (o.judge_choice({**asked, "judge": name}, device=device) for name in judge or ["refusal"])
    job = EvalJob(
        models=tuple(model or ()),
        judge=first,
        others=tuple(others),
        answers=tuple(answers or ()),
        used=tuple(mask or ()),
        text=text,
        base_url=base_url,
        tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
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
            max_new_tokens=max_new_tokens,
            batch_size=o.batch_size(batch_size),
            samples=samples,
            seed=seed,
            prefill=prefill,
            chat=o.chat_settings(asked),
        ),
        settings=EvalSettings(max_asr=max_asr, max_over_refusal=max_over_refusal),
    )
    distributed.start(dist_timeout)
    check_inputs(job)
    cards = find_cards(job) if card else {}
    place = output or default_output("eval", Path((*job.models, *job.answers)[0]).stem)
    folder = distributed.from_first(lambda: open_output(place, "eval", asked, overwrite=overwrite))
    distributed.writes_in(folder.path)
    evaluation = run_eval(job, sink.progress, folder.path)
    if distributed.current().first:
        write_evaluation(folder.path, evaluation)
        folder.finish()
    for warning in evaluation.warnings:
        sink.warn(warning)
    results = results_json(evaluation)
    if distributed.current().first:
        for name, file in cards.items():
            add_evaluation(file, results, name)
    _print(evaluation, results, sink)
    for file in cards.values():
        sink.line(f"Model card: {file}")
    sink.line(f"Results: {folder.path}/results.json, answers in samples.jsonl")
    check(evaluation)


def share(rate: dict[str, Any] | None) -> str:
    """`12.0 % [9.1, 15.7]`, or nothing where it was not measured."""
    if rate is None or rate["rate"] is None:
        return "-"
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _print_more(name: str, figures: dict[str, Any], sink: Sink) -> None:
    """Incoherent answers, further judges and measures of one model."""
    if figures.get("asr") and figures["incoherent"]["count"]:
        sink.line(
            f"{name}: {figures['incoherent']['count']} of {figures['incoherent']['n']} answers are incoherent; "
            f"ASR without them {share(figures['asr_coherent'])}"
        )
    for judge, seen in figures.get("judges", {}).items():
        kappa = "-" if seen["kappa"] is None else f"{seen['kappa']:.3f}"
        sink.line(
            f"{name}, judge {judge}: ASR {share(seen['asr'])}; agrees with the first on {share(seen['agreement'])} "
            f"of {seen['agreement']['n']}, Cohen's kappa {kappa}"
        )
    if text := figures.get("text"):
        sink.line(
            f"{name}: perplexity of {text['file']} {text['perplexity']:.4g} ({text['tokens']:,} tokens, "
            f"{text['bits_per_byte']:.4g} bits a byte)"
        )
    if tasks := figures.get("tasks"):
        _print_tasks(name, tasks, sink)


def _print_tasks(name: str, tasks: dict[str, Any], sink: Sink) -> None:
    rows = [
        (task, metric, f"{value:.4f}", f"{metrics[error]:.4f}" if (error := _stderr(metric)) in metrics else "-")
        for task, metrics in tasks["results"].items()
        for metric, value in metrics.items()
        if metric != "examples" and "_stderr" not in metric
    ]
    sink.table(f"{name}: lm-evaluation-harness {tasks['harness']}", ("task", "metric", "value", "standard error"), rows)


def _stderr(metric: str) -> str:
    name, _, rest = metric.partition(",")
    return f"{name}_stderr,{rest}"


def _print(evaluation: Evaluation, results: dict[str, Any], sink: Sink) -> None:
    columns = (("asr", "ASR"), ("refusal", "refusal"), ("over_refusal", "over-refusal"), ("utility", "utility"))
    found = {key for model in results["models"].values() for key in model}
    several = [(key, f"ASR@{key.removeprefix('asr_at_')}") for key in sorted(found) if key.startswith("asr_at_")]
    measured = [(key, label) for key, label in (columns[0], *several, *columns[1:]) if key in found]
    rows = []
    for name, figures in results["models"].items():
        failed = sum(failure["count"] for failure in figures["judge_failures"].values())
        rows.append((name, *(share(figures.get(key)) for key, _ in measured), failed))
    sink.table("Rates with 95 % Wilson intervals", ("model", *(label for _, label in measured), "judge failures"), rows)
    for key, label in measured:
        rates = [figures[key] for figures in results["models"].values() if figures.get(key)]
        counted = dict.fromkeys(f"{rate['n']} {rate['denominator']}" for rate in rates)
        sink.line(f"{label}: of {' / '.join(counted)}")
    for name, figures in results["models"].items():
        _print_more(name, figures, sink)
    if results["paired"]:
        sink.line()
    for row in results["paired"]:
        sink.line(
            f"{row['model']} - {row['baseline']}, {row['figure']}: {100 * row['difference']:+.1f} points "
            f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}], McNemar p = {row['p']:.2g} (n = {row['n']})"
        )
    sink.result(results)
