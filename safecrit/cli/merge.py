"""`safecrit merge`: a LoRA adapter merged into its base model, all but the masked weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink


def merge(
    context: typer.Context,
    model: o.ModelArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="LoRA adapter folder, as PEFT saves it.")],
    mask: o.MaskFile,
    output: o.OutputFolder = None,
    revision: o.Revision = None,
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    allow_other_weights: o.AllowOtherWeights = False,
    push_to_hub: o.PushToHub = None,
    public: o.Public = False,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Merge a LoRA adapter while the masked weights keep their bits: W + (1 - M) * scale * BA.

    Every other weight is what PEFT's own merge makes of it. The files written are verified at the end.
    """
    from safecrit.adapter import adapter_headline
    from safecrit.api.merge import MergeJob, check_merge, run_merge
    from safecrit.errors import CheckFailed
    from safecrit.hub import push
    from safecrit.outputs import default_output, open_output

    sink = Sink(as_json=as_json, quiet=quiet)
    job = MergeJob(
        model=model,
        adapter=adapter,
        mask=mask,
        revision=revision,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_other_weights=allow_other_weights,
    )
    check_merge(job)
    path = output or default_output("merge", model)
    folder = open_output(path, "merge", o.resolved(context), overwrite=overwrite, inside="safecrit")
    merged, report = run_merge(job, folder.path)
    for warning in merged.warnings:
        sink.warn(warning)
    sink.line(f"{adapter_headline(merged.adapter, merged.held)}.")
    sink.result(
        {
            "output": str(folder.path),
            "changed": merged.changed,
            "held": merged.held,
            "verified": report.to_json(),
            "warnings": merged.warnings,
        }
    )
    if not report.ok:
        raise CheckFailed(report.message())
    folder.finish()
    sink.line(report.message())
    sink.line(f"Output: {folder.path}")
    if push_to_hub:
        sink.line(f"Uploaded: {push(folder.path, push_to_hub, public=public)}")
