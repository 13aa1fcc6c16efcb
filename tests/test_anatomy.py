"""Components, logical matrices and eligibility, against what the models' own forward passes do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter

from safecrit.anatomy import Anatomy, _seen_from, read_anatomy
from safecrit.errors import SafecritError
from safecrit.layout import layout_from_json, layout_to_json
from safecrit.strided import Strided
from tests import architectures

IDS = torch.tensor([[5, 9, 31, 7, 12, 40, 3]])
LLAMA_LAYER = [
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
]


def eligible_names(anatomy: Anatomy) -> list[str]:
    return [tensor.name for tensor in anatomy.eligible]


def components(anatomy: Anatomy, name: str) -> list[tuple[str, int | None, int | None]]:
    return [(m.component, m.layer, m.expert) for m in anatomy.tensors[name].layout.matrices]


def clear(model: PreTrainedModel, component: str, *, layer: int = 0, experts: bool = False) -> int:
    """Zero every matrix of `component` in `layer` through the layouts; returns how many weights."""
    cleared = 0
    for tensor in read_anatomy(model).tensors.values():
        for matrix in tensor.layout.matrices:
            if (matrix.component, matrix.layer, matrix.expert is not None) == (component, layer, experts):
                where = tensor.source.flat_indices()[matrix.where.flat_indices()]
                model.get_parameter(tensor.parameter).data.view(-1)[where] = 0
                cleared += where.numel()
    return cleared


def without_biases(name: str) -> PreTrainedModel:
    model = architectures.build(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
    return model


@torch.no_grad()
def keys_and_values(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layer 0's keys and values as the model itself caches them (or expands them from a latent), and the logits."""
    expanded: list[tuple[torch.Tensor, torch.Tensor]] = []
    if model.config.model_type == "deepseek_v3":
        attention = model.model.layers[0].self_attn
        expand = attention.expand_kv
        attention.expand_kv = lambda *latents: expanded.append(expand(*latents)) or expanded[-1]
    output = model(IDS, use_cache=True)
    cached = output.past_key_values.layers[0]
    keys, values = expanded[0] if expanded else (cached.keys, cached.values)
    return keys, values, output.logits


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_matrices_are_disjoint_and_complete_and_totals_add_up(name: str) -> None:
    model = architectures.build(name)
    anatomy = read_anatomy(model)
    for tensor in anatomy.tensors.values():
        covered = torch.cat([matrix.where.flat_indices() for matrix in tensor.layout.matrices])
        assert torch.equal(covered.sort().values, torch.arange(tensor.layout.numel)), tensor.name
        assert tensor.layout.shape == tensor.source.shape
        assert tensor.layout.eligible == (tensor.layout.reason == "")
        assert layout_from_json(layout_to_json(tensor.layout), "here") == tensor.layout
    assert anatomy.total == sum(parameter.numel() for parameter in model.parameters())
    assert anatomy.eligible_total == sum(t.layout.numel for t in anatomy.tensors.values() if t.layout.eligible)
    assert list(anatomy.tensors) == sorted(anatomy.tensors) == list(anatomy.layouts)
    assert anatomy.layers == 2


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_every_parameter_is_stored_exactly_once(name: str) -> None:
    model = architectures.build(name)
    anatomy = read_anatomy(model)
    for parameter_name, parameter in model.named_parameters():
        parts = anatomy.of_parameter(parameter_name)
        covered = torch.cat([part.source.flat_indices() for part in parts])
        assert torch.equal(covered.sort().values, torch.arange(parameter.numel())), parameter_name


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_no_weight_of_a_known_family_is_unnamed(name: str) -> None:
    unnamed = [
        tensor.name
        for tensor in read_anatomy(architectures.build(name)).eligible
        if any(matrix.component == "other" for matrix in tensor.layout.matrices)
    ]
    allowed = {"opt": r"project_(in|out)\.weight$", "deepseek-v3": r"kv_a_proj_with_mqa\.weight$"}
    assert [n for n in unnamed if not re.search(allowed.get(name, "^$"), n)] == []


# Architecture -> weights in one layer's k (the value part is as large, except where named): heads x head size x input.
FUSED = {
    "gpt2": 24 * 24,
    "gpt-neox": 24 * 24,
    "phi3": 2 * 6 * 24,
    "bloom": 24 * 24,
    "falcon-multi-query": 6 * 24,
    "falcon-heads": 24 * 24,
    "falcon-groups": 2 * 6 * 24,
    "gpt-bigcode": 6 * 24,
    "gpt-bigcode-heads": 24 * 24,
    "codegen": 32 * 32,
    "mpt": 24 * 24,
    "dbrx": 2 * 6 * 24,
    "persimmon": 32 * 32,
    "deepseek-v3": 4 * 6 * 10 + 4 * 24,
}


@pytest.mark.parametrize("name", FUSED)
def test_clearing_the_k_or_v_part_clears_exactly_what_the_model_uses_as_k_or_v(name: str) -> None:
    keys, values, logits = keys_and_values(without_biases(name))
    assert keys.ne(0).any(-1).all() and values.ne(0).any(-1).all()

    model = without_biases(name)
    assert clear(model, "v") == (4 * 8 * 10 if name == "deepseek-v3" else FUSED[name])
    new_keys, new_values, _ = keys_and_values(model)
    assert not new_values.any() and torch.equal(new_keys, keys)

    model = without_biases(name)
    assert clear(model, "k") == FUSED[name]
    new_keys, new_values, _ = keys_and_values(model)
    assert not new_keys.any() and torch.equal(new_values, values)

    model = without_biases(name)
    assert clear(model, "q") > 0
    new_keys, new_values, new_logits = keys_and_values(model)
    assert torch.equal(new_keys, keys) and torch.equal(new_values, values) and not torch.equal(new_logits, logits)


class _Recorder(nn.Module):
    """Stands in for an activation function and keeps what it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen.append(hidden.clone())
        return self.inner(hidden)


@torch.no_grad()
def gate_and_output(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """What layer 0's MLP (its experts, where it has them) feeds to its activation function, and what it returns."""
    layer = model.model.layers[0]
    module = getattr(layer, "mlp", None) or layer.feed_forward
    module = getattr(module, "experts", module)
    slot = "activation_fn" if hasattr(module, "activation_fn") else "act_fn"
    recorder, outputs = _Recorder(getattr(module, slot)), []
    setattr(module, slot, recorder)
    module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(IDS)
    return torch.cat([seen.flatten() for seen in recorder.seen]), outputs[0]


@pytest.mark.parametrize("name", ["phi3", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "llama4"])
def test_gate_up_and_down_are_what_the_forward_pass_makes_of_them(name: str) -> None:
    gates, output = gate_and_output(architectures.build(name))
    assert gates.any() and output.any()
    for component in ("gate", "up", "down"):
        model = architectures.build(name)
        assert clear(model, component, experts=name != "phi3")
        new_gates, new_output = gate_and_output(model)
        assert not new_output.any(), component
        assert torch.equal(new_gates, torch.zeros_like(gates) if component == "gate" else gates), component


def test_interleaved_columns_of_gpt_oss() -> None:
    """Its experts compute (up + 1) * glu(gate): without gate nothing comes out, without up something does."""

    @torch.no_grad()
    def experts_output(component: str) -> torch.Tensor:
        model, outputs = without_biases("gpt-oss"), []
        assert clear(model, component, experts=True) == 3 * 24 * 40
        model.model.layers[0].mlp.experts.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        model(IDS)
        return outputs[0]

    assert not experts_output("gate").any()
    assert not experts_output("down").any()
    assert experts_output("up").any()


@pytest.mark.parametrize("name", ["gpt-oss", "llama4"])
def test_matrices_of_a_three_dimensional_bank_are_its_slices(name: str) -> None:
    model = architectures.build(name)
    for tensor in read_anatomy(model).tensors.values():
        if tensor.parameter.endswith(("gate_up_proj", "down_proj")) and len(tensor.layout.shape) == 3:
            bank = model.get_parameter(tensor.parameter).data
            for matrix in tensor.layout.matrices:
                part = matrix.where.of(bank)
                if matrix.component == "down":
                    expected = bank[matrix.expert]
                elif name == "gpt-oss":
                    expected = bank[matrix.expert][:, int(matrix.component == "up") :: 2]
                else:
                    expected = bank[matrix.expert].chunk(2, dim=1)[int(matrix.component == "up")]
                assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("mixtral", r"layers\.(\d)\.block_sparse_moe\.experts\.(\d)\.(w1|w2|w3)\.weight"),
        ("qwen3-moe", r"layers\.(\d)\.mlp\.experts\.(\d)\.(gate|up|down)_proj\.weight"),
        ("olmoe", r"layers\.(\d)\.mlp\.experts\.(\d)\.(gate|up|down)_proj\.weight"),
    ],
)
def test_experts_carry_the_number_and_role_their_checkpoint_name_says(name: str, pattern: str) -> None:
    roles = {"w1": "gate", "w2": "down", "w3": "up"}
    anatomy, seen = read_anatomy(architectures.build(name)), 0
    for tensor in anatomy.tensors:
        match = re.search(pattern, tensor)
        if match:
            layer, expert, role = match.groups()
            assert components(anatomy, tensor) == [(roles.get(role, role), int(layer), int(expert))]
            seen += 1
    assert seen == 2 * 3 * 3


def test_eligible_tensors_of_a_dense_model() -> None:
    anatomy = read_anatomy(architectures.build("llama"))
    expected = ["lm_head.weight"] + [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LLAMA_LAYER]
    assert eligible_names(anatomy) == expected
    reasons = {name: layout.reason for name, layout in anatomy.layouts.items() if not layout.eligible}
    assert reasons == {
        "model.embed_tokens.weight": "embedding",
        "model.norm.weight": "norm",
        **{f"model.layers.{i}.{n}_layernorm.weight": "norm" for i in (0, 1) for n in ("input", "post_attention")},
    }


def test_eligible_tensors_of_a_tied_model() -> None:
    anatomy = read_anatomy(architectures.build("llama-tied"))
    assert eligible_names(anatomy) == [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LLAMA_LAYER]
    assert components(anatomy, "model.embed_tokens.weight") == [("embedding", None, None)]


def test_eligible_tensors_of_a_mixture_of_experts() -> None:
    anatomy = read_anatomy(architectures.build("mixtral"))
    attention = [name for name in LLAMA_LAYER if name.startswith("self_attn")]
    experts = [f"block_sparse_moe.experts.{e}.{w}.weight" for e in range(3) for w in ("w1", "w2", "w3")]
    layers = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in experts + attention]
    assert eligible_names(anatomy) == ["lm_head.weight", *layers]
    assert anatomy.layouts["model.layers.0.block_sparse_moe.gate.weight"].reason == "router"


def test_shared_experts_have_no_number_and_their_gate_is_a_router() -> None:
    anatomy = read_anatomy(architectures.build("qwen2-moe"))
    assert components(anatomy, "model.layers.1.mlp.shared_expert.down_proj.weight") == [("down", 1, None)]
    assert anatomy.layouts["model.layers.1.mlp.shared_expert_gate.weight"].reason == "router"


def test_biases_positions_and_projections_of_opt() -> None:
    anatomy = read_anatomy(architectures.build("opt"))
    reason = {name.removeprefix("model.decoder."): layout.reason for name, layout in anatomy.layouts.items()}
    assert reason["embed_positions.weight"] == reason["embed_tokens.weight"] == "embedding"
    assert reason["layers.0.fc1.bias"] == "bias" and reason["layers.0.final_layer_norm.bias"] == "bias"
    assert reason["project_in.weight"] == "" and reason["layers.0.fc1.weight"] == ""
    assert components(anatomy, "model.decoder.project_in.weight") == [("other", None, None)]
    assert components(anatomy, "model.decoder.layers.1.fc2.weight") == [("down", 1, None)]


def test_two_dimensional_biases_and_vectors_are_not_eligible() -> None:
    layouts = read_anatomy(architectures.build("gpt-oss")).layouts
    assert layouts["model.layers.0.mlp.experts.gate_up_proj_bias"].reason == "bias"
    assert layouts["model.layers.0.self_attn.sinks"].reason == "vector"


def test_towers_are_not_eligible_unless_included() -> None:
    model = architectures.build("llama")
    model.model.vision_tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 5)])})
    model.model.audio_tower = nn.Linear(5, 3)
    layouts = read_anatomy(model).layouts
    assert layouts["model.vision_tower.layers.0.weight"].reason == "vision tower"
    assert layouts["model.vision_tower.layers.0.weight"].matrices[0].layer is None
    assert layouts["model.audio_tower.weight"].reason == "audio tower"
    assert eligible_names(read_anatomy(model, include="vision_tower")) == ["model.vision_tower.layers.0.weight"]


def test_an_unknown_fused_weight_is_one_matrix() -> None:
    model = architectures.build("llama")
    model.model.layers[0].self_attn.mystery_qkv = nn.Linear(24, 72, bias=False)
    anatomy = read_anatomy(model)
    assert components(anatomy, "model.layers.0.self_attn.mystery_qkv.weight") == [("other", 0, None)]
    assert anatomy.layouts["model.layers.0.self_attn.mystery_qkv.weight"].eligible


def test_include_restricts_and_admits_but_never_norms_or_biases() -> None:
    model = architectures.build("mixtral")
    layer = eligible_names(read_anatomy(model, include=r"layers\.1\."))
    assert "model.layers.1.block_sparse_moe.gate.weight" in layer
    assert all(".layers.1." in name and "norm" not in name for name in layer) and len(layer) == 9 + 4 + 1
    assert eligible_names(read_anatomy(model, include="embed_tokens")) == ["model.embed_tokens.weight"]
    left_out = read_anatomy(model, include="embed_tokens").layouts["lm_head.weight"]
    assert (left_out.eligible, left_out.reason) == (False, "not matched by --include")


def test_exclude_is_applied_last() -> None:
    model = architectures.build("llama")
    anatomy = read_anatomy(model, include=r"self_attn|embed", exclude="[qko]_proj")
    expected = ["model.embed_tokens.weight", *(f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1))]
    assert eligible_names(anatomy) == expected
    assert anatomy.layouts["model.layers.0.self_attn.q_proj.weight"].reason == "matched by --exclude"
    assert anatomy.total == read_anatomy(model).total


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"include": "("}, r"--include '\(' is not a regular expression"),
        ({"exclude": "*"}, r"--exclude '\*' is not a regular expression"),
        ({"include": "nothing"}, r"--include 'nothing' leave no eligible tensor of 21"),
        ({"include": "norm", "exclude": "x"}, r"--include 'norm' and --exclude 'x' leave no eligible tensor"),
        ({"exclude": ""}, r"--exclude '' leave no eligible tensor"),
    ],
)
def test_bad_patterns_are_user_errors(patterns: dict[str, str], message: str) -> None:
    with pytest.raises(SafecritError, match=message):
        read_anatomy(architectures.build("llama"), **patterns)


@pytest.mark.parametrize("name", ["phi3", "gpt-neox"])
def test_parts_of_a_fused_weight_follow_it_into_a_transposed_checkpoint(name: str) -> None:
    model = architectures.build(name)
    plain = read_anatomy(model)
    fused = "self_attn.qkv_proj.weight" if name == "phi3" else "attention.query_key_value.weight"
    model._weight_conversions = [WeightConverter(fused, fused, operations=[Transpose(0, 1)])]
    turned = read_anatomy(model)
    full_name = next(n for n in plain.tensors if n.endswith("0." + fused))
    weight = model.get_parameter(full_name).data
    stored = weight.T.contiguous()
    for before, after in zip(plain.layouts[full_name].matrices, turned.layouts[full_name].matrices, strict=True):
        assert (before.component, before.layer) == (after.component, after.layer)
        assert torch.equal(before.where.of(weight).sort().values, after.where.of(stored).sort().values)


def test_a_checkpoint_that_cuts_across_matrices_is_one_matrix_each() -> None:
    frame, part = Strided(0, (4, 6), (6, 1)), Strided(2, (4, 3), (6, 1))
    assert _seen_from(frame, part) == Strided(2, (4, 3), (6, 1))
    assert _seen_from(frame, Strided(4, (4, 3), (6, 1))) is None  # runs over the end of a row
    assert _seen_from(Strided(0, (4, 3), (6, 1)), part) is None  # begins in the frame, ends outside
    assert _seen_from(Strided(6, (2, 6), (6, 1)), part) is None  # begins before the frame
    assert _seen_from(Strided(0, (6, 4), (1, 6)), part) == Strided(8, (4, 3), (1, 4))  # the transposed frame


def test_an_anatomy_names_an_unknown_parameter() -> None:
    with pytest.raises(KeyError, match="no such"):
        read_anatomy(architectures.build("llama")).of_parameter("no such")


def test_real_model(shared: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260K")
    anatomy = read_anatomy(model)
    assert anatomy.total == sum(parameter.numel() for parameter in model.parameters())
    assert anatomy.layers == model.config.num_hidden_layers
    assert len(anatomy.eligible) == 7 * anatomy.layers + ("lm_head.weight" in anatomy.tensors)
