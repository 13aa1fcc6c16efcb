"""An evaluation in a model card: figures with intervals and denominators, and the Hub's `model-index`.

The section stands between two comments, so that a later evaluation takes its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safecrit.errors import SafecritError
from safecrit.files import write_text
from safecrit.modelcard import FRONT_MATTER, LIMITS
from safecrit.results import FORMAT

_BEGIN, _END = "<!-- safecrit evaluation -->", "<!-- end of safecrit evaluation -->"
_INDEX = re.compile(r"^model-index:\n(?:[ -].*\n)*", re.MULTILINE)
_THIS = "this model"
_RATES = {
    "asr": ("attack success", "prompts"),
    "asr_coherent": ("attack success, coherent answers", "prompts"),
    "refusal": ("refusal of harmful prompts", "prompts"),
    "over_refusal": ("over-refusal", "benign"),
    "utility": ("utility", "task"),
}
"""Shares of results.json: how the card calls them, and which file of prompts they are of."""


def read_results(path: Path) -> dict[str, Any]:
    """The results.json of a folder of `safecrit eval`; SafecritError where there is none."""
    file = path / "results.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SafecritError(f"{file}: cannot be read ({error}). Give an output folder of `safecrit eval`.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise SafecritError(f"{file}: is no results.json of `safecrit eval`.")
    return found


def evaluated(results: Mapping[str, Any], fingerprint: str, path: Path) -> str:
    """The name in `results` (of the folder `path`) of the model with this fingerprint, else SafecritError."""
    for name, model in (results["settings"].get("models") or {}).items():
        if model.get("fingerprint") == fingerprint:
            return str(name)
    raise SafecritError(
        f"{path}: evaluates {', '.join(results['models'])}, not the model to be trained. Evaluate that one, or leave "
        "--results out and add figures afterwards with `safecrit eval OUTPUT --card`."
    )


def add_evaluation(card: Path, results: Mapping[str, Any], name: str, about: str = _THIS) -> None:
    """Write the figures of the model `name` in `results`, and its baseline's, into the file `card`."""
    text = card.read_text(encoding="utf-8")
    section = f"{_BEGIN}\n\n{evaluation_section(results, name, about)}\n\n{_END}"
    old = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if old.search(text):
        text = old.sub(lambda _: section, text)
    elif LIMITS in text:
        text = text.replace(LIMITS, f"{section}\n\n{LIMITS}", 1)
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    if (front := FRONT_MATTER.match(text)) and about == _THIS:
        lines = _INDEX.sub("", front.group(1) + "\n") + _model_index(results, name, card.parent.name)
        text = f"---\n{lines}---\n{text[front.end() :]}"
    write_text(card, text)


def evaluation_section(results: Mapping[str, Any], name: str, about: str) -> str:
    """Figures with intervals and denominators as Markdown: `name`, called `about`, and the baseline."""
    baseline, settings = results.get("baseline"), results["settings"]
    shown = {about: results["models"][name]}
    if baseline is not None and baseline != name:
        shown = {f"baseline `{baseline}`": results["models"][baseline]} | shown
    labels, judge = _rate_names(results["models"][name]), str(results["judge"].get("id"))
    lines = [f"| figure | {' | '.join(shown)} | of |", f"|---|{'--:|' * len(shown)}---|"]
    for key, label in labels.items():
        rates = [figures.get(key) for figures in shown.values()]
        counted = dict.fromkeys(f"{rate['n']:,} {rate['denominator']}" for rate in rates if rate)
        lines.append(f"| {label} | {' | '.join(map(_share, rates))} | {' / '.join(counted)} |")
    notes = [
        f"Judge: `{_short(judge)}`; judge failures: "
        f"{sum(found['count'] for found in results['models'][name]['judge_failures'].values())}. "
        f"Files: {', '.join(f'`{file}`' for file in settings.get('files', {}).values()) or 'answers made elsewhere'}. "
        f"Answers of at most {settings.get('max_new_tokens')} tokens."
    ]
    notes += [
        f"{labels[row['figure']].capitalize()} against the baseline: {100 * row['difference']:+.1f} points "
        f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}], exact McNemar p = {row['p']:.2g} (n = {row['n']:,})."
        for row in results["paired"]
        if row["model"] == name and row["difference"] is not None
    ]
    found = [*results["warnings"], *results["problems"]]
    notes += [f"**Warning:** {warning.replace(judge, _short(judge))}." for warning in found]
    heading = f"## Evaluation{'' if about == 'this model' else f' of the {about}'}"
    parts = [heading, "Shares with 95 % Wilson intervals (`safecrit eval`).", "\n".join(lines)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def _rate_names(figures: Mapping[str, Any]) -> dict[str, str]:
    several = {key: f"attack success at {key.removeprefix('asr_at_')}" for key in figures if key.startswith("asr_at_")}
    return {key: label for key, (label, _) in _RATES.items() if key in figures} | several


def _share(rate: Mapping[str, Any] | None) -> str:
    if rate is None or rate["rate"] is None:
        return "-"
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _short(name: str) -> str:
    """A folder's own name, since a path says more than others should read."""
    return Path(name).name if Path(name).exists() else name


def _model_index(results: Mapping[str, Any], name: str, model: str) -> str:
    """The Hub's `model-index`, one entry a figure; YAML."""
    files = results["settings"].get("files", {})
    lines = ["model-index:", f"- name: {json.dumps(model)}", "  results:"]
    for key, (label, source) in _RATES.items():
        rate = results["models"][name].get(key)
        if rate is None or rate["rate"] is None:
            continue
        data = files.get(source) or files.get("benign") or "answers made elsewhere"
        lines += [
            "  - task:",
            "      type: text-generation",
            f"    dataset: {{name: {json.dumps(data)}, type: {json.dumps(Path(data).stem)}}}",
            f"    metrics: [{{type: {key}, name: {json.dumps(label)}, value: {rate['rate']:.6g}}}]",
        ]
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""
