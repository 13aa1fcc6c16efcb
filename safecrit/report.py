"""The report page: one HTML file without scripts or network, light and dark, from sections of figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from safecrit import __version__, markup
from safecrit.statistics import Rate

MAX_BYTES = 2_000_000
SHOWN_SAMPLES = 50
LABELS = {
    "asr": "attack success rate (ASR)",
    "asr_coherent": "ASR, coherent answers",
    "asr_at_n": "ASR, any of n samples",
    "refusal": "refusal of harmful prompts",
    "over_refusal": "over-refusal",
    "utility": "utility",
    "incoherent": "incoherent answers",
}


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, as HTML."""

    title: str
    body: str


def page(title: str, sources: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document; `sources` are the names of what it was made from."""
    toc = "".join(f'<li><a href="#s{n}">{escape(s.title)}</a></li>' for n, s in enumerate(sections))
    body = "".join(
        f'<section id="s{n}"><h2>{escape(section.title)}</h2>{section.body}</section>'
        for n, section in enumerate(sections)
    )
    made = ", ".join(f"<code>{escape(source)}</code>" for source in sources)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>Made by safecrit {__version__} from {made}.</p><ul>{toc}</ul>{body}"
        "</main></body></html>\n"
    )


def settings_table(settings: Mapping[str, Any]) -> str:
    """Names and values, nested ones as `outer.inner`; lists of more than eight are counted, empty values left out."""
    rows = [(key, shown) for key, value in _flat(settings) if (shown := _plain(value))]
    return markup.table(("setting", "value"), rows)


def evaluation_section(results: Mapping[str, Any], title: str = "Evaluation") -> Section:
    """Before and after with intervals, paired tests, categories, what failed and the settings."""
    keys = [*LABELS, *(k for m in results["models"].values() for k in m if k.startswith("asr_at_"))]
    rates = {
        name: {key: Rate(**figures[key]) for key in dict.fromkeys(keys) if figures.get(key)}
        for name, figures in results["models"].items()
    }
    labels = LABELS | {key: f"ASR, any of {key.removeprefix('asr_at_')} samples" for key in keys if key not in LABELS}
    parts = [markup.rate_bars(rates, labels), '<p class="note">Whiskers: Wilson intervals.</p>']
    if results["paired"]:
        rows = [
            (
                f"{row['model']} - {row['baseline']}",
                labels.get(row["figure"], row["figure"]),
                _points(row["difference"], sign=True),
                f"{_points(row['low'], sign=True)} to {_points(row['high'], sign=True)}",
                "-" if row["p"] is None else f"{row['p']:.2g}",
                row["n"],
            )
            for row in results["paired"]
        ]
        header = ("compared", "figure", "difference, points", "interval", "McNemar p", "prompts")
        parts += ["<h3>Prompt by prompt</h3>", markup.table(header, rows)]
    categories = [
        (name, category, f"{_points(rate['rate'])} %", f"{_points(rate['low'])} to {_points(rate['high'])}", rate["n"])
        for name, figures in results["models"].items()
        for category, rate in figures.get("asr_by_category", {}).items()
    ]
    if categories:
        parts += ["<h3>ASR by category</h3>"]
        parts.append(markup.table(("model", "category", "ASR", "interval", "answers"), categories))
    if results["problems"]:
        parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in results["problems"]) + "</ul>")
    parts += ["<h3>Settings</h3>", settings_table({"judge": results["judge"], **results["settings"]})]
    return Section(title, "".join(parts))


def samples_section(samples: Sequence[Mapping[str, Any]]) -> Section:
    """Prompts and answers as they are: for `--show-text` alone."""
    shown = samples[:SHOWN_SAMPLES]
    rows = [(s["model"], s["set"], s["verdict"] or "", s["prompt"], s["answer"][:600]) for s in shown]
    note = f'<p class="note">The first {len(shown)} of {len(samples)}. May contain harmful text.</p>'
    return Section("Answers", note + markup.table(("model", "set", "verdict", "prompt", "answer"), rows))


def _points(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{100 * value:{'+' if sign else ''}.1f}"


def _flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            found += _flat(entry, f"{before}{key}.")
        elif isinstance(entry, list) and entry and isinstance(entry[0], Mapping):
            found += _flat({str(n): inner for n, inner in enumerate(entry, 1)}, f"{before}{key}.")
        else:
            found.append((f"{before}{key}", entry))
    return found


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} entries" if len(value) > 8 else ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


STYLE = """
:root{--bg:#fff;--ink:#1b1f24;--soft:#5c6670;--line:#d9dee3;--map:#0b5cad;--on:#fff;--track:#eef1f4;
--c0:#0072b2;--c1:#b97a00;--c2:#00805e;--mark:#c04000}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--ink:#e8eaed;--soft:#a2abb4;--line:#353b42;--map:#7cc4ff;--on:#0c1116;
--track:#262c32;--c0:#58b7ee;--c1:#f0b23c;--c2:#3fcfa2;--mark:#ff8c4c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.3rem 0}h2{font-size:1.25rem;margin:2.2rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1.02rem;margin:1.4rem 0 .4rem}h4{font-size:.92rem;margin:1rem 0 .2rem}
a{color:var(--c0)}code{overflow-wrap:anywhere}.note{color:var(--soft);font-size:.88rem;margin:.3rem 0}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.88rem}
th,td{padding:.22rem .7rem .22rem 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}td.long{overflow-wrap:anywhere;max-width:28rem}
svg text{font:11px system-ui,sans-serif;fill:var(--ink)}svg .m,svg .on{text-anchor:middle}svg .e{text-anchor:end}
svg .on{fill:var(--on)}.map rect{fill:var(--map);stroke:var(--line);stroke-width:.3}
.plot{width:100%;max-width:34rem;height:auto;display:block}.plot rect{fill:var(--c0)}
.plot .grid{stroke:var(--line)}.plot .mark{stroke:var(--mark);stroke-width:2}
.plot polyline{fill:none;stroke-width:2}.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}
.d0{fill:var(--c0)}.d1{fill:var(--c1)}.d2{fill:var(--c2)}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1rem}
.curve{margin:0}figcaption{font-weight:600;font-size:.92rem}
.legend{font-size:.85rem;display:flex;gap:1rem;flex-wrap:wrap}
.legend span::before{content:"";display:inline-block;width:.8rem;height:.25rem;margin-right:.35rem;
vertical-align:middle}
.k0::before{background:var(--c0)}.k1::before{background:var(--c1)}.k2::before{background:var(--c2)}
.bar{display:grid;grid-template-columns:11rem 1fr 15rem;gap:.6rem;align-items:center;font-size:.88rem;margin:.15rem 0}
.bar span{overflow-wrap:anywhere}.track{position:relative;height:1rem;background:var(--track);display:block}
.track i{position:absolute;left:0;top:0;bottom:0;background:var(--c0)}.track.other i{background:var(--c1)}
.track b{position:absolute;top:.4rem;height:.2rem;min-width:2px;background:var(--ink)}
@media(max-width:40rem){.bar{grid-template-columns:1fr;gap:0;margin:.5rem 0}}
"""
