"""Run directories: made, checked before a run resumes in them, and opened. `names.py` names
what they hold."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import can_resume, load_params, refuse_damaged, save_params
from plt_jax.config import MeshConfig, RunConfig
from plt_jax.config.types import Section
from plt_jax.config.yaml_file import dump_config, load_resolved
from plt_jax.data.tokenizer import check_size, load_tokenizer
from plt_jax.distributed.mesh import abstract_arrays, make_mesh
from plt_jax.errors import InputError
from plt_jax.files import copy_file, new_folder, write_text
from plt_jax.model.looping import with_loops
from plt_jax.model.transformer import abstract_params
from plt_jax.runs.names import CHECKPOINTS, CONFIG, HUGGINGFACE, TEXT, TOKENIZER, locate

# What may change between one start of a run and the next, because no step's result depends on it
# (training.steps moves the end of the schedule: allowed, since longer training is a fair wish).
MAY_CHANGE = (
    "run_dir",
    "start_from",  # has been read
    "tokenizer.path",  # what it holds is compared
    "checkpoint.",
    "guard.patience",
    "guard.rollbacks",
    "evaluation.",
    "mesh.",
    "processes.",
    "model.attention",  # computes the same model; as with another mesh, only rounding differs
    "model.moe.grouped_product",  # the same
    "model.remat",  # the same, and what running out of memory asks for
    "model.layer_unroll",
    "training.accumulate",  # but see may_change
    "data.cache_dir",
    "data.prefetch",
    "data.synthetic.test_difficulties",
    "data.sources.path",  # what is there is compared
    "training.steps",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.hang_after",
    "training.sample_prompt",
    "training.profile_from",
    "training.profile_steps",
    "training.wandb_project",
)


def may_change(config: RunConfig) -> tuple[str, ...]:
    """Beginnings of the names of what may be another when the run of a configuration goes on."""
    moe = config.model.moe
    # The routers' losses are one of each micro-batch.
    if moe.experts and (moe.load_balance_loss or moe.router_z_loss):
        return tuple(name for name in MAY_CHANGE if name != "training.accumulate")
    return MAY_CHANGE


class Found(NamedTuple):
    """A checkpoint that a path leads to, and what it is one of."""

    directory: Path
    """The run directory."""
    config: RunConfig
    step: int


class Trained(NamedTuple):
    """A checkpoint, opened for evaluation or decoding."""

    directory: Path
    """The run directory."""
    config: RunConfig
    tokenizer: Tokenizer
    step: int
    params: Any
    """See `read_params`."""


def open_trained(path: str | Path, mesh: Mesh | None = None, loops: int | None = None) -> Trained:
    """Opens a run directory (its newest checkpoint) or one of its `checkpoints/STEP` folders.

    Args:
      mesh: where the parameters go, by the rules of distributed/mesh.py; default one device. It
        need not be the one that they were trained on.
      loops: that the model runs; default as many as it was trained with.

    Raises:
      InputError: the path is neither, holds no checkpoint, or has no tokenizer; or the scheme
        cannot run so many loops.
    """
    found = find_checkpoint(path)
    directory, config, step = found
    if not (directory / TOKENIZER).exists() and (directory / HUGGINGFACE).exists():
        raise InputError(
            f"{directory} was imported without a tokenizer; import it again with --tokenizer FILE"
        )
    # Before the parameters, which take longer to read.
    tokenizer = load_tokenizer(directory / TOKENIZER)
    check_size(tokenizer, config.model.vocab_size)
    params = read_params(found, mesh)
    # What the training machine's devices ran need not be here.
    moe = config.model.moe.model_copy(update={"grouped_product": "auto"})
    model = config.model.model_copy(update={"attention": "auto", "moe": moe})
    if loops is not None:
        model, params = with_loops(model, params, loops)
    return Trained(directory, config.model_copy(update={"model": model}), tokenizer, step, params)


def find_checkpoint(path: str | Path) -> Found:
    """The checkpoint that a path means: that of its step, or a run's newest.

    Raises:
      InputError: the path leads to no complete checkpoint.
    """
    directory, step = locate(path)
    steps = list_steps(directory / CHECKPOINTS)
    if not steps:
        raise InputError(
            f"{directory / CHECKPOINTS} holds no checkpoint; train until the first is saved"
        )
    if step is not None and step not in steps:
        raise InputError(f"{path} is not a complete checkpoint; there are {steps}")
    step = steps[-1] if step is None else step
    return Found(directory, load_resolved(directory / CONFIG), step)


def read_params(found: Found, mesh: Mesh | None = None, dtype: str | None = None) -> Any:
    """A checkpoint's parameters, as `Transformer.init` gives them, unboxed.

    Args:
      mesh: where they go, by the rules of distributed/mesh.py; default one device.
      dtype: what they are read into; default as they were stored.

    Raises:
      InputError: they are damaged, cannot be read, or are another configuration's.
    """
    if found.config.checkpoint.verify:
        refuse_damaged(found.directory / CHECKPOINTS, found.step, ["params"])
    boxed = abstract_params(found.config.model)
    abstract = abstract_arrays(boxed, mesh or make_mesh(MeshConfig(), jax.local_devices()[:1]))
    directory = found.directory / CHECKPOINTS
    return load_params(directory, found.step, abstract, as_stored=True, dtype=dtype)


def create_run(
    config: RunConfig, params: Any, tokenizer: Path | None, files: Mapping[str, Path]
) -> None:
    """Makes `config.run_dir` with one checkpoint, of step 0, that holds only parameters.

    Args:
      tokenizer: a tokenizer.json, if there is one.
      files: to keep under huggingface/, by name.

    Raises:
      InputError: the directory holds something, or cannot be written to; nothing is left then.
    """
    with new_folder(config.run_dir) as directory:
        write_text(directory / CONFIG, dump_config(config))
        if tokenizer is not None:
            copy_file(tokenizer, directory / TOKENIZER)
        (directory / HUGGINGFACE).mkdir()
        for name, file in files.items():
            copy_file(file, directory / HUGGINGFACE / name)
        save_params(directory / CHECKPOINTS, 0, params)


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
    steps = list_steps(directory / CHECKPOINTS)
    if steps and not any(can_resume(directory / CHECKPOINTS, step) for step in steps):
        raise InputError(
            f"--run_dir {directory} holds parameters alone, with no optimizer's state to resume; "
            f"train from it in another: --start_from {directory} --run_dir ANOTHER"
        )
    differing = differing_values(load_resolved(directory / CONFIG), config)
    changes = [f"{name}: {old} -> {new}" for name, (old, new) in differing.items()]
    refused = [
        change
        for change in changes
        if not re.sub(r"\[\d+\]", "", change).startswith(may_change(config))
    ]
    if refused:
        raise InputError(
            f"--run_dir {directory} was made with another config ({'; '.join(refused)}); "
            "choose another, or give the same values to resume it"
        )
    return changes


def write_directory(config: RunConfig, tokenizer: Tokenizer, fingerprint: str) -> Path:
    """Makes the run directory with its config, its tokenizer and the fingerprint of its text; call
    `check_directory` and `check_text` before.

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
    write_text(directory / TEXT, _text_file(fingerprint))
    if config.start_from is not None and not list_steps(directory / CHECKPOINTS):
        kept = locate(config.start_from).directory / HUGGINGFACE
        if kept.is_dir():
            shutil.copytree(kept, directory / HUGGINGFACE, dirs_exist_ok=True)
    return directory


def check_text(config: RunConfig, tokenizer: Tokenizer, fingerprint: str) -> None:
    """Checks that a run to resume was begun with this text and tokenizer.

    Args:
      fingerprint: of the text, `data.load.Data.fingerprint`.

    Raises:
      InputError: it was begun with others.
    """
    directory = Path(config.run_dir)
    held = {}
    if (directory / TOKENIZER).exists():
        held[TOKENIZER] = load_tokenizer(directory / TOKENIZER).to_str() == tokenizer.to_str()
    if (directory / TEXT).exists():  # runs of earlier versions have none
        held[TEXT] = (directory / TEXT).read_text(encoding="utf-8") == _text_file(fingerprint)
    for name, same in held.items():
        if not same:
            raise InputError(
                f"the training text or its tokenizer has changed since {directory / name} was "
                "written; bring back the text to resume, or choose another --run_dir"
            )


def _text_file(fingerprint: str) -> str:
    return json.dumps({"fingerprint": fingerprint}) + "\n"


def differing_values(one: Section, other: Section) -> dict[str, tuple[Any, Any]]:
    """Dotted names and both values of the fields in which two configurations of a type differ."""
    differing = {}
    for name in type(one).model_fields:
        left, right = getattr(one, name), getattr(other, name)
        if isinstance(left, Section):
            inner = differing_values(left, right)
            differing |= {f"{name}.{field}": values for field, values in inner.items()}
        elif _are_sections(left) and _are_sections(right) and len(left) == len(right):
            for index, (one_item, other_item) in enumerate(zip(left, right, strict=True)):
                inner = differing_values(one_item, other_item)
                differing |= {f"{name}[{index}].{field}": pair for field, pair in inner.items()}
        elif left != right:
            differing[name] = (left, right)
    return differing


def _are_sections(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, Section) for item in value)
