"""Experts spread over the devices of a mesh axis.

Tokens travel to the devices of the experts they chose and back, by two all-to-alls. Shapes are
static, loads are not: what does not fit a device's buffer goes in another round, so nothing is
dropped, and a balanced model pays for one round. P is the number of pairs of a token and an expert
that a device starts with, S and E number the devices of the axis as sources and as destinations, X
is the number of experts (of one device, where a device works on its own).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plt_jax.config import MoEConfig
from plt_jax.distributed.axes import current_axes, devices_along, dividing_axes, mesh_is_active
from plt_jax.errors import InputError
from plt_jax.model.grouped import grouped_product
from plt_jax.model.kernels import traced_platform
from plt_jax.model.moe import (
    EXPERTS,
    RouterStatistics,
    Weights,
    count_experts,
    expert_swiglu,
    inverse,
    local_experts,
    pair_rows,
    permute,
    route,
    run_groups,
    statistics_of,
    weighted_sum,
)

HEADROOM = 1.5
"""How much more than an even share of all pairs a buffer holds."""
MIN_ROOM = 8

ROUTER = ("router", "router_bias")

RunExperts = Callable[[Weights, jax.Array, jax.Array, jax.Array], jax.Array]
"""`run(experts, x_MD, weight_Mk, chosen_Mk) -> [M, D]`; numbers of experts that are not there count
for nothing."""


def routed_experts(
    moe: MoEConfig, weights: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, RouterStatistics]:
    """`moe.RoutedExperts` under the current mesh, if there is one.

    Raises:
      InputError: the batch does not divide over the mesh.
    """
    if not mesh_is_active():
        return local_experts(moe, weights, x_BTD)
    x_spec = nn.logical_to_mesh_axes(("batch", "length", "activation"))
    devices = devices_along(current_axes("batch"))
    if x_BTD.shape[0] % devices:
        raise InputError(
            f"a batch of {x_BTD.shape[0]} does not divide by the {devices} devices of mesh axes "
            f"{' x '.join(current_axes('batch'))}; change either"
        )
    # The model's width is whole on every device, gathered in the compute dtype.
    specs = {
        name: nn.logical_to_mesh_axes([None if axis == "embed" else axis for axis in axes])
        for name, axes in EXPERTS.items()
    }
    experts = {name: weights[name].astype(x_BTD.dtype) for name in EXPERTS}
    routers = {name: weights[name] for name in ROUTER if name in weights}
    statistics_spec = RouterStatistics(*[PartitionSpec()] * 4, chosen_BTk=x_spec)
    run = jax.shard_map(
        partial(_route_and_exchange, moe),
        in_specs=(dict.fromkeys(routers, PartitionSpec()), specs, x_spec),
        out_specs=(x_spec, statistics_spec),
        check_vma=False,  # kernels do not say over which axes their outputs vary
    )
    return run(routers, experts, x_BTD)


def replicate_rows(
    moe: MoEConfig,
    weights: Weights,
    expert_axes: Mapping[str, tuple[str | None, ...]],
    run: RunExperts,
    x_BTD: jax.Array,
) -> jax.Array:
    """Router and routed experts for decoding, [B, T, D] -> [B, T, D].

    Rows are few there, so under a mesh they do not travel: every device of the expert axis has them
    all and applies its own experts, and one sum puts the outputs together. The batch's other axis
    splits it where it divides.

    Args:
      expert_axes: the logical axes of the experts' weights, by name; of one name "decode_width" is
        split as far as it divides.
      run: the product with the experts of one device.
    """
    routers = {name: weights[name] for name in ROUTER if name in weights}
    experts = {name: weights[name] for name in expert_axes}

    def apply(routers: Weights, experts: Weights, x_BTD: jax.Array, first: int = 0) -> jax.Array:
        routing = route(moe, routers, x_BTD)
        held = next(iter(experts.values())).shape[0]
        chosen_Mk = routing.chosen_Mk - first
        chosen_Mk = jnp.where((chosen_Mk >= 0) & (chosen_Mk < held), chosen_Mk, held)
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        return run(experts, x_MD, routing.weight_Mk, chosen_Mk).reshape(x_BTD.shape)

    if not mesh_is_active():
        return apply(routers, experts, x_BTD)
    spread = current_axes("expert")
    width = dividing_axes(current_axes("decode_width"), moe.expert_width)

    def apply_own(routers: Weights, experts: Weights, x_BTD: jax.Array) -> jax.Array:
        held = moe.experts // jax.lax.axis_size(spread)
        out_BTD = apply(routers, experts, x_BTD, jax.lax.axis_index(spread) * held)
        return jax.lax.psum(out_BTD, spread + width)

    rows = [axis for axis in current_axes("decode_batch") if axis not in spread]
    x_spec = PartitionSpec(dividing_axes(tuple(rows), x_BTD.shape[0]))
    over = {"expert": spread, "decode_width": width}
    specs = {
        name: PartitionSpec(*(over.get(axis) for axis in axes))
        for name, axes in expert_axes.items()
    }
    return jax.shard_map(
        apply_own,
        in_specs=(dict.fromkeys(routers, PartitionSpec()), specs, x_spec),
        out_specs=x_spec,
        check_vma=False,
    )(routers, experts, x_BTD)


def _route_and_exchange(
    moe: MoEConfig, routers: Weights, experts: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, RouterStatistics]:
    """One device's part of `routed_experts`."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = route(moe, routers, x_BTD)
    expert_P = routing.chosen_Mk.ravel()
    swiglu = partial(expert_swiglu, grouped_product(moe), experts)
    out_PD, sizes_X = exchange_experts(swiglu, moe.experts, x_MD, expert_P, current_axes("expert"))
    out_MD = weighted_sum(routing.weight_Mk, out_PD)
    if axes := current_axes("ffn"):
        out_MD = jax.lax.psum(out_MD, axes)
    tokens = token_axes()
    means = routing._replace(
        probability_X=jax.lax.pmean(routing.probability_X, tokens),
        squared_log_z=jax.lax.pmean(routing.squared_log_z, tokens),
    )
    choices = expert_P.size * jax.lax.axis_size(tokens)
    statistics = statistics_of(means, jax.lax.psum(sizes_X, tokens), choices, x_BTD.shape)
    return out_MD.reshape(x_BTD.shape), statistics


def token_axes() -> tuple[str, ...]:
    """The mesh axes whose devices have different tokens."""
    return current_axes("batch") + current_axes("length")


def exchange_experts(
    swiglu: Callable[[jax.Array, jax.Array], jax.Array],
    experts: int,
    x_MD: jax.Array,
    expert_P: jax.Array,
    axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Each pair's token through its expert, wherever that lives; a token's pairs lie together.

    Args:
      swiglu: as in `run_groups`, with this device's own experts.
      experts: how many there are on all devices, X.
      expert_P: int32 numbers of experts.
      axes: the mesh axes over which experts are spread.

    Returns:
      Outputs [P, D], and how many rows each expert of this device worked on, at its place among all
      experts, int32 [X].
    """
    P, peers = expert_P.size, jax.lax.axis_size(axes)
    if peers == 1:
        return run_groups(swiglu, experts, x_MD, expert_P)
    order_P, held = jnp.argsort(expert_P, stable=True), experts // peers
    back_P = inverse(order_P)
    rows_PD = permute(pair_rows(x_MD, P), order_P, back_P)
    counts_SX = jax.lax.all_gather(count_experts(expert_P, experts), axes)
    trip = Trip(counts_SX, P, axes, ragged=_have_ragged_transfers())

    def one_round(turn: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        chunks = trip.chunks(turn)
        arrived_RD = trip.move(chunks, rows_PD, trip.buffer)
        out_RD, sizes_X = run_groups(swiglu, held, arrived_RD, trip.expert_of(chunks))
        return trip.move(chunks.reversed(), out_RD, P), sizes_X

    out_PD, sizes_X = _add_rounds(one_round, trip.rounds_needed(), trip.most_rounds)
    start = jax.lax.axis_index(axes) * held
    sizes_X = jax.lax.dynamic_update_slice(jnp.zeros(experts, jnp.int32), sizes_X, (start,))
    return permute(out_PD, back_P, order_P), sizes_X


def _have_ragged_transfers() -> bool:
    """Whether the devices that the program is traced for do: CPUs do not, nor slices of v5e above
    4x4, whose links XLA calls "limited ICI routing"."""
    mesh = jax.sharding.get_abstract_mesh()
    kind = "" if mesh.abstract_device is None else mesh.abstract_device.device_kind
    return traced_platform() != "cpu" and not (kind == "TPU v5 lite" and mesh.size > 16)


def _add_rounds(one_round: Callable, needed: jax.Array, most: int):
    """The sum of `one_round(0)`, ... over as many rounds as are needed, at most `most`.

    The first is outside of any condition, so that its transfers can overlap other work.
    """
    first = one_round(0)
    if most == 1:
        return first

    def nothing(*_):
        return jax.tree.map(jnp.zeros_like, first)

    def rest():
        def step(sums, turn):
            more = jax.lax.cond(turn < needed, jax.checkpoint(one_round), nothing, turn)
            return jax.tree.map(jnp.add, sums, more), None

        return jax.lax.scan(step, nothing(), jnp.arange(1, most))[0]

    return jax.tree.map(jnp.add, first, jax.lax.cond(needed > 1, rest, nothing))


class Chunks(NamedTuple):
    """One round's rows from every source to every destination."""

    size_SE: jax.Array
    """How many."""
    left_SE: jax.Array
    """Where they lie among the source's rows."""
    arrives_SE: jax.Array
    """Where they lie in the destination's buffer."""
    skipped_SE: jax.Array
    """How many of the same source and destination went in earlier rounds."""

    def reversed(self) -> Chunks:
        """The way back: destinations send what they received to where it came from."""
        return Chunks(self.size_SE.T, self.arrives_SE.T, self.left_SE.T, self.skipped_SE.T)


class Trip:
    """Who sends how many rows to whom, in which round, and where they land.

    With ragged transfers a destination's rows lie one source after another in its buffer, and
    rounds cut that sequence. Without them each source has a part of the buffer for itself.
    """

    def __init__(self, counts_SX: jax.Array, pairs: int, axes: tuple[str, ...], ragged: bool):
        """Plans the trip of `pairs` rows of every source, sorted by expert.

        Args:
          counts_SX: each source's rows by expert, of all devices.
          axes: the mesh axes that sources and destinations are devices of.
          ragged: whether to send what there is, or chunks of one size for all.
        """
        peers, experts = counts_SX.shape
        self.axes, self.ragged, self.peers = axes, ragged, peers
        self.me = jax.lax.axis_index(axes)
        self.counts_SEX = counts_SX.reshape(peers, peers, experts // peers)
        self.size_SE = jnp.sum(self.counts_SEX, axis=2)
        even, most = (pairs, peers * pairs) if ragged else (pairs / peers, pairs)
        self.room = min(max(math.ceil(HEADROOM * even), MIN_ROOM), most)
        """Rows that a round brings a destination (ragged), or that one source sends one."""
        self.buffer = self.room if ragged else peers * self.room
        self.most_rounds = math.ceil(most / self.room)

    def rounds_needed(self) -> jax.Array:
        """The same on all devices: those that share no rows still meet in the same collectives."""
        rows = jnp.max(jnp.sum(self.size_SE, axis=0) if self.ragged else self.size_SE)
        return jax.lax.pmax(-(-rows // self.room), token_axes() + current_axes("ffn"))

    def chunks(self, turn: int | jax.Array) -> Chunks:
        """What travels in a round."""
        size_SE = self.size_SE
        before_SE = jnp.cumsum(size_SE, axis=1) - size_SE
        ahead_SE = jnp.cumsum(size_SE, axis=0) - size_SE if self.ragged else jnp.zeros_like(size_SE)
        start_SE = turn * self.room - ahead_SE
        skipped_SE = jnp.clip(start_SE, 0, size_SE)
        sent_SE = jnp.clip(start_SE + self.room, 0, size_SE) - skipped_SE
        if self.ragged:
            arrives_SE = jnp.clip(skipped_SE - start_SE, 0, self.room)
        else:
            arrives_SE = jnp.arange(self.peers)[:, None] * self.room + jnp.zeros_like(size_SE)
        return Chunks(sent_SE, before_SE + skipped_SE, arrives_SE, skipped_SE)

    def expert_of(self, chunks: Chunks) -> jax.Array:
        """Which of this device's experts each row of its buffer is for; X where there is no row."""
        size_S, arrives_S, skipped_S = (
            array_SE[:, self.me]
            for array_SE in (chunks.size_SE, chunks.arrives_SE, chunks.skipped_SE)
        )
        slot_R = jnp.arange(self.buffer)
        source_R = jnp.searchsorted(arrives_S, slot_R, side="right") - 1
        offset_R = slot_R - arrives_S[source_R]
        ends_SX = jnp.cumsum(self.counts_SEX[:, self.me], axis=1)
        rank_R = skipped_S[source_R] + offset_R
        expert_R = jnp.sum(ends_SX[source_R] <= rank_R[:, None], axis=1)
        return jnp.where(offset_R < size_S[source_R], expert_R, ends_SX.shape[1])

    def move(self, chunks: Chunks, rows_RD: jax.Array, length: int) -> jax.Array:
        """The rows that arrive here, at their places among `length`; the others are zero."""
        out_RD = jnp.zeros((length, rows_RD.shape[1]), rows_RD.dtype)
        sent_E, left_E = chunks.size_SE[self.me], chunks.left_SE[self.me]
        received_S, arrives_S = chunks.size_SE[:, self.me], chunks.arrives_SE[:, self.me]
        if self.ragged:
            return jax.lax.ragged_all_to_all(
                *(rows_RD, out_RD, left_E, sent_E, chunks.arrives_SE[self.me], received_S),
                axis_name=self.axes,
            )
        chunk = jnp.arange(self.room)
        source_ER = jnp.where(chunk < sent_E[:, None], left_E[:, None] + chunk, rows_RD.shape[0])
        sent_ERD = rows_RD.at[source_ER].get(mode="fill", fill_value=0)
        received_SRD = jax.lax.all_to_all(sent_ERD, self.axes, 0, 0, tiled=True)
        target_SR = jnp.where(chunk < received_S[:, None], arrives_S[:, None] + chunk, length)
        return out_RD.at[target_SR].set(received_SRD, mode="drop")
