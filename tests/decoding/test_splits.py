"""Decoding in any split of prefill chunks and decode steps is the full forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plt_jax import ModelConfig, decode_step, init_cache, prefill, prepare_for_decode
from plt_jax.decoding.cache import Cache
from tests.models import ALL, LOOPED, forward, random_params, random_tokens, small_config
from tests.tiers import slow_but

TOLERANCE = 1e-4
B, CAPACITY = 3, 24
STEP = None
"""A decode step, among chunks given as their lengths by row."""

CASES = {
    **{f"{scheme}-{count}": small_config(scheme, count, window=3) for scheme, count in ALL},
    "plt-3-window-1": small_config("plt", 3, window=1),
    "plt-3-window-30": small_config("plt", 3, window=30, gate_input="hidden"),
    "loop_kv_share_window-2-window-1": small_config(
        "loop_kv_share_window", 2, window=1, normalize_between_loops=False, tied_embeddings=True
    ),
    "loop_kv_share_window-2-window-30": small_config("loop_kv_share_window", 2, window=30),
    "plt-4-options": small_config(
        "plt",
        4,
        gate_input="hidden",
        normalize_between_loops=False,
        embedding_scale=0.7,
        qkv_bias=True,
        output_bias=True,
        rope_scaling={"kind": "linear", "factor": 4.0},
        qk_norm=True,
        ffn_output_norm=True,
        kv_heads=1,
    ),
    **{
        f"{scheme}-{count}-of-the-middle": small_config(
            scheme, count, window=3, layers=4, first_layer=1, last_layer=2
        )
        for scheme, count in LOOPED
        if count > 1 or scheme == "plt"
    },
    "plt-3-behind-a-prelude": small_config("plt", 3, window=3, layers=3, first_layer=2),
    "plt-2-before-a-coda": small_config(
        "plt", 2, window=3, layers=3, last_layer=0, normalize_between_loops=False
    ),
    "plt-2-of-experts": small_config(
        "plt",
        2,
        window=3,
        layers=4,
        first_layer=1,
        last_layer=2,
        moe={
            "experts": 4,
            "experts_per_token": 2,
            "expert_width": 8,
            "dense_layers": 2,
            "bias_update_rate": 0.1,
        },
    ),
    "no_loop-1-post-norm": small_config(
        "no_loop",
        1,
        input_norms=False,
        attention_output_norm=True,
        ffn_output_norm=True,
        qk_norm=True,
        qk_norm_over="all_heads",
        output_bias=True,
    ),
    "plt-3-learned-scale": small_config(
        "plt", 3, window=3, learned_hidden_scale=True, residual_scale=0.3
    ),
    "plt-2-sandwich": small_config(
        "plt",
        2,
        window=3,
        attention_output_norm=True,
        ffn_output_norm=True,
        qk_norm=True,
        qk_norm_over="all_heads",
        kv_heads=1,
    ),
    # A step's few rows read their experts one by one, a chunk's rows go through grouped products.
    "plt-2-experts": small_config(
        "plt",
        2,
        qk_norm=True,
        moe={
            "experts": 12,
            "experts_per_token": 2,
            "expert_width": 8,
            "shared_width": 8,
            "shared_gate": True,
            "dense_layers": 1,
            "bias_update_rate": 0.1,
        },
    ),
}

NOT_MODIFIED = ["plt-3", "clp-3", "vanilla_loop-3"]
PROGRAMS = "compiles prefill and the decode step of another model"

operations = st.lists(
    st.just(STEP) | st.tuples(*[st.sampled_from((0, 1, 2, 4, 7, 15))] * B), min_size=1, max_size=8
)


@functools.cache
def programs(config: ModelConfig):
    """`prefill(params, tokens, lengths, cache)` and `decode_step(params, tokens, cache)`."""
    return (
        jax.jit(functools.partial(prefill, config)),
        jax.jit(functools.partial(decode_step, config)),
    )


@functools.cache
def prepared(config: ModelConfig):
    return prepare_for_decode(config, random_params(config))


class Decoder:
    """Feeds fixed sequences to a cache and compares every answer with the full forward pass."""

    def __init__(self, config: ModelConfig, dtype=None, tolerance=TOLERANCE):
        self.config, self.tolerance = config, tolerance
        self.tokens = np.asarray(random_tokens(config, B, CAPACITY))
        exact = config.model_copy(update={"dtype": "float32"})
        self.expected = np.asarray(forward(exact)(random_params(config), self.tokens))
        self.cache = init_cache(config, B, CAPACITY, dtype)
        self.done = np.zeros(B, int)

    def chunk(self, lengths):
        """Prefills up to `lengths` more tokens of each row; junk follows them in the chunk."""
        lengths = np.minimum(lengths, CAPACITY - self.done)
        chunk = np.random.default_rng(self.done).integers(
            0, self.config.vocab_size, (B, CAPACITY), dtype=np.int32
        )
        for row in range(B):
            start, length = self.done[row], lengths[row]
            chunk[row, :length] = self.tokens[row, start : start + length]
        run = programs(self.config)[0]
        logits, self.cache = run(prepared(self.config), chunk, lengths, self.cache)
        self.check(logits, lengths)

    def step(self):
        """Decodes the next token of every row, or none where a row is at its end."""
        if np.max(self.done) == CAPACITY:
            return
        tokens = self.tokens[np.arange(B), self.done]
        logits, self.cache = programs(self.config)[1](prepared(self.config), tokens, self.cache)
        self.check(logits, np.ones(B, int))

    def check(self, logits, lengths):
        self.done += lengths
        np.testing.assert_array_equal(self.cache.lengths, self.done)
        assert logits.dtype == jnp.float32 and logits.shape == (B, self.config.vocab_size)
        for row in np.flatnonzero(lengths):
            right = self.expected[row, self.done[row] - 1]
            np.testing.assert_allclose(logits[row], right, atol=self.tolerance, rtol=0)

    def run(self, operations):
        for operation in operations:
            self.step() if operation is STEP else self.chunk(operation)


def meaningful(cache: Cache):
    """The parts of a cache that later answers depend on; zero elsewhere."""
    layout = cache.slots

    def filled(array):
        slots = np.arange(array.shape[2])
        # A slot is filled if a position of the text, or of its window's first turn, lies in it.
        turn = (slots - layout.capacity) % max(layout.window, 1)
        position = np.where(slots < layout.capacity, slots, turn)
        filled_BS = position < cache.lengths[:, None]
        return jnp.where(filled_BS[:, None, :, None], array, 0)

    return cache.lengths, jax.tree.map(filled, (cache.keys, cache.values)), cache.carried


@pytest.mark.parametrize("case", slow_but(["no_loop-1", "plt-2"], CASES, PROGRAMS))
@settings(max_examples=10, derandomize=True)
@given(operations)
@example([STEP] * CAPACITY)
@example([(24, 24, 24)])
@example([(24, 1, 13), (0, 0, 11), (0, 20, 0)])
@example([(0, 0, 0), (0, 2, 9), STEP, STEP, (5, 0, 0), STEP, (15, 15, 7), STEP, STEP])
def test_any_split_is_the_forward_pass(case, operations):
    """Each answer is the forward pass's, and the cache that of one chunk."""
    config = CASES[case]
    split, whole = Decoder(config), Decoder(config)
    split.run(operations)
    whole.chunk(split.done)
    jax.tree.map(
        lambda actual, right: np.testing.assert_allclose(actual, right, atol=2e-5, rtol=1e-5),
        meaningful(split.cache),
        meaningful(whole.cache),
    )


@pytest.mark.parametrize(
    "case", slow_but(["plt-3"], ["plt-3", "clp-3", "vanilla_loop-3"], PROGRAMS)
)
def test_a_cache_is_not_modified(case):
    """Two calls from one cache answer alike: it can be kept, as the state after a shared prompt."""
    config = CASES[case]
    decoder = Decoder(config)
    decoder.chunk([7, 3, 1])
    before, done = decoder.cache, decoder.done.copy()
    kept = jax.tree.map(np.array, before)
    for _ in range(2):
        decoder.cache, decoder.done = before, done.copy()
        decoder.step()
        decoder.cache, decoder.done = before, done.copy()
        decoder.chunk([2, 0, 5])
    jax.tree.map(np.testing.assert_array_equal, before, kept)


@pytest.mark.slow(reason="compiles a program for every example")
@settings(max_examples=5, derandomize=True)
@given(
    operations,
    st.sampled_from(["plt", "loop_kv_share_window"]),
    st.integers(2, 4),
    st.integers(2, CAPACITY + 2),
)
def test_any_window(operations, scheme, count, window):
    Decoder(small_config(scheme, count, window=window)).run(operations)


SPLIT = [(7, 3, 1), STEP, (2, 4, 0), STEP, STEP, (0, 7, 15)]


def loops_of(scheme):
    return 1 if scheme == "no_loop" else 3


ROUNDED = ["no_loop", "vanilla_loop", "clp", "plt", "loop_kv_share_window"]


@pytest.mark.parametrize("scheme", slow_but(["plt"], ROUNDED, PROGRAMS))
def test_eight_bits(scheme):
    """Keys and values in eight bits move the logits by at most a tenth of their spread."""
    config = small_config(scheme, loops_of(scheme), window=3)
    spread = np.std(Decoder(config).expected)
    decoder = Decoder(config, dtype="int8", tolerance=0.1 * spread)
    decoder.run(SPLIT)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(decoder.cache.keys)} == {"int8", "float32"}


@pytest.mark.parametrize("scheme", slow_but(["plt"], ROUNDED, PROGRAMS))
def test_bfloat16(scheme):
    """All in bfloat16 moves the float32 forward pass's logits by at most a fifth of their spread.

    A cache of bfloat16 alone moves them by at most a tenth.
    """
    exact = small_config(scheme, loops_of(scheme), window=3)
    spread = np.std(Decoder(exact).expected)
    Decoder(exact, dtype="bfloat16", tolerance=0.1 * spread).run(SPLIT)

    config = small_config(scheme, loops_of(scheme), window=3, dtype="bfloat16")
    rounded = Decoder(config, tolerance=0.2 * spread)
    rounded.run(SPLIT)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded.cache)} == {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.int32),
    }
