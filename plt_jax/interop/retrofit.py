"""A model without loops as the starting point of a looped one, for continued training.

With hidden_scale 0 and embedding_scale 1 a shifted scheme's later loops read what loop 1 reads, so
their own keys and values are loop 1's. They repeat loop 1 exactly where they attend to all of them:
`clp` and `clp_kv_share` do, and `plt` does with its gates closed to the window. The logits are then
the source's, whatever the number of loops. Every other choice starts at some distance from it,
which `distance` measures.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plt_jax.config import LoopConfig, ModelConfig
from plt_jax.errors import InputError
from plt_jax.model.block import block_parameters, stacks_of
from plt_jax.model.transformer import Transformer

Params = dict[str, Any]

CLOSED = 20.0
"""Gate bias that shuts out the window for good: sigmoid(20) is 1 in float32, so the window gets a
weight of exactly 0, and the gate no gradient."""


def retrofit(
    config: ModelConfig,
    params: Params,
    loop: LoopConfig,
    gate_bias: float = 0.0,
) -> tuple[ModelConfig, Params]:
    """The same weights in a looped model; new parameters, if any, are the G-SWA gates.

    Args:
      config, params: of scheme no_loop.
      loop: the looping wanted.
      gate_bias: where the gates start. 0 blends loop 1's attention and the window's evenly, as a
        fresh PLT does; 4 gives the window 2 %, and training can still move it; CLOSED nothing.

    Raises:
      InputError: the model is looped already, or the looping wanted is none.
    """
    if config.loop.scheme != "no_loop":
        raise InputError(
            f"the model already loops ({config.loop.scheme}, {config.loop.count} loops); only a "
            "model of scheme no_loop can be retrofitted"
        )
    if not math.isfinite(gate_bias):
        raise InputError(f"gate_bias is {gate_bias}; it must be finite, and {CLOSED} closes")
    if loop.scheme == "no_loop":
        raise InputError("the scheme no_loop does not loop; choose a looped scheme")
    looped = config.model_copy(update={"loop": loop})
    stacks = {}
    for part, stack in stacks_of(looped).items():
        layers = stacks[part] = dict(params[part])
        like = layers["attention_norm"]
        for name, parameter in block_parameters(looped, stack.mixture).items():
            if name not in layers:
                shape = (stack.layers, *parameter.shape)
                layers[name] = parameter.initializer(jax.random.key(0), shape, like.dtype)
        if "gate_bias" in layers:
            layers["gate_bias"] = jnp.full_like(layers["gate_bias"], gate_bias)
        if "router_bias" in layers:  # every loop starts with the biases of the only one
            layers["router_bias"] = jnp.repeat(layers["router_bias"], loop.count, axis=1)
    return looped, params | stacks


class Distance(NamedTuple):
    """How far a retrofitted model's predictions are from those of the model it was made of."""

    largest: float
    """Largest absolute difference of two logits."""
    divergence: float
    """Mean KL divergence of the next token's distribution, in nats."""


def distance(
    config: ModelConfig,
    params: Params,
    looped: ModelConfig,
    looped_params: Params,
    tokens_BT: jax.Array,
) -> Distance:
    """Compares the two on some tokens."""

    def logits(config: ModelConfig, params: Params) -> jax.Array:
        model = Transformer(config)
        return jax.jit(lambda params: model.apply({"params": params}, tokens_BT))(params)

    # One after the other: a program holds what it converts of the weights.
    source_BTV, looped_BTV = logits(config, params), logits(looped, looped_params)
    largest = jnp.max(jnp.abs(source_BTV - looped_BTV))
    log_p_BTV, log_q_BTV = jax.nn.log_softmax(source_BTV), jax.nn.log_softmax(looped_BTV)
    divergence_BT = jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
    return Distance(float(largest), float(jnp.mean(divergence_BT)))
