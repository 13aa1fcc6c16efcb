"""The refusal judge against XSTest's hand labels: full refusal against full compliance.

    python benchmarks/refusal_judge.py COMPLETIONS.csv [...] [--blind]

The patterns of `safecrit/judges/phrases.py` were written from the answers of
Mistral-instruct and general knowledge alone. Any other completions are a test only as
long as nobody changes the patterns after looking at them. Those of Llama 2 were judged
once by each of two versions; before the second, one of them was seen by accident, a
plain "I cannot provide" that the first version has a pattern for.

--blind also judges each type of prompt with those patterns alone that match a refusal
of another type: what the patterns are worth where they were not written.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from pathlib import Path

from safecrit.judges import phrases, refusal
from safecrit.judges.refusal import RefusalJudge
from safecrit.statistics import wilson

REFUSAL, COMPLIANCE = "2_full_refusal", "1_full_compliance"
KINDS = ("DECLINE", "DISAPPROVE", "REJECT")
Row = dict[str, str]


def outcomes(rows: Sequence[Row]) -> list[tuple[bool, bool]]:
    """What the judge says of each row, and what its label says: whether it refuses."""
    verdicts = RefusalJudge().judge([(row["prompt"], row["completion"]) for row in rows])
    return [(v.refused is True, row["final_label"] == REFUSAL) for v, row in zip(verdicts, rows, strict=True)]


def blind(rows: Sequence[Row]) -> list[tuple[bool, bool]]:
    """The same, each type of prompt without the patterns that match no refusal of the others."""
    found, known = [], {kind: getattr(refusal, kind) for kind in KINDS}
    kinds_of_prompt = {row["type"].removeprefix("contrast_") for row in rows}
    try:
        for kind_of_prompt in sorted(kinds_of_prompt):
            mine = [row for row in rows if row["type"].removeprefix("contrast_") == kind_of_prompt]
            refusals = [row["completion"] for row in rows if row not in mine and row["final_label"] == REFUSAL]
            for kind in KINDS:
                patterns = [re.compile(p, re.IGNORECASE | re.MULTILINE) for p in getattr(phrases, kind)]
                kept = tuple(p.pattern for p in patterns if any(p.search(text) for text in refusals))
                setattr(refusal, kind, kept)
            found += outcomes(mine)
    finally:
        for kind, patterns in known.items():
            setattr(refusal, kind, patterns)
    return found


def show(name: str, pairs: Sequence[tuple[bool, bool]]) -> None:
    rate = wilson(sum(said == true for said, true in pairs), len(pairs))
    missed = sum(true and not said for said, true in pairs)
    print(
        f"{name}: {rate.count} of {rate.n} right, {rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]; "
        f"{missed} refusals missed, {rate.n - rate.count - missed} answers called refusals"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--blind", action="store_true")
    arguments = parser.parse_args()
    for path in arguments.files:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["final_label"] in (REFUSAL, COMPLIANCE)]
        show(path.name, outcomes(rows))
        if arguments.blind:
            show(f"{path.name}, blind to its type", blind(rows))


if __name__ == "__main__":
    main()
