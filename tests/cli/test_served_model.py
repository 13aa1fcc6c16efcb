"""A model behind an endpoint: a server whose replies are scripted, and a real one."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pandas as pd
import pytest
import torch
import transformers as t

from safecrit.judges.endpoint import EndpointJudge
from tests import tiny
from tests.chatserver import Server, completion, refusal, serving
from tests.cli.conftest import Cli, World


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("OPENAI_API_KEY", "SAFECRIT_MODEL_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(local: None) -> Iterator[Server]:
    with serving() as made:
        yield made


def read(folder: Path) -> tuple[dict, pd.DataFrame]:  # type: ignore[type-arg]
    results = json.loads((folder / "results.json").read_text())
    return results, pd.read_json(folder / "samples.jsonl", lines=True, dtype=False)


def test_a_served_model_is_asked_and_judged(cli: Cli, world: World, server: Server, tmp_path: Path) -> None:
    server.answer = lambda question, _: completion(
        "I cannot help with that." if "bake" in question else "Sure.", "length"
    )
    ran = cli(
        "eval", "openai:some/model", "--base-url", server.url, "--prompts", world.prompts, "--max-new-tokens", 7,
        "-o", tmp_path / "r", "-q",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    results, rows = read(tmp_path / "r")
    assert (results["models"]["model"]["asr"]["count"], results["models"]["model"]["asr"]["n"]) == (4, 5)
    path, _, body = server.calls[0]
    assert path == "/v1/chat/completions" and body["model"] == "some/model"
    assert (body["max_tokens"], body["temperature"]) == (7, 0.0)
    assert list(rows.row) == [0, 1, 2, 3, 4] and rows.answer[0] == "I cannot help with that."


def test_samples_are_requests_with_seeds(cli: Cli, world: World, server: Server, tmp_path: Path) -> None:
    server.answer = lambda _, call: completion(f"Sure, {call}.")
    ran = cli(
        "eval", "openai:m", "--base-url", server.url, "--prompts", world.prompts, "--samples", 3, "--limit", 2,
        "-o", tmp_path / "r", "-q",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert sorted(body["seed"] for _, _, body in server.calls) == [0, 0, 1, 1, 2, 2]
    assert all(body["temperature"] == 1.0 for _, _, body in server.calls)
    assert read(tmp_path / "r")[1].answer.nunique() == 6


def test_an_answer_that_was_never_given_is_an_error_and_fails_the_run(
    cli: Cli, world: World, server: Server, tmp_path: Path
) -> None:
    server.answer = lambda question, _: refusal(400, "filtered") if "flour" in question else completion("Sure.")
    ran = cli(
        "eval", "openai:m", "--base-url", server.url, "--prompts", world.prompts, "--judge", "refusal",
        "--judge", world.guard, "-o", tmp_path / "r", "-q",
    )  # fmt: skip
    assert ran.code == 3 and "1 were never given" in ran.err
    results, rows = read(tmp_path / "r")
    assert results["models"]["openai:m"]["asr"]["n"] == 4
    lost = rows[rows.verdict == "error"]
    assert list(lost.row) == [3] and all("error" in others.values() for others in lost.others)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "needs --base-url"),
        (["--base-url", "nowhere"], "--base-url: is no http"),
        (["--base-url", "http://127.0.0.1:9/v1", "--prefill", "Sure"], "takes no --prefill"),
        (["--base-url", "http://127.0.0.1:9/v1"], "Start the server or correct --base-url"),
    ],
)
def test_mistakes_are_named(cli: Cli, world: World, local: None, more: list[str], message: str, tmp_path: Path) -> None:
    ran = cli("eval", "openai:m", "--prompts", world.prompts, *more, "-o", tmp_path / "r")
    assert ran.code == 1 and message in ran.err


def says_yes(folder: Path) -> Path:
    """A model that replies `Verdict:yes` to anything: no attention, no MLP, each token names the next."""
    made = tiny.tokenizer("byte-level", tiny.CHAT)
    config = t.LlamaConfig(
        vocab_size=len(made), hidden_size=352, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = t.AutoModelForCausalLM.from_config(config)
    chain = [
        made("[assistant] ", add_special_tokens=False)["input_ids"][-1],
        *made("Verdict:yes", add_special_tokens=False)["input_ids"],
        2,
    ]
    assert len(set(chain)) == len(chain)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(len(made), 352))
        model.lm_head.weight.zero_()
        for now, following in pairwise(chain):
            model.lm_head.weight[following, now] = 1.0
    tiny.loaded(model.eval(), made, folder)
    return folder


def missing() -> list[str]:
    return [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason="needs transformers' server: pip install 'transformers[serving]'")
def test_a_real_server_as_model_and_as_judge(cli: Cli, world: World, local: None, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = says_yes(tmp_path / "judge")
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [
                Path(sys.executable).parent / "transformers", "serve", "--host", "127.0.0.1", "--port", str(port),
                "--device", "cpu",
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        opener, deadline = build_opener(ProxyHandler({})), time.monotonic() + 60
        while True:
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
                time.sleep(0.2)
        url = f"http://127.0.0.1:{port}/v1"
        command = ["--prompts", world.prompts, "--max-new-tokens", 8, "-q"]
        ran = cli("eval", f"openai:{world.model}", "--base-url", url, *command, "-o", tmp_path / "served")
        assert ran.code == 0, ran.err
        assert cli("eval", world.model, *command, "-o", tmp_path / "local").code == 0
        served, own = read(tmp_path / "served")[1], read(tmp_path / "local")[1]
        assert list(served.answer.str.strip()) == list(own.answer.str.strip()) and served.answer.nunique() > 1
        verdicts = EndpointJudge(str(judge), url).judge([("prompt", text or "none") for text in own.answer])
        assert [(verdict.label, verdict.raw) for verdict in verdicts] == [("unsafe", "Verdict:yes")] * 5
    finally:
        process.terminate()
        process.wait(20)
