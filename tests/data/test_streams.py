"""Any part of a stream is what the whole has there, however the whole is kept."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.data import shards
from plt_jax.data.shards import ShardReader, ShardWriter
from plt_jax.data.streams import DocumentStream, JoinedStream
from plt_jax.data.tokens import TokenizedDocuments
from plt_jax.errors import InputError

lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def numbered(lengths: list[int], first: int = 0) -> list[np.ndarray]:
    """Documents of these lengths, whose tokens are `first`, `first` + 1, ..."""
    tokens = np.arange(first, first + sum(lengths), dtype="<u2")
    return np.split(tokens, np.cumsum(lengths)[:-1])


def as_stream(documents: list[np.ndarray]) -> DocumentStream:
    lengths = np.array([len(document) for document in documents])
    return DocumentStream(
        TokenizedDocuments(np.concatenate(documents), np.cumsum(lengths) - lengths)
    )


def assert_part(stream, documents: list[np.ndarray], begin: int, length: int) -> None:
    """A part is that of the concatenation, and changes its document where that does."""
    tokens = np.concatenate(documents)
    numbers = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    part, found = stream.read(begin, length)
    assert np.array_equal(part, tokens[begin : begin + length])
    expected = numbers[begin : begin + length]
    assert np.array_equal(found - found[0], expected - expected[0])


@given(groups=st.lists(lengths_of_documents, min_size=1, max_size=4), data=st.data())
def test_joined_streams_read_as_one(groups, data):
    documents, opened = [], []
    for lengths in groups:
        documents.append(numbered(lengths, sum(map(sum, groups[: len(documents)]))))
    streams = [as_stream(group) for group in documents]

    def stream_at(index):
        opened.append(index)
        return streams[index]

    joined = JoinedStream([len(stream) for stream in streams], stream_at)
    assert not opened
    every = [document for group in documents for document in group]
    assert len(joined) == sum(map(len, every))
    begin = data.draw(st.integers(0, len(joined) - 1))
    assert_part(joined, every, begin, data.draw(st.integers(1, 60)))


def test_a_stream_of_nothing_is_empty():
    assert len(JoinedStream([], [].__getitem__)) == 0


@given(lengths=lengths_of_documents, record=st.integers(1, 30), data=st.data())
def test_a_shard_reads_as_what_was_written(lengths, record, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "one"
    documents = numbered(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "RECORD_TOKENS", record)
        patch.setattr(shards, "_FLUSH_TOKENS", 2 * record)
        writer = ShardWriter(path)
        for document in documents:
            writer.add(document)
        writer.close()
        assert (writer.tokens, writer.documents) == (sum(lengths), len(lengths))
        reader = ShardReader(path, sum(lengths), np.dtype("<u2"))
        assert len(reader) == sum(lengths)
        begin = data.draw(st.integers(0, sum(lengths) - 1))
        assert_part(reader, documents, begin, data.draw(st.integers(1, 60)))


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A shard of three records and its documents."""
    path = tmp_path_factory.mktemp("shard") / "one"
    documents = numbered([5000, 3000, 1000])
    writer = ShardWriter(path)
    for document in documents:
        writer.add(document)
    writer.close()
    return path, documents


def test_large_ids_take_four_bytes(tmp_path):
    writer = ShardWriter(tmp_path / "one")
    writer.add(np.array([7, 2**16 + 1, 2**32 - 1], "<u4"))
    writer.close()
    tokens, _ = ShardReader(tmp_path / "one", 3, np.dtype("<u4")).read(0, 3)
    assert tokens.tolist() == [7, 2**16 + 1, 2**32 - 1]


@given(bit=st.integers(0, 2**31))
def test_a_flipped_bit_never_becomes_a_token(shard, bit, tmp_path_factory):
    """It is noticed, unless it is in what pads the file."""
    path, documents = shard
    contents = bytearray(path.read_bytes())
    contents[bit // 8 % len(contents)] ^= 1 << bit % 8
    damaged = tmp_path_factory.mktemp("damaged") / "one"
    damaged.write_bytes(contents)
    tokens = np.concatenate(documents)
    with contextlib.suppress(InputError):
        tokens, _ = ShardReader(damaged, 9000, np.dtype("<u2")).read(0, 9000)
    assert np.array_equal(tokens, np.concatenate(documents))


@pytest.mark.parametrize("kept", [0, 10, 40_000, -1])
def test_a_truncated_shard_is_refused(shard, kept, tmp_path):
    damaged = tmp_path / "one"
    damaged.write_bytes(shard[0].read_bytes()[:kept])
    with pytest.raises(InputError, match="is damaged"):
        ShardReader(damaged, 9000, np.dtype("<u2")).read(0, 9000)


def test_a_shard_of_another_size_or_none_is_refused(shard, tmp_path):
    with pytest.raises(InputError, match="has 3 records instead of 4"):
        ShardReader(shard[0], 14_000, np.dtype("<u2"))
    with pytest.raises(InputError, match=r"the shard .*nothing is missing"):
        ShardReader(tmp_path / "nothing", 1, np.dtype("<u2"))


def test_a_full_disk_is_an_os_error():
    writer = ShardWriter("/dev/full")
    tokens = np.random.default_rng(0).integers(0, 2**16, 2**23, "<u2")
    with pytest.raises(OSError, match=r"cannot write /dev/full: .*No space left"):
        writer.add(tokens)
