"""LoRA under a mask: PEFT's own merge everywhere, the base's bits where the mask selects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import safecrit
from safecrit.delta import Delta, apply_delta
from safecrit.errors import MismatchError, SafecritError
from safecrit.fingerprint import accepted_fingerprints, fingerprint
from safecrit.lora import LoraSettings
from safecrit.maskfile import Mask
from safecrit.models import LoadedModel
from safecrit.training import headline, run_spa
from safecrit.training_output import write_spa_output
from safecrit.trainloop import TrainSettings
from tests.architectures import build
from tests.training_helpers import fitting_mask, folder_model, pairs, random_mask

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # from PEFT

KINDS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "plain": ("llama", torch.float32, {"target_modules": "all-linear"}),
    "bf16": ("llama", torch.bfloat16, {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        "llama",
        torch.bfloat16,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 7}},
    ),
    "rslora": ("qwen2", torch.float32, {"target_modules": ["v_proj"], "use_rslora": True}),
    "dora": ("llama", torch.float32, {"target_modules": ["up_proj"], "use_dora": True}),
    "fan-in-fan-out": ("gpt2", torch.float32, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fan-in-fan-out-dora": (
        "gpt2",
        torch.float32,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "bias": ("qwen2", torch.float32, {"target_modules": ["q_proj"], "bias": "all"}),
    "saved-modules": ("llama", torch.float32, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "experts": (
        "mixtral",
        torch.bfloat16,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "tied": ("llama-tied", torch.float32, {"target_modules": ["o_proj"]}),
}


def trained_adapter(loaded: LoadedModel, folder: Path, **config: Any) -> Path:
    """An adapter with random weights on a copy of the model, saved as PEFT saves it."""
    base = AutoModelForCausalLM.from_pretrained(loaded.folder, dtype="auto")
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    model.save_pretrained(folder)
    return folder


def pefts_merge(loaded: LoadedModel, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """What PEFT makes of it without us, read from the files that transformers writes."""
    base = AutoModelForCausalLM.from_pretrained(loaded.folder, dtype="auto")
    peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(out)
    return load_file(out / "model.safetensors")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(tensor.numel(), -1)


def saved_mask(loaded: LoadedModel, path: Path, share: float = 0.3) -> tuple[Mask, Path]:
    mask = fitting_mask(loaded, share)
    mask.save(path)
    return mask, path


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_pefts_but_for_the_mask(kind: str, tmp_path: Path) -> None:
    name, dtype, config = KINDS[kind]
    loaded = folder_model(name, tmp_path / "base", dtype=dtype)
    mask, mask_file = saved_mask(loaded, tmp_path / "m.safetensors")
    adapter = trained_adapter(loaded, tmp_path / "adapter", **config)
    theirs = pefts_merge(loaded, adapter, tmp_path / "theirs")
    done = safecrit.merge(tmp_path / "base", adapter, mask_file, tmp_path / "out", device="cpu")
    assert done.verified.ok
    base, ours = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    changed = held = 0
    for tensor, new in ours.items():
        frozen = (mask.dense(tensor) if tensor in mask.indices else torch.zeros(new.shape, dtype=torch.bool)).reshape(
            -1
        )
        assert torch.equal(bits(new)[frozen], bits(base[tensor])[frozen]), tensor
        assert torch.equal(bits(new)[~frozen], bits(theirs[tensor])[~frozen]), tensor
        changed += int((new != base[tensor]).sum())
        held += int((theirs[tensor] != base[tensor]).reshape(-1)[frozen].sum())
    assert changed == done.result.changed > 0
    assert held > 0  # the mask mattered


def test_merge_writes_model_delta_or_both(tmp_path: Path) -> None:
    loaded = folder_model("mixtral", tmp_path / "base", dtype=torch.bfloat16)
    _, mask_file = saved_mask(loaded, tmp_path / "m.safetensors")
    adapter = trained_adapter(loaded, tmp_path / "adapter", **KINDS["experts"][2])
    safecrit.merge(tmp_path / "base", adapter, mask_file, tmp_path / "out", save="both", device="cpu")
    delta = Delta.load(tmp_path / "out" / "safecrit" / "delta.safetensors")
    apply_delta(tmp_path / "base", delta, tmp_path / "applied")
    assert fingerprint(tmp_path / "applied") == fingerprint(tmp_path / "out")
    only = safecrit.merge(tmp_path / "base", adapter, mask_file, tmp_path / "d", save="delta", device="cpu")
    assert only.verified.ok
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"README.md", "safecrit"}
    document = json.loads((tmp_path / "out" / "safecrit" / "training.json").read_text())
    assert document["mode"] == "merge"
    assert document["lora"]["r"] == 3
    assert fingerprint(tmp_path / "base") in accepted_fingerprints(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Rank 3, alpha 6" in card
    assert str(tmp_path) not in card
    with pytest.raises(SafecritError, match="already holds a model"):
        safecrit.merge(tmp_path / "base", adapter, mask_file, tmp_path / "out", device="cpu")


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    mask, mask_file = saved_mask(loaded, tmp_path / "m.safetensors")
    adapter = trained_adapter(loaded, tmp_path / "adapter", target_modules=["q_proj"])

    def merge(where: Path, model: Path = tmp_path / "base", mask: Path = mask_file, **more: Any) -> None:
        safecrit.merge(model, where, mask, tmp_path / "out", device="cpu", **more)

    def altered(name: str, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((adapter / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(weights or load_file(adapter / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
        return folder

    weights = load_file(adapter / "adapter_model.safetensors")
    first = min(weights)
    cases = {
        "only LoRA": altered("kind", peft_type="IA3"),
        "only LoRA for": altered("task", task_type="SEQ_CLS"),
        "path_initial_model": altered("pissa", init_lora_weights="pissa"),
        "layer_replication": altered("replicated", layer_replication=[[0, 2], [0, 2]]),
        "Target modules": altered("nowhere", target_modules=["nothing"]),
        "1 adapter weights are missing": altered("lacking", {n: w for n, w in weights.items() if n != first}),
        "unknown, the first": altered("other", weights | {"base_model.model.no.lora_A.weight": torch.ones(1)}),
        "does not fit": altered("wide", {n: torch.cat([w, w]) for n, w in weights.items()}),
        "not finite": altered("broken", {n: w * float("nan") for n, w in weights.items()}),
        "is no PEFT adapter": tmp_path / "base",
        "no such folder": tmp_path / "nowhere-at-all",
    }
    for message, folder in cases.items():
        with pytest.raises(SafecritError, match=message):
            merge(folder)
    (altered("pickled") / "adapter_model.safetensors").unlink()
    with pytest.raises(SafecritError, match="safetensors"):
        merge(tmp_path / "pickled")
    with pytest.raises(SafecritError, match="--save"):
        merge(adapter, save="all")
    Mask({}, mask.info).save(tmp_path / "empty.safetensors")
    with pytest.raises(SafecritError, match="nothing would be protected"):
        merge(adapter, mask=tmp_path / "empty.safetensors")
    stranger = folder_model("llama", tmp_path / "stranger")
    with torch.no_grad():
        next(stranger.model.parameters()).add_(1)
    stranger.model.save_pretrained(tmp_path / "stranger")
    with pytest.raises(MismatchError, match="other weights"):
        merge(adapter, model=tmp_path / "stranger")
    with pytest.raises(SafecritError, match="--dtype float32"):
        merge(adapter, dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    merge(adapter, model=tmp_path / "stranger", allow_other_weights=True)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, about saving such adapters
def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    loaded = folder_model("llama-tied", tmp_path / "base")
    _, mask_file = saved_mask(loaded, tmp_path / "m.safetensors")
    adapter = trained_adapter(loaded, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(SafecritError, match="one tensor"):
        safecrit.merge(tmp_path / "base", adapter, mask_file, tmp_path / "out", device="cpu")


BENIGN = pairs(("say hi", "hi."), ("count", "1 2 3"))


def quick(**changes: Any) -> TrainSettings:
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 40}
    return TrainSettings(**{"learning_rate": 1e-2, "max_steps": 4, **small, **changes})


@pytest.mark.parametrize(
    ("name", "dtype", "lora"),
    [
        ("llama-tied", torch.bfloat16, LoraSettings(lora_r=4)),
        (
            "mixtral",
            torch.float32,
            LoraSettings(
                lora_r=2,
                lora_dropout=0.0,
                lora_target_modules=("q_proj", "v_proj"),
                lora_target_parameters=("mlp.experts.gate_up_proj",),
            ),
        ),
    ],
)
def test_spa_by_lora_is_the_merge_of_its_own_adapter(
    name: str, dtype: torch.dtype, lora: LoraSettings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = folder_model(name, tmp_path / "base", dtype=dtype)
    mask, mask_file = saved_mask(loaded, tmp_path / "m.safetensors")
    capfd.readouterr()
    result = run_spa(loaded, mask, BENIGN, settings=quick(), lora=lora, adapter=tmp_path / "adapter")
    assert capfd.readouterr() == ("", "")
    assert result.losses[-1] < result.losses[0]
    write_spa_output(loaded, mask, tmp_path / "out", result)
    safecrit.merge(tmp_path / "base", tmp_path / "adapter", mask_file, tmp_path / "merged", device="cpu")
    assert fingerprint(tmp_path / "merged") == fingerprint(tmp_path / "out")
    assert safecrit.verify(tmp_path / "out", tmp_path / "base", mask, "spa").ok
    written = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").named_parameters())
    assert all(torch.equal(p, written[n]) for n, p in loaded.model.named_parameters())
    assert all(p.requires_grad for p in loaded.model.parameters())
    document = json.loads((tmp_path / "out" / "safecrit" / "training.json").read_text())
    assert document["lora"]["lora_r"] == lora.lora_r
    assert 0 < document["changed"] <= document["trained"] < mask.info.total - mask.count
    assert headline(mask, "spa", lora) in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_lora_runs_repeat_and_resume_bit_for_bit(tmp_path: Path) -> None:
    lora, settings = LoraSettings(lora_r=2), quick(max_steps=6, save_steps=2)
    finished = []
    for number, stop in enumerate((None, 5)):
        loaded = folder_model("llama", tmp_path / str(number))
        mask = fitting_mask(loaded, 0.1)

        def interrupt(step: int, total: int, loss: float, stop: int | None = stop) -> None:
            if step == stop:
                raise KeyboardInterrupt

        checkpoints = tmp_path / f"checkpoints-{number}"
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                run_spa(loaded, mask, BENIGN, None, 0.5, settings, interrupt, checkpoints=checkpoints, lora=lora)
            loaded = folder_model("llama", tmp_path / str(number))
        result = run_spa(loaded, mask, BENIGN, None, 0.5, settings, checkpoints=checkpoints, lora=lora)
        finished.append([result.losses, *(p.detach() for p in loaded.model.parameters())])
    assert finished[0][0] == finished[1][0]
    assert all(torch.equal(a, b) for a, b in zip(finished[0][1:], finished[1][1:], strict=True))


def test_masks_are_refused_where_an_adapter_trains(tmp_path: Path) -> None:
    model = build("llama")
    mask = random_mask(model, 0.3)
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["v_proj"], r=2))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(SafecritError, match="safecrit merge"):
        safecrit.protect(adapted, mask, optimizer)
    with pytest.raises(SafecritError, match="safecrit merge"):
        safecrit.SparseAdamW(adapted, mask)
    injected = build("llama")
    injected.add_adapter(peft.LoraConfig(target_modules=["v_proj"], r=2))
    with pytest.raises(SafecritError, match="safecrit merge"):
        safecrit.protect(injected, mask, optimizer)


def test_settings_that_peft_refuses_are_our_error(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    with pytest.raises(SafecritError, match="--use-peft"):
        run_spa(
            loaded, fitting_mask(loaded, 0.1), BENIGN, settings=quick(), lora=LoraSettings(lora_target_modules=("x",))
        )
