"""Options that several commands share, and `--config`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from safecrit.api.judging import JudgeChoice
    from safecrit.chat import ChatSettings

TRANSIENT = {
    "output",
    "overwrite",
    "config",
    "as_json",
    "quiet",
    "debug",
    "push_to_hub",
    "public",
    "dry_run",
    "gpu_memory",
    "ranks",
    "dist_timeout",
    "parallel",
}
DIST_TIMEOUT_S = 1800


def check_dry(context: typer.Context) -> None:
    """UsageError where an option stands without the --dry-run that it belongs to."""
    from safecrit.errors import UsageError

    if context.params["ranks"] > 1:
        raise UsageError("--ranks goes with --dry-run alone; a run on several ranks is started by torchrun.")
    if context.params["gpu_memory"] is not None:
        raise UsageError("--gpu-memory goes with --dry-run alone; a run takes what the device has.")


def asked_ranks(context: typer.Context) -> int:
    """The ranks that a dry run is about: --ranks, or those that a launcher started."""
    from safecrit import faults

    ranks: int = context.params["ranks"]
    return int(os.environ["WORLD_SIZE"]) if ranks == 1 and faults.launched() else ranks


def _load_config(context: typer.Context, value: Path | None) -> Path | None:
    if value is None or context.resilient_parsing:
        return value
    import yaml

    from safecrit.errors import SafecritError

    try:
        content = yaml.safe_load(value.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SafecritError(f"--config {value}: cannot be read as YAML ({type(error).__name__}).") from error
    if not isinstance(content, dict):
        raise SafecritError(f"--config {value}: must hold named settings.")
    command = content.get("command")
    if command is not None and command != context.info_name:
        raise SafecritError(
            f"--config {value}: was written by `safecrit {command}`, this is `safecrit {context.info_name}`."
        )
    settings = content.get("config", content)
    if not isinstance(settings, dict):
        raise SafecritError(f"--config {value}: `config` must hold named settings.")
    known = {parameter.name for parameter in context.command.params}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise SafecritError(f"--config {value}: unknown settings {', '.join(unknown)}.")
    context.default_map = {**(context.default_map or {}), **settings}
    return value


def resolved(context: typer.Context) -> dict[str, Any]:
    """The command's settings as plain values, without those that do not change the result."""
    plain: dict[str, Any] = {}
    for name, value in sorted(context.params.items()):
        if name not in TRANSIENT:
            plain[name] = _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub id.")]
Judge = Annotated[str, typer.Option("--judge", metavar="JUDGE", help="Judge: a guard model's folder or Hub id.")]
Prompts = Annotated[
    str, typer.Option("--prompts", metavar="FILE", help="Harmful prompts: CSV, JSON, JSONL or a Hub id.")
]
MaskFile = Annotated[Path, typer.Option("--mask", metavar="MASK", help="Safety mask: file or Hub id.")]
OutputFolder = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Output folder. [default: safecrit-out/...]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of the same command.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="YAML", is_eager=True, callback=_load_config, help="Settings from a file; flags win."
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub revision of the model.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16, float16, float64.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all randomness.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N rows only.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
BatchSize = Annotated[str, typer.Option("--batch-size", help="Prompts at once; auto is 16.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a model brings along.")]
AllowOtherWeights = Annotated[
    bool, typer.Option("--allow-other-weights", help="Accept a mask made from other weights of the same shape.")
]
JudgeFormat = Annotated[
    str | None,
    typer.Option("--judge-format", metavar="PRESET", help="Ask the judge as this preset does, whatever its name."),
]
JudgeTemplate = Annotated[
    str | None,
    typer.Option(
        "--judge-template", metavar="TEXT", help="A text or file with {prompt} and {answer}: what the judge reads."
    ),
]
JudgeUrl = Annotated[
    str | None, typer.Option("--judge-base-url", metavar="URL", help="Server of an openai:NAME judge.")
]
RefusalPatterns = Annotated[
    Path | None,
    typer.Option(
        "--refusal-patterns",
        metavar="FILE",
        help="Further regular expressions that tell a refusal, one a line; # begins a comment.",
    ),
]
Controversial = Annotated[
    Literal["safe", "unsafe"], typer.Option("--controversial", help="The side of a judge's third verdict.")
]
SafeWord = Annotated[
    list[str] | None,
    typer.Option("--safe-word", help="Judge's word for a safe answer; repeatable. [default: the preset's, or safe]"),
]
UnsafeWord = Annotated[
    list[str] | None,
    typer.Option(
        "--unsafe-word", help="The judge's word for an unsafe answer; repeatable. [default: the preset's, or unsafe]"
    ),
]
VerdictPrefix = Annotated[
    str | None,
    typer.Option("--verdict-prefix", help="Text the judge writes before its verdict. [default: the preset's, or none]"),
]
SystemPrompt = Annotated[
    str | None, typer.Option("--system-prompt", metavar="TEXT", help="System turn for prompts that bring none.")
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option("--chat-template-kwargs", metavar="JSON", help="For the model's chat template, as a JSON object."),
]
ThinkEnd = Annotated[
    str | None,
    typer.Option("--think-end-token", metavar="TEXT", help="Ends a thought; what follows it is the answer judged."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would need, from config.json alone, and stop.")]
GpuMemory = Annotated[
    str | None, typer.Option("--gpu-memory", metavar="SIZE", help="With --dry-run: of a GPU, such as 24GiB.")
]
Ranks = Annotated[int, typer.Option("--ranks", min=1, help="With --dry-run: of a run on N ranks, what one needs.")]
PushToHub = Annotated[
    str | None, typer.Option("--push-to-hub", metavar="NAME", help="Upload the verified output to this Hub repository.")
]
Public = Annotated[bool, typer.Option("--public", help="Make that repository public; it is private otherwise.")]
Json = Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
DistTimeout = Annotated[
    float, typer.Option("--dist-timeout", min=1, help="Under torchrun: seconds that a rank waits for the others.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def batch_size(text: str) -> int:
    """A positive number, or `auto`."""
    from safecrit.errors import SafecritError

    if text == "auto":
        return 16
    if not text.isdigit() or int(text) < 1:
        raise SafecritError(f"--batch-size {text}: give a positive number or auto.")
    return int(text)


def judge_choice(settings: dict[str, Any], *, device: str, dtype: str = "auto", objective: Any = None) -> JudgeChoice:
    """The judge that `--judge` and its neighbours describe; what was not given stays None, so that presets decide."""
    from safecrit.api.judging import JudgeChoice
    from safecrit.judges.conversation import read_template
    from safecrit.judges.presets import GuardOptions
    from safecrit.judges.refusal import read_patterns

    patterns = settings["refusal_patterns"]
    template, safe, unsafe = (settings[name] for name in ("judge_template", "safe_word", "unsafe_word"))
    return JudgeChoice(
        name=settings["judge"],
        preset=settings["judge_format"],
        device=device,
        dtype=dtype,
        guard=GuardOptions(
            template=read_template(template) if template is not None else None,
            verdict_prefix=settings["verdict_prefix"],
            safe_words=tuple(safe) if safe else None,
            unsafe_words=tuple(unsafe) if unsafe else None,
            objective=objective,
        ),
        patterns=read_patterns(patterns) if patterns is not None else (),
        base_url=settings["judge_base_url"],
        controversial=settings["controversial"],
        trust_remote_code=settings["trust_remote_code"],
    )


def chat_settings(settings: dict[str, Any]) -> ChatSettings:
    """How the model's turns are shown, from `--system-prompt` and its neighbours."""
    import json

    from safecrit.chat import ChatSettings
    from safecrit.errors import SafecritError

    text = settings["chat_template_kwargs"]
    try:
        kwargs = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise SafecritError(f"--chat-template-kwargs: is no JSON ({error.msg} at {error.pos}).") from error
    if not isinstance(kwargs, dict):
        raise SafecritError("--chat-template-kwargs: give a JSON object, such as '{\"enable_thinking\": false}'.")
    return ChatSettings(
        system_prompt=settings["system_prompt"],
        template_kwargs=kwargs,
        think_end_token=settings["think_end_token"],
    )
