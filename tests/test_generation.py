from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from safecrit.chat import encode_prompt
from safecrit.errors import SafecritError
from safecrit.generation import GenerationSettings, answers_from_texts, generate
from safecrit.prompts import prompts_from_texts
from tests import tiny

TEXTS = ["How do I bake bread?", "Tell me", "a story about the old lighthouse keeper", "safe", "oven"]


def greedy(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    made: list[int] = []
    for _ in range(count):
        logits = model(input_ids=torch.tensor([[*ids, *made]])).logits[0, -1]
        token = int(logits.argmax())
        if token == 2:
            break
        made.append(token)
    return made


def test_batched_answers_equal_one_at_a_time_argmax() -> None:
    reads = tiny.tokenizer()
    model = tiny.llama(len(reads)).double()
    # What a checkpoint may bring along must not steer the answers.
    model.generation_config = GenerationConfig(repetition_penalty=1.7, do_sample=True, temperature=2.0, eos_token_id=2)
    prompts = prompts_from_texts(TEXTS)
    answers = generate(model, reads, prompts, GenerationSettings(max_new_tokens=12, batch_size=3))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.ids) == greedy(model, encode_prompt(reads, list(prompt.messages)), 12)
        assert answer.finished == (len(answer.ids) < 12)
    assert model.generation_config.repetition_penalty == 1.7


def test_window_bounds_answers_and_refuses_long_prompts() -> None:
    reads = tiny.tokenizer()
    model = tiny.llama(len(reads))
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # never the largest: only the window or the limit ends an answer
    prompts = prompts_from_texts(["a" * 200, "b"])
    answers = generate(model, reads, prompts, GenerationSettings(max_new_tokens=100))
    size = len(encode_prompt(reads, list(prompts[0].messages)))
    assert len(answers[0].ids) <= 256 - size
    assert len(answers[1].ids) == 100
    with pytest.raises(SafecritError, match=r"row 1 has .* tokens, the model's window is 256"):
        generate(model, reads, prompts_from_texts(["a" * 300]), GenerationSettings())


def test_batch_halves_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = tiny.tokenizer()
    model = tiny.llama(len(reads))
    inner, sizes = model.generate, []

    def limited(**arguments: torch.Tensor) -> torch.Tensor:
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        return inner(**arguments)

    monkeypatch.setattr(model, "generate", limited)
    answers = generate(model, reads, prompts_from_texts(TEXTS), GenerationSettings(max_new_tokens=4, batch_size=5))
    assert len(answers) == 5 and sizes == [5, 2, 2, 1]


def test_texts_made_elsewhere_keep_special_spellings_as_text() -> None:
    reads = tiny.tokenizer()
    answer = answers_from_texts(reads, ["go </s> on"])[0]
    assert 2 not in answer.ids and reads.decode(list(answer.ids)) == "go </s> on"
