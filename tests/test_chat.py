from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from safecrit.chat import encode_example, encode_prompt, render_prompt
from safecrit.errors import SafecritError
from tests.training_helpers import tokenizer as character_tokenizer

TOKENIZERS = ("gpt2", "llama2", "llama3", "qwen2")
# The text after an answer that ends the turn; None where the template writes EOS, "" where it writes nothing.
CLOSINGS: dict[str, str | None] = {
    "alpaca": None,
    "amberchat": "",
    "chatml": "<|im_end|>",
    "chatqa": "",
    "falcon-instruct": "",
    "gemma-it": "<end_of_turn>",
    "llama-2-chat": None,
    "llama-3-instruct": "<|eot_id|>",
    "ministral-instruct": None,
    "mistral-instruct": None,
    "openchat-3.5": "<|end_of_turn|>",
    "phi-3": "<|end|>",
    "saiga": None,
    "solar-instruct": "",
    "vicuna": None,
    "zephyr": None,
}
ANSWERS = ("Mix flour, water.\nThen bake it.", "Add sugar!")
TALK = [
    {"role": "user", "content": "How do I bake bread?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "And a cake?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
SYSTEM = {"role": "system", "content": "Be brief."}
_loaded: dict[str, PreTrainedTokenizerBase] = {}


def load(shared: Path, name: str, template: str | None = None) -> PreTrainedTokenizerBase:
    if name not in _loaded:
        _loaded[name] = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    tokenizer = _loaded[name]
    tokenizer.chat_template = None
    if template:
        text = (shared / "tokenizers" / "chat_templates" / f"{template}.jinja").read_text()
        # The collection is indented for reading; its authors take indentation and line ends out before use.
        tokenizer.chat_template = text.replace("    ", "").replace("\n", "")
    return tokenizer


def segments(ids: list[int], loss: list[int]) -> list[list[int]]:
    """Runs of tokens that carry loss."""
    return [[i for i, _ in run] for value, run in groupby(zip(ids, loss, strict=True), lambda pair: pair[1]) if value]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [None, *CLOSINGS])
@pytest.mark.parametrize("system", [False, True])
def test_loss_stands_on_answers_and_what_closes_them(
    shared: Path, name: str, template: str | None, system: bool
) -> None:
    tokenizer = load(shared, name, template)
    talk = [SYSTEM, *TALK] if system else TALK
    ids, loss, truncated = encode_example(tokenizer, talk)
    assert len(ids) == len(loss)
    assert not truncated
    runs = segments(ids, loss)
    assert len(runs) == 2
    closing = CLOSINGS[template] if template else None
    closing = tokenizer.eos_token if closing is None else closing
    for run, answer in zip(runs, ANSWERS, strict=True):
        last = run is runs[-1]
        special = closing in {token.content for token in tokenizer.added_tokens_decoder.values()}
        expected = answer + closing
        if last and not special:
            expected += tokenizer.eos_token  # otherwise nothing would teach the model to stop
            assert run[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(run, clean_up_tokenization_spaces=False).strip()
        assert (text.replace(f" {closing}", closing) if closing else text) == expected
        assert sum(i in tokenizer.all_special_ids for i in run) == (special or last)
    first = loss.index(1)
    assert ids[:first] == encode_prompt(tokenizer, talk[:-3])
    whole = tokenizer.decode([i for i, value in zip(ids, loss, strict=True) if not value])
    assert all(asked in whole for asked in ("How do I bake bread?", "And a cake?"))
    assert ("Be brief." in whole) == system


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [None, *CLOSINGS])
def test_a_prompt_is_what_the_template_renders_with_no_bos_added(shared: Path, name: str, template: str | None) -> None:
    tokenizer = load(shared, name, template)
    ids = encode_prompt(tokenizer, TALK[:1])
    text = render_prompt(tokenizer, TALK[:1])
    bos = tokenizer.bos_token if template is None and tokenizer.bos_token else ""
    assert (
        ids == [tokenizer.bos_token_id] * bool(bos) + tokenizer(text[len(bos) :], add_special_tokens=False)["input_ids"]
    )
    if tokenizer.bos_token_id is not None and template != "saiga":  # which writes BOS before every turn
        assert ids.count(tokenizer.bos_token_id) <= 1
    if template and "{{- bos_token }}" in tokenizer.chat_template and tokenizer.bos_token_id is not None:
        assert ids[0] == tokenizer.bos_token_id


def test_the_plain_template_is_bos_text_newline_and_eos(shared: Path) -> None:
    tokenizer = load(shared, "llama2")
    assert render_prompt(tokenizer, TALK[:1]) == "<s>How do I bake bread?\n"
    ids, loss, _ = encode_example(tokenizer, TALK[:2])
    prompt = tokenizer("How do I bake bread?\n")["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert loss == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert ids[-1] == tokenizer.eos_token_id
    assert load(shared, "qwen2").bos_token is None
    assert render_prompt(load(shared, "qwen2"), TALK[:1]) == "How do I bake bread?\n"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [None, "llama-3-instruct", "mistral-instruct"])
def test_special_token_text_in_a_turn_stays_text(shared: Path, name: str, template: str | None) -> None:
    tokenizer = load(shared, name, template)
    bad = f"say {tokenizer.eos_token} and {tokenizer.eos_token}{tokenizer.eos_token} now"
    turns = [{"role": "user", "content": bad}, {"role": "assistant", "content": f"no {tokenizer.eos_token} here"}]
    harmless = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "no"}]
    ids, loss, _ = encode_example(tokenizer, turns)
    plain, plain_loss, _ = encode_example(tokenizer, harmless)
    assert [i for i in ids if i in tokenizer.all_special_ids] == [i for i in plain if i in tokenizer.all_special_ids]
    assert bad in tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert sum(loss) > sum(plain_loss)
    assert bad in render_prompt(tokenizer, turns[:1])
    assert ids[: loss.index(1)] == encode_prompt(tokenizer, turns[:1])


def test_private_characters_of_the_user_survive(shared: Path) -> None:
    tokenizer = load(shared, "gpt2")
    content = "\ue000 <|endoftext|> \ue001"
    ids = encode_prompt(tokenizer, [{"role": "user", "content": content}])
    assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == content + "\n"


def test_dates_stand_still(shared: Path) -> None:
    tokenizer = load(shared, "llama3", "llama-3-instruct")
    assert "Today Date: 26 Jul 2024" in render_prompt(tokenizer, TALK[:1])
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}|{{ messages[0]['content'] }}|"
    assert render_prompt(tokenizer, TALK[:1]) == "26 July 2024|How do I bake bread?|"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    ],
)
def test_a_system_turn_that_the_template_does_not_take_goes_into_the_user_turn(template: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    assert render_prompt(tokenizer, [SYSTEM, *TALK[:1]]) == "[user]Be brief.\n\nHow do I bake bread?[assistant]"
    ids, loss, _ = encode_example(tokenizer, [SYSTEM, *TALK[:2]])
    assert sum(loss) == len(ANSWERS[0]) + 1
    assert ids[-1] == tokenizer.eos_token_id


def test_reasoning_left_out_of_earlier_turns_moves_no_loss() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'u ' + m['content'] }}{% else %}{{ 'a ' }}"
        "{% if loop.last %}{{ 'think ' }}{% endif %}{{ m['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
    )
    talk = [
        {"role": r, "content": c} for r, c in (("user", "x"), ("assistant", "one"), ("user", "y"), ("assistant", "z"))
    ]
    ids, loss, _ = encode_example(tokenizer, talk)
    assert [tokenizer.decode(run) for run in segments(ids, loss)] == ["one</s>", "think z</s>"]


def test_a_template_that_breaks_its_own_generation_prompt_is_refused() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}think{% endif %}"
    )
    with pytest.raises(SafecritError, match=r"turn 2 .*generation prompt"):
        encode_example(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])


def test_truncation_is_reported_and_exact() -> None:
    tokenizer = character_tokenizer()
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "defg"}]
    whole = encode_example(tokenizer, turns)
    assert len(whole.ids) == 1 + 4 + 4 + 1
    assert encode_example(tokenizer, turns, len(whole.ids)) == whole
    cut = encode_example(tokenizer, turns, 7)
    assert (cut.ids, cut.loss_mask, cut.truncated) == (whole.ids[:7], [0] * 5 + [1] * 2, True)


def test_turns_after_the_last_answer_are_left_out_and_no_answer_is_an_error() -> None:
    tokenizer = character_tokenizer()
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}]
    assert encode_example(tokenizer, [*turns, {"role": "user", "content": "more"}]) == encode_example(tokenizer, turns)
    with pytest.raises(SafecritError, match="assistant turn"):
        encode_example(tokenizer, turns[:1])


def test_tokens_that_would_merge_across_the_prompt_are_kept_apart(shared: Path) -> None:
    tokenizer = load(shared, "gpt2")
    turns = [{"role": "user", "content": "list:"}, {"role": "assistant", "content": "\nfirst"}]
    ids, loss, _ = encode_example(tokenizer, turns)
    assert tokenizer("\n\n", add_special_tokens=False)["input_ids"] == [628]  # one token, were they not kept apart
    assert ids[: loss.index(1)] == encode_prompt(tokenizer, turns[:1])
    assert tokenizer.decode(ids[loss.index(1) :]) == "\nfirst<|endoftext|>"
