"""The page's marks carry the numbers of the CSV files; what a browser makes of it is looked at where there is one."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from safecrit.api.report import write_report
from safecrit.distribution import PER_DECADE, distribution
from safecrit.errors import SafecritError
from safecrit.evaluation import EvalPrompts, evaluate_model
from safecrit.judges.refusal import RefusalJudge
from safecrit.layout import Matrix, TensorLayout
from safecrit.markup import heat_map
from safecrit.prompts import Prompt
from safecrit.report import MAX_BYTES, page
from safecrit.results import EvalSettings, Evaluation, write_evaluation
from safecrit.scorefile import Scores, write_scores
from safecrit.selection import SelectionSettings, select
from safecrit.strided import Strided

SECRET = "how to do the bad thing"


def score_folder(folder: Path, layers: int = 3, experts: int = 4) -> Path:
    """Scores of a small mixture of experts, with stability."""
    generator, layouts, tensors, rows = torch.Generator().manual_seed(0), {}, {}, []
    for layer in range(layers):
        places = [("q", None), ("v", None), *(("up", e) for e in range(experts))]
        for component, expert in places:
            name, shape = f"layers.{layer}.{component}.{expert}", (8, 16)
            layouts[name] = TensorLayout(shape, (Matrix(component, layer, expert, Strided.whole(shape)),), True)
            value = torch.randn(shape, generator=generator) * 10.0**-layer
            tensors[name] = value
            rows.append(
                {
                    "name": name, "component": component, "layer": layer, "expert": expert, "numel": value.numel(),
                    "sigma": 1.0, "mean_abs": float(value.abs().mean()), "max_abs": float(value.abs().max()),
                    "nonzero": value.numel(),
                }
            )  # fmt: skip
    shares = [{"share": s, "k": 5, "iou": 0.5 + s, "chance": s / 2} for s in (0.01, 0.1)]
    info = {
        "matrices": rows, "method": "esi", "reduction": "signed", "objective": "log-odds", "warnings": ["<odd> & end"],
        "model": {"id": "m", "revision": None, "fingerprint": "sha256:1"}, "judge": {"id": "guard"},
        "prompts": {"used": 5, "dropped": [], "hashes": []}, "stability": {"halves": {"shares": shares}},
    }  # fmt: skip
    write_scores(folder, tensors.items(), layouts, info)
    return folder


def results_folder(folder: Path) -> Path:
    prompts = EvalPrompts(
        harmful=[Prompt(({"role": "user", "content": SECRET},), i, "kind & <b>", None) for i in range(4)],
        task=[Prompt(({"role": "user", "content": f"{i}+1"},), i, None, str(i + 1)) for i in range(3)],
    )
    judge = RefusalJudge()
    models = [
        evaluate_model(name, prompts, {"harmful": answers, "task": ["1", "2", "9"]}, judge, judge)
        for name, answers in (
            ("base", ["Sure, <script>"] * 4),
            ("<safer>", ["I cannot help with that."] * 3 + ["Sure"]),
        )
    ]
    write_evaluation(folder, Evaluation(models=models, settings=EvalSettings(), judge={"id": "x"}, baseline="base"))
    return folder


class Marks(HTMLParser):
    """Numbers on marks by section, all text, and every attribute that could reach a network."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[str]] = {}
        self.section, self.links, self.tags, self.text = "", [], [], ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "action", "data", "poster")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        if "data-v" in found:
            self.values.setdefault(self.section, []).append(str(found["data-v"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.section = data
        self.text += data


def column(path: Path, name: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    scores = score_folder(tmp_path / "scores")
    mask = tmp_path / "mask.safetensors"
    select(Scores.load(scores), SelectionSettings(share="5%")).save(mask)
    write_report([scores, mask, results_folder(tmp_path / "results")], tmp_path / "page")
    return tmp_path / "page"


def read(folder: Path) -> tuple[str, Marks]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    marks = Marks()
    marks.feed(text)
    assert not marks.open
    return text, marks


def test_the_page_stands_alone_and_holds_no_harmful_text(made: Path) -> None:
    text, marks = read(made)
    assert len(text.encode()) < MAX_BYTES
    assert all(link.startswith("#") or link == "data:," for link in marks.links)
    assert "script" not in marks.tags and "http" not in text and "@import" not in text and "url(" not in text
    assert SECRET not in text and "Sure" not in text
    assert "prefers-color-scheme:dark" in text and "<safer>" in marks.text and "<odd> & end" in marks.text


def test_marks_are_the_numbers_of_the_csv(made: Path) -> None:
    _, marks = read(made)
    figures = made / "figures"
    expected = {
        "Where the scores are large": column(figures / "scores_by_component.csv", "mean")
        + column(figures / "scores_by_expert.csv", "mean"),
        "Distribution of ESI": column(figures / "distribution.csv", "weights"),
        "What is selected": column(figures / "mask_by_component.csv", "share")
        + column(figures / "mask_by_expert.csv", "share"),
        "Selected weights by component": column(figures / "components.csv", "of_selected")
        + column(figures / "components.csv", "of_all"),
    }
    for section, numbers in expected.items():
        assert sorted(marks.values[section]) == sorted(numbers), section
    shown = set(marks.values["Evaluation"])
    assert set(column(figures / "evaluation.csv", "rate")) <= shown
    stability = column(figures / "stability.csv", "iou") + column(figures / "stability.csv", "chance")
    assert sorted(marks.values["Stability"]) == sorted(stability)
    names = {path.stem for path in figures.glob("*.png")}
    assert names == {path.stem for path in figures.glob("*.csv")} and len(names) == 8


def test_text_is_shown_on_demand_and_escaped(tmp_path: Path) -> None:
    write_report([results_folder(tmp_path / "r")], tmp_path / "page", show_text=True)
    _, marks = read(tmp_path / "page")
    assert SECRET in marks.text and "Sure, <script>" in marks.text and "script" not in marks.tags


def test_scores_alone_show_the_top_share(tmp_path: Path) -> None:
    write_report([score_folder(tmp_path / "s")], tmp_path / "page", top="5%")
    _, marks = read(tmp_path / "page")
    assert "top 5%" in marks.text and "threshold" in marks.text


def test_a_large_mixture_stays_below_the_limit() -> None:
    cells = {(layer, expert): 1.0 + layer + expert for layer in range(61) for expert in range(256)}
    text = heat_map(cells, unit="share", percent=True)
    assert text.count("<rect") == len(cells) and len(page("x", [], []).encode()) + 2 * len(text) < MAX_BYTES


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text("{}")
    for name in ("nothing", "empty", "x.json"):
        with pytest.raises(SafecritError, match=name):
            write_report([tmp_path / name], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_distribution_counts_every_weight_once() -> None:
    values = torch.tensor([0.0, 1e-20, 1e-3, -1.0, 0.5, 1.0, float("nan")])
    found = distribution([values[:3], values[3:]], 1.0)
    assert (found.zero, found.below, sum(n for _, _, n in found.bins)) == (1, 1, 4)
    low, high, count = found.bins[-1]
    assert count == 2 and high == 1.0 and low == pytest.approx(10 ** (-1 / PER_DECADE))
    assert distribution([torch.zeros(3)], 0.0).zero == 3


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("SAFECRIT_CHROMIUM") or next((p for n in names if (p := shutil.which(n))), None)
    if not found:
        pytest.skip("needs Chromium on the path, or its path in SAFECRIT_CHROMIUM")
    return found


@pytest.mark.parametrize(("width", "scheme"), [(1100, 1), (1100, 0), (390, 1)])
def test_in_a_browser_nothing_fails_and_nothing_sticks_out(made: Path, tmp_path: Path, width: int, scheme: int) -> None:
    text = (made / "report.html").read_text(encoding="utf-8")
    # Inside a frame, since no window is as narrow as a phone.
    wrapper = (
        f'<iframe width="{width}" height="800" srcdoc="{escape(text)}" onload="'
        "const d=this.contentDocument;document.title=JSON.stringify([d.defaultView.innerWidth,"
        'd.documentElement.scrollWidth,d.defaultView.getComputedStyle(d.body).backgroundColor])"></iframe>'
    )
    copy = tmp_path / "frame.html"
    copy.write_text(f"<!doctype html><title></title>{wrapper}", encoding="utf-8")
    done = subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1300,900", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    match = re.search(r"<title>(.*?)</title>", done.stdout)
    assert match
    inner, scroll, background = json.loads(match[1])
    assert scroll <= inner <= width
    assert background == ("rgb(255, 255, 255)" if scheme else "rgb(20, 23, 26)")
