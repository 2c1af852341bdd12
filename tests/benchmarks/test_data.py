"""The data benchmark: its rows, and what a chip consumes."""

import json

import pytest

from benchmarks.data import as_array, tokens_consumed
from plt_jax.data.corpus_units import CorpusOptions
from plt_jax.data.corpus_writer import write_corpus
from plt_jax.data.tokenized_corpus import open_tokenized_corpus
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.distributed.chips import CHIPS
from plt_jax.model.costs import flops_by_loop
from plt_jax.runs.configuration import load_config
from tests.training.runs import REPOSITORY, assert_refused, command

CONFIG = REPOSITORY / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    home = tmp_path_factory.mktemp("data")
    texts = [f"a document with the number {number} and some words more" for number in range(60)]
    (home / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 300, 2)
    source = [str(home / "a.jsonl")]
    write_corpus(source, home / "made", tokenizer, CorpusOptions(), 1, lambda *_: lambda *_: None)
    return home


def run(*words):
    return command("benchmarks.data", *words)


def test_the_command_measures_and_writes(corpus, tmp_path):
    words = [corpus / "made", "--inputs", corpus / "a.jsonl", "--lengths", "8,16"]
    words += ["--batch", 2, "--batches", 50, "--rounds", 2, "--config", CONFIG]
    result = run(*words, "--out", tmp_path)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "data.json").read_text())
    assert [row["label"] for row in found["rows"]] == [
        "shards, examples of 8",
        "array, examples of 8",
        "shards, examples of 16",
        "array, examples of 16",
        "prepare",
    ]
    for row in found["rows"]:
        least, median, most = (row[f"tokens_per_second{end}"] for end in ("_min", "", "_max"))
        assert 0 < least <= median <= most
    assert (tmp_path / "data.txt").read_text().strip() in result.out


def test_a_chip_consumes_what_its_arithmetic_allows():
    config = load_config(CONFIG)
    forward = sum(loop.total for loop in flops_by_loop(config.model, config.sequence_length))
    consumed = tokens_consumed(config)
    assert consumed["v5e"] * 3 * forward == pytest.approx(0.5 * 197e12)
    assert set(consumed) == set(CHIPS)


def test_the_array_is_the_shards_tokens(corpus):
    stream = open_tokenized_corpus(corpus / "made").stream("training")
    array = as_array(open_tokenized_corpus(corpus / "made"))
    assert len(array) == len(stream)
    for one, other in zip(array.read(5, 90), stream.read(5, 90), strict=True):
        assert (one - one[0] == other - other[0]).all()


def test_what_cannot_work_is_refused(corpus):
    assert_refused(run(corpus / "made", "--rounds", 0), "must be at least 1")
    assert_refused(run(corpus), "is not a tokenized corpus")
