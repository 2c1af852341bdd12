"""What benchmarks compare: one model with another looping scheme, number of loops or depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pydantic

from plt_jax.config import SCHEMES, ModelConfig, RunConfig
from plt_jax.config.yaml_file import describe_errors
from plt_jax.errors import InputError


class Variant(NamedTuple):
    """A looping scheme with its number of loops, and a depth."""

    scheme: str
    loops: int
    depth: int = 1
    """The number of layers, as a multiple of the configuration's."""
    looped: tuple[int, int] | None = None
    """The first and the last layer that loop, counted from 0; None for the configuration's."""

    @property
    def label(self) -> str:
        """Its name in tables and reports, such as `no_loop` or `plt-2`."""
        name = self.scheme if self.scheme == "no_loop" else f"{self.scheme}-{self.loops}"
        if self.looped is not None:
            name += "-layers_{}_to_{}".format(*self.looped)
        return name if self.depth == 1 else f"{name}-{self.depth}x_layers"

    def apply(self, config: ModelConfig) -> ModelConfig:
        """The model with this scheme, number of loops and depth; all else stays.

        Raises:
          InputError: the model cannot have them.
        """
        loop = config.loop.model_dump() | {"scheme": self.scheme, "count": self.loops}
        if self.looped is not None:
            loop |= dict(zip(("first_layer", "last_layer"), self.looped, strict=True))
        if not SCHEMES[self.scheme].shifted:
            del loop["learned_hidden_scale"]
        if self.scheme == "no_loop":
            for name in ("first_layer", "last_layer", "exit_gate"):
                del loop[name]
        changed = {"loop": loop, "layers": self.depth * config.layers}
        try:
            return ModelConfig(**config.model_dump() | changed)
        except pydantic.ValidationError as error:
            raise InputError(f"{self.label}: {describe_errors(error)}") from error

    def apply_to_run(self, config: RunConfig) -> RunConfig:
        """The run with the model of `apply`. Fields of training that its loops cannot have are left
        out: weights of several loops' losses where it has one loop, and a warmup of hidden_scale
        where it has none.

        Raises:
          InputError: the model or the training cannot have them.
        """
        model, training = self.apply(config.model), config.training.model_dump()
        if model.loop.count == 1:
            training |= {"loop_losses": (), "loop_counts": (), "exit_entropy": None}
        if not model.loop.shifted:
            training["hidden_scale_warmup"] = 0.0
        values = config.model_dump() | {"model": model.model_dump(), "training": training}
        try:
            return RunConfig.model_validate(values)
        except pydantic.ValidationError as error:
            raise InputError(f"{self.label}: {describe_errors(error)}") from error


NO_LOOP = Variant("no_loop", 1)
"""The plain transformer, to which others are compared."""


def variants_of(
    schemes: Sequence[str], loops: Sequence[int], looped: tuple[int, int] | None = None
) -> list[Variant]:
    """Every scheme with every number of loops; no_loop has one loop only.

    Args:
      looped: the first and the last of the layers that loop in a further variant of each scheme.

    Raises:
      InputError: a scheme is unknown.
    """
    if unknown := [name for name in schemes if name not in SCHEMES]:
        raise InputError(f"no scheme {unknown[0]}; known are {', '.join(SCHEMES)}")
    return [
        Variant(scheme, count, looped=layers)
        for scheme in schemes
        for count in ([1] if scheme == "no_loop" else loops)
        for layers in ([None] if scheme == "no_loop" or looped is None else [None, looped])
    ]
