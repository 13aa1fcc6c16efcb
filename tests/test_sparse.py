from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safecrit.anatomy import read_anatomy
from safecrit.errors import MismatchError, SafecritError
from safecrit.maskfile import Mask
from safecrit.placement import place, runtime_indices
from safecrit.sparse import SparseAdamW
from safecrit.strided import Strided
from tests.architectures import build
from tests.training_helpers import backward, batch, random_mask, selected


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gpt-neox", "gpt-oss"])
def test_only_selected_entries_change(name: str) -> None:
    model = build(name)
    mask = random_mask(model, 0.02)
    where = selected(model, mask)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = SparseAdamW(model, mask, lr=1e-2, weight_decay=0.1)
    assert optimizer.trained == mask.count == sum(int(w.sum()) for w in where.values())
    for step in range(3):
        backward(model, step)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    for n, p in model.named_parameters():
        changed = p.detach() != before[n]
        assert not (changed & ~where[n]).any(), n
        assert not where[n].any() or changed[where[n]].float().mean() > 0.5, n


def test_equals_torch_adamw_restricted_to_the_mask() -> None:
    """The same recorded gradients, 50 steps, decay on: 1e-6 elementwise."""
    ours, dense = build("llama"), build("llama")
    mask = random_mask(ours, 0.05)
    where = selected(ours, mask)
    optimizer = SparseAdamW(ours, mask, lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1, max_grad_norm=None)
    optimizer.attach()
    reference = torch.optim.AdamW(dense.parameters(), lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    twins = dict(dense.named_parameters())
    start = {name: p.detach().clone() for name, p in twins.items()}
    for step in range(50):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 * (50 - step) / 50
        total = torch.zeros(())
        for name, parameter in ours.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            twins[name].grad = gradient
            if parameter.requires_grad:
                total = total + (parameter * gradient).sum()
        total.backward()
        optimizer.step()
        reference.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter[where[name]], twins[name][where[name]], rtol=0, atol=1e-6)
        assert torch.equal(parameter[~where[name]], start[name][~where[name]])


def test_accumulation_and_clipping_equal_torch() -> None:
    ours, dense = build("mixtral"), build("mixtral")
    mask = random_mask(ours, 0.05)
    where = selected(ours, mask)
    optimizer = SparseAdamW(ours, mask, lr=1e-3, max_grad_norm=0.01)
    reference = torch.optim.AdamW(dense.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(4):
        for micro in range(3):
            backward(ours, 10 * step + micro, 1 / 3)
            ours.zero_grad()  # as Trainer does; the gathered gradients are not its own
            backward(dense, 10 * step + micro, 1 / 3)
        for name, parameter in dense.named_parameters():
            parameter.grad[~where[name]] = 0
        norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.01)
        optimizer.step()
        reference.step()
        reference.zero_grad()
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.copy_(torch.where(where[name], parameter, dict(ours.named_parameters())[name]))
        assert optimizer.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert float(norm) > 0.01
    twins = dict(dense.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, twins[name], rtol=0, atol=1e-6)


def test_bfloat16_follows_a_float32_master() -> None:
    model = build("llama").to(torch.bfloat16)
    mask = random_mask(model, 0.05)
    name = next(iter(mask.indices))
    tensor = read_anatomy(model).tensors[name]
    parameter = dict(model.named_parameters())[tensor.parameter]
    at = mask.indices[name]
    weight = parameter.detach().reshape(-1)[at].float().requires_grad_()
    optimizer = SparseAdamW(model, mask, lr=1e-4, max_grad_norm=None)
    optimizer.attach()
    reference = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        gradient = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
        (parameter * gradient).sum().backward()
        weight.grad = gradient.reshape(-1)[at].float()
        optimizer.step()
        reference.step()
    close = parameter.detach().reshape(-1)[at] == weight.detach().bfloat16()
    assert close.float().mean() > 0.99  # the rest: a last-bit difference that decides a rounding
    assert optimizer.state[parameter]["master"].dtype == torch.float32
    torch.testing.assert_close(optimizer.state[parameter]["master"], weight.detach(), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # by torch's compiler
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # torch, of Python 3.13.0
def test_blocks_that_are_compiled_train_as_the_others() -> None:
    model, twin = build("llama"), build("llama")
    mask = random_mask(model, 0.05)
    optimizer, reference = SparseAdamW(model, mask, lr=1e-3), SparseAdamW(twin, mask, lr=1e-3)
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    for step in range(3):
        backward(model, step)
        backward(twin, step)
        optimizer.step()
        reference.step()
    assert optimizer.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5) and optimizer.grad_norm > 0
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6)


def test_unselected_parameters_need_no_gradient_until_closed() -> None:
    model = build("llama")
    mask = random_mask(model, 0.05)
    optimizer = SparseAdamW(model, mask)
    placed = place(mask, read_anatomy(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(placed)
    optimizer.close()
    assert all(p.requires_grad for p in model.parameters())
    backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())


def test_a_step_without_gradient_is_an_error_and_zero_grad_forgets() -> None:
    model = build("llama")
    optimizer = SparseAdamW(model, random_mask(model, 0.05))
    with pytest.raises(SafecritError, match="no gradient reached"):
        optimizer.step()
    backward(model, 0)
    optimizer.zero_grad()
    with pytest.raises(SafecritError, match="no gradient reached"):
        optimizer.step()
    backward(model, 0)
    optimizer.step()
    with pytest.raises(SafecritError, match="no gradient reached"):
        optimizer.step()


def test_a_gradient_that_is_no_number_stops_the_run_and_leaves_the_weights() -> None:
    model = build("llama")
    optimizer = SparseAdamW(model, random_mask(model, 0.05))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model, 0, float("nan"))
    with pytest.raises(SafecritError, match="not finite"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_float16_an_empty_mask_and_another_models_mask_are_refused() -> None:
    model = build("llama")
    mask = random_mask(model, 0.05)
    with pytest.raises(SafecritError, match="float16"):
        SparseAdamW(build("llama").half(), mask)
    with pytest.raises(SafecritError, match="selects no weight"):
        SparseAdamW(model, Mask({}, mask.info))
    with pytest.raises(MismatchError):
        SparseAdamW(build("mixtral"), mask)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_continues_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    whole, first = build("mixtral").to(dtype), build("mixtral").to(dtype)
    mask = random_mask(whole, 0.05)
    runs = [SparseAdamW(model, mask, lr=1e-2) for model in (whole, first)]
    for step in range(4):
        backward(whole, step)
        runs[0].step()
        if step < 2:
            backward(first, step)
            runs[1].step()
    torch.save(runs[1].state_dict(), tmp_path / "state.pt")
    second = build("mixtral").to(dtype)
    second.load_state_dict(first.state_dict())
    resumed = SparseAdamW(second, mask, lr=1e-2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for step in (2, 3):
        backward(second, step)
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    other = SparseAdamW(build("mixtral").to(dtype), random_mask(whole, 0.05, seed=1))
    with pytest.raises(MismatchError, match="another mask"):
        other.load_state_dict(torch.load(tmp_path / "state.pt"))


def test_changes_name_checkpoint_tensors() -> None:
    model = build("mixtral")
    mask = random_mask(model, 0.05)
    anatomy = read_anatomy(model)
    optimizer = SparseAdamW(model, mask, lr=1e-2)
    backward(model, 0)
    optimizer.step()
    changes = optimizer.changes(mask, dict.fromkeys(mask.indices, torch.bfloat16))
    assert list(changes) == list(mask.indices)
    assert any("experts" in name for name in changes)
    parameters = dict(model.named_parameters())
    for name, (indices, values) in changes.items():
        tensor = anatomy.tensors[name]
        now = tensor.source.of(parameters[tensor.parameter].detach()).reshape(-1)
        assert torch.equal(indices, mask.indices[name])
        assert torch.equal(values, now[indices].bfloat16())


@pytest.mark.parametrize(
    "source",
    [
        Strided(5, (3, 4), (4, 1)),
        Strided(2, (3, 4), (1, 3)),
        Strided(0, (2, 3, 5), (40, 1, 7)),
        Strided(7, (1, 6), (99, 2)),
    ],
)
def test_runtime_indices_follow_the_pattern(source: Strided) -> None:
    flat = torch.arange(source.numel)[::2]
    assert torch.equal(runtime_indices(source, flat), source.flat_indices()[flat])


def test_memory_of_the_state_is_of_the_mask() -> None:
    model = build("llama")
    mask = random_mask(model, 0.01)
    optimizer = SparseAdamW(model, mask)
    backward(model, 0)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    held += optimizer._indices
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 16 * mask.count


def test_a_gradient_scaler_is_refused() -> None:
    model = build("llama")
    optimizer = SparseAdamW(model, random_mask(model, 0.1))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**batch(0)).loss).backward()
    with pytest.raises(SafecritError, match="gradient scaler"):
        scaler.step(optimizer)
