"""Checkpoints that tests damage, and assertions that a conversion is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from plt_jax import InputError, RunConfig, load_huggingface, save_huggingface
from plt_jax.data.tokenizer import load_tokenizer
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.runs.directory import create_run
from tests.models import random_params, small_config
from tests.training.runs import (
    SENTENCE,
    assert_refused,
    command,
    snapshot,
)

CASES = Path(__file__).parents[1] / "golden" / "transformers"
CONVERT = "plt_jax.convert"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
REMOVED = object()
MOE = {"experts": 4, "experts_per_token": 2, "expert_width": 8, "routing": "topk_then_softmax"}


def copy_case(name, folder):
    """Copies a checkpoint of transformers, which the test may damage."""
    return copy_folder(CASES / name, folder)


def copy_folder(source, folder):
    """Copies a golden checkpoint, which the test may damage."""
    folder.mkdir()
    for file in ("config.json", MODEL):
        shutil.copyfile(source / file, folder / file)
    return folder


def saved_model(folder, *scheme, **settings):
    """Saves a small random model as a checkpoint."""
    config = small_config(*scheme, **settings)
    save_huggingface(folder, config, random_params(config))
    return folder


def write_index(folder, files):
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def change_index(folder, **files):
    write_index(folder, json.loads((folder / INDEX).read_text())["weight_map"] | files)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **changes):
    values = read_config(folder) | changes
    values = {key: value for key, value in values.items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(values))


def change_tensors(folder, changes, file=MODEL):
    tensors = load_file(folder / file) | changes
    save_file({k: v for k, v in tensors.items() if v is not REMOVED}, folder / file)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def assert_import_refused(source, *parts):
    """Asserts that load_huggingface and the command refuse a checkpoint in the same one line, which
    holds all the parts, and that they change no file."""
    before = snapshot(source.parent)
    with pytest.raises(InputError) as refusal:
        load_huggingface(source)
    message = str(refusal.value)
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert str(part) in message
    result = command(CONVERT, "import", source, source.parent / "destination")
    assert_refused(result, message)
    assert result.out == ""
    assert snapshot(source.parent) == before


def assert_export_refused(home, config, params, *parts):
    """Asserts that save_huggingface refuses a model in a line that holds all the parts, and that it
    changes no file below `home`."""
    before = snapshot(home)
    with pytest.raises(InputError) as refusal:
        save_huggingface(home / "destination", config, params)
    assert len(str(refusal.value).splitlines()) == 1
    for part in parts:
        assert part in str(refusal.value)
    assert snapshot(home) == before


def assert_command_refused(home, words, *parts):
    """Asserts that a command is refused in a line that holds all the parts, and that it changes no
    file below `home`."""
    before = snapshot(home)
    assert_refused(command(*words), *map(str, parts))
    assert snapshot(home) == before


def assert_same_params(one, other):
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def make_run(folder, config, tokenizer=None, files=None):
    """Makes a run directory with a checkpoint of random parameters, as an import does."""
    made = RunConfig(run_dir=str(folder), model=config)
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    create_run(made, random_params(config), loaded, files or {})
    return folder


def write_tokenizer(path):
    """Writes a tokenizer of at most 270 tokens."""
    path.write_text(train_tokenizer([SENTENCE], 270, 2).library.to_str(), encoding="utf-8")
    return path
