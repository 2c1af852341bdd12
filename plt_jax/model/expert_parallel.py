"""Expert parallelism: the experts are spread over the devices of a mesh axis.

Tokens travel to the devices of the experts that they chose, and back, by two all-to-alls. Shapes
are static, but loads are not: rows that do not fit into a device's buffer travel in a further
round. So no token is dropped, and a balanced model pays for one round.

Axes: P pairs of a token and one of its experts that a device starts with; S source devices and E
destination devices, both along the mesh axis; X experts (those of one device, in code that runs on
each device); R rows of a device's buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.spmd import logical_to_mesh_axes
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
"""Capacity of a buffer, as a multiple of an even share of all pairs."""
MIN_ROOM = 8
"""Smallest capacity of a buffer, in rows."""

ROUTER = ("router", "router_bias")

RunExperts = Callable[[Weights, jax.Array, jax.Array, jax.Array], jax.Array]
"""`run(experts, x_MD, weight_Mk, chosen_Mk) -> [M, D]`. An expert number at or above the number of
experts held contributes zero."""


def routed_experts(
    moe: MoEConfig, weights: Weights, x_BTD: jax.Array
) -> tuple[jax.Array, RouterStatistics]:
    """The function that `moe.RoutedExperts` describes, over the devices of the current mesh.

    Raises:
      InputError: the batch does not divide over the mesh.
    """
    if not mesh_is_active():
        return local_experts(moe, weights, x_BTD)
    x_spec = logical_to_mesh_axes(("batch", "length", "activation"))
    devices = devices_along(current_axes("batch"))
    if x_BTD.shape[0] % devices:
        raise InputError(
            f"a batch of {x_BTD.shape[0]} does not divide by the {devices} devices of mesh axes "
            f"{' x '.join(current_axes('batch'))}; change either"
        )
    # The model's width is whole on every device, gathered in the compute dtype.
    specs = {
        name: logical_to_mesh_axes([None if axis == "embed" else axis for axis in axes])
        for name, axes in EXPERTS.items()
    }
    experts = {name: weights[name].astype(x_BTD.dtype) for name in EXPERTS}
    routers = {name: weights[name] for name in ROUTER if name in weights}
    statistics_spec = RouterStatistics._make([*[PartitionSpec()] * 4, x_spec])
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

    A decode step has few rows, so they do not travel: every device along the expert axis has all
    of them and applies the experts that it holds, and one all-reduce adds the outputs. The other
    mesh axis of the batch splits the rows where their number divides.

    Args:
      expert_axes: the logical axes of the experts' weights, by name. The axis "decode_width" is
        split over as many of its mesh axes as it divides by. A weight may be several arrays.
      run: applies the experts that one device holds.
    """
    routers = {name: weights[name] for name in ROUTER if name in weights}
    experts = {name: weights[name] for name in expert_axes}

    def apply(
        routers: Weights, experts: Weights, x_BTD: jax.Array, first: int | jax.Array = 0
    ) -> jax.Array:
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
    over = {"expert": spread, "decode_width": width, None: None}

    def spec_of(array: jax.Array, axes: tuple[str | None, ...]) -> PartitionSpec:
        # Scales that are shared along an axis have 1 there.
        sizes = zip(axes, array.shape, strict=True)
        return PartitionSpec(*(None if size == 1 else over[axis] for axis, size in sizes))

    specs = {
        name: jax.tree.map(partial(spec_of, axes=axes), experts[name])
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
    """`routed_experts` on one device."""
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
    """Applies each pair's expert to its token, on whichever device holds the expert.

    Args:
      swiglu: as in `run_groups`, with the experts that this device holds.
      experts: the number of experts on all devices, X.
      expert_P: int32 expert of each pair. The pairs of one token are neighbours.
      axes: the mesh axes over which the experts are spread.

    Returns:
      Outputs [P, D], and the number of rows that each expert of this device worked on, int32 [X];
      zero for the experts of other devices.
    """
    P, peers = expert_P.size, jax.lax.axis_size(axes)
    if peers == 1:
        return run_groups(swiglu, experts, x_MD, expert_P)
    order_P, held = jnp.argsort(expert_P, stable=True), experts // peers
    back_P = inverse(order_P)
    rows_PD = permute(pair_rows(x_MD, P), order_P, back_P)
    counts_SX = jax.lax.all_gather(count_experts(expert_P, experts), axes)
    exchange = ExpertExchange(counts_SX, P, axes, ragged=_have_ragged_transfers())

    def one_round(round_index: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        transfers = exchange.transfers(round_index)
        arrived_RD = exchange.move(transfers, rows_PD, exchange.buffer)
        out_RD, sizes_X = run_groups(swiglu, held, arrived_RD, exchange.expert_of(transfers))
        return exchange.move(transfers.reversed(), out_RD, P), sizes_X

    out_PD, sizes_X = _sum_rounds(one_round, exchange.rounds_needed(), exchange.most_rounds)
    start = jax.lax.axis_index(axes) * held
    sizes_X = jax.lax.dynamic_update_slice(jnp.zeros(experts, jnp.int32), sizes_X, (start,))
    return permute(out_PD, back_P, order_P), sizes_X


def _have_ragged_transfers() -> bool:
    """Whether the devices that the program is traced for support ragged all-to-alls.

    CPUs do not. Slices of v5e above 4x4 do not either: XLA calls their links "limited ICI routing".
    """
    mesh = jax.sharding.get_abstract_mesh()
    kind = "" if mesh.abstract_device is None else mesh.abstract_device.device_kind
    return traced_platform() != "cpu" and not (kind == "TPU v5 lite" and mesh.size > 16)


def _sum_rounds(one_round: Callable, needed: jax.Array, most: int):
    """Sums `one_round(0)`, `one_round(1)`, ... over as many rounds as are needed, at most `most`.

    The first round stands outside of any condition, so that its transfers can overlap other work.
    """
    first = one_round(0)
    if most == 1:
        return first

    def nothing(*_):
        return jax.tree.map(jnp.zeros_like, first)

    def rest():
        def step(sums, round_index):
            more = jax.lax.cond(
                round_index < needed, jax.checkpoint(one_round), nothing, round_index
            )
            return jax.tree.map(jnp.add, sums, more), None

        return jax.lax.scan(step, nothing(), jnp.arange(1, most))[0]

    return jax.tree.map(jnp.add, first, jax.lax.cond(needed > 1, rest, nothing))


class Transfers(NamedTuple):
    """The rows that one round moves from every source to every destination, all int32."""

    size_SE: jax.Array
    """Number of rows."""
    source_start_SE: jax.Array
    """First row, in the source's rows."""
    target_start_SE: jax.Array
    """First row, in the destination's buffer."""
    earlier_SE: jax.Array
    """Number of rows of the same source and destination that moved in earlier rounds."""

    def reversed(self) -> Transfers:
        """The way back: destinations return what they received to where it came from."""
        return Transfers(
            self.size_SE.T, self.target_start_SE.T, self.source_start_SE.T, self.earlier_SE.T
        )


class ExpertExchange:
    """The plan of an exchange: how many rows each source sends to each destination, in which round,
    and where they lie there.

    With ragged transfers, the rows of all sources follow one another in a destination's buffer, and
    rounds cut that sequence. Without them, each source has a part of the buffer to itself.
    """

    def __init__(self, counts_SX: jax.Array, pairs: int, axes: tuple[str, ...], ragged: bool):
        """Plans the exchange of `pairs` rows of every source, sorted by expert.

        Args:
          counts_SX: int32 number of rows that each source has for each expert of all devices.
          axes: the mesh axes along which sources and destinations lie.
          ragged: whether transfers have sizes of their own; otherwise all have one size.
        """
        peers, experts = counts_SX.shape
        self.axes, self.ragged, self.peers = axes, ragged, peers
        self.device = jax.lax.axis_index(axes)
        self.counts_SEX = counts_SX.reshape(peers, peers, experts // peers)
        self.size_SE = jnp.sum(self.counts_SEX, axis=2)
        even, most = (pairs, peers * pairs) if ragged else (pairs / peers, pairs)
        self.room = min(max(math.ceil(HEADROOM * even), MIN_ROOM), most)
        """Rows that a round brings to a destination (ragged), or from one source to one."""
        self.buffer = self.room if ragged else peers * self.room
        self.most_rounds = math.ceil(most / self.room)

    def rounds_needed(self) -> jax.Array:
        """The number of rounds, the same on all devices: also those that share no rows take part in
        the same collectives."""
        rows = jnp.max(jnp.sum(self.size_SE, axis=0) if self.ragged else self.size_SE)
        return jax.lax.pmax(-(-rows // self.room), token_axes() + current_axes("ffn"))

    def transfers(self, round_index: int | jax.Array) -> Transfers:
        """The transfers of a round, 0 for the first."""
        size_SE = self.size_SE
        before_SE = jnp.cumsum(size_SE, axis=1) - size_SE
        ahead_SE = jnp.cumsum(size_SE, axis=0) - size_SE if self.ragged else jnp.zeros_like(size_SE)
        start_SE = round_index * self.room - ahead_SE
        earlier_SE = jnp.clip(start_SE, 0, size_SE)
        sent_SE = jnp.clip(start_SE + self.room, 0, size_SE) - earlier_SE
        if self.ragged:
            target_start_SE = jnp.clip(earlier_SE - start_SE, 0, self.room)
        else:
            target_start_SE = jnp.arange(self.peers)[:, None] * self.room + jnp.zeros_like(size_SE)
        return Transfers(sent_SE, before_SE + earlier_SE, target_start_SE, earlier_SE)

    def expert_of(self, transfers: Transfers) -> jax.Array:
        """The local expert that each row of this device's buffer is for, int32 [R]; X if empty."""
        size_S, target_start_S, earlier_S = (
            array_SE[:, self.device]
            for array_SE in (transfers.size_SE, transfers.target_start_SE, transfers.earlier_SE)
        )
        slot_R = jnp.arange(self.buffer)
        source_R = jnp.searchsorted(target_start_S, slot_R, side="right") - 1
        offset_R = slot_R - target_start_S[source_R]
        ends_SX = jnp.cumsum(self.counts_SEX[:, self.device], axis=1)
        rank_R = earlier_S[source_R] + offset_R
        expert_R = jnp.sum(ends_SX[source_R] <= rank_R[:, None], axis=1)
        return jnp.where(offset_R < size_S[source_R], expert_R, ends_SX.shape[1])

    def move(self, transfers: Transfers, rows_RD: jax.Array, length: int) -> jax.Array:
        """Moves rows [R, D] between devices: those that arrive here, at their places in a buffer of
        `length` rows whose other rows are zero."""
        out_RD = jnp.zeros((length, rows_RD.shape[1]), rows_RD.dtype)
        sent_E, source_start_E = (
            transfers.size_SE[self.device],
            transfers.source_start_SE[self.device],
        )
        received_S, target_start_S = (
            transfers.size_SE[:, self.device],
            transfers.target_start_SE[:, self.device],
        )
        if self.ragged:
            return jax.lax.ragged_all_to_all(
                *(
                    rows_RD,
                    out_RD,
                    source_start_E,
                    sent_E,
                    transfers.target_start_SE[self.device],
                    received_S,
                ),
                axis_name=self.axes,
            )
        chunk = jnp.arange(self.room)
        source_ER = jnp.where(
            chunk < sent_E[:, None], source_start_E[:, None] + chunk, rows_RD.shape[0]
        )
        sent_ERD = rows_RD.at[source_ER].get(mode="fill", fill_value=0)
        received_SRD = jax.lax.all_to_all(sent_ERD, self.axes, 0, 0, tiled=True)
        target_SR = jnp.where(chunk < received_S[:, None], target_start_S[:, None] + chunk, length)
        return out_RD.at[target_SR].set(received_SRD, mode="drop")
