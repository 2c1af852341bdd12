"""The tokenizer of a Hugging Face checkpoint: its files, carried along, and its roles' ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from plt_jax.data.tokenizer import bos_id, eos_id
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


def carried_files(folder: Path) -> list[Path]:
    """Those of CARRIED that a folder has, by name."""
    found = (file for pattern in CARRIED for file in folder.glob(pattern))
    return sorted(file for file in found if file.is_file())


def carried_token_ids(folder: Path) -> dict[str, Any]:
    """The special tokens' ids of a carried config.json; empty without one."""
    path = folder / "config.json"
    values = read_json(path) if path.exists() else {}
    return {key: values[key] for key in TOKEN_IDS if key in values}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Writes what transformers' AutoTokenizer reads; returns the ids for config.json.

    Raises:
      InputError: the tokenizer lacks a token for the beginning or end of a document.
    """
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
