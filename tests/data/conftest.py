"""A small corpus on disk, and runs configured for it."""

import pytest

from plt_jax.config import RunConfig

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
