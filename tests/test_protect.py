from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor

from safecrit.errors import MismatchError, SafecritError
from safecrit.masked import MaskedAdamW
from safecrit.maskfile import Mask
from safecrit.protection import ProtectCallback, protect
from tests.architectures import build
from tests.training_helpers import backward, batch, random_mask, selected

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "adamw-fused": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-foreach": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-one-pass": partial(MaskedAdamW, lr=1e-2, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": partial(Adafactor, lr=1e-2, relative_step=False, scale_parameter=False, weight_decay=0.1),
}


def by_hand(
    model: torch.nn.Module, where: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, seed: int
) -> None:
    """One step that zeroes the gradients and restores the values without any of our code."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model, seed)
    for n, p in model.named_parameters():
        p.grad.masked_fill_(where[n], 0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.where(where[n], before[n], p))


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize(
    ("name", "dtype", "steps"),
    [("llama", torch.float32, 200), ("llama", torch.bfloat16, 40), ("mixtral", torch.float32, 12)],
)
def test_frozen_entries_keep_their_bits_and_the_rest_trains_as_by_hand(
    kind: str, name: str, dtype: torch.dtype, steps: int
) -> None:
    model, twin = build(name).to(dtype), build(name).to(dtype)
    mask = random_mask(model, 0.3)
    where = selected(model, mask)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, reference = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](twin.parameters())
    protection = protect(model, mask, optimizer)
    assert protection.protected == mask.count
    for step in range(steps):
        backward(model, step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0
        optimizer.step()
        optimizer.zero_grad()
        for n, p in model.named_parameters():
            assert torch.equal(p.detach()[where[n]].view(torch.uint8), before[n][where[n]].view(torch.uint8)), (step, n)
        by_hand(twin, where, reference, step)
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), n
        assert (p.detach() != before[n])[~where[n]].any(), n


def test_removal_lets_the_weights_move_again() -> None:
    model = build("llama")
    mask = random_mask(model, 0.3)
    where = selected(model, mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    protect(model, mask, optimizer).remove()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model, 0)
    optimizer.step()
    assert all((p.detach() != before[n])[where[n]].any() for n, p in model.named_parameters() if where[n].any())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # from PEFT
def test_masks_that_would_protect_nothing_are_refused() -> None:
    model = build("llama")
    mask = random_mask(model, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SafecritError, match="nothing would be protected"):
        protect(model, Mask({}, mask.info), optimizer)
    with pytest.raises(MismatchError):
        protect(build("mixtral"), mask, optimizer)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], r=2))
    with pytest.raises(SafecritError, match="adapters"):
        protect(adapted, mask, optimizer)


class _Norms(TrainerCallback):
    """What Trainer clips: the gradients as they are after clipping, before the step."""

    def __init__(self, where: dict[str, torch.Tensor]) -> None:
        self.where, self.seen, self.frozen = where, 0, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            self.seen += 1
            self.frozen += float(parameter.grad[self.where[name]].abs().sum())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_callback_holds_the_weights_in_trainer(optim: str, tmp_path: Path) -> None:
    model = build("mixtral")
    mask = random_mask(model, 0.3)
    where = selected(model, mask)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{name: value[0] for name, value in batch(seed, rows=1).items()} for seed in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.1,
        optim=optim,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    norms = _Norms(where)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[norms])
    trainer.add_callback(ProtectCallback(mask))
    trainer.train()
    assert norms.seen > 0
    assert norms.frozen == 0.0
    for n, p in model.named_parameters():
        assert torch.equal(p.detach()[where[n]], before[n][where[n]]), n
        assert (p.detach() != before[n])[~where[n]].any(), n


def test_the_function_is_no_module() -> None:
    import safecrit

    assert safecrit.ProtectCallback is ProtectCallback
    assert safecrit.protect is protect


def test_what_moves_protected_weights_behind_our_back_is_found() -> None:
    model = build("llama")
    mask = random_mask(model, 0.3)
    optimizer, other = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    protection = protect(model, mask, optimizer)
    backward(model, 0)
    with pytest.raises(SafecritError, match="made no step"):
        protection.check()
    protection.check(stepped=False)
    optimizer.step()
    protection.check()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # not by backward: the hooks see nothing of it
    other.step()
    with pytest.raises(SafecritError, match="have moved"):
        protection.check()
