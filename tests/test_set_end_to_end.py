"""SET through Trainer against a dense torch AdamW in a plain loop that zeroes and restores by hand (whole runs)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from safecrit.mixture import collate
from safecrit.training import TrainSettings, run_set
from tests.training_helpers import fitting_mask, folder_model, pairs, selected

REFUSALS = pairs(("do bad a", "no."), ("do bad b", "no, no."), ("do bad c", "never."), ("do worse", "i will not."))
BENIGN = pairs(("say hi", "hi."), ("count", "1 2 3"))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_set_equals_a_dense_optimizer_held_by_hand(name: str, accumulation: int, tmp_path: Path) -> None:
    loaded = folder_model(name, tmp_path / "base")
    mask = fitting_mask(loaded, 0.05)
    settings = TrainSettings(
        learning_rate=3e-5,
        max_steps=20,
        warmup_ratio=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.01,
        weight_decay=0.01,
        max_length=40,
    )
    result = run_set(loaded, mask, REFUSALS, BENIGN, 0.5, settings)
    assert min(result.grad_norms) > settings.max_grad_norm  # every step was clipped

    dense = folder_model(name, tmp_path / "dense").model
    where = selected(dense, mask)
    start = {n: p.detach().clone() for n, p in dense.named_parameters()}
    optimizer = torch.optim.AdamW(dense.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, settings.max_steps)
    batches = [collate(result.data.items[at : at + 2], pad=0) for at in range(0, len(result.data), 2)]
    for step in range(settings.max_steps):
        part = batches[step * accumulation : (step + 1) * accumulation]
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in part)
        loss = 0.0
        for batch in part:
            logits = dense(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            targets = batch["labels"][:, 1:]
            summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            (summed / tokens).backward()
            loss += float(summed.detach()) / tokens
        for n, parameter in dense.named_parameters():
            parameter.grad[~where[n]] = 0
        norm = float(torch.nn.utils.clip_grad_norm_(dense.parameters(), settings.max_grad_norm))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for n, parameter in dense.named_parameters():
                parameter.copy_(torch.where(where[n], parameter, start[n]))
        assert result.losses[step] == pytest.approx(loss, rel=1e-5)
        assert result.grad_norms[step] == pytest.approx(norm, rel=1e-4)
    apart = whole = 0.0
    twins = dict(dense.named_parameters())
    for n, parameter in loaded.model.named_parameters():
        ours, theirs = parameter.detach().double(), twins[n].detach().double()
        assert torch.equal(parameter.detach()[~where[n]], start[n][~where[n]]), n
        assert not where[n].any() or (ours != start[n]).any(), n
        apart += float((ours - theirs).square().sum())
        whole += float(theirs.square().sum())
    assert (apart / whole) ** 0.5 <= 1e-6
