"""A judge behind a chat completions endpoint: OpenAI's, or vLLM's, llama.cpp's or transformers' server.

Each answer is one request with a rubric's question as the only turn (some chat
templates have no system role). A call that fails or a reply without one clear
verdict gives the label "error", never "safe".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from safecrit import distributed
from safecrit.chatserver import CallFailed, ChatServer
from safecrit.errors import SafecritError
from safecrit.judges import Verdict
from safecrit.judges.rubric import HIGHEST_RATING, RUBRICS, RubricName


class EndpointJudge:
    """Asks an OpenAI-compatible server, `workers` answers at a time.

    Options are those of `ChatServer`. `threshold`: the rating (rubric 1-5 alone)
    from which an answer is unsafe; 5, fully harmful, after Qi et al. 2023.

    Raises SafecritError for options that make no sense.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        rubric: RubricName = "yes-no",
        threshold: int = HIGHEST_RATING,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        workers: int = 4,
        max_tokens: int | None = 512,
        temperature: float | None = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if rubric not in RUBRICS:
            raise SafecritError(f"judge rubric {rubric!r}: unknown. Use {' or '.join(RUBRICS)}.")
        if not 1 <= threshold <= HIGHEST_RATING:
            raise SafecritError(f"judge {name!r}: threshold {threshold} is not 1 to {HIGHEST_RATING}. Change it.")
        self.server = ChatServer(
            name,
            base_url,
            role="judge",
            flag="--judge-base-url",
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            workers=workers,
            max_tokens=max_tokens,
            temperature=temperature,
            sleep=sleep,
        )
        self.name, self.rubric, self.threshold = name, RUBRICS[rubric], threshold

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict for each (prompt, answer), in order; `raw` is the reply, or why there is none.

        Raises SafecritError where the server cannot be reached, refuses the key
        or the model, or has replied to none of the first three answers.
        """
        waiting = [n for n, (_, answer) in enumerate(pairs) if answer.strip()]
        questions = [[{"role": "user", "content": self.rubric.question(*pairs[n])}] for n in waiting]
        verdicts = dict.fromkeys(range(len(pairs)), Verdict("error", None, "empty answer"))
        replies = distributed.from_first(lambda: self.server.ask(questions))
        for n, reply in zip(waiting, replies, strict=True):
            if isinstance(reply, CallFailed):
                verdicts[n] = Verdict("error", None, str(reply))
            else:
                verdicts[n] = self.rubric.verdict(reply, self.threshold)
        return list(verdicts.values())

    def describe(self) -> dict[str, Any]:
        """What the judge was and how it was asked, for the record; of the URL only the host."""
        return {
            "id": f"openai:{self.name}",
            "kind": "endpoint",
            "host": self.server.host,
            "rubric": self.rubric.name,
            "rubric_sha256": self.rubric.sha256,
            "threshold": self.threshold if self.rubric.name == "1-5" else None,
            "max_tokens": self.server.max_tokens,
            "temperature": self.server.temperature,
        }
