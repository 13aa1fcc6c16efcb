"""`safecrit score`: the Expected Safety Impact of every weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

if TYPE_CHECKING:
    from safecrit.api.scorejob import ScoreJob
    from safecrit.scorefile import Scores

Judge = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="JUDGE",
        help="A guard's or classifier's folder or Hub id, or a preset; with score-function also refusal, labels:FILE, "
        "openai:NAME.",
    ),
]
Prompts = Annotated[
    str | None, typer.Option("--prompts", metavar="FILE", help="Harmful prompts: CSV, JSON, JSONL or a Hub id.")
]
Answers = Annotated[
    str | None, typer.Option("--answers", metavar="FILE", help="Answers made elsewhere, instead of generating them.")
]
JudgeDtype = Annotated[str, typer.Option("--judge-dtype", help="As --dtype, for the judge.")]
JudgeDevice = Annotated[str, typer.Option("--judge-device", help="As --device, for the judge.")]
JudgeBatch = Annotated[int, typer.Option("--judge-batch-size", min=1, help="Conversations at once before the judge.")]
Objective = Annotated[
    Literal["log-odds", "prob", "logit", "refusal-nll", "answer-nll"],
    typer.Option(
        "--objective",
        help="What is differentiated: log p(safe)/p(unsafe), p(safe), log p(safe); or, without a judge, log p of a "
        "refusal or of the answers in --data.",
    ),
]
Method = Annotated[
    Literal["esi", "gradient", "snip", "fisher", "wanda", "magnitude"],
    typer.Option(
        "--method",
        help="esi: std of the matrix x gradient; gradient: without std; snip: weight x gradient; fisher: mean square; "
        "wanda: |weight| x input norm; magnitude: |weight|.",
    ),
]
Estimator = Annotated[
    Literal["relaxed", "score-function"],
    typer.Option("--estimator", help="relaxed: through the judge; score-function: sampled answers and any verdict."),
]
Samples = Annotated[int, typer.Option("--samples", min=2, help="Sampled answers a prompt, for score-function.")]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Prompts with answers, for answer-nll.")]
Refusal = Annotated[str, typer.Option("--refusal", metavar="TEXT", help="The refusal of refusal-nll.")]
Placement = Annotated[
    str, typer.Option("--judge-placement", help="auto, together, sequential (by turns), or the judge's device.")
]
AccumulateOn = Annotated[
    Literal["auto", "device", "host", "disk"], typer.Option("--accumulate-on", help="Where float32 sums lie.")
]
Checkpoint = Annotated[
    Literal["auto", "on", "off"],
    typer.Option("--checkpoint-activations", help="Keep only the layers' inputs of the activations."),
]
Stability = Annotated[
    bool, typer.Option("--stability", help="Also compare halves of the prompts and two noise seeds (twice the time).")
]
Reduction = Annotated[
    Literal["signed", "abs", "square"],
    typer.Option(
        "--reduction", help="Over prompts: signed mean, mean of |.|, or mean of squares (one prompt a backward)."
    ),
]
Relaxation = Annotated[
    Literal["gumbel", "gumbel-conditional", "softmax"],
    typer.Option("--relaxation", help="How answer tokens are relaxed."),
]
Tau = Annotated[float, typer.Option("--tau", min=1e-6, help="Temperature of the relaxation.")]
Draws = Annotated[int, typer.Option("--draws", min=1, help="Noise draws averaged per prompt.")]
Include = Annotated[
    str | None,
    typer.Option("--include", metavar="REGEX", help="Score just tensors whose name matches, embeddings too."),
]
Exclude = Annotated[
    str | None, typer.Option("--exclude", metavar="REGEX", help="Leave out tensors whose name matches.")
]
ScoreDtype = Annotated[
    Literal["float32", "bfloat16"], typer.Option("--score-dtype", help="What scores are stored as; sums are float32.")
]
SaveEvery = Annotated[int, typer.Option("--save-every", min=1, help="Save the state after this many prompts.")]
Parallel = Annotated[
    Literal["auto", "shard", "replicate"],
    typer.Option("--parallel", help="Under torchrun: the model whole on every rank, or divided (FSDP2)."),
]


def score(
    context: typer.Context,
    model: o.ModelArgument,
    judge: Judge = None,
    prompts: Prompts = None,
    output: o.OutputFolder = None,
    answers: Answers = None,
    limit: o.Limit = None,
    max_new_tokens: o.MaxNewTokens = 256,
    batch_size: o.BatchSize = "auto",
    judge_batch_size: JudgeBatch = 64,
    method: Method = "esi",
    reduction: Reduction = "signed",
    relaxation: Relaxation = "gumbel",
    tau: Tau = 0.3,
    draws: Draws = 8,
    objective: Objective = "log-odds",
    estimator: Estimator = "relaxed",
    samples: Samples = 8,
    data: Data = None,
    refusal: Refusal = "I'm sorry, but I can't help with that.",
    judge_format: o.JudgeFormat = None,
    judge_template: o.JudgeTemplate = None,
    judge_base_url: o.JudgeUrl = None,
    refusal_patterns: o.RefusalPatterns = None,
    safe_word: o.SafeWord = None,
    unsafe_word: o.UnsafeWord = None,
    verdict_prefix: o.VerdictPrefix = None,
    controversial: o.Controversial = "unsafe",
    judge_placement: Placement = "auto",
    accumulate_on: AccumulateOn = "auto",
    checkpoint_activations: Checkpoint = "auto",
    stability: Stability = False,
    system_prompt: o.SystemPrompt = None,
    chat_template_kwargs: o.TemplateKwargs = None,
    think_end_token: o.ThinkEnd = None,
    include: Include = None,
    exclude: Exclude = None,
    score_dtype: ScoreDtype = "float32",
    save_every: SaveEvery = 256,
    parallel: Parallel = "auto",
    dist_timeout: o.DistTimeout = o.DIST_TIMEOUT_S,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    judge_device: JudgeDevice = "auto",
    judge_dtype: JudgeDtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    dry_run: o.DryRun = False,
    gpu_memory: o.GpuMemory = None,
    ranks: o.Ranks = 1,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Score every weight: how much a typical change of it moves the model's safety.

    The model answers the prompts, the judge reads the answers, and the gradient
    of its verdict goes back through both. Scores land in the output folder.
    """
    from safecrit import distributed
    from safecrit.outputs import default_output

    sink = Sink(as_json=as_json, quiet=quiet)
    settings = o.resolved(context)
    if dry_run:
        settings["parallel"] = parallel
        _dry_run(settings, o.asked_ranks(context), gpu_memory, output or default_output("score", model), sink)
        return
    o.check_dry(context)
    distributed.start(dist_timeout)
    run({**settings, "parallel": parallel}, output or default_output("score", model), overwrite, sink)


def job_of(settings: dict[str, Any]) -> ScoreJob:
    """The job that the flags describe."""
    from safecrit.api.scorejob import ScoreJob, ScoreSettings
    from safecrit.generation import GenerationSettings
    from safecrit.relaxation import RelaxationSettings

    s, batch = settings, o.batch_size(settings["batch_size"])
    differentiated = s["objective"] if s["objective"] in ("log-odds", "prob", "logit") else "log-odds"
    judge = None
    if s["judge"] is not None:
        judge = o.judge_choice(s, device=s["judge_device"], dtype=s["judge_dtype"], objective=differentiated)
    plain = ("model", "prompts", "answers", "data", "refusal", "samples", "limit", "revision", "device", "dtype")
    more = ("trust_remote_code", "include", "exclude", "score_dtype", "save_every")
    return ScoreJob(
        judge=judge,
        generation=GenerationSettings(
            max_new_tokens=s["max_new_tokens"], batch_size=batch, seed=s["seed"], chat=o.chat_settings(s)
        ),
        scoring=ScoreSettings(
            method=s["method"],
            objective=s["objective"],
            estimator=s["estimator"],
            reduction=s["reduction"],
            relaxation=RelaxationSettings(kind=s["relaxation"], tau=s["tau"], draws=s["draws"], seed=s["seed"]),
            batch_size=batch,
            judge_batch_size=s["judge_batch_size"],
            placement=s["judge_placement"],
            accumulate_on=s["accumulate_on"],
            checkpoint=s["checkpoint_activations"],
            stability=s["stability"],
        ),
        parallel=s.get("parallel", "auto"),
        **{name: s[name] for name in (*plain, *more)},
    )


def stability_lines(stability: dict[str, Any]) -> list[str]:
    """How far halves and seeds agreed, one line each, from score.json or a mask."""
    lines = []
    for kind, found in stability.items():
        shares = ", ".join(
            f"{100 * row['share']:g} %: IoU {row['iou']:.2f} (chance {row['chance']:.3f})" for row in found["shares"]
        )
        correlation = found["spearman"]["value"]
        known = "undefined" if correlation is None else f"{correlation:.2f}"
        shares = shares or "no share has enough scores"
        lines.append(f"Stability, {kind}: {shares}; rank correlation {known}.")
    return lines


def _dry_run(settings: dict[str, Any], ranks: int, gpu_memory: str | None, output: Path, sink: Sink) -> None:
    from dataclasses import asdict

    from safecrit.api.dryrun import dry_run, lines

    found = dry_run(job_of(settings), ranks=ranks, gpu_memory=gpu_memory, output=output)
    for line in lines(found):
        sink.line(line)
    sink.result(asdict(found))


def run(settings: dict[str, Any], output: Path, overwrite: bool, sink: Sink) -> Scores:
    """Run the job into `output` and print what came out."""
    from safecrit import distributed
    from safecrit.api.score import run_score
    from safecrit.api.scorejob import check_inputs
    from safecrit.outputs import open_output

    job = job_of(settings)
    check_inputs(job)
    kept = {name: value for name, value in settings.items() if name not in o.TRANSIENT}
    folder = distributed.from_first(lambda: open_output(output, "score", kept, overwrite=overwrite))
    distributed.writes_in(folder.path)
    if folder.resumed:
        sink.note(f"resuming the interrupted run in {folder.path}")
    scores = run_score(job, folder.path, sink.progress, sink.note)
    if distributed.current().first:
        folder.finish()
    info = scores.info
    for warning in info["warnings"]:
        sink.warn(warning)
    used, dropped, judged = info["prompts"]["used"], len(info["prompts"]["dropped"]), info["judged"]
    sink.line(f"Scored {scores.eligible:,} of {scores.total:,} weights with {used} prompts ({dropped} dropped).")
    if judged is not None:
        name = "Judge" if info["judge"] is not None else "Likelihood"
        number = "log-odds" if info["judge"] is not None and info["estimator"] == "relaxed" else "value"
        counted = f"{judged['safe']} of {judged['count']} answers safe, " if info["judge"] is not None else ""
        sink.line(
            f"{name}: {counted}{number} {judged['mean']:+.2f} +- {judged['std']:.2f} "
            f"({judged['min']:+.2f} to {judged['max']:+.2f})."
        )
    for line in stability_lines(info.get("stability") or {}):
        sink.line(line)
    sink.line(f"Scores: {folder.path}")
    sink.line(f"Next: safecrit mask {folder.path} --top 1% -o mask.safetensors")
    sink.result(
        {"output": str(folder.path), "used": used, "dropped": dropped, "judged": judged, "warnings": info["warnings"]}
    )
    return scores
