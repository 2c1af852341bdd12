"""Checkpoints on the Hugging Face Hub: which of a repository's files are fetched."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from plt_jax.config import ModelConfig
from plt_jax.errors import InputError, naming
from plt_jax.files.reading import read_json
from plt_jax.hub.download import Report, Snapshot, open_snapshot
from plt_jax.hub.names import HubName
from plt_jax.interop.config_json import CONFIG
from plt_jax.interop.config_reader import read_config
from plt_jax.interop.safetensors_folder import INDEX, SINGLE, read_index
from plt_jax.interop.tokenizer_files import COMPANIONS

SMALL_FILES = (
    INDEX,
    *(name for name in COMPANIONS if "*" not in name and name != CONFIG),
    "chat_template.jinja",
    "chat_template.json",
)
"""The files that are fetched besides config.json and the weights: of COMPANIONS those with whole
names, and the chat templates that are read; no code."""


class HubCheckpoint(NamedTuple):
    """A checkpoint on the Hub that can be read, as far as its small files tell."""

    snapshot: Snapshot
    """Its small files are there."""
    config: ModelConfig
    weights: Sequence[str]
    """The names of its files of weights, which are to be fetched."""


def open_hub_checkpoint(name: HubName, *, report: Report) -> HubCheckpoint:
    """Fetches the small files of a checkpoint, and checks its config.json.

    Its weights are in model.safetensors, or else in the files that the index names.

    Raises:
      InputError: the repository is none that this user may read, or has no safetensors; or its
        config.json is refused by `read_config`.
    """
    snapshot = open_snapshot(name, CONFIG, SMALL_FILES, report=report)
    weights, tensors = _weights_of(snapshot)
    with naming(f"{name}: {CONFIG}"):
        _, config = read_config(read_json(snapshot.folder / CONFIG), tensors)
    return HubCheckpoint(snapshot, config, weights)


def _weights_of(snapshot: Snapshot) -> tuple[Sequence[str], Collection[str]]:
    """The names of a snapshot's files of weights, and those of its tensors, as far as they are
    known."""
    if SINGLE in snapshot.sizes:
        return [SINGLE], ()
    if INDEX in snapshot.sizes:
        files: dict[str, Path] = read_index(snapshot.folder / INDEX)
        return sorted({file.name for file in files.values()}), files.keys()
    if snapshot.outage is not None:
        return [SINGLE], ()  # which the Hub may have
    raise InputError(
        f"{snapshot.name} on the Hub has neither {SINGLE} nor {INDEX}, and only safetensors "
        f"checkpoints are read; it holds {', '.join(sorted(snapshot.sizes)[:5])}"
    )
