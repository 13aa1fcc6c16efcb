"""`safecrit mask`: the exact top share of the scores, as a portable mask file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

if TYPE_CHECKING:
    from safecrit.scorefile import Scores

Source = Annotated[str, typer.Argument(metavar="SCORES|MODEL", help="Score folder, or a model to score first.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Mask file to write. [default: safecrit-out/...]")
]
Share = "a share: 1% or 0.01"


def mask(
    source: Source,
    output: Output = None,
    top: Annotated[str | None, typer.Option("--top", metavar="SHARE", help=f"The largest scores, {Share}.")] = None,
    bottom: Annotated[
        str | None, typer.Option("--bottom", metavar="SHARE", help=f"The smallest scores, {Share}.")
    ] = None,
    random: Annotated[str | None, typer.Option("--random", metavar="SHARE", help=f"Any weights, {Share}.")] = None,
    match: Annotated[
        Path | None,
        typer.Option("--match", metavar="MASK", help="With --random: as many in each tensor as this mask has."),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="The N largest scores, instead of a share.")
    ] = None,
    share_of: Annotated[
        Literal["all", "eligible"], typer.Option("--share-of", help="What a share is a share of.")
    ] = "all",
    allow_zero: Annotated[bool, typer.Option("--allow-zero", help="Select weights with score 0 too.")] = False,
    seed: o.Seed = 0,
    judge: Annotated[str | None, typer.Option("--judge", metavar="JUDGE", help="With a model: its judge.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="With a model: harmful prompts.")
    ] = None,
    limit: o.Limit = None,
    max_new_tokens: o.MaxNewTokens = 256,
    batch_size: o.BatchSize = "auto",
    overwrite: o.Overwrite = False,
    dist_timeout: o.DistTimeout = o.DIST_TIMEOUT_S,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Select the weights with the largest (or smallest, or random) scores, exactly, into a mask file.

    A share counts all parameters of the model (`--share-of eligible` for the
    scored ones only). Equal scores go to the smaller tensor name, then index.
    """
    from safecrit import distributed
    from safecrit.errors import SafecritError
    from safecrit.maskfile import Mask
    from safecrit.outputs import check_output_file, default_output
    from safecrit.scorefile import Scores
    from safecrit.selection import SelectionSettings, select

    sink = Sink(as_json=as_json, quiet=quiet)
    distributed.start(dist_timeout)
    mode, share = _mode(top, bottom, random, match, count)
    settings = SelectionSettings(
        mode=mode,
        share=share,
        count=count,
        share_of=share_of,
        match=Mask.load(match) if match else None,
        seed=seed,
        allow_zero=allow_zero,
    )
    wanted = output or default_output("mask", source).with_suffix(".safetensors")
    output = distributed.from_first(lambda: check_output_file(wanted, overwrite=overwrite))
    distributed.writes_in(output.parent)
    if judge is None and prompts is None:
        if limit is not None:
            raise SafecritError("--limit goes with a model to score; a score folder is scored already.")
        selected = select(Scores.load(source), settings)
    else:
        with distributed.shared_folder(output.parent) as work:
            scores = _score(source, judge, prompts, limit, max_new_tokens, batch_size, seed, work, sink)
            selected = select(scores, settings)
    selected.save(output)
    info = selected.info
    if info.non_finite:
        sink.warn(f"{info.non_finite} scores are not finite and were never selected")
    of_all, of_eligible = selected.count / info.total, selected.count / info.eligible
    sink.line(
        f"Selected {selected.count:,} of {info.total:,} weights ({of_all:.3%}; {of_eligible:.3%} of the "
        f"{info.eligible:,} eligible), {info.mode}, in {len(selected.counts)} tensors."
    )
    if info.tied > 1:
        sink.line(
            f"At the threshold {info.tied} weights are equal; {info.tied_selected} are selected ({info.tie_rule})."
        )
    sink.line(f"Mask: {output}")
    sink.line(f"Next: safecrit inspect {output}")
    sink.result({"output": str(output), "selected": selected.count, "total": info.total, "eligible": info.eligible})


def _mode(
    top: str | None, bottom: str | None, random: str | None, match: Path | None, count: int | None
) -> tuple[str, str | None]:
    from safecrit.errors import SafecritError

    given = [
        (name, share) for name, share in (("top", top), ("bottom", bottom), ("random", random)) if share is not None
    ]
    if len(given) > 1:
        raise SafecritError(f"--{given[0][0]} and --{given[1][0]} exclude each other.")
    if not given:
        if match is not None:
            return "random", None
        if count is not None:
            return "top", None
        raise SafecritError("say which weights: --top 1%, --bottom 1%, --random 1%, or --count N.")
    if match is not None and given[0][0] != "random":
        raise SafecritError("--match goes with --random only.")
    return given[0]


def _score(
    model: str,
    judge: str | None,
    prompts: str | None,
    limit: int | None,
    max_new_tokens: int,
    batch_size: str,
    seed: int,
    work: Path,
    sink: Sink,
) -> Scores:
    from safecrit.api.judging import JudgeChoice
    from safecrit.api.score import run_score
    from safecrit.api.scorejob import ScoreJob, ScoreSettings, check_inputs
    from safecrit.errors import SafecritError
    from safecrit.generation import GenerationSettings
    from safecrit.relaxation import RelaxationSettings

    if judge is None or prompts is None:
        raise SafecritError("scoring a model needs both --judge and --prompts; a score folder needs neither.")
    batch = o.batch_size(batch_size)
    job = ScoreJob(
        model=model,
        judge=JudgeChoice(name=judge),
        prompts=prompts,
        limit=limit,
        generation=GenerationSettings(max_new_tokens=max_new_tokens, batch_size=batch),
        scoring=ScoreSettings(batch_size=batch, relaxation=RelaxationSettings(seed=seed)),
    )
    check_inputs(job)
    scores = run_score(job, work, sink.progress)
    for warning in scores.info["warnings"]:
        sink.warn(warning)
    return scores
