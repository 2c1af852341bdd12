"""Small models for the tests: configurations, random parameters, compiled forward passes, and
settings for the reference."""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from plt_jax import ModelConfig, Transformer
from plt_jax.config import SCHEMES, LoopConfig
from plt_jax.model.looping import LoopStates
from plt_jax.model.transformer import abstract_params

LOOPED = [(scheme, count) for scheme in SCHEMES for count in (1, 2, 3, 4) if scheme != "no_loop"]
ALL = [("no_loop", 1), *LOOPED]
"""Every scheme with every number of loops that it allows, up to 4."""

THREE_LOOPS = [("no_loop", 1), *(case for case in LOOPED if case[1] == 3)]
"""Every scheme once, with three loops if it loops."""


def small_config(scheme: str = "plt", count: int = 2, window: int = 5, **settings) -> ModelConfig:
    """A configuration with two layers of width 16, four heads, two key/value heads and 31 tokens.

    Settings with the names of LoopConfig's fields belong to the loop, and all others to the model.
    """
    loop = {"scheme": scheme, "count": count, "window": window, "hidden_scale": 0.7}
    for name in LoopConfig.model_fields.keys() & settings.keys():
        loop[name] = settings.pop(name)
    shape = {
        "vocab_size": 31,
        "max_length": 64,
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "ffn_width": 24,
    }
    return ModelConfig(**{**shape, **settings, "loop": loop})


@functools.cache
def random_params(config: ModelConfig, seed: int = 0):
    """Unboxed parameters, all of them random, so that norms and gates matter.

    A parameter's values depend only on its name, its shape and the seed, so schemes share them; but
    layers that do not loop have others than those that do.
    """
    shapes = nn.unbox(abstract_params(config))

    def draw(path, leaf):
        name = path[-1].key
        part = next((part for part in ("prelude", "coda") if path[0].key.endswith(part)), "")
        rng = np.random.default_rng([seed, *part.encode(), *name.encode()])
        return jnp.asarray(name.endswith("norm") + 0.2 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> jax.Array:
    """Random tokens, int32 [batch, length]."""
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, config.vocab_size)


@functools.cache
def forward(config: ModelConfig) -> Callable[..., jax.Array]:
    """The compiled `(params, tokens, segment_ids=None, positions=None) -> logits [B, T, V]`."""
    model = Transformer(config)
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


@functools.cache
def forward_with_states(config: ModelConfig) -> Callable[..., tuple[jax.Array, LoopStates]]:
    """Like `forward`, but the compiled function returns the logits and all loops' states."""

    def logits_and_states(model, *inputs):
        states = model.loop_states(*inputs)
        return model.logits(states.output_LBTD[-1]), states

    model = Transformer(config)
    return jax.jit(
        lambda params, *inputs: model.apply({"params": params}, *inputs, method=logits_and_states)
    )


def reference_settings(config: ModelConfig) -> SimpleNamespace:
    """A configuration as tests/reference.py reads it."""
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    return SimpleNamespace(**{"moe": SimpleNamespace(experts=0), **fields})
