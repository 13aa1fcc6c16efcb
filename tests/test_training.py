from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import safecrit.trainloop as trainloop
from safecrit.delta import Delta, apply_delta
from safecrit.errors import MismatchError, SafecritError
from safecrit.fingerprint import accepted_fingerprints, fingerprint
from safecrit.maskfile import Mask
from safecrit.mixture import collate, mix
from safecrit.models import load_model
from safecrit.traindata import TrainExample
from safecrit.training import TrainSettings, headline, run_set, run_spa
from safecrit.training_output import write_set_output, write_spa_output
from safecrit.verification import verify
from tests.training_helpers import fitting_mask, folder_model, pairs, tokenizer

REFUSALS = pairs(("do bad a", "no."), ("do bad b", "no, no."), ("do bad c", "never."))
BENIGN = pairs(("say hi", "hi."), ("count", "1 2 3"))
FAST = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 40}


def quick(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"learning_rate": 1e-2, "max_steps": 3, **FAST, **changes})


def differing(a: Path, b: Path) -> dict[str, torch.Tensor]:
    old, new = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
    return {name: old[name] != new[name] for name in old}


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float32), ("llama-tied", torch.bfloat16), ("mixtral", torch.bfloat16)]
)
def test_set_changes_masked_entries_only_on_disk(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = folder_model(name, tmp_path / "base", dtype=dtype)
    mask = fitting_mask(loaded, 0.02)
    seen: list[tuple[int, int, float]] = []
    result = run_set(loaded, mask, REFUSALS, BENIGN, 0.5, quick(), lambda *args: seen.append(args))
    assert [(step, total) for step, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [loss for *_, loss in seen] == result.losses
    assert all(math.isfinite(loss) for loss in result.losses)
    assert all(norm > 0 for norm in result.grad_norms)
    write_set_output(loaded, mask, tmp_path / "out", result)
    changed = 0
    for tensor, unequal in differing(tmp_path / "base", tmp_path / "out").items():
        allowed = mask.dense(tensor) if tensor in mask.indices else torch.zeros_like(unequal)
        assert not (unequal & ~allowed).any(), tensor
        changed += int(unequal.sum())
    assert changed == result.changed > mask.count / 3
    assert verify(tmp_path / "out", tmp_path / "base", mask, "set").ok
    assert result.data.retain == 6
    top = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in top
    assert not any(path.suffix == ".safetensors" for path in (tmp_path / "out").iterdir() if path.stem != "model")
    assert {path.name for path in (tmp_path / "out" / "safecrit").iterdir()} == {"delta.safetensors", "training.json"}
    # The delta gives the same files, and the model that transformers loads is the one that was trained.
    delta = Delta.load(tmp_path / "out" / "safecrit" / "delta.safetensors")
    apply_delta(tmp_path / "base", delta, tmp_path / "applied")
    assert fingerprint(tmp_path / "applied") == fingerprint(tmp_path / "out")
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).named_parameters())
    for parameter, tensor in loaded.model.named_parameters():
        assert torch.equal(again[parameter], tensor.to(dtype)), parameter


@pytest.mark.parametrize(("name", "dtype"), [("llama-tied", torch.bfloat16), ("mixtral", torch.float32)])
def test_spa_keeps_masked_entries_on_disk(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = folder_model(name, tmp_path / "base", dtype=dtype)
    mask = fitting_mask(loaded, 0.1)
    result = run_spa(loaded, mask, BENIGN, settings=quick(weight_decay=0.1))
    write_spa_output(loaded, mask, tmp_path / "out", result)
    changed = 0
    for tensor, unequal in differing(tmp_path / "base", tmp_path / "out").items():
        if tensor in mask.indices:
            assert not (unequal & mask.dense(tensor)).any(), tensor
        changed += int(unequal.sum())
    assert changed == result.changed > 0.5 * (mask.info.total - mask.count)
    assert result.trained == mask.info.total - mask.count
    assert sum(row.trained for row in result.moved) == result.trained
    assert verify(tmp_path / "out", tmp_path / "base", mask, "spa").ok
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).named_parameters())
    for parameter, tensor in loaded.model.named_parameters():
        assert torch.equal(again[parameter], tensor.to(dtype)), parameter


def test_spa_keeps_a_stored_copy_of_a_tied_tensor_equal(tmp_path: Path) -> None:
    loaded = folder_model("llama-tied", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    mask = fitting_mask(loaded, 0.1)
    result = run_spa(loaded, mask, BENIGN, settings=quick())
    write_spa_output(loaded, mask, tmp_path / "out", result)
    written = load_file(tmp_path / "out" / "model.safetensors")
    trained = loaded.model.get_input_embeddings().weight
    assert torch.equal(written["lm_head.weight"], trained)
    assert torch.equal(written["model.embed_tokens.weight"], trained)
    assert not torch.equal(weights["lm_head.weight"], trained)


def test_outputs_say_what_was_done_and_take_the_bases_mask(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\nhello\n")
    mask = fitting_mask(loaded, 0.02)
    result = run_set(loaded, mask, REFUSALS, settings=quick())
    write_set_output(loaded, mask, tmp_path / "out", result, "model")
    assert not (tmp_path / "out" / "safecrit" / "delta.safetensors").exists()
    document = json.loads((tmp_path / "out" / "safecrit" / "training.json").read_text())
    base = fingerprint(tmp_path / "base")
    assert document["parents"] == [base]
    assert accepted_fingerprints(tmp_path / "out") == (fingerprint(tmp_path / "out"), base)
    assert document["settings"]["learning_rate"] == 1e-2
    assert document["trained"] == mask.count
    card = (tmp_path / "out" / "README.md").read_text()
    assert "apache-2.0" in card
    assert "hello" not in card
    assert str(tmp_path) not in card + json.dumps(document)
    assert headline(mask, "set") in card
    assert "tokens a second" in card and "of memory at the peak" in card
    # The base's mask goes on to the next stage; another model's does not.
    second = load_model(tmp_path / "out", device="cpu")
    run_spa(second, mask, BENIGN, settings=quick(max_steps=1))
    stranger = folder_model("llama", tmp_path / "stranger")
    with torch.no_grad():
        next(stranger.model.parameters()).add_(1)
    stranger.model.save_pretrained(tmp_path / "stranger")
    with pytest.raises(MismatchError):
        run_set(stranger, mask, REFUSALS, settings=quick())
    with pytest.raises(SafecritError, match="--save"):
        write_set_output(loaded, mask, tmp_path / "no", result, "all")
    write_set_output(loaded, mask, tmp_path / "d", result, "delta")
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"README.md", "safecrit"}


def test_a_mask_that_does_not_fit_stops_before_training(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    mask = fitting_mask(folder_model("qwen2", tmp_path / "other"), 0.1)
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    for run in (run_set, run_spa):
        with pytest.raises(MismatchError):
            run(loaded, mask, REFUSALS, settings=quick())
    assert all(torch.equal(p, before[n]) for n, p in loaded.model.named_parameters())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    mask = fitting_mask(loaded, 0.1)
    with torch.no_grad():
        dict(loaded.model.named_parameters())["lm_head.weight"][5] = float("nan")
    for run in (run_set, run_spa):
        with pytest.raises(SafecritError, match="loss is not finite at step 1"):
            run(loaded, mask, REFUSALS, settings=quick())
        assert all(p.requires_grad for p in loaded.model.parameters())


def test_a_negligible_change_is_warned_of_and_measured_in_sigma(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    mask = fitting_mask(loaded, 0.05)
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    result = run_set(loaded, mask, REFUSALS, settings=quick(learning_rate=1e-7))
    assert any("negligible" in warning for warning in result.warnings)
    assert (
        "negligible"
        in (write_set_output(loaded, mask, tmp_path / "out", result), (tmp_path / "out/README.md").read_text())[1]
    )
    loaded = folder_model("llama", tmp_path / "base")
    result = run_set(loaded, mask, REFUSALS, settings=quick())
    assert not result.warnings
    parts = [
        ((p.detach() - before[n]).abs() / before[n].std()).reshape(-1)[mask.indices[n]]
        for n, p in loaded.model.named_parameters()
        if n in mask.indices
    ]
    assert result.mean_sigma == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)
    assert max(row.max_sigma or 0 for row in result.moved) == pytest.approx(float(torch.cat(parts).max()), rel=1e-4)


def test_runs_repeat_bit_for_bit_and_accumulation_changes_little(tmp_path: Path) -> None:
    models = []
    # Examples of one length, so that a mean over two micro-batches is the mean over one batch.
    same = pairs(("ab", "cd"), ("ef", "gh"), ("ij", "kl"), ("mn", "op"))
    for number, (size, accumulation) in enumerate(((4, 1), (4, 1), (1, 4))):
        loaded = folder_model("llama", tmp_path / str(number))
        settings = quick(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, learning_rate=1e-3)
        run_set(loaded, fitting_mask(loaded, 0.05), same, settings=settings)
        models.append([p.detach() for p in loaded.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(models[0], models[1], strict=True))
    assert all(torch.allclose(a, c, rtol=0, atol=1e-5) for a, c in zip(models[0], models[2], strict=True))


@pytest.mark.parametrize("run", [run_set, run_spa])
def test_a_run_cut_short_continues_bit_for_bit(run: Any, tmp_path: Path) -> None:
    settings = quick(max_steps=6, save_steps=2, optim="adamw_torch")
    finished = []
    for number, stop in enumerate((None, 5)):
        loaded = folder_model("mixtral", tmp_path / str(number))
        mask = fitting_mask(loaded, 0.05)

        def interrupt(step: int, total: int, loss: float, stop: int | None = stop) -> None:
            if step == stop:
                raise KeyboardInterrupt

        checkpoints = tmp_path / f"checkpoints-{number}"
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                run(loaded, mask, REFUSALS, BENIGN, 0.5, settings, interrupt, checkpoints=checkpoints)
            loaded = folder_model("mixtral", tmp_path / str(number))
            torn = checkpoints / "checkpoint-6"  # as a kill in the middle of saving leaves it
            torn.mkdir()
            (torn / "trainer_state.json").write_text('{"global_')
        result = run(loaded, mask, REFUSALS, BENIGN, 0.5, settings, checkpoints=checkpoints)
        assert len(result.losses) == 6
        assert result.tokens == sum(len(example.ids) for example in result.data.items[0 if stop is None else 16 :])
        finished.append([result.losses, result.grad_norms, *(p.detach() for p in loaded.model.parameters())])
    assert finished[0][:2] == finished[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(finished[0][2:], finished[1][2:], strict=True))


@pytest.mark.parametrize(("share", "count", "retained"), [(0.0, 10, 0), (0.5, 10, 5), (0.3, 10, 3), (0.25, 7, 1)])
def test_retain_share_is_exact_and_spread(share: float, count: int, retained: int) -> None:
    def layout(seed: int) -> list[tuple[int, ...]]:
        mixed = mix(tokenizer(), REFUSALS, BENIGN, retain_share=share, count=count, max_length=40, seed=seed)
        assert mixed.retain == retained
        return [tuple(example.ids) for example in mixed.items]

    benign = {
        tuple(mix(tokenizer(), [one], [], retain_share=0, count=1, max_length=40, seed=0)[0].ids) for one in BENIGN
    }
    which = [ids in benign for ids in layout(0)]
    assert sum(which) == retained
    assert all(abs(sum(which[: n + 1]) - (n + 1) * share) <= 1 for n in range(count))
    assert layout(0) == layout(0)
    assert layout(0) != layout(1)


def test_every_example_is_seen_once_before_any_is_seen_twice() -> None:
    mixed = mix(tokenizer(), REFUSALS, [], retain_share=0.5, count=6, max_length=40, seed=3)
    assert mixed.retain == 0
    assert len({tuple(example.ids) for example in mixed.items[:3]}) == 3
    assert sorted(mixed.items[:3]) == sorted(mixed.items[3:])


def test_cut_examples_are_counted_and_useless_ones_left_out() -> None:
    rows = pairs(("a", "b"), ("a", "bcdefgh"), ("a" * 9, "b"))
    mixed = mix(tokenizer(), rows, [], retain_share=0, count=4, max_length=6, seed=0)
    assert (mixed.distinct, mixed.truncated, mixed.cut_away) == (2, 1, 1)
    with pytest.raises(SafecritError, match="--max-length"):
        mix(tokenizer(), rows[2:], [], retain_share=0, count=4, max_length=6, seed=0)
    with pytest.raises(SafecritError, match="--retain-share"):
        mix(tokenizer(), rows, rows, retain_share=1.0, count=4, max_length=6, seed=0)


def test_labels_are_the_answers_tokens() -> None:
    mixed = mix(tokenizer(), pairs(("ab", "cd"), ("e", "f")), [], retain_share=0, count=2, max_length=40, seed=0)
    batch = collate(mixed.items, pad=0)
    for row, example in enumerate(mixed.items):
        length = len(example.ids)
        expected = [i if value else -100 for i, value in zip(example.ids, example.loss_mask, strict=True)]
        assert batch["input_ids"][row, :length].tolist() == example.ids
        assert batch["labels"][row].tolist() == expected + [-100] * (batch["labels"].shape[1] - length)
        assert batch["attention_mask"][row].sum() == length


def test_the_loss_is_the_mean_over_answer_tokens(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    one = pairs(("ab", "cd"))
    result = run_spa(loaded, fitting_mask(loaded, 0.05), one, settings=quick(max_steps=1))
    fresh = folder_model("llama", tmp_path / "base").model
    ids = torch.tensor([loaded.tokenizer("ab\ncd")["input_ids"]])
    ids = torch.cat([torch.tensor([[1]]), ids, torch.tensor([[2]])], dim=1)
    log_p = fresh(ids).logits.log_softmax(-1)[0, 3:6]
    expected = -log_p.gather(1, ids[0, 4:, None]).mean().detach()
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_sequences_stay_within_the_models_window(tmp_path: Path) -> None:
    loaded = folder_model("gpt2", tmp_path / "base")
    window = loaded.model.config.max_position_embeddings
    long = [TrainExample(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 200}), 0)]
    result = run_set(loaded, fitting_mask(loaded, 0.05), long, settings=quick(max_length=2048, max_steps=1))
    assert max(len(example.ids) for example in result.data.items) == window
    assert result.data.truncated == 1


def test_headline_counts_both_ways(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    mask = fitting_mask(loaded, 0.05)
    total = sum(p.numel() for p in loaded.model.parameters())
    share, rest = 100 * mask.count / total, 100 * (total - mask.count) / total
    assert headline(mask, "set") == f"Training {mask.count:,} of {total:,} weights ({share:.4g} %), rest frozen"
    assert headline(mask, "spa") == f"Training {total - mask.count:,} of {total:,} weights ({rest:.4g} %), rest frozen"


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    capfd.readouterr()
    run_set(loaded, fitting_mask(loaded, 0.05), REFUSALS, settings=quick())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("run", [run_set, run_spa])
def test_gradient_checkpointing_gives_the_same_weights(run: Any, tmp_path: Path) -> None:
    models = []
    for checkpointing in (False, True):
        loaded = folder_model("llama", tmp_path / str(checkpointing))
        settings = quick(gradient_checkpointing=checkpointing, learning_rate=1e-3)
        run(loaded, fitting_mask(loaded, 0.05), REFUSALS, settings=settings)
        models.append(list(loaded.model.parameters()))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(*models, strict=True))


def test_bf16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    result = run_spa(loaded, fitting_mask(loaded, 0.05), REFUSALS, settings=quick(bf16=True))
    assert result.changed > 0.5 * result.trained
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())


def test_set_leaves_bfloat16_alone_and_trains_float16_in_float32(tmp_path: Path) -> None:
    for dtype, kept in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        loaded = folder_model("llama", tmp_path / str(dtype), dtype=dtype)
        mask = fitting_mask(loaded, 0.05)
        result = run_set(loaded, mask, REFUSALS, settings=quick())
        assert loaded.model.dtype == kept
        write_set_output(loaded, mask, tmp_path / f"{dtype}-out", result)
        assert verify(tmp_path / f"{dtype}-out", tmp_path / str(dtype), mask, "set").ok


def test_settings_that_trainer_refuses_are_our_error(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    for changes in ({"lr_scheduler_type": "wavy"}, {"optim": "nosuch"}):
        with pytest.raises(SafecritError, match="training settings"):
            run_spa(loaded, fitting_mask(loaded, 0.05), REFUSALS, settings=quick(**changes))
    with pytest.raises(SafecritError, match="no training examples"):
        run_set(loaded, fitting_mask(loaded, 0.05), [], settings=quick())


def test_an_empty_mask_trains_nothing_and_says_so(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    empty = Mask({}, fitting_mask(loaded, 0.05).info)
    for run in (run_set, run_spa):
        with pytest.raises(SafecritError, match="selects no weight"):
            run(loaded, empty, REFUSALS, settings=quick())


def test_peak_memory_and_rate_are_measured(tmp_path: Path) -> None:
    loaded = folder_model("llama", tmp_path / "base")
    result = run_set(loaded, fitting_mask(loaded, 0.05), REFUSALS, settings=quick())
    assert result.tokens == sum(len(example.ids) for example in result.data.items)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.peak_memory == 0 or result.peak_memory > 1 << 20
    assert trainloop._peak_memory(torch.device("cpu")) >= result.peak_memory
