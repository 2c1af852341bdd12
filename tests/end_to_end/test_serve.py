"""The server as a process, and the clients that people have."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from tests.serving.served import TEXT, import_model
from tests.training.runs import REPOSITORY, environment

pytestmark = pytest.mark.slow(reason="starts servers")
KEY = "a secret"
WHOLE = TEXT.removeprefix("the")


class Server:
    """A server on a port of its own."""

    def __init__(self, run, *words, **variables):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "plt_jax.serve", str(run), "--port", "0", *words],
            cwd=REPOSITORY,
            env=environment() | variables,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        line = ""
        while "is served at" not in line:
            line = self.process.stderr.readline()
            assert line, "the server has ended"
        self.url = line.split()[-1]
        self.rest: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.rest += self.process.stderr.readlines()

    def ask(self, **body):
        return httpx.post(f"{self.url}/completions", json=body, timeout=60)

    def running(self) -> float:
        return self.requests("running")

    def requests(self, *states: str) -> float:
        """The number of requests in some states."""
        text = httpx.get(self.url.removesuffix("/v1") + "/metrics").text
        names = tuple(f"plt_requests_{state} " for state in states)
        lines = [line for line in text.splitlines() if line.startswith(names)]
        assert len(lines) == len(states)
        return sum(float(line.split()[-1]) for line in lines)

    def close(self, within: float = 30) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return import_model(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server(run):
    server = Server(run, "--slots", "2", "--prefill_tokens", "16", PLT_API_KEY=KEY)
    yield server
    assert server.close() == 0
    assert not [line for line in server.rest if "Traceback" in line]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)


def test_openais_package_completes(client):
    assert [model.id for model in client.models.list()] == ["served"]
    answer = client.completions.create(model="served", prompt="the", max_tokens=60, logprobs=2)
    assert answer.choices[0].text == WHOLE
    assert answer.choices[0].logprobs.token_logprobs[0] == pytest.approx(0, abs=1e-3)
    several = client.completions.create(model="served", prompt="the", n=3, stop="fox")
    assert [choice.text for choice in several.choices] == [" quick brown "] * 3


def test_openais_package_chats(client):
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(
        model="served", messages=messages, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == WHOLE
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(
        model="served", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == WHOLE
    assert last.usage.completion_tokens == answer.usage.completion_tokens


def test_openais_package_reads_refusals(client):
    with pytest.raises(openai.NotFoundError, match="nobody is not served here"):
        client.completions.create(model="nobody", prompt="the")
    with pytest.raises(openai.BadRequestError, match="the context holds 64"):
        client.completions.create(model="served", prompt="the", max_tokens=1000)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_client_that_goes_away_frees_its_slot(client, server):
    stream = client.completions.create(
        model="served", prompt="the", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while server.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.running() == 0


def test_a_signal_lets_running_texts_end(run):
    server = Server(run, "--slots", "1", "--prefill_tokens", "16", "--drain_seconds", "20")
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(server.ask(prompt="the", max_tokens=50)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    # A request that comes behind the signal is refused.
    while len(answers) + server.requests("running", "waiting") < 3:
        time.sleep(0.005)
    assert server.close() == 0
    for thread in threads:
        thread.join(20)
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [WHOLE] * 3


def test_a_taken_port_is_said_at_once(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "plt_jax.serve", str(run), "--port", port],
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert "cannot listen at 127.0.0.1" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def run_without_begin_token(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return import_model(folder, tokenizer_config={"add_bos_token": False, "eos_token": "</s>"})


def test_the_harness_scores_by_the_server_what_it_scores_itself(
    run_without_begin_token, monkeypatch
):
    """lm-eval's local-completions, whose tokens are those of the server's /tokenize."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from plt_jax.evaluation.harness import HarnessModel

    # Behind the last pair the model writes its end token.
    pairs = [("the quick", " brown fox"), ("the lazy", " dog"), ("jumps", " over the quick")]
    pairs += [("over lazy", " dog.\n")]

    def instances():
        return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]

    own = HarnessModel(str(run_without_begin_token), batch_size=2)
    right = own.loglikelihood(instances())
    server = Server(run_without_begin_token, "--slots", "2", "--prefill_tokens", "16")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    model = LocalCompletionsAPI(
        base_url=f"{server.url}/completions", model="served", max_length=64, batch_size=2
    )
    assert model.tokenizer_backend == "remote"
    scores = model.loglikelihood(instances())
    until = [Instance("generate_until", {}, ("the", {"until": ["fox"], "max_gen_toks": 30}), 0)]
    assert model.generate_until(until) == [" quick brown "]
    assert server.close() == 0
    for (log, greedy), (own_log, own_greedy) in zip(scores, right, strict=True):
        assert log == pytest.approx(own_log, rel=1e-6, abs=1e-4)
        assert greedy == own_greedy
    assert [greedy for _, greedy in scores] == [True, True, False, True]
