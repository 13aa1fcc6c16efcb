from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from safecrit import figures
from safecrit.statistics import wilson
from safecrit.tables import MatrixCount, group_counts, group_scores


def counts(layers: int, experts: int = 0, selected: int = 7) -> list[MatrixCount]:
    made = []
    for layer in range(layers):
        for expert in range(experts) if experts else [None]:
            for component in ("gate", "up", "down"):
                made.append(("mlp", layer, component, expert, 100, 100, selected * layer))
        made += [("q", layer, "q", None, 50, 50, layer % 3), ("norm", layer, "norm", None, 5, 0, 0)]
    made.append(("head", None, "head", None, 70, 70, 3))
    fields = ("tensor", "layer", "component", "expert", "weights", "eligible", "selected")
    return [MatrixCount(**dict(zip(fields, row, strict=True))) for row in made]  # type: ignore[arg-type]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize(("layers", "experts"), [(1, 0), (6, 0), (81, 0), (3, 8), (30, 128)])
def test_mask_maps_of_any_size(tmp_path: Path, layers: int, experts: int) -> None:
    by = ("layer", "expert") if experts else ("layer", "component")
    groups = group_counts(counts(layers, experts), by)  # type: ignore[arg-type]
    path = tmp_path / "map.png"
    figures.mask_map(path, groups)
    width, height = size(path)
    assert 600 <= width <= 2000 and 400 <= height <= 1600
    rows = read(tmp_path / "map.csv")
    assert len(rows) == len(groups)
    assert [int(row["selected"]) for row in rows] == [group.selected for group in groups]
    assert [row["share"] for row in rows] == [str(group.share) for group in groups]


def test_cells_are_the_shares_in_percent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = {}
    monkeypatch.setattr(figures, "_map", lambda path, cells, *rest, **options: drawn.update(cells))
    figures.mask_map(tmp_path / "map.png", group_counts(counts(2), ("layer", "component")))
    assert drawn[(1, "gate")] == pytest.approx(7.0)
    assert drawn[(None, "head")] == pytest.approx(100 * 3 / 70)
    assert (0, "norm") not in drawn  # nothing there could have been selected


def test_numbers_printed_in_cells() -> None:
    assert [figures._percent(v) for v in (0.0, 0.01, 0.05, 0.449, 100.0)] == ["0", "<0.1", "0.1", "0.4", "100.0"]
    assert [figures._scientific(v) for v in (0.0, 1.23e-7, 4e3)] == ["0", "1.2e-7", "4.0e3"]


@pytest.mark.parametrize("mean", [0.0, 1e-12, 3.0])
def test_score_maps(tmp_path: Path, mean: float) -> None:
    matrices = [
        {"layer": layer, "component": c, "numel": 4, "mean_abs": mean * 10**layer, "max_abs": 1.0}
        for layer in range(5)
        for c in ("v", "o")
    ]
    groups = group_scores(matrices, ("layer", "component"))
    figures.score_map(
        tmp_path / "esi.png", groups, title="a title far too long for the figure that it is put above, as they are"
    )
    assert size(tmp_path / "esi.png")[0] < 1300
    assert [float(row["mean"]) for row in read(tmp_path / "esi.csv")] == [group.mean for group in groups]


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    figures.mask_map(tmp_path / "a.png", [])
    figures.score_map(tmp_path / "b.png", [])
    figures.rate_bars(tmp_path / "c.png", {}, title="none")
    for name in "abc":
        size(tmp_path / f"{name}.png")
        assert read(tmp_path / f"{name}.csv") == []


def test_bars_and_their_numbers(tmp_path: Path) -> None:
    rates = {
        "base": {"asr": wilson(498, 500, "judged answers"), "utility": wilson(500, 500, "task prompts")},
        "an/other-model_with_a_very_long_name": {
            "asr": wilson(0, 500, "judged answers"),
            "over_refusal": wilson(0, 0, "none"),
        },
    }
    figures.rate_bars(tmp_path / "bars.png", rates, title="before and after")
    rows = read(tmp_path / "bars.csv")
    assert [(row["model"], row["figure"]) for row in rows] == [
        (m, f) for m, of_model in rates.items() for f in of_model
    ]
    assert float(rows[0]["low"]) == rates["base"]["asr"].low
    assert rows[-1]["rate"] == ""


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    groups = group_counts(counts(3), ("layer", "component"))
    for name in ("a.png", "b.png"):
        figures.mask_map(tmp_path / name, groups)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_matplotlib_is_imported_only_to_draw_and_the_users_settings_stay() -> None:
    code = """
import sys
import safecrit.figures
assert "matplotlib" not in sys.modules
import matplotlib, tempfile, pathlib
read = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if not key.startswith("backend")}
before = read()
safecrit.figures.score_map(pathlib.Path(tempfile.mkdtemp()) / "a.png", [])
assert read() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(figures.__file__).parents[1])
