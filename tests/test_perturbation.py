from __future__ import annotations

import pytest
import torch

from safecrit.anatomy import read_anatomy
from safecrit.errors import CheckFailed
from safecrit.maskfile import Mask
from safecrit.perturbation import matched_random, memory_fingerprint, perturbed
from safecrit.selection import SelectionSettings, select_from
from tests import tiny


def mask_of(model, mode: str = "top", share: str = "5%") -> Mask:  # type: ignore[no-untyped-def]
    anatomy = read_anatomy(model)
    generator = torch.Generator().manual_seed(3)
    scores = {t.name: torch.randn(t.layout.shape, generator=generator) for t in anatomy.eligible}
    return select_from(scores, SelectionSettings(mode=mode, share=share), layouts=anatomy.layouts, total=anatomy.total)


@pytest.mark.parametrize("make", [tiny.llama, tiny.mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_masks_weights_move_and_all_come_back(make, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    model = make(320).to(dtype)
    anatomy, mask = read_anatomy(model), mask_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = memory_fingerprint(model)
    with perturbed(model, anatomy, mask, factor=1.0, seed=0) as done:
        assert memory_fingerprint(model) != start
        moved = sum(int((value != before[name]).sum()) for name, value in model.state_dict().items())
        for name, flat in mask.indices.items():
            entry = anatomy.tensors[name]
            now = entry.source.of(model.get_parameter(entry.parameter).data).reshape(-1)
            old = entry.source.of(before[entry.parameter]).reshape(-1)
            differs = (now != old).nonzero().reshape(-1)
            assert set(differs.tolist()) <= set(flat.tolist())
    assert moved == done.changed and 0.9 * mask.count < moved <= done.weights == mask.count
    assert memory_fingerprint(model) == start
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_noise_has_the_size_asked_for_in_every_matrix() -> None:
    model = tiny.mixtral(320)
    anatomy, mask = read_anatomy(model), mask_of(model, share="60%")
    parts = {n: t.source.of(model.get_parameter(t.parameter).data).clone() for n, t in anatomy.tensors.items()}
    with perturbed(model, anatomy, mask, factor=0.5, seed=1):
        ratios = []
        for name, flat in mask.indices.items():
            entry = anatomy.tensors[name]
            now = entry.source.of(model.get_parameter(entry.parameter).data)
            for matrix in entry.layout.matrices:
                chosen = matrix.where.contains(flat)
                moved = (now - parts[name]).reshape(-1)[flat[chosen]]
                ratios.append((moved / matrix.where.of(parts[name].contiguous()).std()).square().mean().item())
    assert sum(ratios) / len(ratios) == pytest.approx(0.25, rel=0.05)


def test_a_seed_is_one_draw_and_r_only_scales_it() -> None:
    model = tiny.llama(320)
    anatomy, mask = read_anatomy(model), mask_of(model)
    name, flat = next(iter(mask.indices.items()))
    weight = model.get_parameter(anatomy.tensors[name].parameter).data
    old, moves = weight.clone(), []
    for factor, seed in ((1.0, 0), (2.0, 0), (1.0, 0), (1.0, 1)):
        with perturbed(model, anatomy, mask, factor=factor, seed=seed):
            moves.append((weight - old).reshape(-1)[flat])
    torch.testing.assert_close(moves[1], 2 * moves[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(moves[0], moves[2]) and not torch.allclose(moves[0], moves[3])


def test_the_prediction_is_the_change_of_a_linear_function() -> None:
    model = tiny.llama(320)
    anatomy, mask = read_anatomy(model), mask_of(model)
    gradients = {name: torch.randn(len(flat)).double() for name, flat in mask.indices.items()}

    def value() -> float:
        return sum(
            float((gradients[n] * model.get_parameter(anatomy.tensors[n].parameter).data.reshape(-1)[f].double()).sum())
            for n, f in mask.indices.items()
        )

    start = value()
    with perturbed(model, anatomy, mask, factor=0.7, seed=0, gradients=gradients) as done:
        assert done.predicted == pytest.approx(value() - start, rel=1e-9)


def test_weights_come_back_after_an_error_and_a_broken_return_is_found() -> None:
    model = tiny.llama(320)
    anatomy, mask = read_anatomy(model), mask_of(model)
    start = memory_fingerprint(model)
    with pytest.raises(KeyboardInterrupt), perturbed(model, anatomy, mask, factor=1.0, seed=0):
        raise KeyboardInterrupt
    assert memory_fingerprint(model) == start
    with pytest.raises(CheckFailed, match="bit for bit"), perturbed(model, anatomy, mask, factor=1.0, seed=0):
        model.get_input_embeddings().weight.data[0, 0] += 1


def test_the_control_matches_the_count_in_every_tensor() -> None:
    mask = mask_of(tiny.llama(320))
    control = matched_random(mask, 5)
    assert {n: len(f) for n, f in control.indices.items()} == {n: len(f) for n, f in mask.indices.items()}
    assert control.iou(mask) < 0.3 and matched_random(mask, 5).iou(control) == 1.0
