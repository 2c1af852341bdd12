"""Conversions between run directories and Hugging Face checkpoints, and of models without loops
into looped ones."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plt_jax.config import EvaluationConfig, LoopConfig, ModelConfig, RunConfig
from plt_jax.config.data import DataConfig
from plt_jax.data.tokenizer import (
    HUGGINGFACE,
    TOKENIZER,
    TextTokenizer,
    find_tokenizer,
    load_tokenizer,
)
from plt_jax.decoding.quantization import quantize_params
from plt_jax.distributed import processes
from plt_jax.distributed.mesh import whole_batch
from plt_jax.errors import InputError
from plt_jax.files.folders import check_new_folder, local_folder, new_folder
from plt_jax.files.paths import expand, to_path
from plt_jax.files.writing import write_text
from plt_jax.hub.download import Snapshot, fetch
from plt_jax.hub.names import HubName, name_unless_path, read_name
from plt_jax.hub.upload import MODEL_CARD, check_push, push
from plt_jax.interop.checkpoint_reader import load_params, open_huggingface
from plt_jax.interop.checkpoint_writer import check_exportable, write_huggingface
from plt_jax.interop.config_writer import write_config
from plt_jax.interop.hub_checkpoint import open_hub_checkpoint
from plt_jax.interop.model_card import make_model_card
from plt_jax.interop.model_types import choose_model_type
from plt_jax.interop.options import SHARD_BYTES
from plt_jax.interop.retrofit import compare_models, retrofit
from plt_jax.interop.tensors import UnstackedParameter
from plt_jax.interop.tokenizer_files import COMPANIONS, companion_files, write_tokenizer_files
from plt_jax.model.costs import describe_loops
from plt_jax.runs.directory import (
    WAIT_SECONDS,
    Found,
    create_run,
    find_checkpoint,
    read_params,
    tokenizer_of,
)

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
    mesh: Mesh | None = None,
    *,
    report: Report,
    track: Callable[[Sequence[UnstackedParameter]], Iterable[UnstackedParameter]] = iter,
) -> None:
    """Makes a run directory from a Hugging Face checkpoint.

    With several processes all must call it. Each reads and writes what its devices hold.

    Args:
      source: its folder, or its name on the Hugging Face Hub, ORG/NAME or ORG/NAME@REVISION. What
        exists is a folder.
      dtype: dtype of the parameters; default: the checkpoint's.
      tokenizer: a tokenizer to use instead of the checkpoint's, see `find_tokenizer`.
      mesh: the devices that hold the parameters; default one device.
      track: sees every parameter of every layer as it is read, for a progress bar.

    Raises:
      InputError: the source is refused by `open_hub_checkpoint` or `load_huggingface`, its
        tokenizer has more tokens than the model's vocabulary, or the destination is taken; nothing
        is left then.
    """
    check_new_folder(destination)
    given = None if tokenizer is None else find_tokenizer(tokenizer, report)
    with _open_source(source, given, report) as found:
        checkpoint = open_huggingface(found.weights, dtype)
        config = checkpoint.config
        chosen, companions = _choose_tokenizer(found.folder, given)
        if chosen is not None:
            chosen.check_size(config.vocab_size)
        else:
            report(
                f"{found.shown} has no tokenizer.json: evaluation and generation need --tokenizer"
            )
        params = load_params(checkpoint, mesh, track)
        run = RunConfig(
            run_dir=destination,
            model=config,
            data=DataConfig(sequence_length=min(config.max_length, IMPORTED_SEQUENCE_LENGTH)),
            evaluation=EvaluationConfig(batch_size=IMPORTED_BATCH_SIZE),
        )
        create_run(run, params, chosen, companions, found.origin)
    report(f"imported {checkpoint.model_type} from {found.shown}: {describe_model(config, params)}")
    report(f"written to {destination}")


def export_run(
    source: str,
    destination: str,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    repository: str | None = None,
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
      repository: the repository on the Hugging Face Hub to push the folder to, ORG/NAME or
        ORG/NAME@BRANCH, which is made if need be; default: none. If it has no model card, the
        folder gets one.
      mesh: the devices that hold the parameters; default one device.

    Raises:
      InputError: there is no sound checkpoint, no Hugging Face model type can express the model,
        the destination is taken, or the user may not push to the repository; nothing is left then.
        Or the push fails; the folder is whole then.
    """
    check_new_folder(destination)
    target = None if repository is None else check_push(_repository(repository))
    found = find_checkpoint(source)
    config, params = found.config.model, read_params(found, mesh)
    check_exportable(config, params)
    processes.barrier("the destination is checked", WAIT_SECONDS)
    write = partial(write_huggingface, config=config, params=params, dtype=dtype)
    if not processes.is_first():
        write(Path(destination))
        return
    model_type = choose_model_type(config)
    with new_folder(destination) as folder:
        token_ids = write_tokenizer_files(
            folder,
            found.directory / TOKENIZER,
            found.directory / HUGGINGFACE,
            config.max_length,
        )
        write(folder, shard_bytes=shard_bytes, token_ids=token_ids)
        if target is not None and not target.has_card:
            loops, size = describe_loops(config), count_parameters(params)
            card = make_model_card(str(target.name), model_type, loops, size, config.max_length)
            write_text(folder / MODEL_CARD, card)
    report(
        f"exported {found.directory}, step {found.step}, as {model_type}: "
        f"{describe_model(config, params)}"
    )
    report(f"written to {destination}")
    if target is not None:
        with local_folder(to_path(destination), lambda _: True) as folder:
            push(folder, target, f"{model_type}, step {found.step}", report=report)


def retrofit_run(
    source: str,
    destination: str,
    loop: LoopConfig,
    gate_bias: float,
    compare_tokens: int | None = None,
    mesh: Mesh | None = None,
    *,
    report: Report,
) -> None:
    """Makes a run directory of a looped model from a run of a model without loops.

    With several processes all must call it. Each reads and writes what its devices hold.

    Args:
      source: a run directory (its newest checkpoint) or one of its checkpoints/STEP folders.
      loop: the new model's looping.
      gate_bias: the gates' bias at the start; see `interop.retrofit.retrofit`.
      compare_tokens: number of random tokens on which the two models are compared, 0 for none;
        default: 256, or four windows if that is more.
      mesh: the devices that hold the parameters; default one device.

    Raises:
      InputError: there is no sound checkpoint, its model loops already, the destination is taken,
        or `compare_tokens` is negative; nothing is left then.
    """
    if (compare_tokens or 0) < 0:
        raise InputError(f"--compare_tokens is {compare_tokens}; it must be 0 or more")
    check_new_folder(destination)
    found = find_checkpoint(source)
    source_params = read_params(found, mesh)
    config, params = retrofit(found.config.model, source_params, loop, gate_bias, mesh)
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
        for line in _compare(found, source_params, config, params, length, mesh):
            report(line)


def quantize_run(
    source: str, destination: str, mesh: Mesh | None = None, *, report: Report
) -> None:
    """Makes a run directory whose large weights are rounded to eight bits; see `quantize_params`.

    With several processes all must call it. Each reads and writes what its devices hold.

    Args:
      source: a run directory (its newest checkpoint) or one of its checkpoints/STEP folders.
      mesh: the devices that hold the parameters; default one device.

    Raises:
      InputError: there is no sound checkpoint, or the destination is taken; nothing is left then.
    """
    check_new_folder(destination)
    found = find_checkpoint(source)
    params = quantize_params(read_params(found, mesh, quantized=True))
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


class _Source(NamedTuple):
    """What is imported."""

    folder: Path
    """A folder on a disk that has its files, at least those beside the weights."""
    weights: Path
    """The folder that has all of them, on a disk or in a bucket."""
    shown: str
    """Its name, for people."""
    origin: Mapping[str, str | None] | None = None
    """See `create_run`."""


@contextlib.contextmanager
def _open_source(source: str, given: Path | None, report: Report) -> Iterator[_Source]:
    """The folder of a checkpoint to import, fetched from the Hub if it is there. Of a folder in a
    bucket the files beside the weights are fetched.

    Args:
      given: a tokenizer to use instead of its own.
    """
    name = name_unless_path(source)
    if name is not None:
        snapshot = _fetch(name, given, report)
        origin = snapshot.name._asdict() | {"commit": snapshot.commit}
        yield _Source(snapshot.folder, snapshot.folder, str(snapshot), origin)
        return
    with local_folder(expand(source), _is_companion) as folder:
        yield _Source(folder, expand(source), source)


def _is_companion(name: str) -> bool:
    """Whether the import reads a file beside the weights of a checkpoint, by its name."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in COMPANIONS)


def _fetch(name: HubName, given: Path | None, report: Report) -> Snapshot:
    """Fetches a checkpoint from the Hub; its weights only if its tokenizer, or the given one, can
    be used with it."""
    published = open_hub_checkpoint(name, report=report)
    chosen, _ = _choose_tokenizer(published.snapshot.folder, given)
    if chosen is not None:
        chosen.check_size(published.config.vocab_size)
    fetch(published.snapshot, published.weights, report=report)
    return published.snapshot


def _repository(text: str) -> HubName:
    name = read_name(text)
    if name is None:
        raise InputError(f"--push {text} is not ORG/NAME or ORG/NAME@BRANCH; give such a name")
    return name


def _choose_tokenizer(
    folder: Path, given: Path | None
) -> tuple[TextTokenizer | None, Mapping[str, Path]]:
    """The tokenizer of an imported run, and the files that are kept beside it, by name."""
    companions = companion_files(folder)
    own = companions.get(TOKENIZER)
    if given is None:
        return load_tokenizer(own) if own else None, companions
    # The other files describe the checkpoint's own tokenizer, so another one does not keep them.
    kept = {} if own else companions
    chosen = load_tokenizer(given, described_in=folder if companions and not own else None)
    return chosen, {**kept, TOKENIZER: given}


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
    found: Found,
    source_params: Any,
    config: ModelConfig,
    params: Any,
    length: int,
    mesh: Mesh | None,
) -> list[str]:
    """How far a retrofitted model's predictions are from its source's, line by line."""
    loop, length = config.loop, min(length, config.max_length)
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, config.vocab_size)
    if mesh is not None:  # whose devices divide rows
        tokens = np.repeat(tokens, whole_batch(1, mesh), axis=0)
        tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec()))
    models = (found.config.model, source_params, config, params)
    difference = compare_models(*models, tokens, mesh)
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
    count, size = count_parameters(params), sum(leaf.nbytes for leaf in leaves)
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in leaves}))
    return f"{describe_loops(config)}, {count:,} parameters, {dtypes}, {size / 1e9:.2f} GB"


def count_parameters(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
