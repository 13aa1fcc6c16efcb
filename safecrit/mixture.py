"""What a run trains on: encoded examples in a fixed order, retain data mixed in at an exact share.

The order is a function of the seed and the counts alone, and it is laid out before
training, so a resumed run sees what the undisturbed one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from safecrit.chat import EncodedExample, encode_example
from safecrit.errors import SafecritError
from safecrit.traindata import TrainExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Mixture(torch.utils.data.Dataset[EncodedExample]):
    """The examples of a whole run, in order, and what became of the data on the way.

    `retain`: how many of `items` are retain examples. `truncated`: how many of the
    distinct examples used were cut. `cut_away`: how many were left out because no
    answer token was left within the length.
    """

    items: tuple[EncodedExample, ...]
    retain: int
    distinct: int
    truncated: int
    cut_away: int

    def __len__(self) -> int:
        """Examples, repeats included."""
        return len(self.items)

    def __getitem__(self, index: int) -> EncodedExample:
        """The example at position `index` of the run."""
        return self.items[index]


def mix(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TrainExample],
    retain: Sequence[TrainExample],
    *,
    retain_share: float,
    count: int,
    max_length: int,
    seed: int,
) -> Mixture:
    """Lay out `count` examples, floor(count * retain_share) of them from `retain`, evenly spread.

    Each source is gone through in a new random order as often as needed. Raises
    SafecritError for a share outside [0, 1), and where no example of a source keeps an
    answer token within `max_length` tokens.
    """
    if not 0 <= retain_share < 1:
        raise SafecritError(f"--retain-share {retain_share}: must be at least 0 and below 1.")
    share = retain_share if retain else 0.0
    main = _Stream(tokenizer, examples, max_length, seed, "training data")
    other = _Stream(tokenizer, retain, max_length, seed + 1, "retain data")
    items, kept = [], 0
    for position in range(count):
        # 1e-9: 10 * 0.3 is a little less than 3 in binary.
        wanted = math.floor((position + 1) * share + 1e-9)
        items.append(next(other if wanted > kept else main))
        kept = max(kept, wanted)
    streams = (main, other)
    return Mixture(
        tuple(items),
        kept,
        sum(len(stream.encoded) for stream in streams),
        sum(example.truncated for stream in streams for example in stream.encoded.values()),
        sum(len(stream.useless) for stream in streams),
    )


class _Stream(Iterator[EncodedExample]):
    """Endless passes over one source, each in its own order; every example is encoded once, when first met."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[TrainExample],
        max_length: int,
        seed: int,
        what: str,
    ) -> None:
        self.tokenizer, self.examples, self.max_length, self.what = tokenizer, examples, max_length, what
        self.generator = np.random.default_rng(seed)
        self.encoded: dict[int, EncodedExample] = {}
        self.useless: set[int] = set()
        self.queue: list[int] = []

    def __next__(self) -> EncodedExample:
        while True:
            if len(self.useless) == len(self.examples):
                raise SafecritError(
                    f"the {self.what} hold no example that keeps an answer token within {self.max_length} tokens. "
                    "Raise --max-length, or check the data."
                )
            if not self.queue:
                self.queue = self.generator.permutation(len(self.examples)).tolist()[::-1]
            index = self.queue.pop()
            if index in self.useless:
                continue
            if index not in self.encoded:
                example = encode_example(self.tokenizer, self.examples[index].messages, self.max_length)
                if not any(example.loss_mask[1:]):  # the first token is predicted from nothing
                    self.useless.add(index)
                    continue
                self.encoded[index] = example
            return self.encoded[index]


def collate(examples: Sequence[EncodedExample], pad: int) -> dict[str, torch.Tensor]:
    """A batch padded on the right: input_ids, attention_mask and labels, int64 [B, T]; -100 where no loss counts."""
    longest = max(len(example.ids) for example in examples)
    batch = {name: torch.full((len(examples), longest), fill) for name, fill in (("input_ids", pad), ("labels", -100))}
    attention = torch.zeros_like(batch["input_ids"])
    for row, example in enumerate(examples):
        ids, loss = torch.tensor(example.ids), torch.tensor(example.loss_mask, dtype=torch.bool)
        batch["input_ids"][row, : len(ids)] = ids
        batch["labels"][row, : len(ids)] = torch.where(loss, ids, -100)
        attention[row, : len(ids)] = 1
    return batch | {"attention_mask": attention}
