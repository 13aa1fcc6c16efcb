"""`safecrit score`: the Expected Safety Impact of every weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

if TYPE_CHECKING:
    from safecrit.api.score import ScoreJob
    from safecrit.scorefile import Scores

Answers = Annotated[
    str | None, typer.Option("--answers", metavar="FILE", help="Answers made elsewhere, instead of generating them.")
]
JudgeDtype = Annotated[str, typer.Option("--judge-dtype", help="As --dtype, for the judge.")]
JudgeDevice = Annotated[str, typer.Option("--judge-device", help="As --device, for the judge.")]
JudgeBatch = Annotated[int, typer.Option("--judge-batch-size", min=1, help="Conversations at once before the judge.")]
Objective = Annotated[
    Literal["log-odds", "prob", "logit"],
    typer.Option("--objective", help="What is differentiated: log p(safe)/p(unsafe), p(safe), or log p(safe)."),
]
Method = Annotated[
    Literal["esi", "gradient"],
    typer.Option("--method", help="esi: std of the matrix x gradient; gradient: without std."),
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


def score(
    context: typer.Context,
    model: o.ModelArgument,
    judge: o.Judge,
    prompts: o.Prompts,
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
    safe_word: o.SafeWord = "safe",
    unsafe_word: o.UnsafeWord = "unsafe",
    verdict_prefix: o.VerdictPrefix = "",
    include: Include = None,
    exclude: Exclude = None,
    score_dtype: ScoreDtype = "float32",
    save_every: SaveEvery = 256,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    judge_device: JudgeDevice = "auto",
    judge_dtype: JudgeDtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
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
    from safecrit.outputs import default_output

    sink = Sink(as_json=as_json, quiet=quiet)
    settings = o.resolved(context)
    run(settings, output or default_output("score", model), overwrite, sink)


def job_of(settings: dict[str, Any]) -> ScoreJob:
    """The job that the flags describe."""
    from safecrit.api.judging import JudgeChoice
    from safecrit.api.score import ScoreJob
    from safecrit.generation import GenerationSettings
    from safecrit.judges.guard import GuardSettings
    from safecrit.relaxation import RelaxationSettings
    from safecrit.scoring import ScoreSettings

    s, batch = settings, o.batch_size(settings["batch_size"])
    guard = GuardSettings(
        verdict_prefix=s["verdict_prefix"],
        safe_word=s["safe_word"],
        unsafe_word=s["unsafe_word"],
        objective=s["objective"],
    )
    relaxation = RelaxationSettings(kind=s["relaxation"], tau=s["tau"], draws=s["draws"], seed=s["seed"])
    return ScoreJob(
        model=s["model"],
        judge=JudgeChoice(
            name=s["judge"],
            device=s["judge_device"],
            dtype=s["judge_dtype"],
            guard=guard,
            trust_remote_code=s["trust_remote_code"],
        ),
        prompts=s["prompts"],
        answers=s["answers"],
        limit=s["limit"],
        revision=s["revision"],
        device=s["device"],
        dtype=s["dtype"],
        trust_remote_code=s["trust_remote_code"],
        include=s["include"],
        exclude=s["exclude"],
        score_dtype=s["score_dtype"],
        save_every=s["save_every"],
        generation=GenerationSettings(max_new_tokens=s["max_new_tokens"], batch_size=batch),
        scoring=ScoreSettings(
            method=s["method"],
            reduction=s["reduction"],
            relaxation=relaxation,
            batch_size=batch,
            judge_batch_size=s["judge_batch_size"],
        ),
    )


def run(settings: dict[str, Any], output: Path, overwrite: bool, sink: Sink) -> Scores:
    """Run the job into `output` and print what came out."""
    from safecrit.api.score import check_inputs, run_score
    from safecrit.outputs import open_output

    job = job_of(settings)
    check_inputs(job)
    folder = open_output(output, "score", settings, overwrite=overwrite)
    if folder.resumed:
        sink.note(f"resuming the interrupted run in {folder.path}")
    scores = run_score(job, folder.path, sink.progress)
    folder.finish()
    info = scores.info
    for warning in info["warnings"]:
        sink.warn(warning)
    used, dropped, judged = info["prompts"]["used"], len(info["prompts"]["dropped"]), info["judged"]
    sink.line(f"Scored {scores.eligible:,} of {scores.total:,} weights with {used} prompts ({dropped} dropped).")
    sink.line(
        f"Judge: {judged['safe']} of {used} answers safe, log-odds {judged['mean']:+.2f} +- {judged['std']:.2f} "
        f"({judged['min']:+.2f} to {judged['max']:+.2f})."
    )
    sink.line(f"Scores: {folder.path}")
    sink.line(f"Next: safecrit mask {folder.path} --top 1% -o mask.safetensors")
    sink.result(
        {"output": str(folder.path), "used": used, "dropped": dropped, "judged": judged, "warnings": info["warnings"]}
    )
    return scores
