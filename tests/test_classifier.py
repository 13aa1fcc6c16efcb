from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from safecrit.errors import SafecritError
from safecrit.judges import DifferentiableJudge
from safecrit.judges.classifier import ClassifierJudge, ClassifierSettings
from safecrit.models import load_classifier, load_model
from tests import tiny

SAFETY = {0: "Safe", 1: "Unsafe"}
PAIRS = [("How do I bake?", "First warm the oven"), ("Tell me", "x"), ("a</s>b", "the <s> story"), ("q", "日本 😀")]
CHAT = tiny.CHAT


def decoder(made: PreTrainedTokenizerFast, labels: dict[int, str], **config: Any) -> PreTrainedModel:
    torch.manual_seed(2)
    return t.AutoModelForSequenceClassification.from_config(
        t.LlamaConfig(
            vocab_size=len(made), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, id2label=labels,
            label2id={label: n for n, label in labels.items()}, **{"pad_token_id": 0} | config,
        )
    ).eval()  # fmt: skip


def encoder(made: PreTrainedTokenizerFast, labels: dict[int, str], **config: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    return t.AutoModelForSequenceClassification.from_config(
        t.RobertaConfig(
            vocab_size=len(made), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=258, pad_token_id=0, initializer_range=0.3, id2label=labels,
            label2id={label: n for n, label in labels.items()}, **config,
        )
    ).eval()  # fmt: skip


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, without a chat template, two texts set apart as RoBERTa's are."""
    made = tiny.tokenizer("byte-level", None)
    core = Tokenizer.from_str(made.backend_tokenizer.to_str())
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def judge(kind: str, labels: dict[int, str] | None = None, config: Any = None, **settings: Any) -> ClassifierJudge:
    made = pair_tokenizer() if kind == "encoder" else tiny.tokenizer("byte-level", CHAT)
    model = (encoder if kind == "encoder" else decoder)(made, labels or SAFETY, **(config or {}))
    return ClassifierJudge(tiny.loaded(tiny.exact(model), made), ClassifierSettings(**settings))


def alone(judge: ClassifierJudge, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return judge.model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_verdicts_are_those_of_each_text_alone_without_padding(kind: str) -> None:
    made: DifferentiableJudge = judge(kind)
    entries = [made.read(*pair) for pair in [*PAIRS, PAIRS[0]]]
    seen = []
    forward = made.model.forward
    made.model.forward = lambda **given: (seen.append(tuple(given["inputs_embeds"].shape[:2])), forward(**given))[1]
    with torch.no_grad():
        found = made.verdicts(entries, [made.embed(entry) for entry in entries])
    made.model.forward = forward
    lengths = [len(entry.ids) for entry in entries]
    assert sorted(seen) == sorted({(lengths.count(length), length) for length in lengths})
    for row, entry in zip(found, entries, strict=True):
        torch.testing.assert_close(row, torch.log_softmax(alone(made, list(entry.ids)), -1))


def test_chat_template_lays_out_a_decoders_text() -> None:
    made = judge("decoder")
    entry = made.read("How?", "So.")
    assert made.tokenizer.decode(list(entry.ids)) == "<s>[user] How?\n[assistant] So.</s>"
    own = judge("decoder", template="{answer} / {prompt}")
    assert own.tokenizer.decode(list(own.read("How?", "So.").ids)) == "<s>So. / How?"


def test_closing_tokens_that_are_padding_are_not_read() -> None:
    made = judge("decoder", config={"pad_token_id": 2})
    entry = made.read("How?", "So.")
    whole = [*entry.ids, 2]  # as the template writes it; transformers looks for the last token that is no padding
    assert made.tokenizer.decode(whole).endswith("So.</s>")
    torch.testing.assert_close(alone(made, whole), alone(made, list(entry.ids)))


def test_missing_padding_token_is_set() -> None:
    made = judge("decoder", config={"pad_token_id": None})
    assert [verdict.label for verdict in made.judge([("q", "a"), ("q", "b")])] != ["error", "error"]


def test_an_encoder_reads_the_tokenizers_own_pair() -> None:
    made = judge("encoder")
    for prompt, answer in PAIRS:
        entry = made.read(prompt, answer)
        assert list(entry.ids) == made.tokenizer(prompt, answer, split_special_tokens=True)["input_ids"]
        assert entry.ids.count(1) == 1 and entry.ids.count(2) == 3
        assert made.tokenizer.decode(list(entry.ids[entry.answer])) == answer
        assert int(entry.spans[0, 0]) == 0 and int(entry.spans[-1, 1]) == len(answer.encode())
        swapped = made.read(prompt, answer, [7, 8, 9])
        assert swapped.ids[swapped.answer] == (7, 8, 9) and swapped.ids[-1] == 2 and swapped.spans is None


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("labels", [SAFETY, {0: "LABEL_0"}, {0: "toxic", 1: "obscene", 2: "insult"}])
def test_gradient_is_that_of_finite_differences(kind: str, labels: dict[int, str]) -> None:
    many = len(labels) == 3
    config = {"problem_type": "multi_label_classification"} if many else {}
    made = judge(kind, labels, config, unsafe_words=("toxic", "insult") if many else ())
    entry = made.read(*PAIRS[0])
    leaf = made.embed(entry).requires_grad_(True)
    (gradient,) = torch.autograd.grad(made.objective(made.verdicts([entry], [leaf]))[0], [leaf])
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        way = torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)
        with torch.no_grad():
            high, low = (made.objective(made.verdicts([entry], [leaf + step * way]))[0] for step in (1e-5, -1e-5))
        assert float((gradient * way).sum()) == pytest.approx(float(high - low) / 2e-5, rel=1e-6)
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_labels_are_found_by_their_usual_names_or_as_named() -> None:
    assert judge("encoder", {0: "Toxic", 1: "non_toxic", 2: "other"}).safe == [1]
    harm = judge("encoder", {0: "HARMLESS", 1: "harmful"})
    assert (harm.safe, harm.unsafe) == ([0], [1])
    named = judge("encoder", {0: "fine", 1: "S1", 2: "S2"}, safe_words=("Fine",), unsafe_words=("s2", "s1"))
    assert (named.safe, named.unsafe) == ([0], [1, 2])
    entry = named.read(*PAIRS[0])
    p = torch.softmax(alone(named, list(entry.ids)), -1)
    with torch.no_grad():
        found = named.verdicts([entry], [named.embed(entry)])[0]
    torch.testing.assert_close(found.exp(), torch.stack([p[0], p[1] + p[2]]))
    value = named.judge([PAIRS[0]])[0]
    assert value.score == pytest.approx(float(found[0] - found[1])) and value.raw in ("fine", "S1")


def test_labels_that_say_nothing_are_refused_with_their_names() -> None:
    with pytest.raises(SafecritError, match=r"known to mean safe. Its labels: LABEL_0, LABEL_1. .* --safe-word"):
        judge("encoder", {0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(SafecritError, match=r"no label 'bad'. Its labels: Safe, Unsafe"):
        judge("encoder", unsafe_words=("bad",))
    with pytest.raises(SafecritError, match="both safe and unsafe"):
        judge("encoder", safe_words=("unsafe",))


def test_reward_models_count_from_their_threshold() -> None:
    made = judge("decoder", {0: "LABEL_0"}, threshold=0.25)
    entry = made.read(*PAIRS[0])
    reward = alone(made, list(entry.ids))[0] - 0.25
    with torch.no_grad():
        found = made.verdicts([entry], [made.embed(entry)])[0]
    torch.testing.assert_close(found, torch.stack([logsigmoid(reward), logsigmoid(-reward)]))
    verdict = made.judge([PAIRS[0]])[0]
    assert verdict.score == pytest.approx(float(reward))
    assert verdict.raw.startswith("reward") and float(verdict.raw.split()[1]) == pytest.approx(
        float(reward + 0.25), 1e-3
    )
    assert made.describe()["kind"] == "reward" and made.describe()["threshold"] == 0.25


@pytest.mark.parametrize("unsafe", [("toxic",), ("toxic", "insult")])
def test_multi_label_suspicions_add_up(unsafe: tuple[str, ...]) -> None:
    labels = {0: "toxic", 1: "obscene", 2: "insult"}
    made = judge("encoder", labels, {"problem_type": "multi_label_classification"}, unsafe_words=unsafe)
    entry = made.read(*PAIRS[0])
    p = torch.sigmoid(alone(made, list(entry.ids)))[[n for n, label in labels.items() if label in unsafe]]
    with torch.no_grad():
        found = made.verdicts([entry], [made.embed(entry)])[0]
    torch.testing.assert_close(found.exp(), torch.stack([(1 - p).prod(), 1 - (1 - p).prod()]))
    assert made.describe()["unsafe_labels"] == list(unsafe) and made.describe()["safe_labels"] == []


def test_tokenizers_that_rewrite_text_are_refused() -> None:
    core = Tokenizer(
        models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "warm": 4, "it": 5}, unk_token="[UNK]")
    )
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    with pytest.raises(SafecritError, match="rewrites text"):
        ClassifierJudge(tiny.loaded(encoder(made, SAFETY), made)).read("it", "Warm it")


def test_texts_that_nothing_sets_apart_need_a_template() -> None:
    made = tiny.tokenizer("byte-level", None)
    with pytest.raises(SafecritError, match="puts nothing between two texts"):
        ClassifierJudge(tiny.loaded(decoder(made, SAFETY), made))


def test_window_of_the_tokenizer_counts() -> None:
    made = judge("encoder")
    made.tokenizer.model_max_length = 20
    assert made.judge([("q", "x " * 30)])[0].raw == "longer than the judge's window"


def test_classifiers_are_loaded_as_such(tmp_path: Path) -> None:
    tiny.loaded(encoder(pair_tokenizer(), SAFETY), pair_tokenizer(), tmp_path / "encoder")
    loaded = load_classifier(tmp_path / "encoder", device="cpu")
    assert ClassifierJudge(loaded).judge([("q", "a")])[0].label in ("safe", "unsafe")
    assert loaded.model.config.architectures == ["RobertaForSequenceClassification"]
    made = tiny.tokenizer("byte-level")
    tiny.loaded(tiny.llama(len(made)), made, tmp_path / "causal")
    with pytest.raises(SafecritError, match=r"lacks 1 weights, the first score\.weight"):
        load_classifier(tmp_path / "causal", device="cpu")
    tiny.loaded(decoder(made, SAFETY), made, tmp_path / "decoder")
    with pytest.raises(SafecritError, match="lacks"):
        load_model(tmp_path / "decoder", device="cpu")
