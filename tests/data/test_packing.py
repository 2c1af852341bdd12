"""Packing: every token is predicted once, from its own document."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.data.packing import PackedExamples
from plt_jax.data.streams import DocumentStream
from plt_jax.data.tokens import TokenizedDocuments

DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "weights": np.float32,
}
document_lengths = st.lists(st.integers(2, 12), min_size=1, max_size=8)
sequence_lengths = st.integers(1, 15)


def numbered(lengths: list[int]) -> TokenizedDocuments:
    """Documents whose tokens are 1, 2, 3, ... so that each token says where it is from."""
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    return TokenizedDocuments(np.arange(1, sum(lengths) + 1, dtype=np.uint16), starts)


def document_of(tokenized: TokenizedDocuments, token: np.ndarray) -> np.ndarray:
    return np.searchsorted(tokenized.starts, token - 1, side="right")


@given(
    lengths=document_lengths,
    sequence_length=sequence_lengths,
    seed=st.none() | st.integers(0, 2**32 - 1),
)
def test_every_token_but_bos_is_predicted_once(lengths, sequence_length, seed):
    tokenized = numbered(lengths)
    predicted = []
    for example in PackedExamples(DocumentStream(tokenized, shuffle_seed=seed), sequence_length):
        real = example["weights"] == 1
        np.testing.assert_array_equal(example["targets"][real], example["tokens"][real] + 1)
        predicted += list(example["targets"][real])
    expected = set(tokenized.tokens.tolist()) - set((tokenized.starts + 1).tolist())
    assert sorted(predicted) == sorted(expected)


@given(
    lengths=document_lengths,
    sequence_length=sequence_lengths,
    seed=st.none() | st.integers(0, 2**32 - 1),
)
def test_segments_and_weights_follow_documents(lengths, sequence_length, seed):
    tokenized = numbered(lengths)
    for example in PackedExamples(DocumentStream(tokenized, shuffle_seed=seed), sequence_length):
        assert {name: values.dtype for name, values in example.items()} == DTYPES
        assert {values.shape for values in example.values()} == {(sequence_length,)}
        real = example["tokens"] > 0
        assert real[0]
        assert not np.any(real[1:] & ~real[:-1])
        documents = document_of(tokenized, example["tokens"])
        changes = documents[1:] != documents[:-1]
        segments = np.concatenate([[1], 1 + np.cumsum(changes)])
        np.testing.assert_array_equal(example["segment_ids"], np.where(real, segments, 0))
        same = documents == document_of(tokenized, example["targets"])
        np.testing.assert_array_equal(example["weights"], real & same)
        assert not example["targets"][~real].any()


@given(lengths=document_lengths, sequence_length=sequence_lengths)
def test_dropping_leaves_out_the_padded_example_only(lengths, sequence_length):
    every = list(PackedExamples(DocumentStream(numbered(lengths)), sequence_length))
    kept = PackedExamples(DocumentStream(numbered(lengths)), sequence_length, drop_incomplete=True)
    assert len(kept) == (sum(lengths) - 1) // sequence_length
    assert len(every) - len(kept) == (0 if (every[-1]["tokens"] > 0).all() else 1)
    for one, other in zip(kept, every, strict=False):
        np.testing.assert_equal(one, other)


def test_a_worked_example():
    tokenized = TokenizedDocuments(
        np.array([8, 5, 9, 8, 6, 7, 9], np.uint16), np.array([0, 3], np.int64)
    )
    examples = PackedExamples(DocumentStream(tokenized), 4)
    assert repr(examples) == "PackedExamples(2 examples of 4 tokens)"
    first, second = examples
    assert first["tokens"].tolist() == [8, 5, 9, 8]
    assert first["targets"].tolist() == [5, 9, 8, 6]
    assert first["segment_ids"].tolist() == [1, 1, 1, 2]
    assert first["weights"].tolist() == [1, 1, 0, 1]
    assert second["tokens"].tolist() == [6, 7, 0, 0]
    assert second["targets"].tolist() == [7, 9, 0, 0]
    assert second["segment_ids"].tolist() == [1, 1, 0, 0]
    assert second["weights"].tolist() == [1, 1, 0, 0]


def test_document_order_is_drawn_from_the_seed():
    tokenized = numbered([5] * 20)

    def stream(seed):
        examples = PackedExamples(DocumentStream(tokenized, shuffle_seed=seed), 9)
        return np.concatenate([example["tokens"] for example in examples])

    np.testing.assert_array_equal(stream(3), stream(3))
    assert not np.array_equal(stream(3), stream(4))
    assert not np.array_equal(stream(3), stream(None))
    np.testing.assert_array_equal(stream(None)[:99], np.arange(1, 100))
    # Whole documents move, not tokens.
    np.testing.assert_array_equal(stream(3)[:95].reshape(19, 5) % 5, [[1, 2, 3, 4, 0]] * 19)


@pytest.mark.parametrize("index", [-1, 2])
def test_indices_out_of_range_are_refused(index):
    with pytest.raises(IndexError):
        PackedExamples(DocumentStream(numbered([7])), 4)[index]
