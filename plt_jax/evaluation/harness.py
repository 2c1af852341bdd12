"""Models of this package in EleutherAI's lm-evaluation-harness (lm_eval, the extra `lm_eval`).

`eval.py RUN --tasks ...` runs it, or its own command, `python -m plt_jax.lm_eval`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from rich.progress import Progress

from plt_jax.config import MeshConfig
from plt_jax.data.tokenizer import bos_id, eos_id
from plt_jax.decoding.generation import stream
from plt_jax.decoding.layout import prepare_for_decode
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.text import begin
from plt_jax.errors import InputError
from plt_jax.evaluation.likelihood import Scored, likelihoods, whole_batch
from plt_jax.run import open_trained
from plt_jax.sharding import make_mesh, use_mesh

MAX_NEW_TOKENS = 256  # the harness's own default
LOOK_EVERY = 8  # steps between two looks for texts that end a generation


@register_model("plt_jax")
class HarnessModel(TemplateLM):
    """A run or checkpoint, on all devices, of which each takes its rows of a batch.

    Every text begins a document, with the begin token before it, as in training.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str | None = None,
        seed: int | str = 0,
        max_batch_size: None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        """
        Args:
          path: a run directory, or one of its checkpoints.
          batch_size: sequences per batch, on all devices; default the run's evaluation.batch_size,
            raised to divide over the devices.
          seed: of the draws, where a task samples.
          max_batch_size, device: of the harness, for other models; not read.

        Raises:
          InputError: no such checkpoint, a batch size that does not divide over the devices, or
            an argument that is not known.
        """
        super().__init__()
        if unknown:
            raise InputError(
                f"plt_jax has no model argument {next(iter(unknown))}; it has path, batch_size and "
                "seed"
            )
        self._mesh = make_mesh(MeshConfig())
        self._trained = open_trained(path, self._mesh)
        self._config = self._trained.config.model
        self._seed = int(seed)
        self.tokenizer = self._trained.tokenizer
        self._weights = None
        if batch_size is None:
            own = self._trained.config.evaluation.batch_size
            batch_size = whole_batch(own, self._mesh)
        try:
            self.batch_size = int(batch_size)
        except ValueError as error:
            raise InputError(f"batch_size is {batch_size}; it must be a number") from error
        if self.batch_size < 1 or self.batch_size % self._mesh.size:
            raise InputError(
                f"batch_size is {self.batch_size}; it must be a positive multiple of the "
                f"{self._mesh.size} devices"
            )

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return self._trained.step

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self._trained.directory

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self._config.max_length

    @property
    def eot_token_id(self) -> int:
        return eos_id(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        return bos_id(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self.directory)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text that begins a document; of the text alone on request."""
        if add_special_tokens is False:
            return self.tokenizer.encode(string, add_special_tokens=False).ids
        return begin(self.tokenizer, string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Summed log-likelihoods of continuations, and whether they are what greedy decoding gives.

        Of what is too long for the context the beginning is cut off.
        """
        sequences = [self._scored(context, continuation) for _, context, continuation in requests]
        answers = self._likelihoods("log-likelihoods", sequences, disable_tqdm)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _scored(self, context: list[int], continuation: list[int]) -> Scored:
        tokens = [*context, *continuation][-self.max_length - 1 :]
        return Scored(tokens, max(len(tokens) - len(continuation), 1))

    def _likelihoods(
        self, title: str, sequences: Sequence[Scored], silent: bool
    ) -> list[tuple[float, bool]]:
        with Progress(disable=silent) as progress:
            task = progress.add_task(title, total=len(sequences))
            found = likelihoods(
                *(self._config, self._trained.params, self._mesh, sequences, self.batch_size),
                done=lambda count: progress.advance(task, count),
            )
        return [tuple(one) for one in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts in nats, each token scored once, in windows as long as the
        context."""
        windows: list[Scored] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append(Scored([*context, *continuation], len(context)))
                owners.append(index)
        totals = np.zeros(len(requests))
        found = self._likelihoods("log-likelihoods of texts", windows, disable_tqdm)
        np.add.at(totals, owners, [log_probability for log_probability, _ in found])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of each request's `until` texts, left out; greedy unless it
        asks for `do_sample` or a `temperature`.

        What a request draws depends on the seed and its place among the requests, not on batches.
        """
        if self._weights is None:
            with use_mesh(self._mesh):
                self._weights = prepare_for_decode(self._config, self._trained.params)
        answers: list[str | None] = [None] * len(requests)
        with Progress(disable=disable_tqdm) as progress:
            task = progress.add_task("generating", total=len(requests))
            for indices, settings in self._alike(requests):
                contexts = [requests[index].args[0] for index in indices]
                for index, text in zip(
                    indices, self._generate(contexts, indices, settings), strict=True
                ):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                progress.advance(task, len(indices))
        return answers

    def _alike(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Batches of requests of the same settings, the longest contexts first."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for group in groups.values():
            group.sort(key=lambda index: -len(requests[index].args[0]))
            for start in range(0, len(group), self.batch_size):
                indices = group[start : start + self.batch_size]
                yield indices, requests[indices[0]].args[1]

    def _generate(
        self, contexts: Sequence[str], indices: Sequence[int], settings: dict[str, Any]
    ) -> list[str]:
        until, sampling, most = read_settings(settings, self.eot_token_id)
        most = min(most, self.max_length - 1)
        prompts = [self.tok_encode(context)[-(self.max_length - most) :] for context in contexts]
        # All batches have as many rows, for which one program is compiled.
        missing = self.batch_size - len(prompts)
        prompts += [prompts[-1]] * missing
        numbers = jnp.array([*indices, *[indices[-1]] * missing])
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(self._seed), number))
        made: list[list[int]] = [[] for _ in contexts]
        with use_mesh(self._mesh):
            steps = stream(self._config, self._weights, prompts, most, sampling, key=keys(numbers))
            for count, column in enumerate(steps, start=1):
                for tokens, token in zip(made, column.tolist(), strict=False):
                    tokens.append(token)
                texts = self._texts(made, until) if count % LOOK_EVERY == 0 else []
                if texts and all(ended for _, ended in texts):
                    break
        return [text for text, _ in self._texts(made, until)]

    def _texts(self, made: Iterable[list[int]], until: Sequence[str]) -> list[tuple[str, bool]]:
        """The texts of tokens, cut where they end, and whether they do."""
        texts = []
        for tokens in made:
            end = self.eot_token_id
            ended = end in tokens
            text = self.tokenizer.decode(tokens[: tokens.index(end)] if ended else tokens)
            cuts = [at for stop in until if (at := text.find(stop)) >= 0]
            texts.append((text[: min(cuts)] if cuts else text, ended or bool(cuts)))
        return texts


def read_settings(settings: dict[str, Any], end: int) -> tuple[list[str], Sampling, int]:
    """Texts that end a generation, how tokens are drawn, and how many at most.

    Raises:
      InputError: a setting that is not known here.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    most = int(left.pop("max_gen_toks", left.pop("max_new_tokens", MAX_NEW_TOKENS)))
    temperature = float(left.pop("temperature", 0.0) or 0.0)
    if not left.pop("do_sample", temperature > 0):
        temperature = 0.0
    top_k, top_p = int(left.pop("top_k", 0) or 0), float(left.pop("top_p", 1.0) or 1.0)
    if left:
        raise InputError(f"the generation setting {next(iter(left))} is not known here")
    sampling = Sampling(temperature, top_k, top_p, stop_tokens=(end,))
    sampling.check()
    return until, sampling, most
