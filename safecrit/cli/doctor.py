"""`safecrit doctor`: the environment, the backends with reasons, every op run against its reference."""

from __future__ import annotations

from safecrit.cli import options as o
from safecrit.cli.sink import Sink


def doctor(as_json: o.Json = False, quiet: o.Quiet = False, debug: o.Debug = False) -> None:
    """Check the installation: versions, devices, and every kernel against its reference. Exit 3 where one is wrong."""
    from dataclasses import asdict

    from safecrit import ops
    from safecrit.doctor import check_ops, facts
    from safecrit.errors import CheckFailed

    sink = Sink(as_json=as_json, quiet=quiet)
    about = facts()
    for name, value in about:
        sink.line(f"{name:<15}{value}")
    sink.line()
    rows = ops.backends()
    checks = {(check.op, check.backend): check for check in check_ops()}
    table = []
    for row in rows:
        check = checks.get((row.op, row.backend))
        state = "-" if check is None else "ok" if check.ok else "WRONG"
        if row.available or row.reason != "no such kernel":
            table.append((row.op, row.backend, state, check.detail if check and not check.ok else row.reason))
    sink.table("Operations and backends", ("operation", "backend", "check", "why"), table)
    wrong = [check for check in checks.values() if not check.ok]
    sink.result(
        {
            "facts": dict(about),
            "backends": [asdict(row) for row in rows],
            "checks": [asdict(check) for check in checks.values()],
        }
    )
    if wrong:
        first = wrong[0]
        raise CheckFailed(
            f"{len(wrong)} kernels are wrong here, first {first.op} on {first.backend}: {first.detail}. "
            "Use SAFECRIT_NATIVE=OFF when installing, and please report it."
        )
    sink.line(f"All {len(checks)} checks passed.")
