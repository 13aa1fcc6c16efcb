"""Merge a LoRA adapter trained elsewhere while a mask's weights stay bit-identical.

python examples/peft_merge.py MODEL MASK ADAPTER OUT
ADAPTER: a folder of PEFT's save_pretrained. On the command line: `safecrit merge`.
"""

import sys

import safecrit
from safecrit.adapter import merge_adapter
from safecrit.checkpoint import rewrite
from safecrit.models import load_model


def main(model_name: str, mask_file: str, adapter: str, out: str) -> None:
    mask = safecrit.Mask.load(mask_file)
    loaded = load_model(model_name)
    merged = merge_adapter(loaded, adapter, mask)
    rewrite(loaded.folder, out, merged.weights)
    assert safecrit.verify(out, loaded.folder, mask, "spa").ok


if __name__ == "__main__":
    main(*sys.argv[1:])
