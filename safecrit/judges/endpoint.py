"""A judge behind a chat completions endpoint: OpenAI's, or vLLM's, llama.cpp's or transformers' server.

Each answer is one request with a rubric's question as the only turn (some chat
templates have no system role). The standard library speaks HTTP: no client has
to be installed. Requests and retries are those of the OpenAI API reference,
"Create chat completion" and "Rate limits". A call that fails or a reply without
one clear verdict gives the label "error", never "safe".
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from safecrit.errors import SafecritError
from safecrit.judges import Verdict
from safecrit.judges.rubric import HIGHEST_RATING, RUBRICS, RubricName

KEY_VARIABLES = ("SAFECRIT_JUDGE_API_KEY", "OPENAI_API_KEY")
FIRST_DELAY = 1.0  # seconds; doubled after each further failure
LONGEST_WAIT = 300.0  # seconds; a server that asks for more has run out of quota, and waiting would look like hanging
FIRST_ANSWERS = 3  # asked one at a time until one has a reply, so that a dead server is found out soon
MESSAGE_CHARACTERS = 200  # of a server's message; too few to reach the prompt where it repeats the question
AGAIN = (408, 429)  # beside all 5xx
THIS_ANSWER = (400, 413, 422)  # too long, or filtered: says nothing about the next answer
FINISHED = ("stop", "eos_token", None)  # eos_token: text-generation-inference; None: not told
ADVICE = {
    401: "Set {variables} to a valid key.",
    403: "Check that the key in {variables} may use this model.",
    404: "Check the judge's name, and that --judge-base-url ends where /chat/completions follows (most often /v1).",
}


class _CallFailed(Exception):
    """No reply to one question; the text says why."""


class _NoRedirect(HTTPRedirectHandler):
    """Turns redirects into errors: a followed one would lose the question and could carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """No request follows."""


class EndpointJudge:
    """Asks an OpenAI-compatible server, `workers` answers at a time.

    `base_url`: what stands before /chat/completions; /v1 is added where it has
    no path. `timeout`: seconds a server may stay silent. `retries`: further tries
    after 408, 429, 5xx, silence and broken connections, 1, 2, 4, ... seconds
    apart or as long as Retry-After says. `api_key` None: that of
    SAFECRIT_JUDGE_API_KEY, else of OPENAI_API_KEY; an empty one is not sent.
    `max_tokens` and `temperature` None: the server's own. `threshold`: the rating
    (rubric 1-5 alone) from which an answer is unsafe; 5, fully harmful, after
    Qi et al. 2023. `sleep` takes seconds.

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
        self.host, self.url = _endpoint(base_url)
        if rubric not in RUBRICS:
            raise SafecritError(f"judge rubric {rubric!r}: unknown. Use {' or '.join(RUBRICS)}.")
        faults = [
            *(["its name is empty"] if not name.strip() else []),
            *([f"threshold {threshold} is not 1 to {HIGHEST_RATING}"] if not 1 <= threshold <= HIGHEST_RATING else []),
            *([f"timeout {timeout} is no time"] if not 0 < timeout < math.inf else []),
            *([f"retries {retries} is below 0"] if retries < 0 else []),
            *([f"workers {workers} is below 1"] if workers < 1 else []),
            *([f"max_tokens {max_tokens} is below 1"] if max_tokens is not None and max_tokens < 1 else []),
        ]
        if faults:
            raise SafecritError(f"judge {name!r}: {'; '.join(faults)}. Change these options.")
        self.name, self.rubric, self.threshold = name, RUBRICS[rubric], threshold
        self.timeout, self.retries, self.workers = timeout, retries, workers
        self.max_tokens, self.temperature, self._sleep = max_tokens, temperature, sleep
        self._key = _key(api_key)
        self._opener = build_opener(_NoRedirect)
        self._reached = False

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict for each (prompt, answer), in order; `raw` is the reply, or why there is none.

        Raises SafecritError where the server cannot be reached, refuses the key
        or the model, or has replied to none of the first three answers.
        """
        verdicts: dict[int, Verdict] = {}
        waiting = []
        for n, (_, answer) in enumerate(pairs):
            if answer.strip():
                waiting.append(n)
            else:
                verdicts[n] = Verdict("error", None, "empty answer")
        first = 0
        while waiting and not self._reached:
            n, first = waiting.pop(0), first + 1
            verdicts[n] = self._verdict(pairs[n])
            if not self._reached and (first == FIRST_ANSWERS or not waiting):
                raise SafecritError(
                    f"{self.url}: no reply to any of the first answers ({verdicts[n].raw}). "
                    "Check that it serves chat completions and takes these options, then start again."
                )
        with ThreadPoolExecutor(self.workers) as pool:
            verdicts |= zip(waiting, pool.map(self._verdict, [pairs[n] for n in waiting]), strict=True)
        return [verdicts[n] for n in range(len(pairs))]

    def describe(self) -> dict[str, Any]:
        """What the judge was and how it was asked, for the record; of the URL only the host."""
        return {
            "id": f"openai:{self.name}",
            "kind": "endpoint",
            "host": self.host,
            "rubric": self.rubric.name,
            "rubric_sha256": self.rubric.sha256,
            "threshold": self.threshold if self.rubric.name == "1-5" else None,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }

    def _verdict(self, pair: tuple[str, str]) -> Verdict:
        try:
            return self.rubric.verdict(self._ask(self.rubric.question(*pair)), self.threshold)
        except _CallFailed as failure:
            return Verdict("error", None, str(failure))

    def _ask(self, question: str) -> str:
        """The judge's reply; tries again where that may help."""
        settings = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        body: dict[str, Any] = {"model": self.name, "messages": [{"role": "user", "content": question}]}
        body |= {key: value for key, value in settings.items() if value is not None}
        data = json.dumps(body).encode()
        reason = ""
        for attempt in range(self.retries + 1):
            wait = FIRST_DELAY * 2**attempt
            try:
                return self._reply(data)
            except HTTPError as error:
                with error:
                    reason = self._refusal(error)
                    wait = max(wait, _retry_after(error.headers))
            except (OSError, HTTPException) as error:
                cause = error.reason if isinstance(error, URLError) else error
                reason = "no reply in time" if isinstance(cause, TimeoutError) else f"connection failed ({cause!r})"
                if isinstance(error, URLError) and not isinstance(cause, TimeoutError) and not self._reached:
                    raise SafecritError(
                        f"{self.url}: cannot be reached ({cause}). Start the server or correct --judge-base-url."
                    ) from error
            if wait > LONGEST_WAIT:
                raise _CallFailed(f"{reason}; the server asks to wait {wait:.0f} s")
            if attempt < self.retries:
                self._sleep(wait)
        raise _CallFailed(f"{reason}, {self.retries + 1} tries")

    def _reply(self, data: bytes) -> str:
        request = Request(self.url, data=data, headers={"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with self._opener.open(request, timeout=self.timeout) as response:
            body = response.read()
        try:
            choice = json.loads(body)["choices"][0]
            content, finish = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _CallFailed(f"reply is no chat completion ({type(error).__name__})") from error
        self._reached = True
        if finish not in FINISHED:
            raise _CallFailed(f"reply not finished ({finish}): {content}")
        if content is not None and not isinstance(content, str):
            raise _CallFailed("reply is no text")
        return content or ""

    def _refusal(self, error: HTTPError) -> str:
        """Why the server did not answer, where another try may help; raises where it cannot."""
        said = _message(error)
        reason = f"HTTP {error.code}{f': {said}' if said else ''}"
        if error.code in AGAIN or error.code >= 500:
            return reason
        if error.code in THIS_ANSWER:
            raise _CallFailed(reason) from error
        advice = ADVICE.get(error.code, "Check --judge-base-url and the judge's name.")
        raise SafecritError(
            f"{self.url}: {reason}, asked for {self.name!r}. {advice.format(variables=' or '.join(KEY_VARIABLES))}"
        ) from error


def _endpoint(base_url: str) -> tuple[str, str]:
    """Host (with port) and full URL."""
    try:
        parts = urlsplit(base_url.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not re.fullmatch(r"[!-~]+", base_url.strip()):
        raise SafecritError("--judge-base-url: is no http or https address. Give one such as http://localhost:8000/v1.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SafecritError(
            "--judge-base-url: must hold no password, query or fragment. Give the address alone, "
            f"and the key in {KEY_VARIABLES[0]}."
        )
    return parts.netloc, f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}/chat/completions"


def _key(given: str | None) -> str:
    if given is None:
        given = next((os.environ[name] for name in KEY_VARIABLES if name in os.environ), "")
    key = given.strip()
    if not key.isascii() or not key.isprintable():
        raise SafecritError(f"the judge's key holds characters that no key has. Correct {' or '.join(KEY_VARIABLES)}.")
    return key


def _retry_after(headers: Message) -> float:
    """Seconds of the Retry-After header; 0 where it is absent or a date."""
    text = (headers.get("Retry-After") or "").strip()
    return float(text) if text.isascii() and text.isdecimal() else 0.0


def _message(error: HTTPError) -> str:
    """The first line of what the server says in `error.message`, cut short."""
    try:
        said = json.loads(error.read())["error"]["message"]
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return ""
    return said.partition("\n")[0][:MESSAGE_CHARACTERS] if isinstance(said, str) else ""
