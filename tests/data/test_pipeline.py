"""Training batches that resume exactly on any number of processes, and evaluation batches."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_jax.data.packing import PackedExamples
from plt_jax.data.pipeline import Mixture, Source, evaluation_batches, training_dataset
from plt_jax.data.streams import DocumentStream
from plt_jax.data.tokens import TokenizedDocuments
from plt_jax.errors import InputError

EXAMPLES = 10
SHARED_ROWS = ([0, 1, 2], [1, 2, 3])
"""Rows of a batch of four, by process."""


def numbered(*lengths: int) -> TokenizedDocuments:
    """Documents of these lengths, whose tokens are 0, 1, 2, ..."""
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    return TokenizedDocuments(np.arange(sum(lengths), dtype=np.uint16), starts)


def as_source(tokenized: TokenizedDocuments, seed: int = 0) -> list[Source]:
    return [Source("the training text", DocumentStream(tokenized, shuffle_seed=seed))]


@pytest.fixture
def tokenized() -> TokenizedDocuments:
    """Four documents that make exactly ten examples of 16 tokens."""
    return numbered(40, 30, 50, 41)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        np.testing.assert_equal(one, other)


def test_every_epoch_has_every_example_once_in_another_order(make_config, tokenized):
    batches = take(training_dataset(make_config(), as_source(tokenized)), 5)
    assert batches[0]["tokens"].shape == (4, 16)
    assert batches[0]["weights"].dtype == np.float32
    first = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    one, two = first[:EXAMPLES], first[EXAMPLES:]
    assert len(set(one.tolist())) == EXAMPLES
    assert sorted(one) == sorted(two)
    assert one.tolist() != two.tolist()


def test_batches_of_one_are_those_of_any_size_one_by_one(make_config, tokenized):
    ones = take(training_dataset(make_config(training={"batch_size": 1}), as_source(tokenized)), 20)
    fours = take(training_dataset(make_config(), as_source(tokenized)), 5)
    assert ones[0]["tokens"].shape == (1, 16)
    for name in ("tokens", "targets"):
        np.testing.assert_array_equal(
            np.concatenate([batch[name] for batch in ones]),
            np.concatenate([batch[name] for batch in fours]),
        )


def test_the_seed_decides_the_order_of_documents_and_of_examples(make_config, tokenized):
    def first_tokens(seed, tokenized):
        batches = take(training_dataset(make_config(seed=seed), as_source(tokenized, seed)), 5)
        return np.concatenate([batch["tokens"][:, 0] for batch in batches])[:EXAMPLES].tolist()

    assert first_tokens(1, tokenized) == first_tokens(1, tokenized)
    # Other examples, since other documents are neighbours, and not just in another order.
    assert sorted(first_tokens(1, tokenized)) != sorted(first_tokens(2, tokenized))
    one_document = numbered(161)
    assert first_tokens(1, one_document) != first_tokens(2, one_document)


def test_an_incomplete_example_is_not_trained_on(make_config):
    batches = take(training_dataset(make_config(), as_source(numbered(100, 75))), 20)
    assert all((batch["segment_ids"] > 0).all() for batch in batches)


@pytest.mark.parametrize("prefetch", [0, 1, 16])
def test_state_resumes_exactly(make_config, tokenized, prefetch):
    config = make_config(data={"prefetch": prefetch})
    iterator = iter(training_dataset(config, as_source(tokenized)))
    take(iterator, 7)
    state = iterator.get_state()
    expected = take(iterator, 8)
    resumed = iter(training_dataset(make_config(), as_source(tokenized)))
    resumed.set_state(state)
    assert_same(take(resumed, 8), expected)
    # Going back works too, on an iterator that has read ahead.
    iterator.set_state(state)
    assert_same(take(iterator, 8), expected)


def test_processes_share_the_global_batch_and_the_state(make_config, tokenized):
    config = make_config()
    whole = iter(training_dataset(config, as_source(tokenized)))
    # The second and third row lie on devices of both processes.
    parts = [
        iter(training_dataset(config, as_source(tokenized), np.array(rows))) for rows in SHARED_ROWS
    ]

    def joined(count):
        slices = zip(*(take(part, count) for part in parts), strict=True)
        order = np.concatenate(SHARED_ROWS)
        batches = [
            {name: np.concatenate([one[name], two[name]]) for name in one} for one, two in slices
        ]
        for batch in batches:
            for values in batch.values():
                for row in range(4):
                    copies = values[order == row]
                    assert (copies == copies[0]).all()
        firsts = [list(order).index(row) for row in range(4)]
        return [{name: values[firsts] for name, values in batch.items()} for batch in batches]

    assert_same(joined(6), take(whole, 6))
    state = whole.get_state()
    assert parts[0].get_state() == parts[1].get_state() == state
    expected = take(whole, 3)
    for part in parts:
        take(part, 2)
        part.set_state(state)
    assert_same(joined(3), expected)


def test_too_little_text_is_refused_with_its_size(make_config, tokenized):
    with pytest.raises(
        InputError,
        match=r"161 tokens to train on, which is 10 examples of 16 \(data\.sequence_length, by "
        r"default model\.max_length\), fewer than training\.batch_size 11; lower either, hold out "
        r"less \(data\.validation_fraction\)",
    ):
        training_dataset(make_config(training={"batch_size": 11}), as_source(tokenized))
    assert take(training_dataset(make_config(training={"batch_size": 10}), as_source(tokenized)), 1)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 16])
def test_evaluation_reads_everything_once_in_one_shape(tokenized, batch_size):
    examples = PackedExamples(DocumentStream(tokenized), 13)
    batches = list(evaluation_batches(examples, batch_size))
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, 13)}
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    for index, example in enumerate(examples):
        for name, values in example.items():
            np.testing.assert_array_equal(rows[name][index], values)
    assert all(not values[len(examples) :].any() for values in rows.values())
    assert len(rows["tokens"]) < len(examples) + batch_size


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, [0]), (2, [0, 5]), (4, [0, 2, 5, 7]), (99, list(range(10)))]
)
def test_limited_evaluation_is_evenly_spaced(tokenized, limit, expected):
    examples = PackedExamples(DocumentStream(tokenized), 16)
    batches = list(evaluation_batches(examples, 3, limit))
    rows = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert rows[: len(expected)].tolist() == [16 * index for index in expected]
    assert not rows[len(expected) :].any()


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    start=st.integers(0, 10**12),
)
def test_a_mixture_keeps_its_proportions_everywhere(weights, start):
    mixture = Mixture(weights)
    counts = mixture.counts(start)
    assert sum(counts) == start
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - start * weight / sum(weights)) < len(weights) + start * 1e-8
    for index in range(start, start + 20):
        source, place = mixture[index]
        assert place == counts[source]  # each source is read in its order, leaving nothing out
        counts[source] += 1
    assert mixture.counts(start + 20) == counts


def two_sources(*settings) -> list[Source]:
    """Ten and twenty examples of 16; the second's tokens are above 1000."""
    first = numbered(100, 61)
    second = TokenizedDocuments(np.arange(1000, 1321, dtype=np.uint16), np.array([0, 99]))
    streams = [DocumentStream(first), DocumentStream(second)]
    return [
        Source(name, stream, *setting)
        for name, stream, setting in zip("ab", streams, settings or ((), ()), strict=True)
    ]


@pytest.mark.parametrize(
    ("settings", "share"),
    [((), 1 / 3), (((3,), (1,)), 3 / 4), (((None, 4), (None, 1)), 2 / 3)],
    ids=["sizes", "weights", "epochs"],
)
def test_sources_are_mixed_by_weight_or_by_size(make_config, settings, share):
    config = make_config(training={"steps": 5})
    batches = take(training_dataset(config, two_sources(*settings)), 60)
    tokens = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert abs(np.mean(tokens < 1000) - share) < 0.03
    for of, count in ((tokens[tokens < 1000], 10), (tokens[tokens >= 1000], 20)):
        whole = len(of) // count * count
        for epoch in np.split(of[:whole], len(of) // count):
            assert len(set(epoch)) == count  # each example once, before any comes again


def test_a_mixture_resumes_on_any_number_of_processes(make_config):
    whole = iter(training_dataset(make_config(), two_sources()))
    take_batches = [next(whole) for _ in range(3)]
    state = whole.get_state()
    following = next(whole)
    for rows in ([0, 1, 2, 3], [2, 3], [1]):
        part = iter(training_dataset(make_config(), two_sources(), np.array(rows)))
        assert np.array_equal(next(part)["tokens"], take_batches[0]["tokens"][rows])
        part.set_state(state)
        assert np.array_equal(next(part)["tokens"], following["tokens"][rows])


def test_a_source_is_not_read_more_often_than_it_may_be(make_config):
    settings = ((1, 2), (1, None))
    # 4 examples a step, half of them of the first, which has 10 and may be read twice.
    training_dataset(make_config(training={"steps": 10}), two_sources(*settings))
    message = r"^a would be read 2.2 times in 11 steps, but its epochs are 2; lower"
    with pytest.raises(InputError, match=message):
        training_dataset(make_config(training={"steps": 11}), two_sources(*settings))


class Endless:
    """A stream of 10^13 tokens, in documents of a thousand."""

    def __len__(self) -> int:
        return 10**13

    def read(self, begin: int, length: int):
        places = np.arange(begin, begin + length)
        return (places % 50_000).astype(np.uint16), places // 1000


def test_no_order_is_laid_out_in_memory(make_config):
    tracemalloc.start()
    sources = [Source("a", Endless()), Source("b", Endless())]
    iterator = iter(training_dataset(make_config(), sources))
    state = iterator.get_state()
    batches = [next(iterator) for _ in range(5)]
    iterator.set_state(state)
    assert np.array_equal(next(iterator)["tokens"], batches[0]["tokens"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22  # an order of its examples alone would take terabytes


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 3]])
def test_examples_are_requested_in_the_order_in_which_they_are_read(make_config, tokenized, rows):
    """Also after the reader has gone elsewhere."""
    ahead, events = 5, []

    class Watched(DocumentStream):
        def read(self, begin, length):
            events.append(("read", self, begin, length))
            return super().read(begin, length)

    def source(seed: int, ahead: int) -> Source:
        stream = Watched(tokenized, shuffle_seed=seed)

        def request(begin: int, length: int) -> None:
            events.append(("request", stream, begin, length))

        return Source(f"source {seed}", stream, ahead=ahead, request=request)

    dataset = training_dataset(
        make_config(data={"prefetch": 0}), [source(0, 50), source(1, ahead)], np.array(rows)
    )
    batches = iter(dataset)
    beginning = batches.get_state()
    for _ in range(2):
        take(batches, 3)
        reads = [what for kind, *what in events if kind == "read"]
        requests = [what for kind, *what in events if kind == "request"]
        assert len(reads) == 3 * len(rows)
        assert len(requests) == len(reads) + ahead
        assert requests[: len(reads)] == reads
        first_read = [kind for kind, *_ in events].index("read")
        assert first_read == ahead + 1
        events.clear()
        batches.set_state(beginning)
