"""Streams text from a trained model: python -m plt_jax.generate RUN_OR_CHECKPOINT --prompt TEXT.

In Python `plt_jax.generate` is the function of decoding/generation.py.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from plt_jax.commands.decoding_options import add_decoding_options
from plt_jax.commands.device_options import DeviceOptions, add_dtype
from plt_jax.commands.parser import CommandParser
from plt_jax.data.tokenizer import HUGGINGFACE
from plt_jax.errors import InputError

if TYPE_CHECKING:  # they import JAX
    from plt_jax.decoding.early_exit import ExitRule
    from plt_jax.runs.directory import Trained


def main() -> None:
    parser = CommandParser(
        prog="python -m plt_jax.generate",
        description="Stream text from a trained model; decoding is greedy unless a "
        "temperature is given.",
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    parser.add_argument("--prompt", default="", help="text to continue; with --chat, to answer")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="send the prompt as a user's message, by the chat template of an imported model; "
        "shows the answer alone",
    )
    parser.add_argument("--system", help="the system's message before it, with --chat")
    parser.add_argument(
        "--special_tokens",
        action="store_true",
        help="read names of special tokens in the prompt as these tokens, instead of as text",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends the continuation and is no part of it; may be given several times",
    )
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
        "--exit",
        metavar="RULE",
        help="stop a token's loops early, in schemes without a shift: at the first prediction that "
        "is less than NUMBER nats from the loop before (kl:NUMBER), or has an entropy below NUMBER "
        "(entropy:NUMBER), or where the exit gate reaches NUMBER (gate[:NUMBER]); the mean number "
        "of loops is printed on stderr",
    )
    add_decoding_options(parser)
    add_dtype(parser, "parameters", "as they are stored")
    devices = DeviceOptions(parser)
    arguments = parser.parse_args()
    if arguments.system is not None and not arguments.chat:
        raise InputError("--system is the system's message of a chat; give --chat with it")
    import jax

    from plt_jax.decoding.sampling import Sampling
    from plt_jax.decoding.text import TextStream
    from plt_jax.decoding.weights import prepare_for_decode
    from plt_jax.distributed.mesh import use_mesh
    from plt_jax.runs.directory import open_for_decoding

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    sampling.check()
    mesh = devices.connect(arguments)
    rule = None if arguments.exit is None else exit_rule(arguments)
    trained = open_for_decoding(arguments.path, mesh, arguments.loops, dtype=arguments.dtype)
    config = trained.config.model
    with use_mesh(mesh):
        weights = prepare_for_decode(config, trained.params, arguments.weights)
        pieces = TextStream(
            config,
            weights,
            trained.tokenizer,
            encode(arguments, trained),
            arguments.max_new_tokens,
            sampling,
            jax.random.key(arguments.seed),
            arguments.cache_dtype,
            arguments.stop,
            rule,
        )
        if not arguments.chat:
            sys.stdout.write(arguments.prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()
    if rule is not None and pieces.tokens.decoded:
        run = pieces.tokens.loops / pieces.tokens.decoded
        print(f"{run:.2f} of {config.loop.count} loops a token", file=sys.stderr)


def exit_rule(arguments: Namespace) -> ExitRule:
    """The rule of --exit, which is checked before the parameters are read.

    Raises:
      InputError: it is no rule, or the model's loops cannot end by it.
    """
    from plt_jax.decoding.early_exit import check_rule, parse_rule
    from plt_jax.runs.directory import find_checkpoint

    model = find_checkpoint(arguments.path).config.model
    loops = model.loop.count if arguments.loops is None else arguments.loops
    model = model.model_copy(update={"loop": model.loop.model_copy(update={"count": loops})})
    rule = parse_rule(arguments.exit, model)
    check_rule(model, rule)
    return rule


def encode(arguments: Namespace, trained: Trained) -> list[int]:
    """The tokens of the prompt, or of the chat with it.

    Raises:
      InputError: the model has no chat template, or it refuses the messages.
    """
    tokenizer = trained.tokenizer
    if not arguments.chat:
        chosen = tokenizer.reading_special if arguments.special_tokens else tokenizer
        return chosen.encode_prompt(arguments.prompt)
    from plt_jax.decoding.chat import encode_chat, load_chat_template

    messages = [{"role": "user", "content": arguments.prompt}]
    if arguments.system is not None:
        messages.insert(0, {"role": "system", "content": arguments.system})
    template = load_chat_template(trained.directory / HUGGINGFACE, tokenizer)
    # The template's text has the begin token, if any.
    return encode_chat(template, tokenizer, messages)
