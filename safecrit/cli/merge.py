"""`safecrit merge`: a LoRA adapter into its base model, but for the masked weights."""

from __future__ import annotations

from typing import Annotated

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink
from safecrit.cli.train import Save


def merge(
    context: typer.Context,
    model: o.ModelArgument,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="LoRA adapter as PEFT saves it: folder or Hub id.")],
    mask: o.MaskFile,
    output: o.OutputFolder = None,
    save: Save = "model",
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
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
    """Merge a LoRA adapter that was trained elsewhere and leave the masked weights bit-identical: W + (1 - M) scale BA.

    All other weights become what PEFT's own merge makes of them. The files written are verified at the end.
    """
    from safecrit.api.merge import check_inputs
    from safecrit.api.merge import merge as run
    from safecrit.errors import CheckFailed
    from safecrit.hub import push
    from safecrit.outputs import default_output, open_output

    sink = Sink(as_json=as_json, quiet=quiet)
    place, selected = check_inputs(model, adapter, mask, revision=revision, allow_other_weights=allow_other_weights)
    path = output or default_output("merge", model)
    folder = open_output(path, "merge", o.resolved(context), overwrite=overwrite, inside="safecrit")
    share = 100 * selected.count / selected.info.total
    sink.line(f"Merging {place.name}; {selected.count:,} of {selected.info.total:,} weights ({share:.4g} %) stay.")
    done = run(
        model,
        place,
        mask,
        folder.path,
        save=save,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        allow_other_weights=allow_other_weights,
        overwrite=True,
    )
    for warning in done.result.warnings:
        sink.warn(warning)
    sink.line(f"{done.result.changed:,} weights changed, by {done.result.mean_sigma:.3g} sigma in the mean.")
    sink.result(
        {
            "output": str(folder.path),
            "changed": done.result.changed,
            "verified": done.verified.to_json(),
            "warnings": done.result.warnings,
        }
    )
    if not done.verified.ok:
        raise CheckFailed(done.verified.message())
    folder.finish()
    sink.line(done.verified.message())
    sink.line(f"Output: {folder.path}")
    if push_to_hub:
        sink.line(f"Uploaded: {push(folder.path, push_to_hub, public=public)}")
