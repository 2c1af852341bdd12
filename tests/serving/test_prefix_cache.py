"""The cache of prompts' beginnings: what it finds, and what it drops first."""

from hypothesis import given
from hypothesis import strategies as st

from plt_jax.serving.prefix_cache import NO_TOKENS, PrefixCache, key_of

C = 2


def add_all(cache, prompt):
    """Adds the blocks of a prompt in order, as a prefill does."""
    key = NO_TOKENS
    for end in range(C, len(prompt) + 1, C):
        before, key = key, key_of(key, prompt[end - C : end])
        if cache.needs(before, key):
            cache.add(before, key, tuple(prompt[:end]))


def found(cache, prompt):
    return [block for _, block in cache.find(prompt)]


prompts = st.lists(st.integers(0, 1), max_size=12)


@given(st.lists(prompts, max_size=8), prompts)
def test_what_is_found_is_a_beginning_and_the_longest_that_was_added(added, prompt):
    cache = PrefixCache(C, 1, 1000)
    for one in added:
        add_all(cache, one)
    lengths = range(C, len(prompt), C)
    known = [n for n in lengths if any(one[:n] == prompt[:n] for one in added)]
    assert found(cache, prompt) == [tuple(prompt[:n]) for n in known]


@given(st.lists(prompts, max_size=20), st.integers(1, 5))
def test_it_has_no_more_than_its_bytes_and_no_block_without_those_before(added, most):
    cache = PrefixCache(C, 10, 10 * most + 9)
    for one in added:
        add_all(cache, one)
        assert cache.bytes <= 10 * most
        # A prompt's first blocks stay, as many as fit.
        count = min(len(one) // C, most)
        assert len(found(cache, [*one[: count * C], 9])) == count


def test_blocks_that_were_used_last_stay():
    cache = PrefixCache(C, 1, 4)
    add_all(cache, [1, 1, 1, 1])
    add_all(cache, [2, 2, 2, 2])
    assert found(cache, [1, 1, 1, 1, 0])
    add_all(cache, [3, 3, 3, 3])
    assert len(found(cache, [1, 1, 1, 1, 0])) == 2
    assert not found(cache, [2, 2, 2, 2, 0])


def test_nothing_is_kept_without_memory():
    cache = PrefixCache(C, 10, 9)
    add_all(cache, [1, 1])
    assert (found(cache, [1, 1, 1]), cache.bytes) == ([], 0)
