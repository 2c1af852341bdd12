"""Small texts and corpora on disk, and runs configured for them."""

import json
from pathlib import Path

import pytest

from plt_jax.config import RunConfig
from plt_jax.data.tokenizer_training import train_tokenizer
from tests.data.corpora import make as make_corpus

SENTENCE = "the state of our union is strong and the work of peace goes on in every land"


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Twelve different documents of 60 to 170 words."""
    words = SENTENCE.split()
    return [
        " ".join(words[(number * 7 + word * word) % len(words)] for word in range(60 + 10 * number))
        for number in range(12)
    ]


@pytest.fixture
def corpus_folder(tmp_path, documents):
    """The documents as files in a folder."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number:02}.txt").write_text(document, encoding="utf-8")
    return folder


@pytest.fixture
def make_config(tmp_path, corpus_folder):
    """Builds a RunConfig over the folder; sections given as keywords are laid over it."""

    def make(**sections) -> RunConfig:
        values = {
            "model": {"vocab_size": 300, "max_length": 16},
            "data": {"source": str(corpus_folder), "cache_dir": str(tmp_path / "cache")},
            "training": {"batch_size": 4},
        }
        seed = sections.pop("seed", 0)
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return RunConfig.model_validate({"seed": seed, **values})

    return make


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, 300, 2)


@pytest.fixture(scope="module")
def texts(documents):
    return [f"{document} {number}" for number in range(3) for document in documents]


@pytest.fixture(scope="module")
def lines(texts, tmp_path_factory):
    """The documents and two empty ones, as JSON lines in two files."""
    folder = tmp_path_factory.mktemp("lines")
    for name, part in (("a", [*texts[:20], ""]), ("b", [" ", *texts[20:]])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(rows)
    return folder


@pytest.fixture(scope="module")
def corpus(lines, tokenizer, tmp_path_factory) -> Path:
    """A corpus that is written in one go; no test may change it."""
    out = tmp_path_factory.mktemp("corpus") / "made"
    make_corpus(lines, out, tokenizer)
    return out
