"""The tokenizer of a Hugging Face checkpoint: its files, carried along, and its roles' ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from plt_jax.data.tokenizer import bos_id, eos_id, load_tokenizer
from plt_jax.files import copy_file
from plt_jax.interop.config_json import read_json

CARRIED = (
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
"""Files of a checkpoint that its users need beside the weights, as they came."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carried_files(folder: Path) -> dict[str, Path]:
    """Those of CARRIED that a folder has, by name."""
    found = (file for pattern in CARRIED for file in folder.glob(pattern))
    return {file.name: file for file in found if file.is_file()}


def take_tokenizer(own: Path, imported: Path, folder: Path, max_length: int) -> dict[str, Any]:
    """Puts a run's tokenizer into a checkpoint's folder; returns the special tokens' ids.

    If the run still has the tokenizer that it was imported with, the files and ids are those it
    came with; else they are made for transformers' AutoTokenizer.

    Args:
      own: the run's tokenizer.json.
      imported: the folder of files that the run's model was imported with; may be missing.

    Raises:
      InputError: the tokenizer lacks a token for the beginning or end of a document, or a file
        cannot be read.
    """
    carried = carried_files(imported)
    if own.exists() and not _same(own, carried.get("tokenizer.json")):
        return _make_files(folder, load_tokenizer(own), max_length)
    for name, file in carried.items():
        copy_file(file, folder / name)
    values = read_json(carried["config.json"]) if "config.json" in carried else {}
    return {key: values[key] for key in TOKEN_IDS if key in values}


def _same(own: Path, carried: Path | None) -> bool:
    return carried is not None and load_tokenizer(own).to_str() == load_tokenizer(carried).to_str()


def _make_files(folder: Path, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    bos, eos = bos_id(tokenizer), eos_id(tokenizer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(bos),
        "eos_token": tokenizer.id_to_token(eos),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(values, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return {"bos_token_id": bos, "eos_token_id": eos}
