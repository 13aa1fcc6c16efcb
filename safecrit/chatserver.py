"""A client of chat completions: OpenAI's, or vLLM's, llama.cpp's or transformers' server.

The standard library speaks HTTP: no client has to be installed. Requests and
retries are those of the OpenAI API reference, "Create chat completion" and
"Rate limits".
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from http.client import HTTPException
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from safecrit.errors import SafecritError

FIRST_DELAY = 1.0  # seconds; doubled after each further failure
LONGEST_WAIT = 300.0  # seconds; a server that asks for more has run out of quota, and waiting would look like hanging
FIRST_ANSWERS = 3  # asked one at a time until one has a reply, so that a dead server is found out soon
MESSAGE_CHARACTERS = 200  # of a server's message; too few to reach the prompt where it repeats the question
AGAIN = (408, 429)  # beside all 5xx
THIS_ANSWER = (400, 413, 422)  # too long, or filtered: says nothing about the next answer
FINISHED = ("stop", "eos_token", None)  # eos_token: text-generation-inference; None: not told
CUT = ("length", "max_tokens")  # the reply was cut at max_tokens
ADVICE = {
    401: "Set {variables} to a valid key.",
    403: "Check that the key in {variables} may use this model.",
    404: "Check the {role}'s name, and that {flag} ends where /chat/completions follows (most often /v1).",
}
Messages = Sequence[Mapping[str, str]]


class CallFailed(Exception):
    """No reply to one question; the text says why."""


class _NoRedirect(HTTPRedirectHandler):
    """Turns redirects into errors: a followed one would lose the question and could carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """No request follows."""


class ChatServer:
    """One model behind an OpenAI-compatible server, as the judge or as the model that is evaluated.

    `base_url`: what stands before /chat/completions; /v1 is added where it has
    no path. `flag`: the option that gave it, for messages. `timeout`: seconds a
    server may stay silent. `retries`: further tries after 408, 429, 5xx, silence
    and broken connections, 1, 2, 4, ... seconds apart or as long as Retry-After
    says. `api_key` None: that of SAFECRIT_JUDGE_API_KEY or SAFECRIT_MODEL_API_KEY,
    else of OPENAI_API_KEY; an empty one is not sent. `max_tokens` and
    `temperature` None: the server's own. `cut`: a reply cut at `max_tokens` is a
    reply. `sleep` takes seconds.

    Raises SafecritError for options that make no sense.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        role: Literal["judge", "model"],
        flag: str,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        workers: int = 4,
        max_tokens: int | None = 512,
        temperature: float | None = 0.0,
        cut: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.role, self.flag = role, flag
        self.host, self.url = _endpoint(base_url, flag)
        faults = [
            *(["its name is empty"] if not name.strip() else []),
            *([f"timeout {timeout} is no time"] if not 0 < timeout < math.inf else []),
            *([f"retries {retries} is below 0"] if retries < 0 else []),
            *([f"workers {workers} is below 1"] if workers < 1 else []),
            *([f"max_tokens {max_tokens} is below 1"] if max_tokens is not None and max_tokens < 1 else []),
        ]
        if faults:
            raise SafecritError(f"{role} {name!r}: {'; '.join(faults)}. Change these options.")
        self.name, self.timeout, self.retries, self.workers = name, timeout, retries, workers
        self.max_tokens, self.temperature, self._sleep = max_tokens, temperature, sleep
        self._variables = (f"SAFECRIT_{role.upper()}_API_KEY", "OPENAI_API_KEY")
        self._key = self._read_key(api_key)
        self._finished = (*FINISHED, *CUT) if cut else FINISHED
        self._opener = build_opener(_NoRedirect)
        self._reached = False

    def ask(
        self, conversations: Sequence[Messages], done: Callable[[int], None] | None = None, **settings: Any
    ) -> list[str | CallFailed]:
        """The reply to each conversation, in order, or why there is none; `workers` at a time.

        `settings` are further fields of the request. `done` hears how many replies
        there are so far. Raises SafecritError where the server cannot be reached,
        refuses the key or the model, or has replied to none of the first three.
        """
        replies: list[str | CallFailed] = []
        while len(replies) < len(conversations) and not self._reached:
            replies.append(self._reply_to(conversations[len(replies)], settings))
            if not self._reached and len(replies) in (FIRST_ANSWERS, len(conversations)):
                raise SafecritError(
                    f"{self.url}: no reply to any of the first answers ({replies[-1]}). "
                    "Check that it serves chat completions and takes these options, then start again."
                )
        with ThreadPoolExecutor(self.workers) as pool:
            for reply in pool.map(lambda asked: self._reply_to(asked, settings), conversations[len(replies) :]):
                replies.append(reply)
                if done is not None:
                    done(len(replies))
        return replies

    def _reply_to(self, messages: Messages, settings: Mapping[str, Any]) -> str | CallFailed:
        try:
            return self._ask(messages, settings)
        except CallFailed as failure:
            return failure

    def _ask(self, messages: Messages, more: Mapping[str, Any]) -> str:
        """The reply to one conversation; tries again where that may help."""
        settings = {"temperature": self.temperature, "max_tokens": self.max_tokens, **more}
        body: dict[str, Any] = {"model": self.name, "messages": [dict(turn) for turn in messages]}
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
                        f"{self.url}: cannot be reached ({cause}). Start the server or correct {self.flag}."
                    ) from error
            if wait > LONGEST_WAIT:
                raise CallFailed(f"{reason}; the server asks to wait {wait:.0f} s")
            if attempt < self.retries:
                self._sleep(wait)
        raise CallFailed(f"{reason}, {self.retries + 1} tries")

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
            raise CallFailed(f"reply is no chat completion ({type(error).__name__})") from error
        self._reached = True
        if finish not in self._finished:
            raise CallFailed(f"reply not finished ({finish}): {content}")
        if content is not None and not isinstance(content, str):
            raise CallFailed("reply is no text")
        return content or ""

    def _refusal(self, error: HTTPError) -> str:
        """Why the server did not answer, where another try may help; raises where it cannot."""
        said = _message(error)
        reason = f"HTTP {error.code}{f': {said}' if said else ''}"
        if error.code in AGAIN or error.code >= 500:
            return reason
        if error.code in THIS_ANSWER:
            raise CallFailed(reason) from error
        advice = ADVICE.get(error.code, "Check {flag} and the {role}'s name.")
        told = advice.format(variables=" or ".join(self._variables), role=self.role, flag=self.flag)
        raise SafecritError(f"{self.url}: {reason}, asked for {self.name!r}. {told}") from error

    def _read_key(self, given: str | None) -> str:
        if given is None:
            given = next((os.environ[name] for name in self._variables if name in os.environ), "")
        key = given.strip()
        if not key.isascii() or not key.isprintable():
            names = " or ".join(self._variables)
            raise SafecritError(f"the {self.role}'s key holds characters that no key has. Correct {names}.")
        return key


def _endpoint(base_url: str, flag: str) -> tuple[str, str]:
    """Host (with port) and full URL."""
    try:
        parts = urlsplit(base_url.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not re.fullmatch(r"[!-~]+", base_url.strip()):
        raise SafecritError(f"{flag}: is no http or https address. Give one such as http://localhost:8000/v1.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SafecritError(
            f"{flag}: must hold no password, query or fragment. Give the address alone, and the key in OPENAI_API_KEY."
        )
    return parts.netloc, f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}/chat/completions"


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
