"""A model without loops as the starting point of a looped one, for continued training.

All layers may loop, or some in the middle. In a shifted scheme with hidden_scale 0 and
embedding_scale 1, later loops read the same states as loop 1, so their own keys and values are
loop 1's. They repeat loop 1 exactly if they attend to all of these keys: `clp` and `clp_kv_share`
do, and so does `plt` if its gates are closed to the window. The logits are then the source's for
any number of loops. With any other choice they differ from the source's, and `compare_models`
measures how far.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pydantic
from jax.sharding import Mesh

from plt_jax.config import LoopConfig, ModelConfig
from plt_jax.config.yaml_file import describe_errors
from plt_jax.distributed.mesh import shardings_of, use_mesh
from plt_jax.errors import InputError
from plt_jax.interop.options import CLOSED_GATE_BIAS
from plt_jax.interop.tensors import Params, leaves_by_path
from plt_jax.model.block import block_parameters, stacks_of
from plt_jax.model.layers import Parameter
from plt_jax.model.transformer import Transformer, abstract_params, top_parameters


def retrofit(
    config: ModelConfig,
    params: Params,
    loop: LoopConfig,
    gate_bias: float | None = None,
    mesh: Mesh | None = None,
) -> tuple[ModelConfig, Params]:
    """The same weights in a looped model. New are only gates, a learned hidden_scale, and the norm
    between loops that layers follow.

    Args:
      config: the configuration of a model of scheme no_loop.
      params: its parameters as `Transformer.init` gives them.
      loop: the new model's looping.
      gate_bias: the gates' bias at the start, instead of the loop's. 0 blends loop 1's attention
        and the window's evenly, as in a new PLT. 4 gives the window a weight of 2 %, which training
        can still change. CLOSED_GATE_BIAS gives it none.
      mesh: the devices that hold the parameters; default one device.

    Returns:
      The looped model's configuration and parameters. Stacks of layers that are not cut are the
      source's own arrays.

    Raises:
      InputError: the model loops already, `loop` has no loops, or `gate_bias` is not finite.
    """
    if config.loop.scheme != "no_loop":
        raise InputError(
            f"the model already loops ({config.loop.scheme}, {config.loop.count} loops); only a "
            "model of scheme no_loop can be retrofitted"
        )
    if gate_bias is None:
        gate_bias = loop.gate_bias
    if not math.isfinite(gate_bias):
        raise InputError(
            f"gate_bias is {gate_bias}; it must be finite; {CLOSED_GATE_BIAS} closes the gates"
        )
    if loop.scheme == "no_loop":
        raise InputError("the scheme no_loop does not loop; choose a looped scheme")
    looped = _looped(config, loop.model_copy(update={"gate_bias": gate_bias}))
    dtype = params["final_norm"].dtype
    shardings = {} if mesh is None else shardings_of(abstract_params(looped), mesh)
    by_path = leaves_by_path(shardings)

    def make(parameter: Parameter, shape: tuple[int, ...], *path: str) -> jax.Array:
        init = partial(parameter.initializer, shape=shape, dtype=dtype)
        return jax.jit(init, out_shardings=by_path.get(path))(jax.random.key(0))

    sources = stacks_of(config)
    new = {name: params[name] for name in params if name not in sources}
    for name, parameter in top_parameters(looped).items():
        if name not in new:
            new[name] = make(parameter, parameter.shape, name)
    # The source's stacks, dense and with experts, are cut where the loops begin and end.
    cut = dict.fromkeys(sources, 0)
    for name, stack in stacks_of(looped).items():
        source = next(key for key, one in sources.items() if one.mixture == stack.mixture)
        start, stop = cut[source], cut[source] + stack.layers
        cut[source] = stop
        layers = dict(params[source])
        if stack.layers < sources[source].layers:
            layers = {key: values[start:stop] for key, values in layers.items()}
        for key, parameter in block_parameters(looped, stack).items():
            if key not in layers:
                layers[key] = make(parameter, (stack.layers, *parameter.shape), name, key)
        if "router_bias" in layers and stack.part == "core":
            # Every loop starts with the source's biases.
            layers["router_bias"] = jnp.repeat(layers["router_bias"], loop.count, axis=1)
        new[name] = layers
    return looped, new


def _looped(config: ModelConfig, loop: LoopConfig) -> ModelConfig:
    """The configuration with another looping.

    Raises:
      InputError: the model cannot have it, such as layers that it does not have.
    """
    try:
        return ModelConfig.model_validate(config.model_dump() | {"loop": loop.model_dump()})
    except pydantic.ValidationError as error:
        raise InputError(describe_errors(error)) from error


class ModelDifference(NamedTuple):
    """How far a retrofitted model's predictions are from its source's."""

    largest_logit: float
    """The largest absolute difference of two logits."""
    kl_divergence: float
    """The mean KL divergence of the next token's distribution, in nats."""


def compare_models(
    config: ModelConfig,
    params: Params,
    looped: ModelConfig,
    looped_params: Params,
    tokens_BT: jax.Array,
    mesh: Mesh | None = None,
) -> ModelDifference:
    """Compares a model and the looped model that was made from it, on tokens int32 [B, T].

    Args:
      mesh: the devices that hold the parameters; B and T must divide over it.
    """
    with use_mesh(mesh):
        return _compare(config, params, looped, looped_params, tokens_BT)


def _compare(
    config: ModelConfig,
    params: Params,
    looped: ModelConfig,
    looped_params: Params,
    tokens_BT: jax.Array,
) -> ModelDifference:
    def logits(config: ModelConfig, params: Params) -> jax.Array:
        model = Transformer(config)
        return jax.jit(lambda params: model.apply({"params": params}, tokens_BT))(params)

    # Two programs, because each holds converted copies of its weights while it runs.
    source_BTV, looped_BTV = logits(config, params), logits(looped, looped_params)
    largest = jnp.max(jnp.abs(source_BTV - looped_BTV))
    log_p_BTV, log_q_BTV = jax.nn.log_softmax(source_BTV), jax.nn.log_softmax(looped_BTV)
    divergence_BT = jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
    return ModelDifference(float(largest), float(jnp.mean(divergence_BT)))
