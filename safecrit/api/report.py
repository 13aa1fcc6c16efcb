"""report: score folders, masks and results -> one page, every figure as PNG with its numbers as CSV."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from safecrit import figures, markup, plots
from safecrit.distribution import distribution
from safecrit.errors import MismatchError, SafecritError
from safecrit.files import write_text
from safecrit.maskfile import Mask
from safecrit.report import (
    LABELS,
    MAX_BYTES,
    Section,
    evaluation_section,
    page,
    samples_section,
    settings_table,
)
from safecrit.results import FORMAT as RESULTS
from safecrit.scorefile import Scores
from safecrit.selection import SelectionSettings, select
from safecrit.statistics import Rate
from safecrit.tables import (
    Group,
    ScoreGroup,
    mask_by_component,
    mask_by_layer_component,
    mask_by_layer_expert,
    scores_by_layer_component,
    scores_by_layer_expert,
)

PERTURBATION = "safecrit-perturbation"
Source = Scores | Mask | dict[str, Any]


def read_source(path: Path) -> Source:
    """A score folder, a mask file, or the results.json of a folder of `eval` or `perturb`; SafecritError for others."""
    if not path.exists():
        raise SafecritError(f"{path}: no such file or folder. Give a score folder, a mask, or a folder of results.")
    if path.is_dir() and (path / "score.json").is_file():
        return Scores.load(path)
    file = path / "results.json" if path.is_dir() else path
    if file.name.endswith(".json") and not file.name.endswith(".index.json") and file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SafecritError(f"{file}: is no JSON ({error}).") from error
        if not isinstance(found, dict) or found.get("format") not in (RESULTS, PERTURBATION):
            raise SafecritError(f"{file}: is no results.json of `safecrit eval` or `safecrit perturb`.")
        return found
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        raise SafecritError(f"{path}: holds no scores, no mask and no results. Give what score, mask or eval wrote.")
    return Mask.load(path)


def write_report(paths: Sequence[Path], folder: Path, *, top: str = "1%", show_text: bool = False) -> Path:
    """Write `folder`/report.html and figures/*.png, *.csv; the page's path.

    `top`: the share whose selection is shown for scores that come without a mask.
    Raises SafecritError for sources that cannot be read, MismatchError for a mask
    and scores of different weights.
    """
    sources = [(path, read_source(path)) for path in paths]
    pictures = folder / "figures"
    sections: list[Section] = []
    masks = [(path, source) for path, source in sources if isinstance(source, Mask)]
    several = len({type(source) for _, source in sources}) < len(sources)
    for number, (path, source) in enumerate(sources):
        label = f", {path.name}" if several else ""
        stem = f"{number + 1}_" if several else ""
        if isinstance(source, Scores):
            mask = next((mask for _, mask in masks if mask.info.fingerprint == source.fingerprint), None)
            if masks and mask is None:
                raise MismatchError(f"{path}: no mask given here is of these weights. Report them apart.")
            own = mask or select(source, SelectionSettings(share=top, allow_zero=True))
            sections += _scores(source, own, pictures, stem, label)
            if mask is None:
                sections += _mask(own, pictures, stem, f"{label}, top {top}")
        elif isinstance(source, Mask):
            sections += _mask(source, pictures, stem, label)
        elif source["format"] == PERTURBATION:
            sections.append(_perturbation(source, pictures, stem, label))
        else:
            sections.append(_evaluation(source, pictures, stem, label))
        if show_text and isinstance(source, dict):
            sections.append(_samples(path))
    document = page("safecrit report", [path.name for path in paths], sections)
    size = len(document.encode())
    if size > MAX_BYTES:
        raise SafecritError(f"the page would be {size:,} bytes, above {MAX_BYTES:,}. Report fewer sources at once.")
    write_text(folder / "report.html", document)
    return folder / "report.html"


def _scores(scores: Scores, mask: Mask, pictures: Path, stem: str, label: str) -> list[Section]:
    info = scores.info
    cells, experts = scores_by_layer_component(info["matrices"]), scores_by_layer_expert(info["matrices"])
    body = _score_map(cells, pictures / f"{stem}scores_by_component.png")
    if experts:
        body += "<h3>By expert</h3>" + _score_map(experts, pictures / f"{stem}scores_by_expert.png")
    largest = max((row["max_abs"] for row in info["matrices"]), default=0.0)
    found = distribution((scores.tensor(name) for name in scores.names), largest)
    threshold = _threshold(mask)
    plots.distribution_plot(pictures / f"{stem}distribution.png", found, threshold)
    spread = markup.histogram(found.bins, threshold)
    spread += (
        f'<p class="note">{scores.eligible:,} weights scored; {found.zero:,} score 0, {found.below:,} lie below the '
        "lowest bin.</p>"
    )
    sections = [Section(f"Where the scores are large{label}", body), Section(f"Distribution of ESI{label}", spread)]
    if stability := info.get("stability"):
        sections.append(_stability(stability, pictures / f"{stem}stability.png", label))
    kept = ("method", "objective", "estimator", "reduction", "relaxation", "tau", "draws", "seed", "dtype", "judged")
    settings = {"model": info.get("model"), "judge": info.get("judge"), **{k: info[k] for k in kept if k in info}}
    prompts = info.get("prompts") or {}
    settings["prompts"] = {"used": prompts.get("used"), "dropped": len(prompts.get("dropped") or [])}
    body = settings_table({key: value for key, value in settings.items() if value is not None})
    if info.get("warnings"):
        body += "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in info["warnings"]) + "</ul>"
    return [*sections, Section(f"How it was scored{label}", body)]


def _score_map(groups: Sequence[ScoreGroup], path: Path) -> str:
    figures.score_map(path, groups)
    cells = {(g.layer, g.expert if g.expert is not None else g.component or "other"): g.mean for g in groups}
    return markup.heat_map(cells, unit="mean |score| of a weight", percent=False, logarithmic=True)


def _mask_map(groups: Sequence[Group], path: Path) -> str:
    figures.mask_map(path, groups)
    cells = {
        (g.layer, g.expert if g.expert is not None else g.component or "other"): g.share
        for g in groups
        if g.eligible and g.share is not None
    }
    return markup.heat_map(cells, unit="share selected, % of the cell's weights", percent=True)


def _mask(mask: Mask, pictures: Path, stem: str, label: str) -> list[Section]:
    info = mask.info
    body = (
        f"<p>{mask.count:,} of {info.total:,} weights ({mask.count / info.total:.3%}), {escape(info.mode)}; "
        f"{info.eligible:,} were eligible.</p>"
    )
    body += _mask_map(mask_by_layer_component(mask), pictures / f"{stem}mask_by_component.png")
    if experts := mask_by_layer_expert(mask):
        body += "<h3>By expert</h3>" + _mask_map(experts, pictures / f"{stem}mask_by_expert.png")
    components = [group for group in mask_by_component(mask) if group.eligible]
    plots.component_shares(pictures / f"{stem}components.png", components)
    rows = [(str(g.component), g.of_selected, g.of_all) for g in components]
    shares = markup.pair_bars(rows, "of the selected", "of all weights")
    threshold = _threshold(mask)
    settings: dict[str, Any] = {
        "model": info.model,
        "fingerprint": info.fingerprint,
        "share": info.share,
        "share_of": info.share_of,
        "threshold": threshold,
        "seed": info.seed,
        "scoring": info.scoring,
        "prompts": len(info.prompt_hashes),
        "made_from": [f"{part['mode']} of {part['count']:,}" for part in info.made_from],
    }
    shown = {key: value for key, value in settings.items() if value not in (None, "", [], {})}
    return [
        Section(f"What is selected{label}", body),
        Section(f"Selected weights by component{label}", shares),
        Section(f"Settings of the mask{label}", settings_table(shown)),
    ]


def _threshold(mask: Mask) -> float | None:
    bits = mask.info.threshold_bits
    return None if bits is None else float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _stability(stability: Mapping[str, Any], path: Path, label: str) -> Section:
    plots.stability_plot(path, stability)
    rows = plots.stability_rows(stability)
    series = {
        kind: [(r[1], r[3], None, None) for r in rows if r[0] == kind] for kind in dict.fromkeys(r[0] for r in rows)
    }
    if rows:
        series["chance"] = [(r[1], r[4], None, None) for r in rows if r[0] == rows[0][0]]
    body = markup.curves(series, title="intersection over union, %", across="share selected", logarithmic=True)
    table = [(r[0], f"{100 * r[1]:g} %", f"{r[3]:.3f}", f"{r[4]:.4f}") for r in rows]
    return Section(f"Stability{label}", body + markup.table(("between", "share", "IoU", "by chance"), table))


def _rates(results: Mapping[str, Any]) -> dict[str, dict[str, Rate]]:
    shown = ("asr", "over_refusal", "utility")
    return {
        name: {key: Rate(**model[key]) for key in shown if model.get(key)} for name, model in results["models"].items()
    }


def _evaluation(results: Mapping[str, Any], pictures: Path, stem: str, label: str) -> Section:
    figures.rate_bars(pictures / f"{stem}evaluation.png", _rates(results), title="Evaluation")
    return evaluation_section(results, f"Evaluation{label}")


def _perturbation(results: Mapping[str, Any], pictures: Path, stem: str, label: str) -> Section:
    plots.perturbation_curves(pictures / f"{stem}perturbation.png", results)
    rows = plots.curve_rows(results)
    parts = []
    for name in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == name]
        series = {
            kind: [(r[2], r[6], r[7], r[8]) for r in own if r[1] == kind] for kind in dict.fromkeys(r[1] for r in own)
        }
        parts.append(markup.curves(series, title=f"{LABELS.get(name, name)}, %", across="noise r (sigma)"))
    body = f'<div class="curves">{"".join(parts)}</div>'
    header = ["weights", "r", "draw", "ASR", "refusal", "utility", "dS predicted", "dS measured"]
    table = []
    for arm in results["arms"]:
        model = results["models"][arm["name"]]
        shares = [
            "-" if not model.get(key) or model[key]["rate"] is None else f"{100 * model[key]['rate']:.1f} %"
            for key in ("asr", "refusal", "utility")
        ]
        change = [_change(arm["predicted"]), _change(arm["S"]["difference"])]
        table.append((arm["kind"], f"{arm['r']:g}", arm["draw"] + 1, *shares, *change))
    body += markup.table(header, table)
    body += "<h3>Settings</h3>" + settings_table({"judge": results["judge"], **results["settings"]})
    return Section(f"Perturbation test{label}", body)


def _change(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"


def _samples(path: Path) -> Section:
    file = (path if path.is_dir() else path.parent) / "samples.jsonl"
    if not file.is_file():
        raise SafecritError(f"{file}: no such file, which --show-text needs.")
    lines = file.read_text(encoding="utf-8").split("\n")
    return samples_section([json.loads(line) for line in lines if line.strip()])
