"""What the server answers: the objects of OpenAI's API, whole and in chunks of a stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from plt_jax.data.tokenizer import TextTokenizer
from plt_jax.serving.bodies import ChatBody, CompletionBody
from plt_jax.serving.listening import Piece
from plt_jax.serving.request import Alternatives, Finish, NewToken

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LEAST_LOG = -9999.0
"""Stands for the log-probability of an impossible token, since JSON has no infinity."""


class TokenLog(NamedTuple):
    """A token with the log-probabilities that a client asked for."""

    token: int
    log: float | None
    """None for a prompt's first token."""
    alternatives: Alternatives | None


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """The numbers of tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def error(message: str, code: int, parameter: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(code, "invalid_request_error" if code < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


class TokenTexts:
    """The texts of tokens by themselves, as lists of log-probabilities show them."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            name = self._tokenizer.name_of(token)
            is_special = token in self._tokenizer.special_ids
            self._known[token] = name if is_special else self._text(token)
        return self._known[token]

    def length(self, token: int) -> int:
        """The number of characters that a token adds to a text; special tokens add none."""
        return 0 if token in self._tokenizer.special_ids else len(self[token])

    def _text(self, token: int) -> str:
        # Behind another token, so that one that begins with a space keeps it.
        before = self._tokenizer.encode("a")
        return self._tokenizer.decode_continuation(before, [token])


class _Answers:
    """The answers to one request; what completions and chats share."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, texts: TokenTexts):
        self._texts = texts
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self, choices: Sequence[Mapping[str, Any]], used: Mapping[str, int]
    ) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        return {**self._head, "object": self.kind, "choices": choices, "usage": used}

    def chunk(
        self, choices: Sequence[Mapping[str, Any]], used: Mapping[str, int] | None, has_usage: bool
    ) -> dict[str, Any]:
        """A chunk of a stream.

        Args:
          used: for the chunk that has the numbers of tokens, and no choices.
          has_usage: whether the stream has such a chunk.
        """
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        return {**chunk, "usage": used} if has_usage else chunk

    def _most_likely(self, alternatives: Alternatives, count: int) -> Iterator[tuple[int, float]]:
        for token, log in zip(alternatives.tokens[:count], alternatives.logs[:count], strict=True):
            yield int(token), _finite(float(log))


class CompletionAnswers(_Answers):
    """Answers of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, texts: TokenTexts, body: CompletionBody):
        super().__init__(model, texts)
        self._count = body.logprobs
        self._offsets: dict[int, int] = {}
        """Characters of each answer whose tokens were listed."""

    def choice(
        self, index: int, text: str, logs: Sequence[TokenLog], finish: Finish | None
    ) -> dict[str, Any]:
        """An answer, or a part of it behind those before."""
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logs),
            "finish_reason": finish_reason(finish),
        }

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """The choice of a stream that a piece makes."""
        return self.choice(index, piece.text, token_logs(piece.tokens), piece.finish)

    def _logprobs(self, index: int, logs: Sequence[TokenLog]) -> dict[str, Any] | None:
        if self._count is None:
            return None
        offsets = []
        for log in logs:
            offset = self._offsets.get(index, 0)
            offsets.append(offset)
            self._offsets[index] = offset + self._texts.length(log.token)
        return {
            "tokens": [self._texts[log.token] for log in logs],
            "token_logprobs": [None if log.log is None else _finite(log.log) for log in logs],
            "top_logprobs": [self._top(log) for log in logs],
            "text_offset": offsets,
        }

    def _top(self, log: TokenLog) -> dict[str, float] | None:
        """The most likely tokens, and the one that is there, which may be none of them."""
        if log.alternatives is None or log.log is None:
            return None
        found: dict[str, float] = {}
        for token, value in self._most_likely(log.alternatives, self._count or 0):
            found.setdefault(self._texts[token], value)  # two tokens may have one text
        found.setdefault(self._texts[log.token], _finite(log.log))
        return found


class ChatAnswers(_Answers):
    """Answers of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, model: str, texts: TokenTexts, body: ChatBody):
        super().__init__(model, texts)
        self._begun: set[int] = set()
        """The answers of a stream of which a piece was sent."""
        self._count = (body.top_logprobs or 0) if body.logprobs else None

    def choice(
        self, index: int, text: str, logs: Sequence[TokenLog], finish: Finish | None
    ) -> dict[str, Any]:
        """A whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(logs),
            "finish_reason": finish_reason(finish),
        }

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """The choice of a stream that a piece makes."""
        is_first = index not in self._begun
        self._begun.add(index)
        delta: dict[str, str] = {"role": "assistant", "content": ""} if is_first else {}
        if piece.text:
            delta["content"] = piece.text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(token_logs(piece.tokens)),
            "finish_reason": finish_reason(piece.finish),
        }

    def _logprobs(self, logs: Sequence[TokenLog]) -> dict[str, Any] | None:
        if self._count is None:
            return None
        content = []
        for log in logs:
            top = (
                [] if log.alternatives is None else self._most_likely(log.alternatives, self._count)
            )
            entry = self._entry(log.token, _finite(log.log or 0.0))
            entry["top_logprobs"] = [self._entry(token, value) for token, value in top]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _entry(self, token: int, log: float) -> dict[str, Any]:
        text = self._texts[token]
        # A token that is a part of a character has no bytes that its text tells.
        is_whole = REPLACEMENT not in text
        own = list(text.encode("utf-8")) if is_whole else None
        return {"token": text, "logprob": log, "bytes": own}


def token_logs(tokens: Sequence[NewToken]) -> list[TokenLog]:
    """The log-probabilities of new tokens."""
    return [TokenLog(new.token, new.log, new.alternatives) for new in tokens]


def finish_reason(finish: Finish | None) -> str | None:
    """Why an answer has ended, in OpenAI's words: at a stop, or at its length."""
    if finish is None:
        return None
    return "stop" if finish is Finish.STOP else "length"


def _finite(log: float) -> float:
    return log if math.isfinite(log) else LEAST_LOG
