"""Streams text from a trained model: python -m plt_jax.generate RUN_OR_CHECKPOINT --prompt TEXT.

A command only: `plt_jax.generate` in Python is the function of decoding/generation.py, so nothing
imports this file.
"""

import sys

from plt_jax.commands.parser import CommandParser
from plt_jax.decoding.cache import DTYPES


def main() -> None:
    parser = CommandParser(
        prog="python -m plt_jax.generate",
        description="Stream text from a trained model; greedy unless a temperature is given.",
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens to add at most")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="divides the logits; 0 for greedy"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="draw among this many likeliest tokens; 0 for all"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw among the likeliest with this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument(
        "--cache_dtype", choices=DTYPES, help="of keys and values; default the compute dtype"
    )
    parser.add_argument("--loops", type=int, help="default as many as it was trained with")
    arguments = parser.parse_args()
    import jax

    from plt_jax.decoding.sampling import Sampling
    from plt_jax.decoding.text import stream_text
    from plt_jax.runs.directory import open_trained

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    sampling.check()
    trained = open_trained(arguments.path, loops=arguments.loops)
    pieces = stream_text(
        trained.config.model,
        trained.params,
        trained.tokenizer,
        arguments.prompt,
        arguments.max_new_tokens,
        sampling,
        jax.random.key(arguments.seed),
        arguments.cache_dtype,
    )
    sys.stdout.write(arguments.prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
