"""What a score job asks for, read from config.json, tokenizers and prompts: the plan, and the account that suits it.

No weight is read. Answers that are yet to be made count with the most tokens that they may have.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from safecrit import distributed
from safecrit.account import Account, ScorePlan, decide, largest_batches, score_account
from safecrit.api.answering import split_example
from safecrit.api.scorejob import ScoreJob, check_settings
from safecrit.chat import encode_continuation, encode_prompt, render_prompt
from safecrit.errors import SafecritError
from safecrit.judges.conversation import chat_layout, text_layout
from safecrit.judges.guard import PLAIN_TEMPLATE
from safecrit.machine import device_free, host_free, parse_bytes
from safecrit.metamodel import ModelShape, read_shape
from safecrit.models import DTYPES, load_tokenizer, pick_device, resolve_folder
from safecrit.prompts import Prompt, given_answer_column, read_prompts, read_rows
from safecrit.relaxation import CHUNK_BYTES
from safecrit.scoring import SENT_BYTES
from safecrit.traindata import read_examples

if TYPE_CHECKING:
    from safecrit.api.judging import JudgeChoice

GPUS_A_HOST = 8  # assumed
_DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found: shapes, tokens of each prompt (ascending), bytes free by place.

    account: of the batch sizes asked for, with `auto` settings as the largest batches that fit need them.
    best: the account of those batches, None where nothing fits.
    """

    model: ModelShape
    judge: ModelShape | None
    device: torch.device
    available: dict[str, int]
    prompt_tokens: list[int]
    account: Account
    best: Account | None
    first_prompt: str


def settled(job: ScoreJob) -> ScorePlan:
    """The plan of a job on this machine, its `auto` settings decided: placement, accumulate_on, checkpointed."""
    return survey(job).account.plan


def survey(job: ScoreJob, *, ranks: int | None = None, gpu_memory: str | None = None, output: Path = Path()) -> Survey:
    """Read all but weights, and decide what is left to decide; see `dryrun.dry_run`. ranks: None for those that run."""
    check_settings(job)
    _check_choices(job)
    scoring, chat = job.scoring, job.generation.chat
    reader = job.judge if job.judged and job.judge is not None and job.judge.is_model else None
    prompts, texts = _asked(job)
    folder = description_folder(job.model, job.revision)
    model = read_shape(folder, trust_remote_code=job.trust_remote_code, include=job.include, exclude=job.exclude)
    tokenizer = load_tokenizer(folder, trust_remote_code=job.trust_remote_code)
    counts = sorted(len(encode_prompt(tokenizer, list(prompt.messages), chat=chat)) for prompt in prompts)
    judge, read = (None, [0]) if reader is None else _read_judge(reader, prompts)
    answer = job.generation.max_new_tokens
    if texts is not None:
        answer = max([1, *(len(encode_continuation(tokenizer, text, plain=True)) for text in texts)])
    if model.window is not None:
        answer = max(1, min(answer, model.window - counts[-1]))
    device = torch.device("cuda") if gpu_memory is not None else pick_device(job.device)
    plan = ScorePlan(
        prompts=len(prompts) * (job.samples if job.sampled else 1),
        prompt_tokens=counts[-1],
        answer_tokens=answer,
        judge_tokens=max(read) + answer,
        mean_prompt_tokens=sum(counts) / len(counts),
        mean_judge_tokens=sum(read) / len(read) + answer,
        batch_size=scoring.batch_size,
        judge_batch_size=scoring.judge_batch_size,
        draws=1 if job.sampled else scoring.relaxation.effective_draws,
        itemsize=_itemsize(job.dtype, model),
        judge_itemsize=_itemsize(reader.dtype, judge) if reader is not None and judge is not None else 2,
        score_itemsize=DTYPES[job.score_dtype].itemsize,
        accumulate_on=scoring.accumulate_on,  # type: ignore[arg-type]
        checkpointed=scoring.checkpoint,  # type: ignore[arg-type]
        cpu=device.type == "cpu",
        given_answers=texts is not None,
        one_by_one=scoring.reduction != "signed" or scoring.method == "fisher",
        chunk_bytes=CHUNK_BYTES,
        sent_bytes=SENT_BYTES,
    )
    local = distributed.current().local_world if ranks is None else sharers(device, ranks)
    available = available_bytes(device, gpu_memory, output, local)
    available["disk"] //= local
    account = _placed(model, judge, plan, scoring.placement, available)
    # The account at hand has `auto` decided for these batch sizes; smaller ones decide anew.
    undecided = replace(account.plan, accumulate_on=plan.accumulate_on, checkpointed=plan.checkpointed)
    room = (available["device"], available["host"])
    # Smaller batches may allow better choices than the last resort of the batches asked for.
    best = largest_batches(model, judge, undecided, *room)
    if best is not None:
        same = replace(best.plan, batch_size=plan.batch_size, judge_batch_size=plan.judge_batch_size)
        account = score_account(model, judge, same)
    return Survey(
        model=model,
        judge=judge,
        device=device,
        available=available,
        prompt_tokens=counts,
        account=account,
        best=best,
        first_prompt=render_prompt(tokenizer, chat.turns(prompts[0].messages), template_kwargs=chat.template_kwargs),
    )


def description_folder(name: str, revision: str | None) -> Path:
    """The folder that holds a model's configuration and tokenizer; of a Hub id these files alone are fetched."""
    if Path(name).expanduser().exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return resolve_folder(name, revision=revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_DESCRIPTION))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SafecritError(
            f"{name}: no such folder, and its config.json could not be fetched from the Hub ({type(error).__name__}). "
            "Check the name, the network and, for gated or private models, `hf auth login`."
        ) from error


def sharers(device: torch.device, ranks: int) -> int:
    """Of so many ranks those that share a host where the hosts are not known: all on a CPU, of GPUs eight at most."""
    return ranks if device.type == "cpu" else min(ranks, GPUS_A_HOST)


def available_bytes(device: torch.device, gpu_memory: str | None, output: Path, local: int) -> dict[str, int]:
    """Bytes that one of `local` ranks of this host can have, by place; of the disk that `output` is on, all."""
    own = parse_bytes(gpu_memory) if gpu_memory is not None else device_free(device)
    above = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    return {
        "device": own // local if device.type == "cpu" else own,
        "host": host_free() // local,
        "disk": shutil.disk_usage(above).free,
    }


def _read_judge(choice: JudgeChoice, prompts: Sequence[Prompt]) -> tuple[ModelShape, list[int]]:
    """The judge's shape, and the tokens of each conversation as it reads it, the answer left out."""
    folder = description_folder(choice.model, choice.revision)
    tokenizer = load_tokenizer(folder, trust_remote_code=choice.trust_remote_code)
    settings = choice.settings()
    if settings.template is None and tokenizer.chat_template is not None:
        layout = chat_layout(tokenizer, settings, choice.name)
    else:
        layout = text_layout(tokenizer, settings.template or PLAIN_TEMPLATE, choice.name)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    frame = sum(map(count, (layout.before, layout.between, layout.after + settings.verdict_prefix)))
    shape = read_shape(folder, trust_remote_code=choice.trust_remote_code)
    return shape, [frame + count(prompt.conversation) for prompt in prompts]


def _asked(job: ScoreJob) -> tuple[list[Prompt], list[str] | None]:
    """The prompts, and their answers where they are given."""
    if job.data is not None:
        pairs = [split_example(example, job.data) for example in read_examples(job.data, job.limit).examples]
        return [prompt for prompt, _ in pairs], [text for _, text in pairs]
    if job.prompts is None:
        raise SafecritError("--method magnitude reads the weights alone: without --prompts there is nothing to survey.")
    prompts = read_prompts(job.prompts, job.limit)
    if job.scoring.objective == "refusal-nll":
        return prompts, [job.refusal]
    if job.answers is None:
        return prompts, None
    rows = read_rows(job.answers)
    column = given_answer_column(rows, job.answers)
    return prompts, [str(row[column] or "") for row in rows]


def _placed(
    model: ModelShape, judge: ModelShape | None, plan: ScorePlan, placement: str, available: dict[str, int]
) -> Account:
    """The account under `placement`; `auto` is together where that fits, else in turns."""
    room = (available["device"], available["host"])
    if placement == "auto":
        account = decide(model, judge, plan, *room)
        return (
            account
            if plan.cpu or judge is None or account.fits(*room)
            else _placed(model, judge, plan, "sequential", available)
        )
    if placement in ("together", "sequential"):
        return decide(model, judge, replace(plan, placement=placement), *room)  # type: ignore[arg-type]
    try:
        on_cpu = torch.device(placement).type == "cpu"
    except RuntimeError as error:
        raise SafecritError(
            f"--judge-placement {placement}: unknown. Use auto, together, sequential or a device such as cuda:1."
        ) from error
    return decide(model, judge, replace(plan, placement="separate", judge_cpu=on_cpu), *room)


def _check_choices(job: ScoreJob) -> None:
    known: list[tuple[str, str, tuple[str, ...]]] = [
        ("--accumulate-on", job.scoring.accumulate_on, ("auto", "device", "host", "disk")),
        ("--checkpoint-activations", job.scoring.checkpoint, ("auto", "on", "off")),
        ("--dtype", job.dtype, ("auto", *DTYPES)),
    ]
    for flag, value, values in known:
        if value not in values:
            raise SafecritError(f"{flag} {value}: unknown. Use {', '.join(values)}.")


def _itemsize(dtype: str, shape: ModelShape) -> int:
    return shape.itemsize if dtype == "auto" else DTYPES[dtype].itemsize
