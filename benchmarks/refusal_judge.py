"""The refusal judge against XSTest's hand labels: full refusal against full compliance.

    python benchmarks/refusal_judge.py COMPLETIONS.csv [...]

The patterns of `safecrit/judges/phrases.py` were written from the answers of
Mistral-instruct alone. Any other completions are a test only as long as nobody
changes the patterns after looking at them.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from safecrit.judges.refusal import RefusalJudge
from safecrit.statistics import wilson

REFUSAL, COMPLIANCE = "2_full_refusal", "1_full_compliance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["final_label"] in (REFUSAL, COMPLIANCE)]
        verdicts = RefusalJudge().judge([(row["prompt"], row["completion"]) for row in rows])
        pairs = [(v.refused is True, row["final_label"] == REFUSAL) for v, row in zip(verdicts, rows, strict=True)]
        rate = wilson(sum(said == true for said, true in pairs), len(pairs))
        missed = sum(true and not said for said, true in pairs)
        print(
            f"{path.name}: {rate.count} of {rate.n} right, {rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]; "
            f"{missed} refusals missed, {rate.n - rate.count - missed} answers called refusals"
        )


if __name__ == "__main__":
    main()
