"""Serves a trained model: python -m plt_jax.serve RUN_OR_CHECKPOINT."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import threading
import time
from argparse import Namespace
from typing import TYPE_CHECKING

from plt_jax.commands.decoding_options import add_decoding_options
from plt_jax.commands.parser import CommandParser
from plt_jax.data.tokenizer import HUGGINGFACE
from plt_jax.errors import FailedError, InputError

if TYPE_CHECKING:  # they import JAX and the HTTP server
    from jax.sharding import Mesh

    from plt_jax.runs.directory import Trained
    from plt_jax.serving.engine import Engine
    from plt_jax.serving.metrics import Metrics
    from plt_jax.serving.model import ServedModel

API_KEY = "PLT_API_KEY"
"""The environment variable with the key that clients must send."""
MEBIBYTE = 2**20

PREFILL_ON_CPU, PREFILL_ELSEWHERE = 16, 256
"""Tokens of prompts between two steps: on a CPU so few that running texts wait no more than two
steps longer, elsewhere so many that arithmetic, and not the weights' reading, takes the time."""


def main() -> None:
    arguments = parse()
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{package} is not installed, which serving needs: pip install 'plt_jax[serve]'"
            )
    from plt_jax.runs.directory import open_for_decoding

    with listening(arguments.host, arguments.port) as listener:
        mesh = serving_mesh(getattr(arguments, "mesh.tensor"))
        trained = open_for_decoding(arguments.path, mesh, arguments.loops)
        model, metrics = build(trained, arguments, mesh)
        serve(model, metrics, listener, arguments.drain_seconds)


def parse() -> Namespace:
    parser = CommandParser(
        prog="python -m plt_jax.serve",
        description="Serve a trained model by OpenAI's API. Clients need the key that the "
        f"environment variable {API_KEY} holds, if it is set.",
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all")
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen at; 0 for a free one"
    )
    parser.add_argument("--name", help="the model's name for clients; default the run directory's")
    parser.add_argument("--slots", type=int, default=8, help="texts that are written at once")
    parser.add_argument(
        "--context", type=int, help="tokens of a prompt and its answer; default the model's context"
    )
    parser.add_argument(
        "--queue", type=int, default=256, help="requests that may wait; further ones get status 429"
    )
    parser.add_argument(
        "--prefill_tokens",
        type=int,
        help="tokens of prompts that are read between two steps of running texts; default "
        f"{PREFILL_ON_CPU} on a CPU, {PREFILL_ELSEWHERE} elsewhere",
    )
    parser.add_argument(
        "--prefix_cache_mb",
        type=int,
        default=512,
        help="megabytes of device memory for the beginnings of earlier prompts; 0 for none",
    )
    add_decoding_options(parser)
    parser.add_argument(
        "--mesh.tensor",
        type=int,
        default=1,
        help="devices that share the model: each has a part of every weight, and of the cache",
    )
    parser.add_argument(
        "--drain_seconds",
        type=float,
        default=30.0,
        help="seconds that running texts get to end after SIGTERM",
    )
    arguments = parser.parse_args()
    for name, least in (
        ("mesh.tensor", 1),
        ("slots", 1),
        ("queue", 0),
        ("prefill_tokens", 1),
        ("prefix_cache_mb", 0),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}; it must be at least {least}")
    if not 0 <= arguments.drain_seconds < 1e6:
        raise InputError(f"--drain_seconds is {arguments.drain_seconds}; it must be 0 to a million")
    if os.environ.get(API_KEY) == "":
        raise InputError(f"{API_KEY} is empty; set it to a key, or unset it")
    if not 0 <= arguments.port < 2**16:
        raise InputError(f"--port is {arguments.port}; it must be 0 to {2**16 - 1}")
    return arguments


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens, opened before the model is, which takes longer.

    Raises:
      InputError: it cannot be opened.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}:{port} ({error.strerror or error}); choose another --port"
        ) from error


def serving_mesh(devices: int) -> Mesh | None:
    """The mesh of so many devices; None for one.

    Raises:
      InputError: there are fewer.
    """
    import jax

    from plt_jax.config import MeshConfig
    from plt_jax.distributed.mesh import make_mesh

    here = jax.local_devices()
    if devices > len(here):
        raise InputError(f"--mesh.tensor is {devices}, but there are {len(here)} devices here")
    if devices == 1:
        return None
    return make_mesh(MeshConfig(data=1, tensor=devices), here[:devices])


def build(
    trained: Trained, arguments: Namespace, mesh: Mesh | None = None
) -> tuple[ServedModel, Metrics]:
    """The model with its engine, whose programs are compiled, and its numbers.

    Args:
      mesh: the mesh of the parameters; see `SlotModel`.

    Raises:
      InputError: an option does not fit the model.
    """
    import jax

    from plt_jax.decoding.chat import find_chat_template
    from plt_jax.decoding.weights import prepare_for_decode
    from plt_jax.distributed.mesh import use_mesh
    from plt_jax.serving.engine import Engine
    from plt_jax.serving.metrics import Metrics
    from plt_jax.serving.model import ServedModel
    from plt_jax.serving.prefix_cache import PrefixCache
    from plt_jax.serving.scheduler import Scheduler
    from plt_jax.serving.slots import SlotModel, block_bytes

    config, tokenizer = trained.config.model, trained.tokenizer
    context = arguments.context or config.max_length
    if not 2 <= context <= config.max_length:
        raise InputError(
            f"--context is {context}; it must be 2 to {config.max_length}, the model's"
        )
    template = find_chat_template(trained.directory / HUGGINGFACE, tokenizer)
    usual = PREFILL_ON_CPU if jax.default_backend() == "cpu" else PREFILL_ELSEWHERE
    chunk = min(arguments.prefill_tokens or usual, context)
    with use_mesh(mesh):
        weights = prepare_for_decode(config, trained.params, arguments.weights)
    slots = SlotModel(config, weights, arguments.slots, context, chunk, arguments.cache_dtype, mesh)
    print("compiling the programs, which takes a minute or more", file=sys.stderr, flush=True)
    slots.compile()
    prefix_cache = PrefixCache(
        chunk,
        block_bytes(config, chunk, arguments.cache_dtype),
        arguments.prefix_cache_mb * MEBIBYTE,
    )
    metrics = Metrics()
    scheduler = Scheduler(slots, prefix_cache, arguments.queue, metrics)
    metrics.watch(scheduler, prefix_cache, arguments.slots * context)
    model = ServedModel(
        name=arguments.name or trained.directory.resolve().name,
        created=int(time.time()),
        engine=Engine(scheduler),
        tokenizer=tokenizer,
        template=template,
        vocab_size=config.vocab_size,
        context=context,
        loops=config.loop.count,
        longest_token=max(map(len, tokenizer.library.get_vocab())),
    )
    return model, metrics


def serve(
    model: ServedModel, metrics: Metrics, listener: socket.socket, drain_seconds: float
) -> None:
    """Serves a model until a signal comes.

    Raises:
      FailedError: the engine has failed.
    """
    import uvicorn

    from plt_jax.serving.app import make_app

    engine = model.engine

    class Server(uvicorn.Server):
        """Lets running texts end before it does."""

        def handle_exit(self, sig, frame) -> None:
            _stop_engine(engine, drain_seconds)
            # Uvicorn's own handler would raise the signal again at the end, for another status.
            self.force_exit, self.should_exit = self.should_exit, True

    app = make_app(model, metrics, os.environ.get(API_KEY))
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=int(drain_seconds) + 5,
    )
    server = Server(config)

    def end() -> None:
        server.should_exit = True

    engine.on_failure = end
    engine.start()
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{model.name} is served at http://{shown}:{port}/v1", file=sys.stderr, flush=True)
    server.run(sockets=[listener])
    engine.stop(within=0)
    if engine.failure is not None:
        raise FailedError(f"the engine failed: {engine.failure}") from engine.failure


def _stop_engine(engine: Engine, drain_seconds: float) -> None:
    """Ends the engine without waiting, since a signal's handler must not."""
    threading.Thread(target=engine.stop, args=(drain_seconds,), daemon=True).start()
