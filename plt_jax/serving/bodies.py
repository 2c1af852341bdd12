"""What clients send: OpenAI's parameters of completions and chats, and a few of our own.

Parameters that are known and not supported are refused if they ask for something; unknown ones are
ignored, as OpenAI's clients send more of them every year.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from plt_jax.serving.request import SlotSampling
from plt_jax.serving.slot_programs import ALTERNATIVES
from plt_jax.serving.slots import MOST_BIASES

MOST_STOPS = 16
"""Strings that may end a text."""
MOST_PROMPTS = 1024
MOST_CHOICES = 128
"""Answers that one request may ask for."""
MOST_LOOPS = 64
LEAST = 1e-5
"""The least temperature that draws, and the least top_p."""
SEEDS = 2**32

Token = Annotated[int, Field(ge=0, lt=2**31)]
# One wrong element ends the check: a list of millions would make as many errors.
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


def _kind_of_prompt(value: Any) -> str:
    """Which of its forms a prompt has, as its first element says."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else 0
    if isinstance(first, str):
        return "texts"
    return "lists" if isinstance(first, list) else "tokens"


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class _Body(BaseModel):
    """The parameters that completions and chats share."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None

    # Ours, by the names that other open servers have.
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    ignore_eos: bool = False
    loops: int | None = Field(None, ge=1, le=MOST_LOOPS)

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: Any) -> Any:
        """Leaves out nulls, which mean the default, and refuses what is not supported."""
        if not isinstance(values, Mapping):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        biases = given.get("logit_bias")
        if isinstance(biases, Mapping) and len(biases) > MOST_BIASES:
            raise ValueError(f"logit_bias has {len(biases)} tokens; it may have {MOST_BIASES}")
        for name, nothing in cls.unsupported(given).items():
            if name in given and given[name] not in nothing:
                raise ValueError(f"{name} is not supported by this server")
        return given

    @classmethod
    def unsupported(cls, given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Parameters that are known and not supported, with the values that ask for nothing."""
        return {}

    @property
    def stops(self) -> list[str]:
        """The strings that end the text."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, seed: int, choice: int) -> SlotSampling:
        """How the tokens of one of the answers are drawn.

        Args:
          seed: the seed that is used if the client gives none.
        """
        given = self.seed if self.seed is not None else seed
        temperature = _or(self.temperature, 1.0)
        return SlotSampling(
            # Numbers so small that float32 cannot divide by them ask for the most likely token.
            temperature=temperature if temperature > LEAST else 0.0,
            top_k=max(_or(self.top_k, 0), 0),
            top_p=max(_or(self.top_p, 1.0), LEAST),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias or {},
            seed=given % SEEDS,
            choice=choice,
            loops=self.loops,
        )


class CompletionBody(_Body):
    """The body of /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[list[str], Field(max_length=MOST_PROMPTS, fail_fast=True), Tag("texts")]
        | Annotated[list[Tokens], Field(max_length=MOST_PROMPTS, fail_fast=True), Tag("lists")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=ALTERNATIVES)
    echo: bool = False
    special_tokens: bool = True
    """Whether names of special tokens in a prompt are these tokens, as clients expect that render
    chats themselves."""

    @classmethod
    def unsupported(cls, given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        return {"suffix": ("",), "best_of": (1, given.get("n"))}

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """All prompts, as texts or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class MessageBody(BaseModel):
    """A message of a chat; further fields reach the template."""

    model_config = ConfigDict(extra="allow")

    # A template may put a role beside other characters, so it must not complete a token's name.
    role: str = Field(max_length=64, pattern="^[A-Za-z0-9_-]+$")
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None

    def to_message(self) -> dict[str, Any]:
        """The message as templates expect it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatBody(_Body):
    """The body of /v1/chat/completions."""

    messages: list[MessageBody] = Field(min_length=1, max_length=4096, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=ALTERNATIVES)

    @classmethod
    def unsupported(cls, given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        return {
            "tools": ([],),
            "functions": ([],),
            "tool_choice": ("none", "auto"),
            "function_call": ("none", "auto"),
            "response_format": ({"type": "text"},),
            "modalities": (["text"],),
            "audio": (),
        }


class TokenizeBody(BaseModel):
    """The body of /tokenize."""

    # A tokenizer holds Python's lock, so a longer text would keep all clients waiting.
    prompt: str = Field(max_length=2**20)
    add_special_tokens: bool = True
    """Whether the begin token is among the tokens."""
    special_tokens: bool = True
    """See CompletionBody."""


class DetokenizeBody(BaseModel):
    """The body of /detokenize."""

    tokens: list[Token] = Field(max_length=2**20, fail_fast=True)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
