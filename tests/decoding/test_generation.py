"""Generation: greedy against the full forward pass, and what a row may depend on."""

import jax
import numpy as np
import pytest

from plt_jax import InputError, Sampling, generate
from plt_jax.decoding import generation
from plt_jax.decoding.generation import GenerationRequest, TokenStream
from tests.models import forward, random_params, small_config

CONFIG = small_config("plt", 3, window=3)
PROMPTS = ([5, 1, 9, 2, 2, 7, 30], [0], [8, 8, 3, 1])
NEW = 6
LENGTH = 24  # one shape for all full forward passes
SAMPLING = Sampling(temperature=1.5, top_k=20, top_p=0.95)


def greedy(config, prompt, new) -> list[int]:
    """The most likely token after each prefix, by the full forward pass over all of it."""
    params, tokens = random_params(config), list(prompt)
    for _ in range(new):
        padded = np.zeros((3, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = forward(config)(params, padded)[0, len(tokens) - 1]
        tokens.append(int(np.argmax(logits)))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def continuation():
    """The greedy continuation of every prompt, [3, NEW]."""
    return np.array([greedy(CONFIG, prompt, NEW) for prompt in PROMPTS])


def run(prompts=PROMPTS, new=NEW, sampling=Sampling(), seed=None, config=CONFIG, **options):
    key = None if seed is None else jax.random.key(seed)
    return generate(config, random_params(config), prompts, new, sampling, key, **options)


def test_ragged_prompts_continue_as_the_forward_pass_says(continuation):
    tokens = run()
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, continuation)


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize("scheme", ["no_loop", "loop_kv_share_window"])
def test_schemes_that_decode_in_other_ways(scheme):
    config = small_config(scheme, 1 if scheme == "no_loop" else 2, window=3)
    expected = [greedy(config, prompt, NEW) for prompt in PROMPTS]
    np.testing.assert_array_equal(run(config=config), expected)


def test_prompt_alone_continues_as_among_others(continuation):
    np.testing.assert_array_equal(run([PROMPTS[0]]), continuation[:1])


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize("chunk", [1, 3])
def test_prompts_longer_than_a_chunk(continuation, monkeypatch, chunk):
    """Here prompts end in different chunks, inside one and at its end."""
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    np.testing.assert_array_equal(run(), continuation)


def test_one_new_token(continuation):
    np.testing.assert_array_equal(run(new=1), continuation[:, :1])


def test_context_can_be_filled(continuation):
    config = CONFIG.model_copy(update={"max_length": len(PROMPTS[0]) + NEW})
    np.testing.assert_array_equal(run(config=config)[0], continuation[0])


def test_arrays_are_prompts_too(continuation):
    prompts = [np.array(prompt, np.int64) for prompt in PROMPTS]
    np.testing.assert_array_equal(run(prompts), continuation)


# ---- draws ----


def test_a_seed_decides_the_draws():
    first = run(sampling=SAMPLING, seed=1)
    np.testing.assert_array_equal(first, run(sampling=SAMPLING, seed=1))
    assert np.any(first != run(sampling=SAMPLING, seed=2))
    assert np.all((first >= 0) & (first < CONFIG.vocab_size))


def test_a_row_does_not_depend_on_other_prompts():
    others = ([1, 2, 3, 4, 5, 6, 7], [0], [11])
    first, second = run(sampling=SAMPLING, seed=1), run(others, sampling=SAMPLING, seed=1)
    np.testing.assert_array_equal(first[1], second[1])
    assert np.any(first[0] != second[0])


@pytest.mark.slow(reason="compiles several programs")
def test_equal_prompts_draw_differently_by_row_and_step():
    """One key would give each row, or each step, the same draw."""
    tokens = run([[0]] * 3, new=12, sampling=Sampling(temperature=100.0), seed=3)
    assert len({tuple(row) for row in tokens.tolist()}) == 3
    assert all(len(set(row)) > 4 for row in tokens.tolist())


@pytest.mark.slow(reason="compiles several programs")
def test_a_key_for_each_prompt_goes_where_it_goes():
    """The draws of a prompt are its key's, in whatever row and company."""
    keys = jax.random.split(jax.random.key(4), 3)

    def draw(order):
        prompts = [PROMPTS[index] for index in order]
        params = random_params(CONFIG)
        return generate(CONFIG, params, prompts, NEW, SAMPLING, keys[np.array(order)])

    first = draw([0, 1, 2])
    np.testing.assert_array_equal(draw([2, 0, 1]), first[[2, 0, 1]])
    np.testing.assert_array_equal(draw([1]), first[[1]])
    assert np.any(first != run(sampling=SAMPLING, seed=5))


def test_old_style_keys_draw_as_new_ones():
    old = generate(CONFIG, random_params(CONFIG), PROMPTS, 3, SAMPLING, jax.random.PRNGKey(1))
    np.testing.assert_array_equal(old, run(new=3, sampling=SAMPLING, seed=1))


# ---- log-probabilities ----


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize(("sampling", "seed"), [(Sampling(), None), (SAMPLING, 5)], ids=str)
def test_log_probabilities_are_the_models_own(sampling, seed):
    """At temperature 1, before tokens are left out; 0 for repeated stop tokens."""
    stop = int(run(sampling=sampling, seed=seed)[0][2])
    tokens, logs = run(
        sampling=sampling, seed=seed, stop_tokens=[[stop], [], []], log_probabilities=True
    )
    assert logs.dtype == np.float32 and logs.shape == tokens.shape == (3, NEW)
    assert stop in tokens[0].tolist()
    end = tokens[0].tolist().index(stop) + 1
    assert np.all(tokens[0, end:] == stop) and not np.any(logs[0, end:])
    for row, prompt in enumerate(PROMPTS):
        made = end if row == 0 else NEW
        padded = np.zeros((3, LENGTH), np.int32)
        whole = [*prompt, *tokens[row, :made]]
        padded[0, : len(whole)] = whole
        logits = forward(CONFIG)(random_params(CONFIG), padded)[0]
        right = jax.nn.log_softmax(logits)[
            np.arange(len(prompt) - 1, len(whole) - 1), whole[len(prompt) :]
        ]
        np.testing.assert_allclose(logs[row, :made], right, atol=1e-4)


# ---- the loop on the device ----


@pytest.mark.parametrize("block", [1, 2, 5])
def test_tokens_do_not_depend_on_blocks(continuation, monkeypatch, block):
    monkeypatch.setattr(generation, "STREAMED_BLOCK", block)
    steps = list(TokenStream(CONFIG, random_params(CONFIG), GenerationRequest(PROMPTS, NEW)))
    np.testing.assert_array_equal(np.stack(steps, axis=1), continuation)


@pytest.mark.slow(reason="compiles several programs")
def test_more_tokens_than_a_block(monkeypatch):
    """Two blocks and a part of one, against one token at a time."""
    new = 2 * generation.BLOCK // 8 + 3
    monkeypatch.setattr(generation, "BLOCK", generation.BLOCK // 8)
    generation.advance.clear_cache()
    tokens = run([[3, 1]], new=new)
    monkeypatch.setattr(generation, "STREAMED_BLOCK", 1)
    one_by_one = list(TokenStream(CONFIG, random_params(CONFIG), GenerationRequest([[3, 1]], new)))
    np.testing.assert_array_equal(tokens[0], np.concatenate(one_by_one))
    generation.advance.clear_cache()


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_dtypes_of_the_cache(dtype):
    """Rounded keys may choose other tokens in the end, but the first comes from near them."""
    tokens, logs = run(new=2, cache_dtype=dtype, log_probabilities=True)
    exact, exact_logs = run(new=2, log_probabilities=True)
    np.testing.assert_array_equal(tokens, exact)
    np.testing.assert_allclose(logs, exact_logs, atol=0.1)
    assert np.any(logs != exact_logs)


# ---- stop tokens ----


def test_stop_tokens_of_one_prompt_stop_it_alone(continuation):
    """Each row has a stop token of its own and one that only the next row draws; one is for all."""
    rows = continuation.tolist()
    own = [rows[index][index] for index in range(3)]
    others = [
        next(token for token in rows[(index + 1) % 3] if token not in rows[index])
        for index in range(3)
    ]
    stops = [list(pair) for pair in zip(own, others, strict=True)]
    sampling = Sampling(stop_tokens=(rows[2][1],))
    expected = [
        until_stop(row, {*sampling.stop_tokens, *mine})
        for row, mine in zip(rows, stops, strict=True)
    ]
    assert all(row != whole for row, whole in zip(expected, rows, strict=True))
    np.testing.assert_array_equal(run(sampling=sampling, stop_tokens=stops), expected)
    as_array = run(sampling=sampling, stop_tokens=np.array(stops))
    np.testing.assert_array_equal(as_array, expected)


def until_stop(row, stops):
    """A row with everything after the first stop token replaced by it."""
    for index, token in enumerate(row):
        if token in stops:
            return [*row[:index], *[token] * (len(row) - index)]
    return list(row)


def test_a_row_repeats_its_stop_token_and_others_go_on(continuation):
    stop = int(continuation[0][1])
    expected = [until_stop(row, {stop}) for row in continuation.tolist()]
    assert expected[0] != continuation.tolist()[0] and expected[1:] == continuation.tolist()[1:]
    np.testing.assert_array_equal(run(sampling=Sampling(stop_tokens=(stop,))), expected)


def test_generation_ends_when_all_rows_have_stopped(continuation):
    """Each row has its own stop token, the last at step 2; stop tokens are not swallowed."""
    stops = tuple(sorted({int(continuation[row][row]) for row in range(3)}))
    expected = [until_stop(row, set(stops)) for row in continuation.tolist()]
    sampling = Sampling(stop_tokens=stops)
    steps = list(
        TokenStream(CONFIG, random_params(CONFIG), GenerationRequest(PROMPTS, NEW, sampling))
    )
    last_stop = max(min(row.index(s) for s in stops if s in row) for row in continuation.tolist())
    assert len(steps) == last_stop + 1 <= 3
    np.testing.assert_array_equal(np.stack(steps, axis=1), np.array(expected)[:, : len(steps)])
    np.testing.assert_array_equal(run(sampling=sampling), expected)


# ---- what is refused, when called and before any device work ----


def stream_request(config, params, *asked, **options):
    return TokenStream(config, params, GenerationRequest(*asked, **options))


@pytest.mark.parametrize(
    ("prompts", "new", "sampling", "message"),
    [
        ([], 1, Sampling(), "no prompts were given"),
        ([[1], []], 1, Sampling(), "prompt 1 is empty"),
        ([[1], [2, 31]], 1, Sampling(), "prompt 1 holds token 31, outside the vocabulary of 31"),
        ([[-1]], 1, Sampling(), "prompt 0 holds token -1"),
        ([[1] * 60], 5, Sampling(), "prompt 0 has 60 tokens and 5 new ones .* at most 4"),
        ([[1] * 64], 5, Sampling(), "prompt 0 has 64 tokens.*shorten it to 63"),
        ([[1], [1] * 70], 1, Sampling(), "prompt 1 has 70 tokens.*shorten it to 63"),
        ([[1]], 0, Sampling(), "max_new_tokens is 0"),
        ([[1]], -3, Sampling(), "max_new_tokens is -3"),
        ([[1]], 1, Sampling(temperature=1.0), "needs a key"),
        ([[1]], 1, Sampling(top_p=2.0), "top_p is 2.0"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream_request])
def test_bad_input_is_refused(function, prompts, new, sampling, message, monkeypatch):
    def device_work(*_):
        raise AssertionError("device work began")

    monkeypatch.setattr(generation, "init_cache", device_work)
    monkeypatch.setattr(generation, "prepare_for_decode", device_work)
    with pytest.raises(InputError, match=message):
        function(CONFIG, random_params(CONFIG), prompts, new, sampling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_tokens": [[1]]}, "stop_tokens are given for 1 prompts, but there are 2"),
        ({"stop_tokens": [1, 2]}, r"stop_tokens\[0\] is 1; give a list for every prompt"),
        ({"stop_tokens": [[1], [31]]}, r"stop_tokens\[1\] holds token 31, outside"),
        ({"sampling": Sampling(stop_tokens=(-1,))}, "sampling.stop_tokens holds token -1"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"key has shape \(3,\).*each of 2"),
        ({"cache_dtype": "float16"}, "cache dtype is float16"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream_request])
def test_options_that_do_not_fit_are_refused(function, options, message):
    with pytest.raises(InputError, match=message):
        function(CONFIG, random_params(CONFIG), [[1], [2]], 1, **options)
