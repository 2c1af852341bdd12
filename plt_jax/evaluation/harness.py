"""Models of this package for EleutherAI's lm-evaluation-harness (lm_eval, the extra `lm_eval`).

`eval.py RUN --tasks ...` uses it, and so does the harness's own command
`python -m plt_jax.lm_eval`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from rich.progress import Progress

from plt_jax.config import MeshConfig
from plt_jax.data.tokenizer import HUGGINGFACE
from plt_jax.decoding.chat import ChatTemplate, Message, load_chat_template
from plt_jax.decoding.generation import GenerationRequest, TokenStream
from plt_jax.decoding.template_process import ChatRefusedError
from plt_jax.decoding.weights import DecodeWeights, prepare_for_decode
from plt_jax.distributed.mesh import make_mesh, use_mesh, whole_batch
from plt_jax.errors import InputError
from plt_jax.evaluation.answers import Answer, read_settings
from plt_jax.evaluation.likelihood import Scored, likelihoods
from plt_jax.interop.options import DTYPES
from plt_jax.runs.directory import open_trained

CHECK_EVERY = 8
"""The number of steps between two checks whether all texts have ended."""


class HarnessModel(LM):
    """A run or checkpoint on all devices; each device takes its rows of a batch.

    Every text is the beginning of a document, with the begin token before it, as in training.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str | None = None,
        loops: int | str | None = None,
        seed: int | str = 0,
        mesh: Mesh | None = None,
        dtype: str | None = None,
        max_batch_size: None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        """
        Args:
          path: a run directory, or one of its checkpoints.
          batch_size: sequences per batch on all devices together, rounded up to divide over them;
            default the run's evaluation.batch_size.
          loops: the number of loops; default the number that it was trained with.
          seed: seed of the sampling, for tasks that sample.
          mesh: the devices, which share batches and parameters; default all of them, along the data
            axis. With several processes all must make the same requests.
          dtype: dtype of the parameters, "float32" or "bfloat16"; default: as they are stored.
          max_batch_size, device: arguments of the harness for other models; they are ignored.

        Raises:
          InputError: no such checkpoint, an invalid batch size or number of loops, or an unknown
            argument.
        """
        super().__init__()
        if unknown:
            raise InputError(
                f"plt_jax has no model argument {next(iter(unknown))}; it has path, batch_size, "
                "loops, seed and dtype"
            )
        size = None if batch_size is None else _number("batch_size", batch_size, least=1)
        if dtype not in (None, *DTYPES):
            raise InputError(f"dtype is {dtype}; it must be one of {', '.join(DTYPES)}")
        self._seed = _number("seed", seed, least=0)
        self._mesh = mesh or make_mesh(MeshConfig())
        count = None if loops is None else _number("loops", loops, least=1)
        self._trained = open_trained(path, self._mesh, count, dtype=dtype)
        self._config = self._trained.config.model
        # As with transformers, names of special tokens in a task's texts are these tokens.
        self.tokenizer = self._trained.tokenizer.reading_special
        self._template: ChatTemplate | None = None
        """What makes contexts of conversations; None where they are plain texts."""
        own = self._trained.config.evaluation.batch_size
        self.batch_size = whole_batch(own if size is None else size, self._mesh)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """Makes a model from the harness's --model_args, such as `path=RUN,loops=3`."""
        return cls.create_from_arg_obj(
            utils.simple_parse_args_string(arg_string), additional_config
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """Makes a model from its arguments.

        They take precedence over the harness's own arguments, which contain a default batch size
        of 1.
        """
        given = {name: one for name, one in (additional_config or {}).items() if one is not None}
        return cls(**(given | arg_dict))

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self._trained.step

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self._trained.directory

    @property
    def max_length(self) -> int:
        """The length of the context, in tokens."""
        return self._config.max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos

    @property
    def tokenizer_name(self) -> str:
        return str(self.directory)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the model's chat template, which `apply_chat_template` then uses.

        Args:
          chat_template: the name of one of several templates, or True.

        Raises:
          InputError: the model has none, or none of that name.
        """
        if not chat_template:
            return ""
        name = chat_template if isinstance(chat_template, str) else None
        self._template = load_chat_template(self.directory / HUGGINGFACE, self.tokenizer, name)
        return self._template.source

    def apply_chat_template(
        self, chat_history: Sequence[Message], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; see `ChatTemplate.render`.

        As the harness does with models of transformers, a template that refuses a system message
        gets the others alone.
        """
        if self._template is None:
            self.chat_template(True)
        template = cast("ChatTemplate", self._template)
        try:
            return template.render(chat_history, add_generation_prompt=add_generation_prompt)
        except ChatRefusedError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            warnings.warn(f"{error}; it gets them without the system's", stacklevel=2)
            return template.render(others, add_generation_prompt=add_generation_prompt)

    def _encode_context(self, text: str) -> list[int]:
        """The tokens of a context; a rendered chat has its begin token, if any, in the text."""
        tokens = self.tokenizer.encode(text) if self._template is not None else []
        return tokens or self.tokenizer.encode_prompt(text)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context and of its continuation, as parts of the whole text's tokens.

        If the tokenizer would join the end of the context with the beginning of the continuation,
        as in "union" and "s", the continuation is tokenized separately: otherwise there might be no
        token left to score after the joined one.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        tokens, whole = (self._encode_context(text) for text in (kept, kept + continuation))
        if whole[: len(tokens)] == tokens:
            return tokens, whole[len(tokens) :]
        return tokens, self.tokenizer.encode_continuation(continuation)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Summed log-likelihoods of continuations in nats, and whether they are what greedy
        decoding gives.

        If the text is too long for the context, its beginning is cut off. A continuation that is
        itself longer is scored in windows.

        Raises:
          InputError: a continuation has no tokens, so that its likelihood would exceed any other.
        """
        pairs = [_arguments(request) for request in requests]
        encoded = [self._split(*pair) for pair in pairs]
        for (context, _), (_, continuation) in zip(pairs, encoded, strict=True):
            if not continuation:
                raise InputError(
                    f"a task has an empty continuation after the context {context[-40:]!r}"
                )
        answers = self._likelihoods("log-likelihoods", encoded, disable_tqdm)
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts in nats, each token scored once, in windows as long as the
        context."""
        texts = [_arguments(request)[0] for request in requests]
        begin = self.tokenizer.encode_prompt("")
        encoded = [(begin, self.tokenizer.encode(text)) for text in texts]
        found = self._likelihoods("log-likelihoods of texts", encoded, disable_tqdm)
        totals = [total for total, _ in found]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _likelihoods(
        self, title: str, pairs: Sequence[tuple[list[int], list[int]]], silent: bool
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether it is greedy."""
        windows = [self._windows(*pair) for pair in pairs]
        sequences = [window for of_one in windows for window in of_one]
        with Progress(disable=silent) as progress:
            task = progress.add_task(title, total=len(sequences))
            found = likelihoods(
                *(self._config, self._trained.params, self._mesh, sequences, self.batch_size),
                done=lambda count: progress.advance(task, count),
            )
        left = iter(found)
        answers = []
        for of_one in windows:
            own = [next(left) for _ in of_one]
            total = sum(one.log_probability for one in own)
            answers.append((total, all(one.greedy for one in own)))
        return answers

    def _windows(self, context: list[int], continuation: list[int]) -> list[Scored]:
        """Windows that score every token of a continuation once."""
        if len(continuation) <= self.max_length:
            tokens = [*context, *continuation][-self.max_length - 1 :]
            return [Scored(tokens, len(tokens) - len(continuation))]
        pairs = utils.get_rolling_token_windows(
            continuation, context[-1], self.max_length, context_len=1
        )
        return [Scored([*c, *new], len(c)) for c, new in map(utils.make_disjoint_window, pairs)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, which end before the first of their request's `until` texts.

        Decoding is greedy unless the request sets `do_sample` or a `temperature`. At most half the
        context is generated, even if a request sets more, and the beginning of a prompt that does
        not fit beside it is cut off. Samples depend on the seed and on the request's position among
        the requests, not on batches.

        Raises:
          InputError: a request has an unknown setting.
        """
        for request in requests:
            # Refuses before any computation.
            read_settings(_arguments(request)[1], self.tokenizer.special.eos)
        answers: dict[int, str] = {}
        with Progress(disable=disable_tqdm) as progress:
            task = progress.add_task("generating", total=len(requests))
            for indices, settings in self._alike(requests):
                contexts = [_arguments(requests[index])[0] for index in indices]
                for index, text in zip(
                    indices, self._generate(contexts, indices, settings), strict=True
                ):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                progress.advance(task, len(indices))
        return [answers[index] for index in range(len(requests))]

    @functools.cached_property
    def _weights(self) -> DecodeWeights:
        """The parameters as decoding uses them."""
        with use_mesh(self._mesh):
            return prepare_for_decode(self._config, self._trained.params)

    def _alike(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Batches of requests with equal settings, the longest contexts first."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(_arguments(request)[1].items())), []).append(index)
        for group in groups.values():
            group.sort(key=lambda index: -len(_arguments(requests[index])[0]))
            for start in range(0, len(group), self.batch_size):
                indices = group[start : start + self.batch_size]
                yield indices, _arguments(requests[indices[0]])[1]

    def _generate(
        self, contexts: Sequence[str], indices: Sequence[int], settings: dict[str, Any]
    ) -> list[str]:
        until, sampling, most = read_settings(settings, self.tokenizer.special.eos)
        # A stop that is one special token ends a row on the device, too.
        ids = (self.tokenizer.library.token_to_id(stop) for stop in until)
        ends = [token for token in ids if token in self.tokenizer.special_ids]
        sampling = sampling._replace(stop_tokens=(*sampling.stop_tokens, *ends))
        most = min(most, self.max_length // 2)
        room = self.max_length - most
        prompts = [self._encode_context(context)[-room:] for context in contexts]
        answers = [Answer(self.tokenizer, prompt, until) for prompt in prompts]
        # All batches have the same number of rows, so that one program is compiled.
        missing = self.batch_size - len(prompts)
        prompts += [prompts[-1]] * missing
        numbers = jnp.array([*indices, *[indices[-1]] * missing])
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(self._seed), number))
        with use_mesh(self._mesh):
            request = GenerationRequest(prompts, most, sampling, keys(numbers))
            steps = TokenStream(self._config, self._weights, request)
            for count, column in enumerate(steps, start=1):
                for answer, token in zip(answers, column.tolist(), strict=False):
                    answer.push(token)
                if count % CHECK_EVERY == 0 and all(answer.has_ended for answer in answers):
                    break
        return [answer.close() for answer in answers]


def _arguments(request: Instance) -> tuple[Any, ...]:
    """The arguments of a request, such as a context and a continuation."""
    return cast("tuple[Any, ...]", request.args)


def _number(name: str, value: Any, least: int) -> int:
    """A whole number from a model argument, which the harness may give as text."""
    text = str(value)
    number = int(text) if text.isdecimal() else least - 1
    if number < least:
        raise InputError(f"{name} is {value}; it must be a whole number of at least {least}")
    return number


register_model("plt_jax")(HarnessModel)
