"""A toy world small enough that the expected safety of a model's answers is a sum, not an estimate.

Tokens are single characters. A request is one of 8 verbs and one of 8 objects (64
prompts); an answer is two of 16 letters, as the model's output head has rows for
nothing else. So S = E_x E_{y ~ p(.|x)} s(x, y) and dS/dtheta are exact sums over
64 x 256 conversations. Model and guard are small Llamas, trained for a few seconds
on a made-up language (seeded):

    model   refuses (first letter `a` to `d`) with a probability that depends on verb and
            object, else serves the request; which letters it takes depends on both too
    guard   safe: a refusal, unless its second letter serves the request all the same;
            or an answer whose second letter is empty talk (`m` to `p`)

Letters that serve a request's object are four of `e` to `l`, so the verdict depends on the
prompt and on both letters together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from safecrit.anatomy import Anatomy, read_anatomy
from safecrit.api.answering import items_of
from safecrit.chat import ChatSettings
from safecrit.estimators import Estimator, Item
from safecrit.generation import GenerationSettings, generate_samples
from safecrit.gradients import GradientStream
from safecrit.judges.conversation import Objective
from safecrit.judges.guard import GuardJudge, GuardSettings
from safecrit.models import NO_FOLDER, LoadedModel
from safecrit.prompts import Prompt
from safecrit.scoring import Scorer

LETTERS, VERBS, OBJECTS = "abcdefghijklmnop", "ABCDEFGH", "IJKLMNOP"
REFUSING, EMPTY = 4, 12  # letters before the first refuse, from the second on they say nothing
SIZE = len(LETTERS)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Sizes and training of the two models; `model_steps` and `judge_steps` 0: random weights."""

    hidden: int = 64
    intermediate: int = 128
    layers: int = 2
    sharpness: float = 1.0
    model_steps: int = 300
    judge_steps: int = 300
    blended: bool = False
    objective: Objective = "log-odds"
    batch: int = 256
    lr: float = 3e-3


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; the answer's letters come first."""
    pieces = [*LETTERS, *VERBS, *OBJECTS, *":=+-", "<pad>", "<s>", "</s>", "<unk>"]
    core = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{{ '<s>' + messages[-1]['content'] + ':' }}",
    )


def llama(toy: Toy, reads: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with the initial weights of `seed`; larger ones where it stays untrained."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(reads),
            hidden_size=toy.hidden,
            intermediate_size=toy.intermediate,
            num_hidden_layers=toy.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            pad_token_id=reads.pad_token_id,
            bos_token_id=reads.bos_token_id,
            eos_token_id=reads.eos_token_id,
            initializer_range=0.1,
        )
    )


@dataclass
class Language:
    """What the models learn: the letters' probabilities [64, 16] and [64, 16, 16], and what is safe, [64, 16, 16]."""

    seed: int
    sharpness: float = 1.0
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    safe: Tensor = field(init=False)

    def __post_init__(self) -> None:
        chance = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=chance)

        verb, thing = torch.arange(64) // 8, torch.arange(64) % 8
        refuses = torch.sigmoid(1.5 * (normal(8)[verb] + normal(8)[thing]))
        logits = self.sharpness * (normal(8, SIZE)[verb] + normal(8, SIZE)[thing])
        refusing = torch.arange(SIZE) < REFUSING
        kinds = [logits.masked_fill(~which, -torch.inf).softmax(-1) for which in (refusing, ~refusing)]
        self.first = refuses[:, None] * kinds[0] + (1 - refuses)[:, None] * kinds[1]
        self.second = (self.sharpness * (1.5 * normal(SIZE, SIZE) + normal(8, SIZE)[thing][:, None])).softmax(-1)
        order = torch.argsort(normal(8, EMPTY - REFUSING), dim=-1)[thing] + REFUSING
        serves = torch.zeros(64, SIZE, dtype=torch.bool).scatter_(1, order[:, :4], True)
        empty = torch.arange(SIZE) >= EMPTY
        self.safe = torch.where(refusing[None, :, None], ~serves[:, None], empty[None, None])


class World:
    """One seed's model, guard and prompts, and the exact S of the two."""

    def __init__(self, seed: int, toy: Toy | None = None) -> None:
        toy = toy or Toy()
        reads = tokenizer()
        self.language = Language(seed, toy.sharpness)
        with torch.random.fork_rng(devices=[]):
            self.model = llama(toy, reads, 1000 + seed)
            # No other token can be said, so that the answers are the 256 pairs of letters.
            self.model.lm_head = torch.nn.Linear(toy.hidden, SIZE, bias=False)
            torch.nn.init.normal_(self.model.lm_head.weight, std=0.1)
            guard = llama(toy, reads, 2000 + seed)
            prompts = [verb + thing for verb in VERBS for thing in OBJECTS]
            self.heads = torch.tensor([reads(f"<s>{prompt}:")["input_ids"] for prompt in prompts])
            self._train_model(toy)
            self._train_guard(toy, guard, reads)
        self.prompts = [
            Prompt(messages=({"role": "user", "content": text},), row=row) for row, text in enumerate(prompts)
        ]
        self.loaded = LoadedModel(
            model=self.model.eval(), tokenizer=reads, folder=NO_FOLDER, id=f"toy-{seed}", revision=None
        )
        asked = GuardSettings(
            template="{prompt}:{answer}=", safe_words=("+",), unsafe_words=("-",), objective=toy.objective
        )
        self.judge = GuardJudge(
            LoadedModel(model=guard, tokenizer=reads, folder=NO_FOLDER, id=f"guard-{seed}", revision=None), asked
        )
        self.anatomy: Anatomy = read_anatomy(self.model)
        self.values = self._values()

    def _draw(self, rows: Tensor) -> Tensor:
        first = torch.multinomial(self.language.first[rows], 1)
        return torch.cat([first, torch.multinomial(self.language.second[rows, first[:, 0]], 1)], dim=1)

    def _train_model(self, toy: Toy) -> None:
        def loss() -> Tensor:
            rows = torch.randint(64, (toy.batch,))
            answers = self._draw(rows)
            logits = self.model(torch.cat([self.heads[rows], answers[:, :1]], dim=1)).logits[:, -2:]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())

        _descend(self.model, loss, toy.model_steps, toy.lr)

    def _train_guard(self, toy: Toy, guard: LlamaForCausalLM, reads: PreTrainedTokenizerFast) -> None:
        verdict, safe, unsafe = (reads.convert_tokens_to_ids(token) for token in "=+-")

        def loss() -> Tensor:
            rows = torch.randint(64, (toy.batch,))
            embedded, safety = self._shown(rows, guard, verdict)
            if toy.blended:
                share = torch.rand(toy.batch) * (torch.rand(toy.batch) < 0.5)
                other, own = self._shown(rows, guard, verdict)
                embedded = embedded.lerp(other, share[:, None, None])
                safety = safety.lerp(own, share)
            log_p = guard(inputs_embeds=embedded).logits[:, -1].log_softmax(-1)
            return -(safety * log_p[:, safe] + (1 - safety) * log_p[:, unsafe]).mean()

        _descend(guard, loss, toy.judge_steps, toy.lr)

    def _shown(self, rows: Tensor, guard: LlamaForCausalLM, verdict: int) -> tuple[Tensor, Tensor]:
        """Embedded conversations, half of their answers the language's and half at random; 1 where they are safe."""
        half = len(rows) // 2
        answers = torch.cat([self._draw(rows[:half]), torch.randint(SIZE, (len(rows) - half, 2))])
        ids = torch.cat([self.heads[rows], answers, torch.full((len(rows), 1), verdict)], dim=1)
        return guard.get_input_embeddings()(ids), self.language.safe[rows, answers[:, 0], answers[:, 1]].float()

    @torch.no_grad()
    def _values(self) -> Tensor:
        """s of every answer to every prompt by the guard, [64, 16, 16] float64."""
        pairs = [(prompt.text, a + b) for prompt in self.prompts for a in LETTERS for b in LETTERS]
        found: list[Tensor] = []
        for start in range(0, len(pairs), 1024):
            entries = [self.judge.read(*pair) for pair in pairs[start : start + 1024]]
            found.append(self.judge.objective(self.judge.verdicts(entries, [self.judge.embed(e) for e in entries])))
        return torch.cat(found).double().view(64, SIZE, SIZE)

    def log_p(self) -> Tensor:
        """log p(y | x) of every answer to every prompt, [64, 16, 16] float64, with a graph to the weights."""
        letters = torch.arange(SIZE)
        ids = torch.cat([self.heads.repeat_interleave(SIZE, 0), letters.repeat(64)[:, None]], dim=1)
        logits = self.model(ids).logits[:, -2:].double().log_softmax(-1).view(64, SIZE, 2, SIZE)
        return logits[:, 0, 0, :, None] + logits[:, :, 1]

    @torch.no_grad()
    def expected(self) -> float:
        """S, exactly."""
        return float((self.log_p().exp() * self.values).sum(dim=(1, 2)).mean())

    def exact(self) -> dict[str, Tensor]:
        """sigma x dS/dtheta of every eligible tensor, by name, float32: the truth that estimates are held against."""
        parameters = dict(self.model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        wanted = [parameters[entry.parameter] for entry in self.anatomy.eligible]
        value = (self.log_p().exp() * self.values).sum(dim=(1, 2)).mean()
        grads, sigma = torch.autograd.grad(value, wanted), self.sigma()
        return {
            entry.name: (sigma[entry.name] * grad.double()).float()
            for entry, grad in zip(self.anatomy.eligible, grads, strict=True)
        }

    def sigma(self) -> dict[str, float]:
        """Standard deviation of every eligible tensor, each of which is one matrix here."""
        parameters = dict(self.model.named_parameters())
        return {e.name: float(parameters[e.parameter].detach().double().std()) for e in self.anatomy.eligible}

    @functools.cached_property
    def greedy(self) -> list[Item]:
        """The greedy answers as `safecrit score` takes them."""
        return self.answers(0, 0)

    def sampled(self, samples: int, seed: int = 0) -> list[Item]:
        """`samples` sampled answers a prompt, as `safecrit score --objective score-function` takes them."""
        return self.answers(samples, seed)

    def answers(self, samples: int, seed: int) -> list[Item]:
        """Answers of the model as its weights are: greedy ones for `samples` 0, else sampled."""
        settings = GenerationSettings(max_new_tokens=2, batch_size=64, samples=samples, seed=seed)
        answers = generate_samples(self.model, self.loaded.tokenizer, self.prompts, settings)
        return items_of(self.loaded, self.prompts, answers, ChatSettings())[0]

    def value_of(self, item: Item) -> float:
        """The guard's s of one answer."""
        return float(self.values[item.row, item.answer_ids[0], item.answer_ids[1]])

    def scores(self, estimator: Estimator, items: list[Item]) -> dict[str, Tensor]:
        """The product's signed scores: mean over items of sigma x gradient, float32 by checkpoint name."""
        stream = GradientStream(self.model, self.anatomy)
        scorer = Scorer(self.model, estimator, stream, items, batch_size=64)
        scorer.run()
        return scorer.scores("esi")

    def summary(self) -> dict[str, float]:
        """How the world looks: S, the guard's accuracy and spread, the entropy of answers in nats."""
        with torch.no_grad():
            log_p = self.log_p()
        boundary = 0.5 if self.judge.settings.objective == "prob" else 0.0
        said = self.values > boundary
        best = log_p.flatten(1).max(-1).values.exp()
        return {
            "S": self.expected(),
            "guard_accuracy": float((said == self.language.safe).double().mean()),
            "s_std": float(self.values.std()),
            "answer_entropy": float(-(log_p.exp() * log_p).sum(dim=(1, 2)).mean()),
            "likeliest_answer": float(best.mean()),
            "p_safe": float((log_p.exp() * said).sum(dim=(1, 2)).mean()),
        }


def _descend(model: PreTrainedModel, loss: object, steps: int, lr: float) -> None:
    if not steps:
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[operator]
        optimizer.step()
        schedule.step()
    model.eval()
