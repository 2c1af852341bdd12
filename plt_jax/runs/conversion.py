"""Conversions between run directories and Hugging Face checkpoints, and of models without loops
into looped ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from plt_jax.config import EvaluationConfig, LoopConfig, ModelConfig, RunConfig
from plt_jax.config.data import DataConfig
from plt_jax.data.tokenizer import HUGGINGFACE, TOKENIZER, TextTokenizer, load_tokenizer
from plt_jax.decoding.quantization import quantize_params
from plt_jax.distributed import processes
from plt_jax.errors import InputError
from plt_jax.files import check_new_folder, new_folder
from plt_jax.interop.checkpoint_reader import load_params, open_huggingface
from plt_jax.interop.checkpoint_writer import check_exportable, write_huggingface
from plt_jax.interop.config_writer import write_config
from plt_jax.interop.model_types import choose_model_type
from plt_jax.interop.options import SHARD_BYTES
from plt_jax.interop.retrofit import compare_models, retrofit
from plt_jax.interop.tensors import UnstackedParameter
from plt_jax.interop.tokenizer_files import companion_files, write_tokenizer_files
from plt_jax.model.costs import describe_loops
from plt_jax.runs.directory import Found, create_run, find_checkpoint, read_params, tokenizer_of

Report = Callable[[str], None]
"""Receives lines for people, without their line ends."""

IMPORTED_SEQUENCE_LENGTH = 1024
"""The longest sequence, in tokens, that evaluation of an imported run reads by default. The model's
context can be longer than memory allows."""
IMPORTED_BATCH_SIZE = 8
"""Sequences per evaluation batch of an imported run."""


def import_run(
    source: str,
    destination: str,
    dtype: str | None = None,
    tokenizer: str | None = None,
    *,
    report: Report,
    track: Callable[[Sequence[UnstackedParameter]], Iterable[UnstackedParameter]] = iter,
) -> None:
    """Makes a run directory from a Hugging Face checkpoint folder.

    Args:
      dtype: dtype of the parameters; default: the checkpoint's.
      tokenizer: path of a tokenizer.json to use instead of the checkpoint's.
      track: sees every parameter of every layer as it is read, for a progress bar.

    Raises:
      InputError: the source is refused by `load_huggingface`, its tokenizer has more tokens than
        the model's vocabulary, or the destination is taken; nothing is left then.
    """
    check_new_folder(destination)
    checkpoint = open_huggingface(source, dtype)
    config = checkpoint.config
    chosen, companions = _choose_tokenizer(checkpoint.folder, tokenizer)
    if chosen is not None:
        chosen.check_size(config.vocab_size)
    else:
        report(
            f"{checkpoint.folder} has no tokenizer.json: evaluation and generation need --tokenizer"
        )
    params = load_params(checkpoint, track=track)
    run = RunConfig(
        run_dir=destination,
        model=config,
        data=DataConfig(sequence_length=min(config.max_length, IMPORTED_SEQUENCE_LENGTH)),
        evaluation=EvaluationConfig(batch_size=IMPORTED_BATCH_SIZE),
    )
    create_run(run, params, chosen, companions)
    report(
        f"imported {checkpoint.model_type} from {checkpoint.folder}: "
        f"{describe_model(config, params)}"
    )
    report(f"written to {destination}")


def export_run(
    source: str,
    destination: str,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    mesh: Mesh | None = None,
    *,
    report: Report,
) -> None:
    """Writes a run's checkpoint as a Hugging Face checkpoint folder, with the run's tokenizer.

    With several processes all must call it, and process 0 writes.

    Args:
      source: a run directory (its newest checkpoint) or one of its checkpoints/STEP folders.
      dtype: dtype of the tensors; default: the parameters'.
      shard_bytes: size limit of one safetensors file, in bytes; process 0 holds the tensors of one
        file at a time.
      mesh: the devices that hold the parameters; default one device.

    Raises:
      InputError: there is no sound checkpoint, no Hugging Face model type can express the model, or
        the destination is taken; nothing is left then.
    """
    check_new_folder(destination)
    found = find_checkpoint(source)
    config, params = found.config.model, read_params(found, mesh)
    check_exportable(config, params)
    write = partial(write_huggingface, config=config, params=params, dtype=dtype)
    if processes.is_first():
        with new_folder(destination) as folder:
            token_ids = write_tokenizer_files(
                folder,
                found.directory / TOKENIZER,
                found.directory / HUGGINGFACE,
                config.max_length,
            )
            write(folder, shard_bytes=shard_bytes, token_ids=token_ids)
    else:
        write(Path(destination))
    report(
        f"exported {found.directory}, step {found.step}, as {choose_model_type(config)}: "
        f"{describe_model(config, params)}"
    )
    report(f"written to {destination}")


def retrofit_run(
    source: str,
    destination: str,
    loop: LoopConfig,
    gate_bias: float,
    compare_tokens: int | None = None,
    *,
    report: Report,
) -> None:
    """Makes a run directory of a looped model from a run of a model without loops.

    Args:
      source: a run directory (its newest checkpoint) or one of its checkpoints/STEP folders.
      loop: the new model's looping.
      gate_bias: the gates' bias at the start; see `interop.retrofit.retrofit`.
      compare_tokens: number of random tokens on which the two models are compared, 0 for none;
        default: 256, or four windows if that is more.

    Raises:
      InputError: there is no sound checkpoint, its model loops already, the destination is taken,
        or `compare_tokens` is negative; nothing is left then.
    """
    if (compare_tokens or 0) < 0:
        raise InputError(f"--compare_tokens is {compare_tokens}; it must be 0 or more")
    check_new_folder(destination)
    found = find_checkpoint(source)
    source_params = read_params(found)
    config, params = retrofit(found.config.model, source_params, loop, gate_bias)
    create_run(
        found.config.model_copy(
            update={"model": config, "run_dir": destination, "start_from": None}
        ),
        params,
        tokenizer_of(found),
        companion_files(found.directory / HUGGINGFACE),
    )
    report(f"retrofitted {found.directory}, step {found.step}: {describe_model(config, params)}")
    report(f"written to {destination}")
    for line in _advice(config, destination):
        report(line)
    if compare_tokens != 0:
        length = compare_tokens or max(256, 4 * loop.window)
        for line in _compare(found, source_params, config, params, length):
            report(line)


def quantize_run(source: str, destination: str, *, report: Report) -> None:
    """Makes a run directory whose large weights are rounded to eight bits; see `quantize_params`.

    Args:
      source: a run directory (its newest checkpoint) or one of its checkpoints/STEP folders.

    Raises:
      InputError: there is no sound checkpoint, or the destination is taken; nothing is left then.
    """
    check_new_folder(destination)
    found = find_checkpoint(source)
    params = quantize_params(read_params(found, quantized=True))
    config = found.config
    create_run(
        config.model_copy(update={"run_dir": destination, "start_from": None}),
        params,
        tokenizer_of(found),
        companion_files(found.directory / HUGGINGFACE),
    )
    report(
        f"quantized {found.directory}, step {found.step}: {describe_model(config.model, params)}"
    )
    report(f"written to {destination}")


def _choose_tokenizer(
    folder: Path, given: str | None
) -> tuple[TextTokenizer | None, Mapping[str, Path]]:
    """The tokenizer of an imported run, and the files that are kept beside it, by name."""
    companions = companion_files(folder)
    own = companions.get(TOKENIZER)
    if given is None:
        return load_tokenizer(own) if own else None, companions
    # The other files describe the checkpoint's own tokenizer, so another one does not keep them.
    kept = {} if own else companions
    chosen = load_tokenizer(given, described_in=folder if companions and not own else None)
    return chosen, {**kept, TOKENIZER: Path(given)}


def _advice(config: ModelConfig, destination: str) -> list[str]:
    """What to know before a retrofitted model is trained, line by line."""
    lines, option = [], ""
    try:
        write_config(config, "float32", {})
    except InputError as error:
        lines.append(f"note: {error}")
    if config.loop.shifted and config.loop.hidden_scale == 0:
        lines.append(
            "note: with hidden_scale 0 no loop reads the one before it; change it to train"
        )
        option = " --model.loop.hidden_scale 0.01"
    lines.append(
        "to train from it: python train.py configs/continue.yaml --start_from "
        f"{destination} --data.source FOLDER{option}"
    )
    return lines


def _compare(
    found: Found, source_params: Any, config: ModelConfig, params: Any, length: int
) -> list[str]:
    """How far a retrofitted model's predictions are from its source's, line by line."""
    loop, length = config.loop, min(length, config.max_length)
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, config.vocab_size)
    difference = compare_models(found.config.model, source_params, config, params, tokens)
    lines = [
        f"on {length} random tokens its logits are within {difference.largest_logit:.2g} of the "
        f"source's, its predictions {difference.kl_divergence:.2g} nats (KL) away"
    ]
    if loop.later_attention == "gated" and length <= loop.window:
        lines.append(
            f"note: the window of {loop.window} held all of them, so its effect does not show"
        )
    return lines


def describe_model(config: ModelConfig, params: Any) -> str:
    """A model in one line: its looping scheme and its size."""
    leaves = jax.tree.leaves(params)
    count, size = sum(math.prod(leaf.shape) for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in leaves}))
    return f"{describe_loops(config)}, {count:,} parameters, {dtypes}, {size / 1e9:.2f} GB"
