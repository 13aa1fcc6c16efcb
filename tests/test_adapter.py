from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safecrit.adapter import merge_adapter
from safecrit.anatomy import read_anatomy
from safecrit.checkpoint import rewrite
from safecrit.errors import MismatchError, SafecritError
from safecrit.lora import LoraSettings, TrainedAdapter, train_adapter
from safecrit.models import LoadedModel, load_model
from safecrit.protection import protect
from safecrit.sparse import SparseAdamW
from safecrit.tensorfile import bits_of
from safecrit.trainloop import TrainSettings
from safecrit.verification import verify
from tests.architectures import build
from tests.training_helpers import fitting_mask, folder_model, pairs, random_mask

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]


def adapter(model: Any, folder: Path, **settings: Any) -> Path:
    """An adapter folder as PEFT saves it, every trained weight away from its start."""
    torch.manual_seed(3)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"} | settings
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.1)
    wrapped.save_pretrained(folder)
    return folder


def merged_by_peft(folder: Path, adapter_folder: Path) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(load_model(folder).model, adapter_folder).merge_and_unload()
    return dict(model.named_parameters())


def check(loaded: LoadedModel, adapter_folder: Path, out: Path, share: float = 0.3) -> int:
    """Merge, write, and compare every entry with the base and with PEFT's own merge; the entries held."""
    mask = fitting_mask(loaded, share)
    merged = merge_adapter(load_model(loaded.folder), adapter_folder, mask)
    rewrite(loaded.folder, out, merged.weights)
    assert verify(out, loaded.folder, mask, "spa").ok
    written, base, theirs = (
        load_model(out).model,
        load_model(loaded.folder).model,
        merged_by_peft(loaded.folder, adapter_folder),
    )
    anatomy, moved = read_anatomy(base), 0
    for name, tensor in anatomy.tensors.items():
        ours, old, peft_s = (
            torch.from_numpy(bits_of(tensor.source.of(dict_[tensor.parameter].detach())).astype("int64"))
            for dict_ in (dict(written.named_parameters()), dict(base.named_parameters()), theirs)
        )
        where = mask.dense(name).reshape(-1) if name in mask.indices else torch.zeros(len(ours), dtype=torch.bool)
        assert torch.equal(ours[where], old[where]), name
        assert torch.equal(ours[~where], peft_s[~where]), name
        moved += int((ours != old).sum())
    assert merged.changed == moved > 0
    return merged.held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "mixtral"])
def test_merge_equals_pefts_outside_the_mask_and_the_base_inside(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = folder_model(name, tmp_path / "base", dtype=dtype)
    assert check(loaded, adapter(loaded.model, tmp_path / "adapter"), tmp_path / "out") > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_variants_that_peft_merges(settings: dict[str, Any], tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    assert check(loaded, adapter(loaded.model, tmp_path / "adapter", **settings), tmp_path / "out") > 0


def test_adapters_on_fused_experts(tmp_path: Path) -> None:
    loaded = folder_model("mixtral", tmp_path / "base")
    targets = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    assert check(loaded, adapter(loaded.model, tmp_path / "adapter", **targets), tmp_path / "out") > 0


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    mask = fitting_mask(loaded, 0.3)
    good = adapter(loaded.model, tmp_path / "adapter")

    def refuse(folder: Path, match: str) -> None:
        with pytest.raises(SafecritError, match=match):
            merge_adapter(load_model(loaded.folder), folder, mask)

    refuse(tmp_path, "has no adapter_config.json")
    refuse(adapter(build("gpt2"), tmp_path / "gpt2"), "the model it was made on")
    config = json.loads((good / "adapter_config.json").read_text())
    for name, change, match in (
        ("ia3", {"peft_type": "IA3"}, "only LORA"),
        ("alora", {"alora_invocation_tokens": [5, 6]}, "activated LoRA"),
        ("layers", {"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ("fewer", {"target_modules": ["q_proj"]}, "does not fit"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes())
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        refuse(folder, match)
    broken = adapter(loaded.model, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    save_file({name: weight * float("nan") for name, weight in weights.items()}, broken / "adapter_model.safetensors")
    refuse(broken, "not finite")
    with pytest.raises(MismatchError):
        merge_adapter(load_model(loaded.folder), good, random_mask(build("mixtral"), 0.3))


def test_a_trained_copy_of_a_tied_head_is_refused(tmp_path: Path) -> None:
    loaded = folder_model("gpt2", tmp_path / "base")
    assert loaded.model.config.tie_word_embeddings
    folder = adapter(loaded.model, tmp_path / "adapter", target_modules=["c_attn"], modules_to_save=["lm_head"])
    with pytest.raises(SafecritError, match="unties"):
        merge_adapter(load_model(loaded.folder), folder, fitting_mask(loaded, 0.3))


def test_an_adapter_that_touches_nothing_masked_or_is_zero_is_told(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    mask = fitting_mask(loaded, 0.3)
    zero = peft.get_peft_model(copy.deepcopy(loaded.model), peft.LoraConfig(target_modules=["q_proj"]))
    zero.save_pretrained(tmp_path / "zero")
    merged = merge_adapter(load_model(loaded.folder), tmp_path / "zero", mask)
    assert merged.changed == 0 and "Was it trained" in merged.warnings[0]
    free = next(n for n in read_anatomy(loaded.model).tensors if "proj" in n and n not in mask.indices)
    folder = adapter(loaded.model, tmp_path / "free", target_modules=[free.removesuffix(".weight")])
    merged = merge_adapter(load_model(loaded.folder), folder, mask)
    assert merged.held == 0 and "no weight that the mask selects" in merged.warnings[-1]


def test_masks_of_the_base_are_refused_on_models_with_adapters() -> None:
    model = build("llama")
    mask = random_mask(model, 0.3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], r=2))
    with pytest.raises(SafecritError, match="safecrit merge"):
        protect(wrapped, mask, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    with pytest.raises(SafecritError, match="safecrit merge"):
        SparseAdamW(wrapped, mask)
    merged = wrapped.merge_and_unload()
    assert protect(merged, mask, torch.optim.SGD(merged.parameters(), lr=0.1)).protected == mask.count


def test_a_training_of_an_adapter_cut_short_continues_bit_for_bit(tmp_path: Path) -> None:
    base = folder_model("llama", tmp_path / "base").folder
    examples = pairs(("say hi", "hi."), ("count", "1 2 3"))
    settings = TrainSettings(learning_rate=1e-2, max_steps=6, save_steps=2, max_length=40)
    finished = []
    for number, stop in enumerate((None, 5)):

        def interrupt(step: int, total: int, loss: float, stop: int | None = stop) -> None:
            if step == stop:
                raise KeyboardInterrupt

        def run(number: int = number, progress: Any = interrupt) -> TrainedAdapter:
            return train_adapter(
                load_model(base),
                examples,
                None,
                0.0,
                settings,
                LoraSettings(r=2, lora_dropout=0.1),
                tmp_path / f"adapter-{number}",
                progress,
                checkpoints=tmp_path / f"checkpoints-{number}",
            )

        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                run()
            assert not (tmp_path / f"adapter-{number}").exists()
        finished.append(run(progress=None).record.losses)
    assert finished[0] == finished[1]
    whole, cut = (tmp_path / f"adapter-{number}" / "adapter_model.safetensors" for number in range(2))
    assert whole.read_bytes() == cut.read_bytes()
