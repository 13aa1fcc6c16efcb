"""Presets: what each guard is shown. Templates here are our own, with the shape of the guards' but not their text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safecrit.api import judging
from safecrit.api.judging import JudgeChoice, find_judge, load_differentiable, load_judge
from safecrit.errors import SafecritError
from safecrit.judges.classifier import ClassifierJudge
from safecrit.judges.guard import GuardJudge, GuardSettings
from safecrit.judges.presets import PRESETS, GuardOptions, find_preset, guard_settings, preset_named
from safecrit.models import LoadedModel
from tests import tiny
from tests.test_classifier import SAFETY, encoder, pair_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "judges"
PROMPT, ANSWER = "How is bread {made}?\nTell me.", 'Mix <flour> & water, "then" bake.'
TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
PARTS = "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
OPEN = "{% if add_generation_prompt %}<open>{% endif %}"
SHOWN = f"<user>{PROMPT}<assistant>{ANSWER}"

# Per preset: a template of the same shape (None: the preset brings its text), and what follows the answer.
SHAPES: dict[str, tuple[str | None, str]] = {
    "llama-guard-3": (TURNS + "<end>" + OPEN, "<end>\n\n"),
    "llama-guard-3-1b": (PARTS + "<end>" + OPEN, "<end>\n\n"),
    "llama-guard-4": (PARTS + "<end>{{ '\n\n' }}" + OPEN, "<end>\n\n"),
    "wildguard": (None, ""),
    "shieldgemma": (TURNS + "<rule>{{ guideline }}<end>\n\n" + OPEN, ""),
    "qwen3guard": (TURNS + "<end>{{ '\n' }}" + OPEN, "<end>\nSafety: "),
    "granite-guardian": (TURNS + "<{{ guardian_config['risk_name'] }}>" + OPEN, "<harm><open>"),
    "granite-guardian-3.3": (
        TURNS + "<{{ guardian_config['criteria_id'] }}{{ ' thinking' if think else '' }}>" + OPEN,
        "<harm><open><score> ",
    ),
    "harmbench": (None, ""),
}


def loaded(chat: str | None) -> LoadedModel:
    made = tiny.tokenizer("byte-level", chat)
    return tiny.loaded(tiny.llama(len(made), seed=1), made)


def judge(name: str, chat: str | None, controversial: Any = "unsafe", **given: Any) -> GuardJudge:
    settings = guard_settings(preset_named(name), GuardOptions(**given), controversial)
    return GuardJudge(loaded(chat), settings)


def shown(made: GuardJudge) -> str:
    """The text before the verdict (the tiny tokenizer leaves a last space apart from the word that follows)."""
    entry = made.read(PROMPT, ANSWER)
    assert made.tokenizer.decode(list(entry.ids[entry.answer])).strip() == ANSWER
    return made.tokenizer.decode(list(entry.ids))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_shows_its_guard_what_it_expects(name: str) -> None:
    chat, after = SHAPES[name]
    text = shown(judge(name, chat))
    if chat is None:
        golden = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
        prefix = "Harmful request: yes\nResponse refusal: " if name == "wildguard" else ""
        assert text == golden + prefix
    elif name == "shieldgemma":
        assert text.startswith(SHOWN + '<rule>"No Dangerous Content": The chatbot shall not generate content that')
        assert text.endswith("instructions for suicide).<end>\n\n")
    else:
        assert text == SHOWN + after


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_whole(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name and preset.source.startswith("https://") and preset.hub_ids
    assert GuardSettings(safe_words=preset.safe_words, unsafe_words=preset.unsafe_words + preset.controversial)
    assert (preset.template is None) == (SHAPES[name][0] is not None)


def test_wildguards_answer_on_refusal_is_summed_over_in_two_sequences() -> None:
    made = judge("wildguard", None)
    entry = made.read("q", "a")
    words = [made.tokenizer.decode(list(word)) for side in entry.verdicts for word in side]
    assert words == [f"{refuses}\nHarmful response: {ends}" for ends in ("no", "yes") for refuses in ("no", "yes")]
    rows = []
    forward = made.model.forward
    made.model.forward = lambda **given: (rows.append(len(given["inputs_embeds"])), forward(**given))[1]
    made.verdicts([entry], [made.embed(entry)])
    assert rows == [2]


def test_controversial_counts_with_the_side_asked_for() -> None:
    chat = SHAPES["qwen3guard"][0]
    strict, loose = judge("qwen3guard", chat), judge("qwen3guard", chat, "safe")
    assert strict.settings.unsafe_words == ("Unsafe", "Controversial") and strict.settings.safe_words == ("Safe",)
    assert loose.settings.safe_words == ("Safe", "Controversial") and loose.settings.unsafe_words == ("Unsafe",)
    short = replace(preset_named("qwen3guard"), controversial=("C",))  # the tiny guard gives long words no chance
    found = []
    for side in ("unsafe", "safe"):
        made = GuardJudge(loaded(chat), guard_settings(short, GuardOptions(), side))  # type: ignore[arg-type]
        entry = made.read("q", "a")
        with torch.no_grad():
            found.append(made.verdicts([entry], [made.embed(entry)])[0].exp())
    torch.testing.assert_close(found[0].sum(), found[1].sum())
    assert found[0][0] < found[1][0] and found[0][1] > found[1][1]


def test_explicit_settings_win_over_a_preset() -> None:
    preset = preset_named("shieldgemma")
    own = guard_settings(preset, GuardOptions(template_kwargs={"guideline": "No lies"}, objective="prob"))
    assert own.template_kwargs == {"guideline": "No lies"} and own.safe_words == ("No",) and own.objective == "prob"
    thinking = guard_settings(preset_named("granite-guardian-3.3"), GuardOptions(template_kwargs={"think": True}))
    assert thinking.template_kwargs == {"guardian_config": {"criteria_id": "harm"}, "think": True}
    words = guard_settings(preset_named("qwen3guard"), GuardOptions(safe_words=("ok",), verdict_prefix=">"))
    assert (words.safe_words, words.verdict_prefix) == (("ok",), ">")
    assert words.unsafe_words == ("Unsafe", "Controversial")
    text = guard_settings(preset_named("wildguard"), GuardOptions(template="{prompt} {answer}"))
    assert text.template == "{prompt} {answer}" and text.verdict_prefix == ""
    assert guard_settings(None, GuardOptions()) == GuardSettings()


def test_settings_that_equal_the_defaults_win_over_a_preset_too() -> None:
    given = GuardOptions(safe_words=("safe",), unsafe_words=("unsafe",), verdict_prefix="", generation_prompt=True)
    assert guard_settings(preset_named("qwen3guard"), given) == GuardSettings()


@pytest.mark.parametrize(
    ("judge", "name"),
    [
        ("qwen3guard", "qwen3guard"),
        ("Qwen/Qwen3Guard-Gen-8B", "qwen3guard"),
        ("/models/Qwen3Guard-Gen-0.6B", "qwen3guard"),
        ("models/llama-guard-3-1b/", "llama-guard-3-1b"),
        ("somebody/wildguard", "wildguard"),
        ("./llama-guard", None),
        ("Qwen/Qwen3Guard-Stream-4B", None),
    ],
)
def test_names_stand_for_presets(judge: str, name: str | None) -> None:
    found = find_preset(judge)
    assert (found.name if found else None) == name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tiny.tokenizer("byte-level", SHAPES["qwen3guard"][0])
    tiny.loaded(tiny.llama(len(made)), made, tmp_path / "Qwen3Guard-Gen-4B")
    return tmp_path / "Qwen3Guard-Gen-4B"


def test_a_folder_named_as_a_known_model_has_its_format(folder: Path) -> None:
    made = load_differentiable(JudgeChoice(name=str(folder), device="cpu"))
    assert made.settings == guard_settings(preset_named("qwen3guard"), GuardOptions())
    assert made.describe()["verdict_prefix"] == "Safety: " and made.name == str(folder)
    plain = folder.rename(folder.parent / "mine")
    assert load_differentiable(JudgeChoice(name=str(plain), device="cpu")).settings == GuardSettings()
    asked = load_judge(JudgeChoice(name=str(plain), preset="granite-guardian", device="cpu"))
    assert asked.describe()["template_kwargs"] == {"guardian_config": {"risk_name": "harm"}}


def test_a_presets_name_is_its_first_model_unless_a_folder_has_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert JudgeChoice(name="qwen3guard").model == "Qwen/Qwen3Guard-Gen-0.6B"
    folder.rename(folder.parent / "qwen3guard")
    monkeypatch.chdir(folder.parent)
    assert JudgeChoice(name="qwen3guard").model == "qwen3guard"
    assert load_differentiable(JudgeChoice(name="qwen3guard", device="cpu")).settings.verdict_prefix == "Safety: "


def test_a_format_by_chat_template_needs_one(tmp_path: Path) -> None:
    made = tiny.tokenizer("byte-level", None)
    tiny.loaded(tiny.llama(len(made)), made, tmp_path / "shieldgemma-2b")
    with pytest.raises(SafecritError, match="no chat template, which is the format of shieldgemma"):
        load_differentiable(JudgeChoice(name=str(tmp_path / "shieldgemma-2b"), device="cpu"))
    text = GuardOptions(template="{prompt} {answer}: ")
    assert load_differentiable(JudgeChoice(name=str(tmp_path / "shieldgemma-2b"), device="cpu", guard=text))


def test_classifiers_are_told_by_their_architecture(tmp_path: Path) -> None:
    tiny.loaded(encoder(pair_tokenizer(), SAFETY), pair_tokenizer(), tmp_path)
    made = load_differentiable(JudgeChoice(name=str(tmp_path), device="cpu"))
    assert isinstance(made, ClassifierJudge) and made.describe()["safe_labels"] == ["Safe"]
    assert made.describe()["fingerprint"].startswith("sha256:")
    turned = GuardOptions(safe_words=("Unsafe",), unsafe_words=("Safe",), objective="logit")
    made = load_differentiable(JudgeChoice(name=str(tmp_path), device="cpu", guard=turned, kind="classifier"))
    assert made.describe()["safe_labels"] == ["Unsafe"] and made.settings.objective == "logit"
    with pytest.raises(SafecritError, match="lacks"):
        load_differentiable(JudgeChoice(name=str(tmp_path), device="cpu", kind="guard"))


def test_judges_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SafecritError, match=r"unknown judge. Use refusal, a preset \(llama-guard-3, .*harmbench\)"):
        find_judge(JudgeChoice(name="./absent"))
    with pytest.raises(SafecritError, match=r"--judge-format nothing: unknown format. There are llama-guard-3,"):
        find_judge(JudgeChoice(name="./absent", preset="nothing"))
    find_judge(JudgeChoice(name="refusal"))
    with pytest.raises(SafecritError, match="has no gradient"):
        find_judge(JudgeChoice(name="refusal"), differentiable=True)
    asked = []
    monkeypatch.setattr(judging, "resolve_folder", lambda model, revision: asked.append(model))
    find_judge(JudgeChoice(name="wildguard"))
    assert asked == ["allenai/wildguard"]


def test_gated_models_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: Any, **__: Any) -> None:
        from huggingface_hub.errors import GatedRepoError

        raise GatedRepoError.__new__(GatedRepoError, "gated")  # its constructor wants an HTTP response

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(SafecritError, match=r"allenai/wildguard: is gated. Accept its terms"):
        load_differentiable(JudgeChoice(name="wildguard"))
    with pytest.raises(SafecritError, match=r"allenai/wildguard: is gated. Accept its terms"):
        find_judge(JudgeChoice(name="wildguard"))


def test_text_part_of_a_multimodal_guard_is_loaded(tmp_path: Path) -> None:
    import transformers as t

    made = tiny.tokenizer("byte-level", SHAPES["llama-guard-4"][0])
    torch.manual_seed(0)
    text = {
        "hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": len(made),
        "num_local_experts": 1, "moe_layers": [], "max_position_embeddings": 256, "no_rope_layers": [1, 0],
        "attention_chunk_size": None, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    }  # fmt: skip
    whole = t.Llama4ForConditionalGeneration(t.Llama4Config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path / "Llama-Guard-4-12B")
    made.save_pretrained(tmp_path / "Llama-Guard-4-12B")
    guard = load_differentiable(JudgeChoice(name=str(tmp_path / "Llama-Guard-4-12B"), device="cpu"))
    entry = guard.read("q", "a")
    whole.language_model.config.attention_chunk_size = 256
    with torch.no_grad():
        together = guard.judge([("q", "a"), ("q", "a longer answer")])
        log_p = []
        for (word,) in entry.verdicts:
            logits = whole(input_ids=torch.tensor([[*entry.ids, *word[:-1]]]), use_cache=False).logits[0].float()
            steps = torch.log_softmax(logits[len(entry.ids) - 1 :], -1)
            log_p.append(sum(float(steps[n, token]) for n, token in enumerate(word)))
    assert together[0].score == pytest.approx(log_p[0] - log_p[1], abs=1e-4)
    assert all(verdict.label != "error" for verdict in together)
