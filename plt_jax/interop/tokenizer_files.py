"""The tokenizer of a Hugging Face checkpoint: its files, and the ids of its special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plt_jax.data.tokenizer import TextTokenizer, load_tokenizer
from plt_jax.files.folders import copy_file
from plt_jax.files.reading import read_json

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "tokenization_*.py",
)
"""Name patterns of the files, besides the weights, that a run directory keeps from the checkpoint
that it was imported from. An export writes them again."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def companion_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that match COMPANIONS, by name."""
    found = (file for pattern in COMPANIONS for file in folder.glob(pattern))
    return {file.name: file for file in found if file.is_file()}


def write_tokenizer_files(
    folder: Path, tokenizer: Path, imported: Path, max_length: int
) -> dict[str, Any]:
    """Writes a run's tokenizer into the folder of a Hugging Face checkpoint.

    If the run still has the tokenizer that it was imported with, the imported files are copied.
    Otherwise files for transformers' AutoTokenizer are made.

    Args:
      folder: the folder to write to.
      tokenizer: the run's tokenizer.json.
      imported: the folder of files that the run keeps from its import; may be missing.
      max_length: the model's context in tokens.

    Returns:
      bos_token_id, eos_token_id and pad_token_id, those that there are, for config.json.

    Raises:
      InputError: the tokenizer lacks a token for the beginning or end of a document, or a file
        cannot be read.
    """
    companions = companion_files(imported)
    if tokenizer.exists() and not _same_tokenizer(tokenizer, companions.get("tokenizer.json")):
        return _make_files(folder, load_tokenizer(tokenizer), max_length)
    for name, file in companions.items():
        copy_file(file, folder / name)
    values = read_json(companions["config.json"]) if "config.json" in companions else {}
    return {key: values[key] for key in TOKEN_IDS if key in values}


def _same_tokenizer(one: Path, other: Path | None) -> bool:
    return other is not None and load_tokenizer(one).identity == load_tokenizer(other).identity


def _make_files(folder: Path, tokenizer: TextTokenizer, max_length: int) -> dict[str, Any]:
    bos, eos = tokenizer.special.bos, tokenizer.special.eos
    (folder / "tokenizer.json").write_text(tokenizer.library.to_str(), encoding="utf-8")
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if bos is None else tokenizer.name_of(bos),
        "eos_token": tokenizer.name_of(tokenizer.eos),
        "add_bos_token": bos is not None,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(values, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return {"bos_token_id": bos, "eos_token_id": list(eos) if len(eos) > 1 else tokenizer.eos}
