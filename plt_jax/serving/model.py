"""A model that is served: its engine, tokenizer and chat template, and requests made for it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from plt_jax.data.tokenizer import TextTokenizer
from plt_jax.decoding.chat import ChatTemplate, encode_chat
from plt_jax.errors import InputError
from plt_jax.serving.bodies import SEEDS, ChatBody, CompletionBody
from plt_jax.serving.engine import Engine
from plt_jax.serving.listening import TextListener
from plt_jax.serving.request import Listener, Request


class ServedModel(NamedTuple):
    """What requests are served with."""

    name: str
    """The name by which clients call the model."""
    created: int
    """When it was opened, in seconds since 1970."""
    engine: Engine
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    """None for a model that is no chat model."""
    vocab_size: int
    context: int
    """Tokens that a prompt and its answer may have together."""
    loops: int
    longest_token: int
    """Characters that a token stands for at most."""

    def encode_completion(self, body: CompletionBody) -> list[list[int]]:
        """The tokens of a completion's prompts.

        Raises:
          InputError: one is empty, or has tokens that the model does not.
        """
        encode = self.reading(body.special_tokens).encode_prompt
        self.check_characters(prompt for prompt in body.prompts if isinstance(prompt, str))
        return [
            encode(prompt) if isinstance(prompt, str) else self._checked(prompt)
            for prompt in body.prompts
        ]

    def check_characters(self, texts: Iterable[str]) -> None:
        """Raises InputError for a text that is too long for the context, whatever its tokens are.

        To encode it would take seconds, in which no other client is heard.
        """
        for text in texts:
            if len(text) > self.context * self.longest_token:
                raise InputError(
                    f"a text has {len(text)} characters, too many for the model's context of "
                    f"{self.context} tokens"
                )

    def reading(self, special_tokens: bool) -> TextTokenizer:
        """The tokenizer, which reads names of special tokens in a text or does not."""
        return self.tokenizer.reading_special if special_tokens else self.tokenizer

    def encode_messages(self, body: ChatBody) -> list[int]:
        """The tokens of a chat.

        Raises:
          InputError: the model is no chat model, or its template refuses the messages.
        """
        if self.template is None:
            raise InputError(
                "the model has no chat template, so it is no chat model; use /v1/completions"
            )
        messages: list[Mapping[str, Any]] = [message.to_message() for message in body.messages]
        self.check_characters([json.dumps(messages, ensure_ascii=False)])
        return encode_chat(self.template, self.tokenizer, messages)

    def listener(self, prompt: Sequence[int], stops: Sequence[str], send) -> TextListener:
        """A listener for an answer to a prompt; see `TextListener`."""
        return TextListener(self.tokenizer, prompt, stops, send)

    def request(
        self,
        prompt: Sequence[int],
        body: CompletionBody | ChatBody,
        choice: int,
        seed: int,
        listener: Listener,
    ) -> Request:
        """The engine's request for one answer.

        Args:
          choice: the answer's number among those to this prompt.
          seed: see `new_seed`.

        Raises:
          InputError: a parameter does not fit the model.
        """
        if body.loops is not None and body.loops > self.loops:
            raise InputError(f"loops is {body.loops}, but the model runs {self.loops}")
        wrong = [token for token in body.logit_bias or () if token >= self.vocab_size]
        if wrong:
            raise InputError(f"logit_bias has token {wrong[0]}, which the model does not have")
        is_chat = isinstance(body, ChatBody)
        most = (body.max_completion_tokens or body.max_tokens) if is_chat else body.max_tokens
        room = self.context - len(prompt)
        if room < (1 if most is None else 0):
            raise InputError(
                f"the prompt has {len(prompt)} tokens, but the model's context holds {self.context}"
            )
        # A stop that is the name of a special token ends the text at that token.
        named = (self.tokenizer.library.token_to_id(stop) for stop in body.stops)
        stops = {token for token in named if token in self.tokenizer.special_ids}
        if not body.ignore_eos:
            stops |= set(self.tokenizer.special.eos)
        return Request(
            prompt=prompt,
            max_new_tokens=room if most is None else most,
            sampling=body.sampling(seed, choice),
            listener=listener,
            stop_tokens=frozenset(stops),
            log_probabilities=bool(body.logprobs) if is_chat else body.logprobs is not None,
            score_prompt=not is_chat and body.echo and body.logprobs is not None,
        )

    def _checked(self, prompt: list[int]) -> list[int]:
        wrong = [token for token in prompt if token >= self.vocab_size]
        if wrong:
            raise InputError(f"the prompt has token {wrong[0]}, which the model does not have")
        return prompt


def new_seed() -> int:
    """The seed of a request that brings none."""
    return secrets.randbelow(SEEDS)
