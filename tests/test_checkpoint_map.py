"""The map from runtime parameters to checkpoint tensors, against the files transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import Chunk, ConversionOps, Interleave, Transpose, WeightConverter

from safecrit.anatomy import read_anatomy
from safecrit.checkpoint_map import checkpoint_map, keep_stored_names
from safecrit.errors import SafecritError
from safecrit.strided import Strided
from tests import architectures


def assert_describes(model: PreTrainedModel, file: Path) -> None:
    """The map of `model` names exactly the tensors of `file`, and `source` finds their very bits."""
    buffers = {name for name, _ in model.named_buffers()}
    stored = {name: tensor for name, tensor in load_file(file).items() if name not in buffers}
    found = checkpoint_map(model)
    assert list(found) == sorted(stored)
    parameters = dict(model.named_parameters())
    for name, part in found.items():
        view = part.source.of(parameters[part.parameter].data)
        assert view.shape == stored[name].shape, name
        assert torch.equal(view, stored[name]), name


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_names_shapes_and_bits_are_those_of_the_saved_file(name: str, tmp_path: Path) -> None:
    model = architectures.save(name, tmp_path)
    assert_describes(model, tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_describes(loaded, tmp_path / "model.safetensors")
    assert checkpoint_map(loaded) == checkpoint_map(model)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_a_model_without_weights_has_the_same_map(name: str) -> None:
    assert checkpoint_map(architectures.build(name, device="meta")) == checkpoint_map(architectures.build(name))


def test_experts_are_single_tensors_in_the_checkpoint_and_one_bank_at_run_time() -> None:
    found = checkpoint_map(architectures.build("mixtral"))
    part = found["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert part.parameter == "model.layers.1.mlp.experts.gate_up_proj"  # [3, 2 * 40, 24]: w1 above w3
    assert part.source == Strided(2 * 80 * 24 + 40 * 24, (40, 24), (24, 1))


def test_a_checkpoint_saved_from_the_base_model_keeps_its_short_names(tmp_path: Path) -> None:
    model = architectures.save("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    short = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(short, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)
    assert keep_stored_names(loaded, short) == []
    assert_describes(loaded, file)
    assert read_anatomy(loaded).total == read_anatomy(model).total
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(load_file(tmp_path / "again" / "model.safetensors")) == sorted(short)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_names_that_agree_stay_and_missing_ones_are_told(name: str, tmp_path: Path) -> None:
    architectures.save(name, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = checkpoint_map(loaded)
    assert keep_stored_names(loaded, before) == [] and checkpoint_map(loaded) == before
    assert keep_stored_names(loaded, list(before)[1:]) == list(before)[:1] and checkpoint_map(loaded) == before


def test_tied_weights_appear_once_and_buffers_never() -> None:
    model = architectures.build("llama-tied")
    found = checkpoint_map(model)
    assert "lm_head.weight" not in found and "model.embed_tokens.weight" in found
    assert {part.parameter for part in found.values()} == {name for name, _ in model.named_parameters()}


def test_undeclared_sharing_is_refused() -> None:
    model = architectures.build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(SafecritError, match=r"llama: parameters share storage.*layers\.1\.mlp\.up_proj"):
        checkpoint_map(model)


def _converted(*converters: WeightConverter) -> PreTrainedModel:
    """A tiny Llama that believes it was loaded through `converters`."""
    model = architectures.build("llama")
    model._weight_conversions = list(converters)
    return model


class _Copied(ConversionOps):
    """A conversion that moves no weight but makes a copy."""

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        (tensor,) = input_dict.values()
        return {target_patterns[0]: (tensor[0] if isinstance(tensor, list) else tensor).clone()}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Copied()


class _Halved(_Copied):
    """A conversion that loses weights."""

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        (tensor,) = input_dict.values()
        return {target_patterns[0]: tensor[0][::2]}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Halved()


@pytest.mark.parametrize("operations", [[Transpose(0, 1)], [_Copied(), Transpose(0, 1)]])
def test_a_transposed_tensor_is_a_transposed_pattern_copied_or_not(operations: list[ConversionOps]) -> None:
    model = _converted(WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", operations=operations))
    part = checkpoint_map(model)["model.layers.1.mlp.down_proj.weight"]
    weight = model.model.layers[1].mlp.down_proj.weight.data
    assert part.parameter == "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(part.source.of(weight), weight.T)


@pytest.mark.parametrize(
    ("converter", "message"),
    [
        (
            WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]),
            r"llama: checkpoint tensor model\.layers\.0\.mlp\.gate_up\.weight is joined from several parameters",
        ),
        (
            WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Interleave(dim=1)]),
            r"llama: checkpoint tensor model\.layers\.0\.mlp\.down_proj\.weight is permuted",
        ),
        (
            WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [_Halved()]),
            r"holds 480 weights for parameter model\.layers\.0\.mlp\.down_proj\.weight, which has 960",
        ),
    ],
)
def test_what_no_pattern_describes_is_refused_by_name(converter: WeightConverter, message: str) -> None:
    with pytest.raises(SafecritError, match=message):
        checkpoint_map(_converted(converter))


def test_following_indices_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safecrit.checkpoint_map.MAX_INDEXED", 959)
    model = _converted(WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", operations=[_Copied()]))
    with pytest.raises(SafecritError, match=r"rearranges model\.layers\.0\.mlp\.down_proj\.weight \(960 weights\)"):
        checkpoint_map(model)


def test_a_quantised_model_is_refused() -> None:
    converter = WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", operations=[_Copied()])
    converter.quantization_operation = _Copied()
    with pytest.raises(SafecritError, match="Quantised checkpoints are not supported"):
        checkpoint_map(_converted(converter))


def test_real_model(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    assert_describes(AutoModelForCausalLM.from_pretrained(folder), folder / "model.safetensors")
