"""The account of memory and work, against what torch itself allocates and against known models."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from safecrit.account import ScorePlan, decide, largest_batches, score_account
from safecrit.anatomy import read_anatomy
from safecrit.api.dryrun import dry_run, lines
from safecrit.api.judging import JudgeChoice
from safecrit.api.scorejob import ScoreJob, ScoreSettings
from safecrit.chat import encode_prompt
from safecrit.errors import SafecritError
from safecrit.generation import GenerationSettings
from safecrit.machine import Rates, device_free, host_free, parse_bytes, probe
from safecrit.metamodel import ModelShape, activation_bytes, layer_bytes, read_shape, shape_of
from tests import tiny
from tests.architectures import CONFIGS, build

GIB = 2**30
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[int], t.PretrainedConfig]] = {
    "llama": lambda n: t.LlamaConfig(**SIZES, num_hidden_layers=n),
    "qwen2": lambda n: t.Qwen2Config(**SIZES, num_hidden_layers=n),
    "mixtral": lambda n: t.MixtralConfig(**SIZES, num_hidden_layers=n, num_local_experts=4),
    "gpt2": lambda n: t.GPT2Config(n_embd=64, n_head=8, n_layer=n, vocab_size=64, bos_token_id=1, eos_token_id=2),
}
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
PLAN = ScorePlan(
    prompts=520,
    prompt_tokens=80,
    answer_tokens=256,
    judge_tokens=500,
    mean_prompt_tokens=50.0,
    mean_judge_tokens=450.0,
)


def made(family: str, layers: int, dtype: torch.dtype) -> t.PreTrainedModel:
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(FAMILIES[family](layers)).eval().to(dtype)


@functools.cache
def llama_8b() -> ModelShape:
    with torch.device("meta"):
        return shape_of(t.AutoModelForCausalLM.from_config(t.LlamaConfig(**LLAMA_8B)))


def forward(model: t.PreTrainedModel, batch: int, tokens: int, weights: bool) -> torch.Tensor:
    """Logits of one position, with graph to the eligible weights, or to the input embeddings alone."""
    eligible = {entry.parameter for entry in read_anatomy(model).eligible}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(weights and name in eligible)
    ids = torch.randint(3, 60, (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    given = {"input_ids": ids} if weights else {"inputs_embeds": model.get_input_embeddings()(ids).requires_grad_()}
    return model(**given, attention_mask=mask, use_cache=False, logits_to_keep=1).logits  # type: ignore[no-any-return]


def kept_by_autograd(model: t.PreTrainedModel, batch: int, tokens: int, weights: bool) -> int:
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward(model, batch, tokens, weights)
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_autograd_keeps_of_a_layer(family: str, dtype: torch.dtype, weights: bool) -> None:
    one, three = (kept_by_autograd(made(family, layers, dtype), 4, 32, weights) for layers in (1, 3))
    shape = shape_of(made(family, 3, dtype))
    assert (three - one) / 2 == pytest.approx(
        layer_bytes(shape, 4, 32, dtype.itemsize, weights_require_grad=weights), rel=0.04
    )


def peak(function: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_a_backward_pass(dtype: torch.dtype, checkpointed: bool, weights: bool) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 384}
    model = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**sizes, num_hidden_layers=8)).eval().to(dtype)
    for layer in model.model.layers if checkpointed else ():
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    def run() -> None:
        for parameter in model.parameters():
            if not hasattr(parameter, "folded"):
                parameter.requires_grad_(True)
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
                parameter.folded = True  # type: ignore[attr-defined]
        logits = forward(model, 8, 64, weights)
        logits.backward(torch.full_like(logits, 1e-3))

    run()
    predicted = activation_bytes(
        shape_of(model), 8, 64, dtype.itemsize, checkpointed=checkpointed, weights_require_grad=weights
    )
    assert peak(run) == pytest.approx(predicted, rel=0.12)


@pytest.mark.parametrize("name", CONFIGS)
def test_shape_of_every_family_needs_no_weights(name: str) -> None:
    shape, anatomy = shape_of(build(name, device="meta")), read_anatomy(build(name))
    assert (shape.parameters, shape.eligible) == (anatomy.total, anatomy.eligible_total)
    assert 0 < shape.active <= shape.parameters + shape.head
    assert shape.largest >= shape.largest_part > 0
    assert shape.intermediate or shape.expert_intermediate
    assert layer_bytes(shape, 1, 8, 4, weights_require_grad=True) > 0


def test_known_sizes() -> None:
    shape = llama_8b()
    assert shape.parameters == 8_030_261_248
    assert (shape.layers, shape.intermediate, shape.vocabulary, shape.itemsize) == (32, 14336, 128256, 2)
    assert shape.active == shape.parameters - 128256 * 4096
    with torch.device("meta"):
        mixtral = shape_of(t.AutoModelForCausalLM.from_config(t.MixtralConfig(num_local_experts=8)))
    assert mixtral.parameters == 46_702_792_704
    assert mixtral.active == pytest.approx(12.75e9, rel=0.01)  # the model card says 12.9 B, embedding included
    assert mixtral.largest == 8 * 2 * 14336 * 4096  # a layer's whole bank
    assert mixtral.largest_part == 32000 * 4096  # the head; experts are stored one by one


def test_eight_billion_fit_24_gib_in_turns_only() -> None:
    shape = llama_8b()
    turns = replace(PLAN, placement="sequential", accumulate_on="host")
    found = largest_batches(shape, shape, turns, 24 * GIB)
    assert found is not None
    assert found.peak("device") < 24 * GIB
    assert found.plan.checkpointed == "on"
    assert found.peak("host") > 4 * shape.eligible
    assert largest_batches(shape, shape, replace(turns, placement="together"), 24 * GIB) is None


def test_automatic_choices_take_the_fastest_that_fits() -> None:
    shape = llama_8b()
    chosen = {}
    for name, device, host in (("large", 400, 64), ("middle", 80, 64), ("small", 40, 128), ("poor", 40, 64)):
        account = decide(shape, shape, replace(PLAN, batch_size=4, judge_batch_size=4), device * GIB, host * GIB)
        assert account.fits(device * GIB, host * GIB), name
        chosen[name] = (account.plan.accumulate_on, account.plan.checkpointed)
    assert chosen["large"] == ("device", "off")
    assert chosen["middle"][0] == "device"
    assert chosen["small"] == ("host", "on")


def test_parts_lie_where_the_plan_puts_them() -> None:
    shape = llama_8b()
    weights = 2 * shape.parameters
    together = score_account(shape, shape, PLAN)
    turns = score_account(shape, shape, replace(PLAN, placement="sequential"))
    apart = score_account(shape, shape, replace(PLAN, placement="separate"))
    on_cpu = score_account(shape, shape, replace(PLAN, cpu=True))
    assert together.in_phase("device", "answer") - turns.in_phase("device", "answer") == weights
    assert together.peak("judge device") == turns.peak("judge device") == 0
    assert apart.peak("judge device") > weights
    assert on_cpu.peak("device") == 0
    assert on_cpu.peak("host") > together.peak("device") - GIB
    on_disk = score_account(shape, shape, replace(PLAN, accumulate_on="disk", score_itemsize=2))
    moved = on_disk.peak("disk") - together.peak("disk")
    assert moved == 4 * shape.eligible - 2 * shape.eligible


def test_more_of_anything_never_needs_less() -> None:
    shape = llama_8b()
    least = score_account(shape, shape, PLAN).peak("device")
    for more in ({"batch_size": 32}, {"answer_tokens": 512}, {"prompt_tokens": 500}, {"itemsize": 4}):
        assert score_account(shape, shape, replace(PLAN, **more)).peak("device") > least, more
    assert score_account(shape, shape, replace(PLAN, checkpointed="on")).peak("device") < least
    assert score_account(shape, None, PLAN).peak("device") < least


def test_work_of_the_passes() -> None:
    shape = llama_8b()
    work = {entry.name: entry for entry in score_account(shape, shape, PLAN).work}
    tokens = PLAN.prompts * (PLAN.mean_prompt_tokens + PLAN.answer_tokens)
    assert work["model, forward and backward"].flops == pytest.approx(6 * shape.active * tokens, rel=0.05)
    judged = PLAN.prompts * PLAN.draws * PLAN.mean_judge_tokens
    assert work["judge, forward and backward"].flops == pytest.approx(4 * shape.active * judged, rel=0.1)
    again = {e.name: e for e in score_account(shape, shape, replace(PLAN, checkpointed="on")).work}
    name = "model, forward and backward"
    assert again[name].flops == pytest.approx(work[name].flops * 4 / 3)


@pytest.mark.parametrize(("text", "expected"), [("24GiB", 24 * GIB), ("80 GB", 80 * 10**9), ("1.5gib", 3 * 2**29)])
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "24 bananas", "0GB"])
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(SafecritError, match="--gpu-memory"):
        parse_bytes(text)


def test_configs_that_describe_no_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "no-such-thing"}))
    with pytest.raises(SafecritError, match="no language model"):
        read_shape(tmp_path)
    file.write_text(json.dumps({"model_type": "llama", "quantization_config": {}}))
    with pytest.raises(SafecritError, match="quantised"):
        read_shape(tmp_path)


def test_a_classifier_is_measured_as_one(tmp_path: Path) -> None:
    config = t.LlamaConfig(**SIZES, num_hidden_layers=2, num_labels=3)
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert (shape.vocabulary, shape.head, shape.embedding) == (3, 0, 64)


RATES = Rates(flops=1e12, flops32=1e11, memory=1e11, link=1e10)
HARMLESS = ["How do I bake bread?", "Tell me a story about the old keeper of the lighthouse, please."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a judge as folders without weights, and a file of prompts."""
    root = tmp_path_factory.mktemp("dry")
    for name, layers in (("model", 3), ("guard", 2)):
        made_tokenizer = tiny.tokenizer(template=tiny.CHAT)
        t.LlamaConfig(**{**SIZES, "vocab_size": len(made_tokenizer)}, num_hidden_layers=layers).save_pretrained(
            root / name
        )
        made_tokenizer.save_pretrained(root / name)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in HARMLESS))
    return root


def job(folders: Path, *, scoring: ScoreSettings | None = None, **changes: Any) -> ScoreJob:
    given: dict[str, Any] = {
        "model": str(folders / "model"),
        "judge": JudgeChoice(name=str(folders / "guard")),
        "prompts": str(folders / "prompts.jsonl"),
        "generation": GenerationSettings(max_new_tokens=24),
        "scoring": scoring or ScoreSettings(),
    }
    return ScoreJob(**{**given, **changes})


def test_dry_run_reads_no_weights(folders: Path) -> None:
    found = dry_run(job(folders), gpu_memory="24GiB", output=folders)
    assert found.fits
    assert found.advice == ""
    assert found.best == {"batch_size": 16, "judge_batch_size": 64}
    assert found.settings["answer_tokens"] == 24
    assert found.available["device"] == 24 * GIB
    assert found.seconds is None
    assert found.settings["placement"] == "together"
    json.dumps(asdict(found), allow_nan=False)
    text = "\n".join(lines(found))
    assert text.endswith(found.first_prompt)
    assert HARMLESS[0] in found.first_prompt
    assert HARMLESS[0] not in "\n".join(lines(found)[:-1])
    assert "Time: not known" in text
    for part in found.parts:
        assert part["name"] in text


def test_dry_run_counts_with_the_real_tokenizers(folders: Path) -> None:
    found = dry_run(job(folders), gpu_memory="24GiB", output=folders)
    made_tokenizer = tiny.tokenizer(template=tiny.CHAT)
    counts = [len(encode_prompt(made_tokenizer, [{"role": "user", "content": text}])) for text in HARMLESS]
    assert found.settings["prompt_tokens"] == max(counts)
    assert found.settings["mean_prompt_tokens"] == sum(counts) / 2
    assert found.settings["judge_tokens"] > max(counts) + 24


def test_dry_run_on_this_machine_estimates_time(folders: Path) -> None:
    found = dry_run(job(folders, device="cpu"), output=folders, rates=RATES)
    assert found.settings["cpu"]
    assert found.peaks["device"]["score.model"] == 0
    assert found.seconds == pytest.approx(sum(entry["seconds"] for entry in found.work))
    assert found.seconds > 0
    assert "Time: about" in "\n".join(lines(found))


def test_dry_run_says_what_to_lower(folders: Path) -> None:
    together = ScoreSettings(placement="together", checkpoint="off")
    roomy = dry_run(job(folders, scoring=together), gpu_memory="24GiB", output=folders)
    fixed = sum(part["bytes"] for part in roomy.parts if part["name"] in ("CUDA context", "model weights"))
    most = max(roomy.peaks["device"].values())
    whole = ScoreSettings(checkpoint="off")
    tight = dry_run(job(folders, scoring=whole), gpu_memory=f"{(most + fixed) // 2 / 1e6}MB", output=folders)
    assert not tight.fits
    assert tight.best is not None
    assert f"--batch-size {tight.best['batch_size']}" in tight.advice
    assert tight.best["judge_batch_size"] < 64
    none = dry_run(job(folders), gpu_memory="1MB", output=folders)
    assert none.best is None
    assert not none.fits
    assert "Not even one prompt" in none.advice


def test_dry_run_without_a_judge(folders: Path) -> None:
    refusal = ScoreSettings(objective="refusal-nll")
    found = dry_run(job(folders, scoring=refusal), gpu_memory="24GiB", output=folders)
    assert found.judge is None
    assert not any("judge" in part["name"] for part in found.parts)
    assert "No judge model." in lines(found)[0]


def test_dry_run_counts_given_answers(folders: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    rows = [{"prompt": text, "answer": "First warm the oven."} for text in HARMLESS]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = dry_run(job(folders, answers=str(answers)), gpu_memory="24GiB", output=folders)
    assert 1 < found.settings["answer_tokens"] < 24
    assert not any(part["name"] == "key-value cache" for part in found.parts)


def test_dry_run_of_training_examples(folders: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": HARMLESS[0], "completion": "First warm the oven."}) + "\n")
    likelihood = ScoreSettings(objective="answer-nll")
    asked = job(folders, prompts=None, data=str(data), scoring=likelihood)
    found = dry_run(asked, gpu_memory="24GiB", output=folders)
    assert found.settings["prompts"] == 1
    assert 1 < found.settings["answer_tokens"] < 24
    assert HARMLESS[0] in found.first_prompt


def test_dry_run_refuses_unknown_settings(folders: Path) -> None:
    with pytest.raises(SafecritError, match="--accumulate-on"):
        dry_run(job(folders, scoring=ScoreSettings(accumulate_on="tape")), gpu_memory="24GiB")
    with pytest.raises(SafecritError, match="--judge-placement"):
        dry_run(job(folders, scoring=ScoreSettings(placement="beside")), gpu_memory="24GiB")
    with pytest.raises(SafecritError, match="no such folder"):
        dry_run(job(folders, model=str(folders / "absent")), gpu_memory="24GiB")


def test_probe_measures_every_rate() -> None:
    found = probe(torch.device("cpu"), torch.float32)
    assert min(found.flops, found.flops32, found.memory, found.link) > 1e6


def test_free_memory_of_a_cpu_is_the_hosts() -> None:
    assert device_free(torch.device("cpu")) == pytest.approx(host_free(), rel=0.5)
    assert host_free() > 1e8
