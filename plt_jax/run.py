"""The run directory: what train.py leaves, and how everything else opens it.

config.yaml      the resolved configuration
tokenizer.json   the tokenizer (Hugging Face tokenizers)
checkpoints/N/   orbax checkpoints by step
metrics.jsonl    one JSON object per line; tensorboard/ has the same; loss.png draws it
eval.json        what eval.py found last
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tokenizers import Tokenizer

from plt_jax.checkpoint import list_steps, load_params
from plt_jax.config import MeshConfig, RunConfig, Section
from plt_jax.config_file import dump_config, load_config
from plt_jax.data.tokenizer import load_tokenizer
from plt_jax.errors import InputError
from plt_jax.model.transformer import Transformer
from plt_jax.sharding import abstract_arrays, make_mesh

CONFIG, TOKENIZER, CHECKPOINTS, METRICS = (
    "config.yaml",
    "tokenizer.json",
    "checkpoints",
    "metrics.jsonl",
)

# What may change between one start of a run and the next, because no step's result depends on it
# (training.steps moves the end of the schedule: allowed, since longer training is a fair wish).
MAY_CHANGE = (
    "run_dir",
    "checkpoint.",
    "evaluation.",
    "mesh.",
    "data.cache_dir",
    "data.prefetch",
    "training.steps",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.sample_prompt",
)


class Trained(NamedTuple):
    """A checkpoint, opened for evaluation or decoding."""

    directory: Path
    """The run directory."""
    config: RunConfig
    tokenizer: Tokenizer
    step: int
    params: Any
    """As `Transformer.init` gives them, unboxed."""


def open_trained(path: str | Path, mesh: Mesh | None = None) -> Trained:
    """Opens a run directory (its newest checkpoint) or one of its `checkpoints/STEP` folders.

    Args:
      mesh: where the parameters go, by the rules of sharding.py; default one device. It need not be
        the one that they were trained on.

    Raises:
      InputError: the path is neither, or holds no checkpoint.
    """
    path = Path(path).resolve()  # the name of a folder given as . tells what it is
    if not path.exists():
        raise InputError(f"{path} does not exist; give a run directory, or one of its checkpoints")
    directory, step = path, None
    if path.name.isdigit() and path.parent.name == CHECKPOINTS:
        directory, step = path.parent.parent, int(path.name)
    elif path.name == CHECKPOINTS:
        directory = path.parent
    if not (directory / CONFIG).is_file():
        raise InputError(
            f"{path} is neither a run directory nor a checkpoint of one: {directory / CONFIG} is "
            "missing; train one with train.py"
        )
    steps = list_steps(directory / CHECKPOINTS)
    if not steps:
        raise InputError(
            f"{directory / CHECKPOINTS} holds no checkpoint; train until the first is saved"
        )
    if step is not None and step not in steps:
        raise InputError(f"{path} is not a complete checkpoint; there are {steps}")
    step = steps[-1] if step is None else step
    config = load_config(directory / CONFIG)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    init = Transformer(config.model).init
    boxed = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    abstract = abstract_arrays(boxed, mesh or make_mesh(MeshConfig(), jax.local_devices()[:1]))
    params = load_params(directory / CHECKPOINTS, step, abstract)
    return Trained(directory, config, tokenizer, step, params)


def check_directory(config: RunConfig) -> list[str]:
    """Checks that the run directory is new, empty, or holds a run that this configuration resumes.

    Returns:
      The changes since the run's last start, as `field: old -> new`.

    Raises:
      InputError: the directory holds something else, or a run whose configuration differs in what
        matters.
    """
    directory = Path(config.run_dir)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--run_dir {directory} is a file; choose another")
    if not (directory / CONFIG).exists():
        if directory.exists() and any(directory.iterdir()):
            raise InputError(
                f"--run_dir {directory} is not empty and holds no {CONFIG}, so it is not a run to "
                "resume; choose another"
            )
        return []
    differing = differing_values(load_config(directory / CONFIG), config)
    changes = [f"{name}: {old} -> {new}" for name, (old, new) in differing.items()]
    refused = [change for change in changes if not change.startswith(MAY_CHANGE)]
    if refused:
        raise InputError(
            f"--run_dir {directory} was made with another config ({'; '.join(refused)}); "
            "choose another, or give the same values to resume it"
        )
    return changes


def write_directory(config: RunConfig, tokenizer: Tokenizer) -> Path:
    """Makes the run directory with its config and tokenizer; call `check_directory` before.

    Raises:
      InputError: it cannot be written to.
    """
    directory = Path(config.run_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make --run_dir {directory}: {error.strerror}") from error
    write_text(directory / CONFIG, dump_config(config))
    write_text(directory / TOKENIZER, tokenizer.to_str())
    return directory


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Checks that a run to resume was begun with this tokenizer.

    Raises:
      InputError: it was begun with another, so the training text or the tokenizer has changed.
    """
    path = Path(config.run_dir) / TOKENIZER
    if path.exists() and load_tokenizer(path).to_str() != tokenizer.to_str():
        raise InputError(
            f"the training text or its tokenizer has changed since {path} was written; bring back "
            "the text to resume, or choose another --run_dir"
        )


def differing_values(one: Section, other: Section) -> dict[str, tuple[Any, Any]]:
    """Dotted names and both values of the fields in which two configurations of a type differ."""
    differing = {}
    for name in type(one).model_fields:
        left, right = getattr(one, name), getattr(other, name)
        if isinstance(left, Section):
            inner = differing_values(left, right)
            differing |= {f"{name}.{field}": values for field, values in inner.items()}
        elif left != right:
            differing[name] = (left, right)
    return differing


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, so that a kill leaves the old one or the new one.

    Raises:
      InputError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
