"""Diagnostics of each loop of a trained model on held-out text (LoopCoder-v2).

They need every attention map, so this file has a forward pass that computes the maps explicitly,
one sequence at a time. It uses the model's own layers (`apply_block`). loop_measures.py holds the
measures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from plt_jax.config import ModelConfig
from plt_jax.config.model import Part
from plt_jax.data.load import examples_for
from plt_jax.data.packing import Examples
from plt_jax.distributed.axes import shard
from plt_jax.distributed.mesh import mesh_axes, use_mesh, whole_batch
from plt_jax.errors import InputError
from plt_jax.evaluation import loop_measures as measures
from plt_jax.evaluation.results import write_results
from plt_jax.files.writing import to_json
from plt_jax.model.attention import blend
from plt_jax.model.block import KeysValues, apply_block, stacks_in
from plt_jax.model.layers import Rotation, embed, rms_norm, rope_rotation
from plt_jax.model.looping import loop_output, next_loop_input, shift_states, with_loops
from plt_jax.model.moe import weights_of_loop
from plt_jax.model.transformer import (
    Transformer,
    loop_norm,
    number_documents,
    positions_in_documents,
)
from plt_jax.reports.loops_page import loops_page
from plt_jax.reports.tables import aligned
from plt_jax.runs.directory import open_trained

LOOPS, PAGE = "loops.json", "loops.html"
SEQUENCES = 16
"""Default number of sequences."""
LONGEST = 512
"""Most positions of a sequence; an attention map grows with their square."""

Values = dict[str, jax.Array]


class LoopReport(NamedTuple):
    """The diagnostics of a model's loops, and the page that shows them."""

    numbers: dict[str, Any]
    """The content of loops.json: `by_loop`, a row per loop, and `by_layer`, a list [loops][layers]
    per measure, over the looped layers from `first_layer` on, counted from 1."""
    path: Path

    def table(self) -> str:
        """A table with a line per measure and a column per loop."""
        return aligned(self.cells())

    def cells(self) -> list[list[str]]:
        """Cells of that table, row by row, with the numbers of the loops first."""
        rows = self.numbers["by_loop"]
        used = [measure for measure in MEASURES if any(measure[0] in row for row in rows)]
        return [
            ["", *(f"loop {row['loop']}" for row in rows)],
            *(
                [title, *(form.format(row[name]) if name in row else "" for row in rows)]
                for name, title, form in used
            ),
        ]


MEASURES = (
    ("loss", "loss", "{:.4f}"),
    ("step_size", "step size", "{:.2f}"),
    ("cosine", "cosine", "{:.3f}"),
    ("fixed_point_gap", "fixed-point gap", "{:.2f}"),
    ("effective_rank", "effective rank", "{:.1f}"),
    ("offset_cost", "offset cost", "{:.2f}"),
    ("output_shift", "output shift", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("true_rank", "rank of truth", "{:.1f}"),
    ("exit", "exit probability", "{:.3f}"),
    ("gate", "gate", "{:.3f}"),
    ("attention_entropy", "attention entropy", "{:.3f}"),
    ("attention_change", "attention change", "{:.4f}"),
    ("head_rank", "rank of heads", "{:.2f}"),
    ("head_cosine", "cosine of heads", "{:.3f}"),
)
BY_LAYER = ("gate", "attention_entropy", "attention_change", "head_rank", "head_cosine")


def evaluate_loops(
    path: str,
    text: str | None = None,
    sequences: int = SEQUENCES,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> LoopReport:
    """Measures the loops of a run or checkpoint on held-out or other text; writes loops.json, and
    a page that draws it, loops.html.

    Args:
      sequences: the number of sequences, evenly spaced over the text.
      mesh: the devices, which share the parameters; default one device.
      dtype: dtype of the parameters; see `read_params`.

    Raises:
      InputError: no such checkpoint or text, `sequences` is below 1, or the mesh would split the
        sequences of a model with experts.
    """
    if sequences < 1:
        raise InputError(f"--sequences is {sequences}; it must be at least 1")
    trained = open_trained(path, mesh, dtype=dtype)
    config = trained.config
    if config.model.moe.experts and mesh is not None and whole_batch(1, mesh) > 1:
        raise InputError(
            "--loops measures one sequence at a time, which experts cannot share over mesh axes "
            f"{' x '.join(mesh_axes('batch'))}; give --mesh.data 1, and --mesh.tensor or "
            "--mesh.context alone"
        )
    examples = examples_for(config, trained.tokenizer, text)
    with use_mesh(mesh):
        found = measure_examples(config.model, trained.params, examples, sequences)
    numbers = {
        "step": trained.step,
        "text": text or f"held out from {config.data.text}",
        "scheme": config.model.loop.scheme,
        "positions": min(config.sequence_length, LONGEST),
        "first_layer": config.model.looped_layers.start + 1,
        **found,
    }
    report = LoopReport(numbers, trained.directory / PAGE)
    write_results(trained.directory / LOOPS, [to_json(numbers, indent=2), "\n"])
    write_results(report.path, [loops_page(trained.directory.name, numbers, report.cells())])
    return report


def measure_examples(
    config: ModelConfig, params: Any, examples: Examples, sequences: int
) -> dict[str, Any]:
    """`by_loop`, `by_layer`, `most_shifting_loop` (r*, the argmax over r >= 2 of the output shift)
    and `tokens`, means over the targets of evenly spaced examples."""
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(sequences, len(examples))).astype(int))
    sums: dict[str, np.ndarray] = {}
    total = 0.0
    for index in chosen.tolist():
        example = {name: value[:LONGEST] for name, value in examples[index].items()}
        tokens = float(example["weights"].sum())
        if not tokens:
            continue
        values = jax.device_get(measure(config, params, example))
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + tokens * np.asarray(value, np.float64)
        total += tokens
    if not total:
        raise InputError("the text holds no token to predict; give a longer one (--text)")
    means = {name: value / total for name, value in sums.items()}
    return arranged(config, means) | {"tokens": int(total), "sequences": len(chosen)}


def arranged(config: ModelConfig, means: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means by loop [L] or by loop and layer [L, J] as rows; what a loop does not have is nan
    there, and left out."""
    rows = []
    for index in range(config.loop.count):
        row: dict[str, Any] = {"loop": index + 1}
        for name, value in means.items():
            one = float(np.mean(value[index]))
            if np.isfinite(one):
                row[name] = one
        rows.append(row)
    by_layer = {
        name: [[float(one) for one in layer] for layer in means[name] if np.isfinite(layer).all()]
        for name in BY_LAYER
    }
    shifts = [row.get("output_shift", -1.0) for row in rows]
    most = int(np.argmax(shifts)) + 1 if len(rows) > 1 else None
    return {
        "by_loop": rows,
        "by_layer": {name: values for name, values in by_layer.items() if values},
        "most_shifting_loop": most,
    }


@partial(jax.jit, static_argnums=0)
def measure(config: ModelConfig, params: Any, example: Values) -> Values:
    """The diagnostics of one example [T], means over its targets: by loop [L], or [L, J]."""
    tokens_1T, targets_T = example["tokens"][None], example["targets"]
    documents_1T = number_documents(example["segment_ids"][None])
    counted_T = example["weights"] > 0
    # Positions that have an earlier position in their own document.
    behind_T = jnp.pad(documents_1T[0, 1:] == documents_1T[0, :-1], (1, 0)) & counted_T
    positions_T = positions_in_documents(documents_1T)[0]
    passes, looped = config.loop.count, config.loop.scheme != "no_loop"
    # One more loop than the model has, for the fixed-point gap of the last state.
    longer = with_loops(config, params, passes + 1) if looped else (config, params)
    states_RTD, maps = run_loops(*longer, tokens_1T, documents_1T)
    model = Transformer(config).bind({"params": params})
    inputs = tokens_1T, example["segment_ids"][None]
    states = model.loop_states(*inputs)
    readouts_R1TD = model.readouts(states, model.context(*inputs))
    logs = [jax.nn.log_softmax(model.logits(read_1TD)[0]) for read_1TD in readouts_R1TD]

    def mean(value_T: jax.Array, where_T: jax.Array = counted_T) -> jax.Array:
        return jnp.sum(jnp.where(where_T, value_T, 0.0)) / jnp.maximum(jnp.sum(where_T), 1)

    def by_loop(of_loop: Callable[[int], jax.Array], first: int = 1) -> jax.Array:
        """Stacks the values of all loops r, nan for loops before `first`."""
        nothing = jnp.float32(jnp.nan)
        return jnp.stack([of_loop(r) if r >= first else nothing for r in range(1, passes + 1)])

    def step(r: int) -> jax.Array:
        return mean(measures.distance(states_RTD[r], states_RTD[r - 1]))

    def cosine(r: int) -> jax.Array:
        turn_T = measures.turn(states_RTD[r], states_RTD[r - 1], states_RTD[r - 2])
        # Under the shift the first r - 1 positions of a document have nothing new to read in loop
        # r: what moves them is rounding, which has no direction.
        return mean(turn_T, counted_T & ((positions_T >= r - 1) | (not config.loop.shifted)))

    values = {
        "loss": by_loop(lambda r: -mean(chosen(logs[r - 1], targets_T))),
        "step_size": by_loop(step),
        "cosine": by_loop(cosine, 2),
        "fixed_point_gap": by_loop(lambda r: step(r + 1), 1 if looped else passes + 1),
        "effective_rank": by_loop(lambda r: measures.rank_of_states(states_RTD[r], counted_T)),
        "offset_cost": by_loop(
            lambda r: mean(measures.offset_cost(states_RTD[r - 1]), behind_T), 2
        ),
        "output_shift": by_loop(lambda r: mean(measures.output_shift(logs[r - 1], logs[r - 2])), 2),
        "entropy": by_loop(lambda r: mean(measures.entropy(logs[r - 1]))),
        "true_rank": by_loop(lambda r: mean(measures.rank_of_truth(logs[r - 1], targets_T))),
    }
    if config.loop.exit_gate:
        exits_R1T = model.exit_probabilities(states.hidden_LBTD)
        values["exit"] = by_loop(lambda r: mean(exits_R1T[r - 1, 0]))
    for name, value_RJT in maps.items():
        values[name] = jax.vmap(jax.vmap(mean))(value_RJT[:passes])
    return jax.tree.map(shard, values)  # every process reads them


def chosen(log_p_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    """The log-probabilities of the targets, [T]."""
    return jnp.take_along_axis(log_p_TV, targets_T[:, None], axis=-1)[:, 0]


def run_loops(
    config: ModelConfig, params: Any, tokens_1T: jax.Array, documents_1T: jax.Array
) -> tuple[jax.Array, Values]:
    """Runs the prelude and all loops over one example.

    Returns:
      The states h(0) (what loop 1 reads: the embeddings, or the prelude's output) and h(1), ...,
      h(L), each loop's hidden states, float32 [L+1, T, D]; and measures of attention by loop,
      looped layer and position, [L, J, T], nan where a loop has none.
    """
    loop = config.loop
    rotation = rope_rotation(config, positions_in_documents(documents_1T))
    embeddings_1TD = embed(tokens_1T, params["embedding"], jnp.dtype(config.dtype))
    normalize = partial(
        rms_norm,
        scale=params.get(loop_norm(config)),  # None where nothing is normed between loops
        epsilon=config.norm_epsilon,
    )
    shift = partial(shift_states, documents_BT=documents_1T)
    run = partial(run_stacks, config, params, rotation, documents_1T)
    first_1TD = run("prelude", 0, embeddings_1TD, None, None).x_1TD
    x_1TD, states, measured, before = first_1TD, [first_1TD], [], None
    shared = None
    for index in range(loop.count):
        ran = run("core", index, x_1TD, shared, before)
        before, measured = ran.maps, [*measured, ran.values]
        shared = ran.keys_values if shared is None else shared
        states.append(ran.x_1TD)
        output_1TD = loop_output(loop, ran.x_1TD, normalize)
        scale = params.get("hidden_scale", loop.hidden_scale)
        x_1TD = next_loop_input(loop, first_1TD, output_1TD, shift, scale)
    by_loop = {name: jnp.stack([values[name] for values in measured]) for name in measured[0]}
    return jnp.stack(states)[:, 0].astype(jnp.float32), by_loop


class Ran(NamedTuple):
    """What the stacks of a part leave."""

    x_1TD: jax.Array
    """The hidden states."""
    keys_values: dict[str, KeysValues]
    """Of all layers of each stack."""
    maps: dict[str, jax.Array]
    """The attention maps of all layers of each stack, [J, N, T, S]."""
    values: Values
    """The measures of attention by layer and position, [J, T], of all stacks."""


def run_stacks(
    config: ModelConfig,
    params: Any,
    rotation: Rotation,
    documents_1T: jax.Array,
    part: Part,
    index: int,
    x_1TD: jax.Array,
    shared: dict[str, KeysValues] | None,
    before: dict[str, jax.Array] | None,
) -> Ran:
    """Runs all layers of a part in loop `index` (0 for the first).

    Args:
      shared: loop 1's keys and values, by stack; None in loop 1.
      before: the attention maps of the loop before, by stack; None in loop 1.
    """
    keys_values, maps, measured = {}, {}, []
    for name in stacks_in(config, part):
        scanned = (
            params[name],
            None if shared is None else shared[name],
            None if before is None else before[name],
        )
        step = partial(run_layer, config.of_part(part), index, rotation, documents_1T)
        x_1TD, (keys_values[name], maps[name], values) = jax.lax.scan(step, x_1TD, scanned)
        measured.append(values)
    names = measured[0] if measured else ()
    values = {name: jnp.concatenate([one[name] for one in measured]) for name in names}
    return Ran(x_1TD, keys_values, maps, values)


def run_layer(
    config: ModelConfig,
    index: int,
    rotation: Rotation,
    documents_1T: jax.Array,
    x_1TD: jax.Array,
    scanned: tuple[Any, KeysValues | None, jax.Array | None],
) -> tuple[jax.Array, tuple[KeysValues, jax.Array, Values]]:
    """Runs one layer, as the body of a scan.

    Returns:
      The layer's output [1, T, D]; and its keys and values, its attention map [N, T, S] (of both
      branches, blended by their gates), and the map's measures by position [T].
    """
    declared, shared, before_NTS = scanned
    loop, T = config.loop, documents_1T.shape[1]
    index_T = jnp.arange(T)
    causal_TS = (index_T[:, None] >= index_T) & (documents_1T[0][:, None] == documents_1T[0])
    window_TS = causal_TS & (index_T[:, None] - index_T < loop.window)

    def attend(q, k, v, gate_1NT):
        keys, values = (k, v) if shared is None or loop.later_attention == "own" else shared
        map_NTS, global_1NTH = explicit(q, keys, values, causal_TS)
        if index == 0 or loop.later_attention != "gated":
            return global_1NTH, ((k, v), map_NTS, jnp.full(T, jnp.nan))
        local_NTS, local_1NTH = explicit(q, k, v, window_TS)
        gate_NT1 = gate_1NT[0, :, :, None]
        map_NTS = gate_NT1 * map_NTS + (1 - gate_NT1) * local_NTS
        gate_T = jnp.mean(gate_1NT[0], axis=0)
        return blend(gate_1NT, global_1NTH, local_1NTH), ((k, v), map_NTS, gate_T)

    weights = weights_of_loop(declared, index)
    x_1TD, (keys_values, map_NTS, gate_T), _ = apply_block(config, weights, x_1TD, rotation, attend)
    rank_T, cosine_T = measures.head_diversity(map_NTS)
    change_T = jnp.full(T, jnp.nan)
    if before_NTS is not None:
        change_T = measures.attention_change(map_NTS, before_NTS)
    values = {
        "gate": gate_T,
        "attention_entropy": measures.attention_entropy(map_NTS),
        "attention_change": change_T,
        "head_rank": rank_T,
        "head_cosine": cosine_T,
    }
    return x_1TD, (keys_values, map_NTS, values)


def explicit(
    q_1NTH: jax.Array, k_1KSH: jax.Array, v_1KSH: jax.Array, mask_TS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention as a map [N, T, S], float32, and the heads' outputs [1, N, T, H]."""
    groups = q_1NTH.shape[1] // k_1KSH.shape[1]
    k_NSH, v_NSH = (jnp.repeat(x[0], groups, axis=0) for x in (k_1KSH, v_1KSH))
    logits_NTS = jnp.einsum("NTH,NSH->NTS", q_1NTH[0], k_NSH, preferred_element_type=jnp.float32)
    logits_NTS = jnp.where(mask_TS, logits_NTS / np.sqrt(q_1NTH.shape[-1]), -jnp.inf)
    attention_NTS = jax.nn.softmax(logits_NTS, axis=-1)
    out_NTH = jnp.einsum("NTS,NSH->NTH", attention_NTS.astype(v_NSH.dtype), v_NSH)
    return attention_NTS, out_NTH[None]
