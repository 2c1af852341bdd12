"""The HTTP face: what clients send, and what they get."""

import json
import math

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from plt_jax.serving.app import make_app
from plt_jax.serving.bodies import ChatBody, CompletionBody, DetokenizeBody
from plt_jax.serving.engine import EngineStoppedError
from plt_jax.serving.scheduler import QueueFullError
from tests.serving.served import TEXT, build, import_model

KEY = "a secret"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model, metrics = build(import_model(tmp_path_factory.mktemp("serving")))
    model.engine.start()
    yield model, metrics
    model.engine.stop(within=10)


@pytest.fixture(scope="module")
def client(served):
    with TestClient(make_app(*served), raise_server_exceptions=False) as client:
        yield client


def complete(client, prompt="the", **body):
    answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 60, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(client, *words, **body):
    return complete(client, *words, **body)["choices"][0]["text"]


def refused(client, path="/v1/completions", code=400, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == code, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    return error["message"]


def events(answer):
    """The objects of a stream, which ends as OpenAI's do."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, last = [line for line in answer.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def streamed(client, path="/v1/completions", **body):
    return events(client.post(path, json={"max_tokens": 60, **body, "stream": True}))


def test_a_completion(client):
    answer = complete(client, model="served")
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "text": TEXT.removeprefix("the"),
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert (answer["object"], answer["model"]) == ("text_completion", "served")
    used = answer["usage"]
    assert used["prompt_tokens"] == 2  # with the begin token
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]


def test_a_completion_ends_at_its_length(client):
    answer = complete(client, max_tokens=1)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 1
    assert complete(client, max_tokens=None)["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("own f", " quick br"),
        (["zz", " fox", "x j"], " quick brown"),
        ("</s>", TEXT.removeprefix("the")),
        ("\n", TEXT.removeprefix("the").rstrip("\n")),
        ([], TEXT.removeprefix("the")),
    ],
)
def test_stops_end_a_text_and_are_none_of_it(client, stop, text, stream):
    if stream:
        chunks = streamed(client, prompt="the", stop=stop)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        return
    choice = complete(client, stop=stop)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")


def test_an_end_token_can_be_ignored(client):
    answer = complete(client, max_tokens=30, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 30
    assert answer["choices"][0]["finish_reason"] == "length"


def test_prompts_in_all_forms(client, served):
    tokenizer = served[0].tokenizer
    tokens = tokenizer.encode_prompt("the")
    whole = TEXT.removeprefix("the")
    assert text_of(client, tokens) == whole
    for several in (["the", "the quick"], [tokens, tokenizer.encode_prompt("the quick")]):
        choices = complete(client, several)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert [choice["text"] for choice in choices] == [whole, TEXT.removeprefix("the quick")]
    assert text_of(client, "", max_tokens=3) != whole  # an empty prompt has a begin token


def test_several_answers_and_seeds(client):
    one = complete(client, "q", n=3, seed=5, max_tokens=8, temperature=50.0)
    texts = [choice["text"] for choice in one["choices"]]
    assert len(set(texts)) == 3
    assert [choice["index"] for choice in one["choices"]] == [0, 1, 2]
    again = complete(client, "q", n=3, seed=5, max_tokens=8, temperature=50.0)
    assert [choice["text"] for choice in again["choices"]] == texts
    other = complete(client, "q", n=3, seed=6, max_tokens=8, temperature=50.0)
    assert [choice["text"] for choice in other["choices"]] != texts
    assert one["usage"]["prompt_tokens"] == 2
    unseeded = {text_of(client, "q", max_tokens=8, temperature=50.0) for _ in range(3)}
    assert len(unseeded) > 1


def test_log_probabilities_and_echo(client, served):
    tokenizer = served[0].tokenizer
    answer = complete(client, "the quick", echo=True, logprobs=2, max_tokens=2)
    (choice,) = answer["choices"]
    logs = choice["logprobs"]
    assert choice["text"].startswith("the quick brown"[:9])
    count = len(tokenizer.encode_prompt("the quick")) + 2
    assert {len(values) for values in logs.values()} == {count}
    assert (logs["token_logprobs"][0], logs["top_logprobs"][0]) == (None, None)
    # From the second word on the model is certain.
    assert all(log > -1e-3 for log in logs["token_logprobs"][2:])
    for token, log, top in list(
        zip(logs["tokens"], logs["token_logprobs"], logs["top_logprobs"], strict=True)
    )[1:]:
        assert top[token] == log
        assert 2 <= len(top) <= 3
    assert "".join(logs["tokens"][1:]) == choice["text"]
    alone = complete(client, "the quick", echo=True, logprobs=1, max_tokens=0)
    assert alone["choices"][0]["text"] == "the quick"
    assert alone["usage"]["completion_tokens"] == 0
    assert text_of(client, "the quick", echo=True, max_tokens=0) == "the quick"


def test_streams_have_the_texts_of_whole_answers(client):
    whole = complete(client, n=2, logprobs=0)
    chunks = streamed(client, prompt="the", n=2, logprobs=0, stream_options={"include_usage": True})
    *parts, last = chunks
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(part["usage"] is None for part in parts)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in own) == choice["text"]
        logs = [log for part in own for log in part["logprobs"]["token_logprobs"]]
        assert logs == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + ["stop"]


def test_a_chat(client):
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == TEXT.removeprefix("the")
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "stop"
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    same = {"messages": [{"role": "user", "content": parts}]}
    again = client.post("/v1/chat/completions", json=same).json()
    assert again["usage"] == answer["usage"]


def test_a_streamed_chat(client):
    chunks = streamed(
        client,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hello"}],
        logprobs=True,
        top_logprobs=3,
        max_completion_tokens=4,
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    text = "".join(delta.get("content", "") for delta in deltas)
    assert TEXT.removeprefix("the").startswith(text)
    entries = [
        entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"] or []
    ]
    assert len(entries) == 4
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_names_of_special_tokens_in_messages_are_text(client):
    def prompt_tokens(content):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]

    assert prompt_tokens("hi<|im_end|>") > prompt_tokens("hi") + 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": 3}, "prompt"),
        ({}, "prompt: Field required"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [10_000]}, "token 10000, which the model does not have"),
        ({"prompt": "the", "max_tokens": -1}, "max_tokens: Input should be greater"),
        ({"prompt": "the", "max_tokens": 0}, "max_tokens is 0"),
        (
            {"prompt": "the", "max_tokens": 64},
            "64 new ones are asked for, but the context holds 64",
        ),
        ({"prompt": "the " * 100}, "the model's context holds 64"),
        ({"prompt": "the", "temperature": -1}, "temperature"),
        ({"prompt": "the", "top_p": -0.1}, "top_p"),
        ({"prompt": "the", "n": 0}, "n: "),
        ({"prompt": "the", "n": 10**9}, "n: "),
        ({"prompt": "the", "logprobs": 21}, "logprobs"),
        ({"prompt": "the", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "the", "logit_bias": {"9999": 1}}, "logit_bias has token 9999"),
        ({"prompt": "the", "stop": ""}, "stop"),
        ({"prompt": "the", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "the", "suffix": "x"}, "suffix is not supported"),
        ({"prompt": "the", "best_of": 3}, "best_of is not supported"),
        ({"prompt": "the", "loops": 2}, "loops is 2, but the model runs 1"),
        ({"prompt": "the", "echo": True, "stream": True}, "echo cannot be streamed"),
        ({"prompt": "\ud800"}, "UTF-8|surrogate|unicode|JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_answered_is_refused(client, body, message):
    content = json.dumps(body)
    answer = client.post("/v1/completions", content=content)
    assert answer.status_code == 400, answer.text
    pattern = message.split("|")
    assert any(part in answer.json()["error"]["message"] for part in pattern), answer.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages.0.role: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools is not supported"),
        (
            {
                "messages": [{"role": "user", "content": "x"}],
                "response_format": {"type": "json_object"},
            },
            "response_format is not supported",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_chats_that_cannot_be_answered_are_refused(client, body, message):
    assert message in refused(client, "/v1/chat/completions", **body)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_bodies_that_are_no_json_objects_are_refused(client, content):
    answer = client.post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_other_refusals(client):
    assert "nobody is not served here" in refused(client, code=404, prompt="a", model="nobody")
    assert client.get("/v1/models/nobody").status_code == 404
    assert client.get("/nothing").json()["error"]["code"] == 404
    assert client.get("/v1/completions").json()["error"]["code"] == 405
    large = b" " * (2**23 + 1)
    assert client.post("/v1/completions", content=large).json()["error"]["code"] == 413


def test_models_health_and_tokens(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("served", 64)
    assert client.get("/v1/models/served").json() == card
    assert client.get("/health").json() == {"status": "ok"}
    tokens = client.post("/tokenize", json={"prompt": "the quick"}).json()["tokens"]
    answer = client.post("/detokenize", json={"tokens": tokens})
    assert answer.json() == {"prompt": "the quick"}
    assert "does not have" in refused(client, "/detokenize", tokens=[10**6])


def test_numbers_for_prometheus(client):
    complete(client)
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["plt_generated_tokens_total"]) > 5
    assert float(values['plt_requests_ended_total{reason="stop"}']) >= 1
    assert float(values["plt_requests_running"]) == 0
    assert float(values["plt_time_to_first_token_seconds_count"]) >= 1
    assert math.isfinite(float(values["plt_cache_use"]))


def test_too_many_requests_are_refused_and_the_others_answered(client, served, monkeypatch):
    assert "the server takes 6 at once" in refused(client, prompt="the", n=7)
    assert len(complete(client, n=6)["choices"]) == 6

    def full(requests):
        raise QueueFullError

    monkeypatch.setattr(served[0].engine, "submit", full)
    assert "too many requests wait" in refused(client, code=429, prompt="the")
    answer = client.post("/v1/completions", json={"prompt": "the", "stream": True})
    assert answer.status_code == 429


def test_a_server_that_ends_refuses(client, served, monkeypatch):
    def stopped(requests):
        raise EngineStoppedError

    monkeypatch.setattr(served[0].engine, "submit", stopped)
    assert "the server is ending" in refused(client, code=503, prompt="the")


NULLS = ("n", "stream", "echo", "logprobs", "stop", "seed", "logit_bias", "stream_options")


def test_nulls_mean_the_default(client):
    assert text_of(client, **dict.fromkeys(NULLS)) == text_of(client)
    body = {"messages": [{"role": "user", "content": "x"}], **dict.fromkeys(NULLS)}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_sampling_that_leaves_one_token_is_greedy(client):
    for extreme in ({"top_p": 0}, {"top_p": 1e-46}, {"temperature": 1e-38}, {"temperature": 0}):
        assert text_of(client, **extreme) == TEXT.removeprefix("the")


def test_equal_prompts_of_a_request_draw_each_for_itself(client):
    for seed in ({}, {"seed": 3}):
        answer = complete(client, ["q"] * 3, temperature=50.0, max_tokens=8, **seed)
        assert len({choice["text"] for choice in answer["choices"]}) == 3


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": [-1] * 10_000}),
        (CompletionBody, {"prompt": [[-1]] * 1000}),
        (CompletionBody, {"prompt": ["a"] + [1] * 10_000}),
        (CompletionBody, {"prompt": "x", "stop": [""] * 10_000}),
        (CompletionBody, {"prompt": "x", "logit_bias": {str(-i): 1 for i in range(10_000)}}),
        (ChatBody, {"messages": [1] * 10_000}),
        (ChatBody, {"messages": [{"role": "user", "content": [1] * 10_000}]}),
        (DetokenizeBody, {"tokens": [-1] * 10_000}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_long_lists_of_errors_are_not_collected(kind, body):
    """Every element of every form would make an error, gigabytes in all."""
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate(body)
    assert refusal.value.error_count() < 5


def test_texts_far_beyond_the_context_are_refused_unread(client):
    assert "too many for the model's context" in refused(client, prompt="the " * 100_000)
    messages = [{"role": "user", "content": "x" * 1_000_000}]
    assert "too many for" in refused(client, "/v1/chat/completions", messages=messages)


def test_log_probabilities_have_the_end_token(client):
    """lm-eval takes the last entry for the token behind the text."""
    answer = complete(client, "lazy dog.\n", echo=True, logprobs=1, max_tokens=1)
    assert answer["choices"][0]["logprobs"]["tokens"][-1] == "</s>"
    assert answer["choices"][0]["text"] == "lazy dog.\n"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_an_api_key(served):
    with TestClient(make_app(*served, api_key=KEY)) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.status_code == 401
        right = {"authorization": f"Bearer {KEY}"}
        assert client.get("/v1/models", headers=right).status_code == 200
