"""Early exit: the loops that each token needs by a rule, and the loss that the fewer loops cost.

The rules are those of decoding/early_exit.py. Tokens for which one holds nowhere run all loops. All
loops of all earlier tokens are computed here. Decoding by a rule does not compute them, and reads
those of a token's last loop in their place.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from plt_jax.config import MeshConfig, ModelConfig
from plt_jax.data.load import examples_for
from plt_jax.data.pipeline import evaluation_batches
from plt_jax.data.token_bytes import token_bytes
from plt_jax.decoding.early_exit import ExitRule, parse_rule
from plt_jax.distributed.axes import shard
from plt_jax.distributed.mesh import batch_layout, make_mesh, use_mesh, whole_batch
from plt_jax.errors import InputError
from plt_jax.evaluation import loop_measures as measures
from plt_jax.evaluation.perplexity import score
from plt_jax.evaluation.results import write_results
from plt_jax.files.writing import to_json
from plt_jax.model.transformer import Transformer
from plt_jax.reports.tables import aligned
from plt_jax.runs.directory import open_trained

EXITS = "exits.json"
LOGITS = 2**25
"""Logits that are computed at once, at most: 128 MiB in float32."""


Numbers = np.ndarray | jax.Array


class LoopPredictions(NamedTuple):
    """The predictions of all loops at M positions, [M, L] each."""

    nats: Numbers
    """The negative log-likelihood of the target."""
    entropy: Numbers
    """In nats."""
    kl: Numbers
    """The divergence from the prediction of the loop before, in nats; infinite in loop 1."""
    best: Numbers
    """int32, the most likely token."""
    exited: Numbers
    """The gate's probability to have exited by the end of the loop; 0 without a gate."""


class ExitReport(NamedTuple):
    """What each rule saves and costs, and the file that says it."""

    numbers: dict[str, Any]
    """The content of exits.json: `rules`, a row for each, with `mean_loops`, `share_by_loop`,
    `loss`, `bits_per_byte` and `same_token`, the share of positions whose most likely token is that
    of all loops; and `by_loop`, the losses if all tokens run so many."""
    path: Path

    def table(self) -> str:
        """A table with a line per rule."""
        *_, last = self.numbers["by_loop"]
        loops = last["loop"]
        everything = {
            "rule": "all loops",
            "mean_loops": loops,
            "same_token": 1.0,
            "share_by_loop": [*[0.0] * (loops - 1), 1.0],
            **last,
        }
        lines = [["", "loops per token", "loss", "bits per byte", "same token", "share by loop"]]
        for row in (everything, *self.numbers["rules"]):
            shares = " ".join(f"{share:.3f}" for share in row["share_by_loop"])
            lines.append(
                [
                    row["rule"],
                    f"{row['mean_loops']:.3f} of {loops}",
                    f"{row['loss']:.4f}",
                    f"{row['bits_per_byte']:.4f}",
                    f"{row['same_token']:.4f}",
                    shares,
                ]
            )
        return "\n".join([aligned(lines), self.numbers["note"]])


def parse_rules(text: str, model: ModelConfig) -> list[ExitRule]:
    """The rules in a list such as `kl:0.01,entropy:0.5,gate`; see `parse_rule`."""
    return [parse_rule(word, model) for word in text.split(",")]


def loops_needed(rule: ExitRule, predictions: LoopPredictions) -> np.ndarray:
    """The number of loops that each position runs, [M]: 1 to L."""
    if rule.kind == "gate":
        ends_ML = np.array(predictions.exited >= rule.threshold)
    else:
        ends_ML = np.array(getattr(predictions, rule.kind) < rule.threshold)
    ends_ML[:, -1] = True
    return np.argmax(ends_ML, axis=1) + 1


def evaluate_exits(
    path: str,
    rules: str,
    text: str | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> ExitReport:
    """Measures exit rules on a run's held-out text, or on other text; writes exits.json.

    Args:
      rules: see `parse_rules`.
      batch_size: sequences on all devices together, raised to divide over them; default the run's
        evaluation.batch_size.
      mesh: the devices, which share batches and parameters; default one device.
      dtype: dtype of the parameters; see `read_params`.

    Raises:
      InputError: no such checkpoint or text, a batch size that is not positive, or see
        `parse_rules`.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch_size is {batch_size}; it must be at least 1")
    trained = open_trained(path, mesh, dtype=dtype)
    config = trained.config
    parsed = parse_rules(rules, config.model)
    examples = examples_for(config, trained.tokenizer, text)
    bytes_V = token_bytes(trained.tokenizer, config.model.vocab_size)
    count = config.model.loop.count
    tokens = text_bytes = 0
    by_loop = np.zeros(count)
    totals = [_Total(np.zeros(count), 0.0, 0) for _ in parsed]
    here = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    size = whole_batch(batch_size or config.evaluation.batch_size, here)
    length = ("data.sequence_length", config.sequence_length)
    layout = batch_layout(here, ("--batch_size", size), length)
    for batch in evaluation_batches(examples, size):
        counted_M = batch["weights"].reshape(-1) > 0
        with use_mesh(mesh):
            placed = layout.place_whole(batch)
            arrays = jax.device_get(predict(config.model, trained.params, placed))
        predictions = LoopPredictions(*(np.asarray(array)[counted_M] for array in arrays))
        tokens += int(counted_M.sum())
        text_bytes += int(bytes_V[batch["targets"].reshape(-1)[counted_M]].sum())
        by_loop += predictions.nats.sum(axis=0, dtype=np.float64)
        totals = [
            total.plus(loops_needed(rule, predictions), predictions)
            for rule, total in zip(parsed, totals, strict=True)
        ]
    if not tokens:
        raise InputError("the text holds no token to predict; give a longer one (--text)")
    numbers = {
        "step": trained.step,
        "text": text or f"held out from {config.data.text}",
        "scheme": config.model.loop.scheme,
        "tokens": tokens,
        "by_loop": [
            {"loop": index + 1, **score(nats, tokens, text_bytes)._asdict()}
            for index, nats in enumerate(by_loop)
        ],
        "rules": [
            total.row(rule, tokens, text_bytes) for rule, total in zip(parsed, totals, strict=True)
        ],
        "note": note_on(config.model),
    }
    target = trained.directory / EXITS
    write_results(target, [to_json(numbers, indent=2), "\n"])
    return ExitReport(numbers, target)


class _Total(NamedTuple):
    """Sums of a rule over positions."""

    positions_L: np.ndarray
    """The positions that run so many loops."""
    nats: float
    same: int

    def plus(self, loops_M: np.ndarray, predictions: LoopPredictions) -> _Total:
        at = np.arange(len(loops_M)), loops_M - 1
        return _Total(
            self.positions_L + np.bincount(loops_M - 1, minlength=len(self.positions_L)),
            self.nats + float(predictions.nats[at].sum(dtype=np.float64)),
            self.same + int((predictions.best[at] == predictions.best[:, -1]).sum()),
        )

    def row(self, rule: ExitRule, tokens: int, text_bytes: int) -> dict[str, Any]:
        shares = self.positions_L / tokens
        return {
            "rule": str(rule),
            "mean_loops": float(shares @ np.arange(1, len(shares) + 1)),
            "share_by_loop": shares.tolist(),
            "same_token": self.same / tokens,
            **score(self.nats, tokens, text_bytes)._asdict(),
        }


def note_on(model: ModelConfig) -> str:
    """What early exit can save when such a model decodes."""
    if model.loop.shifted:
        return (
            f"note: {model.loop.scheme} decodes all loops in one pass, which reads each weight "
            "once for all; fewer loops would save arithmetic there, but hardly time"
        )
    return (
        f"note: {model.loop.scheme} decodes its loops one after another, so that a step's time "
        "grows with them; plt_jax.generate --exit RULE leaves out what a rule does not need"
    )


@partial(jax.jit, static_argnums=0)
def predict(config: ModelConfig, params: Any, batch: dict[str, jax.Array]) -> LoopPredictions:
    """The predictions of all loops at all positions of a batch, M = B·T."""

    def forward(model: Transformer) -> LoopPredictions:
        inputs = batch["tokens"], batch["segment_ids"]
        states = model.loop_states(*inputs)
        readouts_LBTD = model.readouts(states, model.context(*inputs))
        L, B, T, D = readouts_LBTD.shape
        exited_LBT = jnp.zeros((L, B, T))
        if config.loop.exit_gate:
            exited_LBT = jnp.cumsum(model.exit_probabilities(states.hidden_LBTD), axis=0)

        def of_position(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            read_LD, target = inputs
            logs_LV = jax.nn.log_softmax(model.logits(read_LD[None])[0])
            shift_L = measures.output_shift(logs_LV[1:], logs_LV[:-1])
            return (
                -logs_LV[:, target],
                measures.entropy(logs_LV),
                jnp.pad(shift_L, (1, 0), constant_values=jnp.inf),
                jnp.argmax(logs_LV, axis=-1).astype(jnp.int32),
            )

        read_MLD = jnp.moveaxis(readouts_LBTD, 0, 2).reshape(B * T, L, D)
        at_once = max(LOGITS // (L * config.vocab_size), 1)
        positions = read_MLD, batch["targets"].reshape(B * T)
        nats, entropy, kl, best = jax.lax.map(of_position, positions, batch_size=at_once)
        found = nats, entropy, kl, best, exited_LBT.reshape(L, B * T).T
        return LoopPredictions(*map(shard, found))  # every process reads them

    predictions: Any = Transformer(config).apply({"params": params}, method=forward)
    return predictions
