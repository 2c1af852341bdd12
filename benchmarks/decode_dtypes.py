"""How the dtypes of the decode cache and of the weights change predictions on text.

python -m benchmarks.decode_dtypes RUN

It decodes the first tokens of documents with every dtype of the cache, then with weights in eight
bits. Each step reads the text's own next token, so that all dtypes predict after the same text.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from plt_jax.benchmarks.machine import machine
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import ModelConfig
from plt_jax.decoding.cache import DTYPES, Cache, init_cache
from plt_jax.decoding.step import decode_step
from plt_jax.decoding.weights import DecodeWeights, prepare_for_decode
from plt_jax.errors import InputError
from plt_jax.evaluation.documents import documents_of, stream_of
from plt_jax.runs.directory import Trained, open_trained


def main() -> None:
    parser = CommandParser(
        prog="python -m benchmarks.decode_dtypes",
        description="Compare predictions with caches and weights of different dtypes.",
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    parser.add_argument("--text", help="text file or folder; default the run's held-out documents")
    parser.add_argument(
        "--documents", type=int, default=8, help="number of documents, evenly spaced"
    )
    parser.add_argument("--tokens", type=int, default=512, help="number of tokens of each document")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    trained = open_trained(arguments.path)
    config = trained.config.model
    tokens_BT = beginnings(trained, arguments.text, arguments.documents, arguments.tokens)
    exact, rows = None, []
    for weights, caches in ((None, DTYPES), ("int8", ("float32", "int8"))):
        params = prepare_for_decode(config, trained.params, weights)
        for cache in caches:
            found = predictions(config, params, tokens_BT, cache)
            exact = found if exact is None else exact
            names = {"cache_dtype": cache, "weights": weights or config.dtype}
            rows.append(names | compare(found, exact, tokens_BT))
    report = {
        "command": " ".join(["python -m benchmarks.decode_dtypes", *sys.argv[1:]]),
        "machine": machine(),
        "scheme": f"{config.loop.scheme}, {config.loop.count} loops",
        "dtype": config.dtype,
        "tokens": int(tokens_BT.size),
        "rows": rows,
    }
    print(table(report))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def beginnings(trained: Trained, text: str | None, documents: int, tokens: int) -> np.ndarray:
    """The first tokens of evenly spaced documents that are long enough, int32 [B, T].

    Raises:
      InputError: no document is so long, the context is not, or the run read a synthetic task.
    """
    if documents < 1 or not 2 <= tokens <= trained.config.model.max_length:
        raise InputError(
            f"--documents is {documents} and --tokens {tokens}; at least 1 and 2 are needed, and "
            f"the context holds {trained.config.model.max_length}"
        )
    found = (document[:tokens].copy() for document in documents_of(stream_of(trained, text, None)))
    long_enough = [beginning for beginning in found if len(beginning) == tokens]
    if not long_enough:
        raise InputError(f"no document of the text has {tokens} tokens; lower --tokens")
    spaced = np.linspace(0, len(long_enough) - 1, min(documents, len(long_enough))).astype(int)
    return np.array([long_enough[index] for index in spaced], np.int32)


def predictions(config: ModelConfig, params: DecodeWeights, tokens_BT: np.ndarray, dtype: str):
    """Log-probabilities of the next token after each but the last, float32 [T - 1, B, V]."""
    B, T = tokens_BT.shape
    cache = init_cache(config, B, T, dtype)
    return _predictions(config, params, jnp.asarray(tokens_BT.T[:-1]), cache)


@functools.partial(jax.jit, static_argnums=0)
def _predictions(config: ModelConfig, params: DecodeWeights, tokens_TB: jax.Array, cache: Cache):
    def step(cache: Cache, tokens_B: jax.Array):
        logits_BV, cache = decode_step(config, params, tokens_B, cache)
        return cache, jax.nn.log_softmax(logits_BV)

    return jax.lax.scan(step, cache, tokens_TB)[1]


def compare(found, exact, tokens_BT: np.ndarray) -> dict[str, float]:
    """Compares predictions with the text, and with those of a float32 cache.

    Args:
      found, exact: log-probabilities, float32 [T - 1, B, V].
      tokens_BT: the text, int32 [B, T].

    Returns:
      The loss, the mean and largest Kullback-Leibler divergence from the exact predictions, and the
      share of positions where both have the same most likely token.
    """
    next_TB = tokens_BT.T[1:, :, None]
    loss = -jnp.mean(jnp.take_along_axis(found, next_TB, axis=2))
    divergence_TB = jnp.sum(jnp.exp(exact) * (exact - found), axis=2)
    same_TB = jnp.argmax(found, axis=2) == jnp.argmax(exact, axis=2)
    return {
        "nats_per_token": float(loss),
        "mean_divergence": float(jnp.mean(divergence_TB)),
        "largest_divergence": float(jnp.max(divergence_TB)),
        "same_likeliest_token": float(jnp.mean(same_TB)),
    }


def table(report: dict) -> str:
    """The report as text."""
    lines = [
        f"{report['scheme']}, {report['dtype']}, {report['tokens']} tokens",
        f"{'weights':9} {'cache':9} {'nats/token':>11} {'mean KL':>10} {'largest KL':>11} "
        f"{'same argmax':>12}",
    ]
    lines += [
        f"{row['weights']:9} {row['cache_dtype']:9} {row['nats_per_token']:11.5f} "
        f"{row['mean_divergence']:10.2e} {row['largest_divergence']:11.2e} "
        f"{row['same_likeliest_token']:12.4f}"
        for row in report["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
