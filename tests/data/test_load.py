"""The whole flow, from a configuration to batches."""

import re

import numpy as np

from plt_jax.data.corpus import load_corpus, read_documents
from plt_jax.data.input_files import counted
from plt_jax.data.load import examples_from_text, load_data, validation_examples
from plt_jax.data.pipeline import evaluation_batches


def test_counts_and_parts_agree_with_the_text(make_config):
    config = make_config()
    data = load_data(config)
    corpus = load_corpus(config.data)
    for line, documents in zip(data.about, (corpus.training, corpus.validation), strict=False):
        size = sum(len(text.encode()) for text in documents)
        assert f" {counted(len(documents), 'document')}, " in line
        assert line.endswith(f" {size:,} bytes")
    assert data.about[2].endswith(" times in 1,000 steps")
    batch = next(iter(data.training))
    assert batch["tokens"].shape == (4, 16)
    assert data.token_bytes.shape == (300,)


def test_validation_covers_its_bytes_and_predictions(make_config):
    data = load_data(make_config(data={"validation_fraction": 0.3}))
    predicted = covered = 0
    for batch in evaluation_batches(data.validation, 3):
        predicted += int(batch["weights"].sum())
        covered += int((data.token_bytes[batch["targets"]] * batch["weights"]).sum())
    documents, tokens, size = (
        int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", data.about[1])
    )
    assert predicted == tokens - documents
    assert covered == size


def test_held_out_text_does_not_reach_training(make_config, corpus_folder):
    (corpus_folder / "06.txt").write_text("zyzzyva " * 50)
    data = load_data(make_config())
    assert data.tokenizer.decode(data.validation[0]["tokens"]).startswith("zyzzyva")
    assert not any("zy" in token for token in data.tokenizer.library.get_vocab())
    batches = iter(data.training)
    tokens = np.concatenate([next(batches)["tokens"].ravel() for _ in range(40)])
    assert data.tokenizer.library.token_to_id("z") not in tokens


def test_evaluation_needs_only_the_tokenizer(make_config, corpus_folder):
    config = make_config()
    data = load_data(config)
    np.testing.assert_equal(
        list(validation_examples(config, data.tokenizer)), list(data.validation)
    )
    text = read_documents(str(corpus_folder / "03.txt"))
    examples = examples_from_text(text, data.tokenizer, 8, config.data.cache_dir)
    covered = sum(data.token_bytes[example["targets"]].sum() for example in examples)
    assert covered == len(text[0].encode())
