"""Small checkpoints and runs. Each test gets its own copy, which it may damage."""

import pytest
from safetensors.numpy import load_file, save_file

from tests.golden.huggingface import GOLDEN
from tests.interop.damage import (
    EMBEDDING,
    FIRST,
    HEAD,
    MODEL,
    SECOND,
    copy_case,
    copy_folder,
    make_run,
    saved_model,
    write_index,
)
from tests.models import small_config


@pytest.fixture
def llama(tmp_path):
    return copy_case("llama", tmp_path / "source")


@pytest.fixture
def nanbeige(tmp_path):
    return copy_folder(GOLDEN.parent / "nanbeige" / "nanbeige_l2", tmp_path / "source")


@pytest.fixture
def tied(tmp_path):
    return copy_case("llama_rope_llama3_tied", tmp_path / "source")


@pytest.fixture
def sharded(llama):
    """The llama checkpoint in two files: EMBEDDING is in the first and Q in the second."""
    tensors = load_file(llama / MODEL)
    first = {name: tensors[name] for name in (EMBEDDING, HEAD)}
    second = {name: tensors[name] for name in tensors.keys() - first.keys()}
    save_file(first, llama / FIRST)
    save_file(second, llama / SECOND)
    write_index(llama, dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND))
    (llama / MODEL).unlink()
    return llama


@pytest.fixture
def plt(tmp_path):
    return saved_model(tmp_path / "source")


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "dense", small_config("no_loop", 1))


@pytest.fixture(scope="module")
def plt_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "plt", small_config())
