"""Streams text from a trained model: python -m plt_jax.generate RUN_OR_CHECKPOINT --prompt TEXT.

In Python `plt_jax.generate` is the function of decoding/generation.py.
"""

import sys

from plt_jax.commands.parser import CommandParser
from plt_jax.decoding.options import DTYPES


def main() -> None:
    parser = CommandParser(
        prog="python -m plt_jax.generate",
        description="Stream text from a trained model; decoding is greedy unless a "
        "temperature is given.",
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="most new tokens")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="divisor of the logits; 0 is greedy",
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="draw among the k most probable tokens; 0 for all"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw among the most probable tokens that together have this probability",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument(
        "--cache_dtype",
        choices=DTYPES,
        help="dtype of the cached keys and values; default the compute dtype",
    )
    parser.add_argument(
        "--loops", type=int, help="number of loops; default the number that it was trained with"
    )
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
