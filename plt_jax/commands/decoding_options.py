"""The options that say how a trained model is decoded, which several commands have."""

from __future__ import annotations

from argparse import ArgumentParser

from plt_jax.decoding.options import DTYPES, WEIGHTS


def add_decoding_options(parser: ArgumentParser) -> None:
    """Adds --cache_dtype, --weights and --loops."""
    parser.add_argument(
        "--cache_dtype",
        choices=DTYPES,
        help="dtype of the cached keys and values; default the compute dtype",
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="dtype of the large weights: int8 halves what a bfloat16 model reads; default the "
        "compute dtype, or int8 if the run was quantized",
    )
    parser.add_argument(
        "--loops", type=int, help="number of loops; default the number that it was trained with"
    )
