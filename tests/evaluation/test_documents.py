"""Perplexity document by document: every token once, and as the model gives it."""

import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plt_jax
from plt_jax.data.corpus_units import CorpusOptions
from plt_jax.data.corpus_writer import write_corpus
from plt_jax.data.load import load_corpus
from plt_jax.data.streams import DocumentStream
from plt_jax.data.token_bytes import token_bytes
from plt_jax.data.tokens import TokenizedDocuments
from plt_jax.evaluation import documents as module
from plt_jax.evaluation.documents import documents_of, windows_of
from plt_jax.runs.directory import open_trained
from tests.training.runs import assert_refused, command, json_rows


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_documents_are_read_whole_whatever_is_read_at_once(lengths, at_once):
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    starts = np.cumsum([0, *lengths[:-1]])
    stream = DocumentStream(TokenizedDocuments(tokens, starts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_TOKENS", at_once)
        found = [document.tolist() for document in documents_of(stream)]
    assert found == [list(range(a, a + n)) for a, n in zip(starts, lengths, strict=True)]


@settings(max_examples=200)
@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_score_every_token_but_the_first_once(length, context, data):
    stride = data.draw(st.integers(1, context))
    document = np.arange(length)
    scored = []
    for tokens, first in windows_of(document, context, stride):
        assert len(tokens) <= context + 1
        assert (np.diff(tokens) == 1).all()  # one stretch
        # Each has all before it that the context holds, or all but what others of the window take.
        assert tokens[0] == 0 or first >= context + 1 - stride
        scored += tokens[first:].tolist()
    assert scored == list(range(1, length))


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished.directory, tmp_path / "copy")


def direct(trained, text, stride):
    """Nats of a text's last loop, and of loop 1, token by token in windows by hand."""
    config = trained.config.model
    tokens = [*trained.tokenizer.encode_prompt(text), trained.tokenizer.eos]
    model = plt_jax.Transformer(config)
    # Padded behind, where no position looks, so that one program does for all.
    by_loop = jax.jit(lambda p, x: model.apply({"params": p}, x, method="logits_by_loop"))
    nats = np.zeros((2, len(tokens) - 1))
    done = 1
    while done < len(tokens):
        end = min(config.max_length + 1 if done == 1 else done + stride, len(tokens))
        start = max(end - config.max_length - 1, 0)
        inputs = np.array([tokens[start : end - 1]], np.int32)
        padded = np.pad(inputs, ((0, 0), (0, config.max_length - inputs.shape[1])))
        logits = by_loop(trained.params, padded)[:, 0, : inputs.shape[1]]
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        for place in range(done, end):
            nats[:, place - 1] = -log_p[:, place - start - 1, tokens[place]]
        done = end
    return nats, tokens


@pytest.mark.slow(reason="scores every document, and each again by hand")
def test_a_run_is_scored_document_by_document(copy):
    result = command("eval.py", copy, "--by_document", "--stride", "5", "--batch_size", "3")
    assert result.code == 0 and result.err == ""
    numbers = json.loads((copy / "documents.json").read_text())
    rows = json_rows(copy / "documents.jsonl")
    trained = open_trained(copy)
    bytes_V = token_bytes(trained.tokenizer, trained.config.model.vocab_size)
    texts = load_corpus(trained.config.data).validation
    total, counted, positions = np.zeros(2), 0, {}
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        nats, tokens = direct(trained, text, 5)
        assert row["document"] == number and row["tokens"] == len(tokens) - 1
        assert row["bytes"] == bytes_V[tokens[1:]].sum() == len(text.encode())
        assert row["loss"] == pytest.approx(nats[1].mean(), rel=1e-5)
        total += nats.sum(axis=1)
        counted += nats.shape[1]
        for place, one in enumerate(nats[1], start=1):
            positions.setdefault(place.bit_length() - 1, []).append(one)
    assert numbers["tokens"] == counted and numbers["documents"] == len(texts)
    losses = [row["loss"] for row in numbers["by_loop"]]
    assert losses == pytest.approx((total / counted).tolist(), rel=1e-5)
    assert [row["first"] for row in numbers["by_position"]] == [2**k for k in sorted(positions)]
    for row, bucket in zip(numbers["by_position"], sorted(positions), strict=True):
        assert row["tokens"] == len(positions[bucket])
        assert row["loss"] == pytest.approx(np.mean(positions[bucket]), rel=1e-5)
    assert "position 4 to 7" in result.out


def silently(*_):
    """A progress report that reports nothing."""
    return lambda *_: None


def test_a_prepared_corpus_is_scored_on_its_held_out_documents(copy, tmp_path):
    trained = open_trained(copy)
    texts = load_corpus(trained.config.data).training
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = CorpusOptions(validation_fraction=0.5)
    manifest = write_corpus(
        [str(source)], tmp_path / "corpus", trained.tokenizer, options, 1, silently
    )
    held_out = sum(shard.documents for shard in manifest.shards if shard.split == "validation")
    words = ["--by_document", "--corpus", tmp_path / "corpus"]
    result = command("eval.py", copy, *words)
    assert result.code == 0, result.err
    assert json.loads((copy / "documents.json").read_text())["documents"] == held_out
    assert command("eval.py", copy, *words, "--limit", "1").code == 0
    assert len(json_rows(copy / "documents.jsonl")) == 1
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["truncation"] = None
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused = command("eval.py", copy, *words)
    assert_refused(refused, "--corpus: ", "another tokenizer than the run's")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by_document", "--stride", "0"], "--stride is 0; it must be at least 1"),
        (["--by_document", "--stride", "17"], "--stride is 17, but the context holds 16"),
        (["--by_document", "--corpus", "/no/where"], "--corpus: /no/where"),
        (["--by_document", "--corpus", "x", "--text", "y"], "exclude one another"),
        (["--stride", "4"], "--stride is for --by_document"),
        (["--by_document", "--at_loops", "1"], "--at_loops is for scores"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(copy, words, message):
    assert_refused(command("eval.py", copy, *words), message)
    assert not (copy / "documents.json").exists()
