"""A toy world small enough that the expected safety of a model's answers is a sum, not an estimate.

Tokens are single characters. A request is one of 8 verbs and one of 8 objects (64
prompts); an answer is two of 16 letters (or four of 4), as the model's output head has rows
for nothing else. So S = E_x E_{y ~ p(.|x)} s(x, y) and dS/dtheta are exact sums over
64 x 256 conversations. Model and guard are small Llamas, trained for a few seconds
on a made-up language (seeded):

    model   refuses (the first letter is in the first quarter of the alphabet) with a probability
            that depends on verb and object, else serves the request; which letters it takes
            depends on both too, and on the letter before
    guard   safe: a refusal, unless a later letter serves the request all the same;
            or an answer whose last letter is empty talk (the alphabet's last quarter)

The letters that serve an object are half of the middle ones, so the verdict depends on the
prompt and on all letters together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Sizes and training of the two models; `model_steps` and `judge_steps` 0: random weights.

    `letters` to the power of `length` is the number of answers. `sharpness`: factor of the logits of
    the model's language; `blended`: the guard also learns blends of two answers.
    """

    letters: int = 16
    length: int = 2
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
    """A Llama with the initial weights of `seed`."""
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


class Language:
    """What the models learn: `first` [64, letters] and `next` [64, letters, letters], the letters' probabilities."""

    def __init__(self, seed: int, toy: Toy) -> None:
        chance, size = torch.Generator().manual_seed(seed), toy.letters

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=chance)

        verb, thing = torch.arange(64) // 8, torch.arange(64) % 8
        refuses = torch.sigmoid(1.5 * (normal(8)[verb] + normal(8)[thing]))
        logits = toy.sharpness * (normal(8, size)[verb] + normal(8, size)[thing])
        self.refusing = torch.arange(size) < size // 4
        kinds = [logits.masked_fill(~which, -torch.inf).softmax(-1) for which in (self.refusing, ~self.refusing)]
        self.first = refuses[:, None] * kinds[0] + (1 - refuses)[:, None] * kinds[1]
        self.next = (toy.sharpness * (1.5 * normal(size, size) + normal(8, size)[thing][:, None])).softmax(-1)
        order = torch.argsort(normal(8, size // 2), dim=-1)[thing] + size // 4
        self.serves = torch.zeros(64, size, dtype=torch.bool).scatter_(1, order[:, : size // 4], True)
        self.empty = torch.arange(size) >= size - size // 4

    def draw(self, rows: Tensor, length: int) -> Tensor:
        """Answers to the prompts `rows` [n], int64 [n, length], from torch's own random numbers."""
        letters = [torch.multinomial(self.first[rows], 1)]
        while len(letters) < length:
            letters.append(torch.multinomial(self.next[rows, letters[-1][:, 0]], 1))
        return torch.cat(letters, dim=1)

    def safe(self, rows: Tensor, answers: Tensor) -> Tensor:
        """What the guard learns of `answers` [n, length] to the prompts `rows` [n]: bool [n]."""
        serving = self.serves[rows[:, None], answers[:, 1:]].any(-1)
        return torch.where(self.refusing[answers[:, 0]], ~serving, self.empty[answers[:, -1]])


class World:
    """One seed's model, guard and prompts, and the exact S of the two."""

    def __init__(self, seed: int, toy: Toy | None = None) -> None:
        toy = toy or Toy()
        reads = tokenizer()
        self.language, self.length, self.size = Language(seed, toy), toy.length, toy.letters
        self.answers = torch.cartesian_prod(*[torch.arange(toy.letters)] * toy.length)
        with torch.random.fork_rng(devices=[]):
            self.model = llama(toy, reads, 1000 + seed)
            # No other token can be said, so that the answers are the 256 pairs of letters.
            self.model.lm_head = torch.nn.Linear(toy.hidden, toy.letters, bias=False)
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

    def _train_model(self, toy: Toy) -> None:
        def loss() -> Tensor:
            rows = torch.randint(64, (toy.batch,))
            answers = self.language.draw(rows, toy.length)
            logits = self.model(torch.cat([self.heads[rows], answers[:, :-1]], dim=1)).logits[:, -toy.length :]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())

        _descend(self.model, loss, toy.model_steps, toy.lr)

    def _train_guard(self, toy: Toy, guard: LlamaForCausalLM, reads: PreTrainedTokenizerFast) -> None:
        known = reads.get_vocab()
        verdict, safe, unsafe = (known[token] for token in "=+-")

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
        strange = torch.randint(self.size, (len(rows) - half, self.length))
        answers = torch.cat([self.language.draw(rows[:half], self.length), strange])
        ids = torch.cat([self.heads[rows], answers, torch.full((len(rows), 1), verdict)], dim=1)
        return guard.get_input_embeddings()(ids), self.language.safe(rows, answers).float()

    @torch.no_grad()
    def _values(self) -> Tensor:
        """s of every answer to every prompt by the guard, float64 [64, answers]."""
        texts = ["".join(LETTERS[n] for n in answer) for answer in self.answers.tolist()]
        found: list[Tensor] = []
        for prompt in self.prompts:
            entries = [self.judge.read(prompt.text, text) for text in texts]
            found.append(self.judge.objective(self.judge.verdicts(entries, [self.judge.embed(e) for e in entries])))
        return torch.stack(found).double()

    def log_p(self) -> Tensor:
        """log p(y | x) of every answer to every prompt, float64 [64, answers], with a graph to the weights."""
        prefixes = self.answers[:: self.size, :-1]
        ids = torch.cat([self.heads.repeat_interleave(len(prefixes), 0), prefixes.repeat(64, 1)], dim=1)
        logits = self.model(ids).logits[:, -self.length :].double().log_softmax(-1)
        logits = logits.view(64, len(prefixes), self.length, self.size)
        chosen = prefixes[None, :, :, None].expand(64, -1, -1, 1)
        before = logits[:, :, :-1].gather(3, chosen).sum(2)
        return (before + logits[:, :, -1]).flatten(1)

    @torch.no_grad()
    def expected(self) -> float:
        """S, exactly."""
        return float((self.log_p().exp() * self.values).sum(1).mean())

    def exact(self) -> dict[str, Tensor]:
        """sigma x dS/dtheta of every eligible tensor, by name, float32: the truth that estimates are held against."""
        parameters = dict(self.model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        wanted = [parameters[entry.parameter] for entry in self.anatomy.eligible]
        value = (self.log_p().exp() * self.values).sum(1).mean()
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
        return self.answered(0, 0)

    def sampled(self, samples: int, seed: int = 0) -> list[Item]:
        """`samples` sampled answers a prompt, as `safecrit score --objective score-function` takes them."""
        return self.answered(samples, seed)

    def answered(self, samples: int, seed: int) -> list[Item]:
        """Answers of the model as its weights are: greedy ones for `samples` 0, else sampled."""
        settings = GenerationSettings(max_new_tokens=self.length, batch_size=64, samples=samples, seed=seed)
        answers = generate_samples(self.model, self.loaded.tokenizer, self.prompts, settings)
        return items_of(self.loaded, self.prompts, answers, ChatSettings())[0]

    def place(self, item: Item) -> int:
        """Where the item's answer stands in `answers`."""
        return sum(letter * self.size**n for n, letter in enumerate(reversed(item.answer_ids)))

    def value_of(self, item: Item) -> float:
        """The guard's s of one answer."""
        return float(self.values[item.row, self.place(item)])

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
        count = len(self.answers)
        rows = torch.arange(64).repeat_interleave(count)
        right = self.language.safe(rows, self.answers.repeat(64, 1)).view(64, count)
        best = log_p.max(-1).values.exp()
        return {
            "S": self.expected(),
            "guard_accuracy": float((said == right).double().mean()),
            "s_std": float(self.values.std()),
            "answer_entropy": float(-(log_p.exp() * log_p).sum(1).mean()),
            "likeliest_answer": float(best.mean()),
            "p_safe": float((log_p.exp() * said).sum(1).mean()),
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
