"""Requests in company: each gets what it gets alone, whatever the others are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax import Sampling, generate
from plt_jax.decoding.weights import prepare_for_decode
from plt_jax.model.looping import with_loops
from plt_jax.serving import slot_programs, slots
from plt_jax.serving.prefix_cache import PrefixCache
from plt_jax.serving.request import Finish, Request, SlotSampling
from plt_jax.serving.scheduler import Scheduler
from plt_jax.serving.slots import SlotModel, block_bytes
from tests.models import THREE_LOOPS, forward, random_params, small_config
from tests.serving.fake_slots import Recorder, run_to_end

MOE = {"moe": {"experts": 4, "experts_per_token": 2, "expert_width": 8}}
CHUNK, CONTEXT, SLOTS = 16, 64, 3
MOST_NEW = 19


@functools.cache
def slot_model(config, cache_dtype=None, weights_dtype=None) -> SlotModel:
    weights = prepare_for_decode(config, random_params(config), weights_dtype)
    return SlotModel(config, weights, SLOTS, CONTEXT, CHUNK, cache_dtype)


def schedule(config, requests, prefix_blocks=0, *dtypes, arrive=lambda index: 0):
    """Runs requests, the one with each index from the tick `arrive(index)` on."""
    cache = PrefixCache(CHUNK, 1, prefix_blocks)
    scheduler = Scheduler(slot_model(config, *dtypes), cache, 100)
    for tick in range(100):
        scheduler.submit([r for index, r in enumerate(requests) if arrive(index) == tick])
        scheduler.tick()
    run_to_end(scheduler)
    return requests


def random_requests(count, seed=0, sampled=False, **settings):
    """Requests with prompts of 1 to 40 tokens, of which some begin alike."""
    rng = np.random.default_rng(seed)
    beginning = rng.integers(0, 31, 40).tolist()
    requests = []
    for index in range(count):
        size = int(rng.integers(1, 41))
        own = rng.integers(0, 31, size).tolist()
        prompt = [*beginning[: size - 1], own[-1]] if index % 2 else own
        sampling = SlotSampling()
        if sampled and index % 3:
            sampling = SlotSampling(
                temperature=1.5, top_k=(0, 5)[index % 2], top_p=0.9, seed=index, choice=index % 4
            )
        new = int(rng.integers(1, MOST_NEW + 1))
        requests.append(Request(prompt, new, sampling, Recorder(), **settings))
    return requests


def assert_as_alone(config, requests, params=None, **options):
    """Every request has the tokens and log-probabilities that `generate` gives its prompt."""
    groups = {}
    for request in requests:
        sampling = request.sampling
        alike = Sampling(sampling.temperature, sampling.top_k, sampling.top_p)
        groups.setdefault(alike, []).append(request)
    for sampling, group in groups.items():
        keys = [jax.random.key(request.sampling.seed) for request in group]
        choices = [request.sampling.choice for request in group]
        tokens, logs = generate(
            config,
            params or random_params(config),
            [request.prompt for request in group],
            MOST_NEW,
            sampling,
            jnp.stack([jax.random.fold_in(*both) for both in zip(keys, choices, strict=True)]),
            log_probabilities=True,
            **options,
        )
        for request, right, right_logs in zip(group, tokens, logs, strict=True):
            new = request.max_new_tokens
            assert request.listener.ids == right[:new].tolist()
            assert request.listener.ends == [Finish.LENGTH]
            served = [made.log for made in request.listener.tokens if made.log is not None]
            np.testing.assert_allclose(served, right_logs[: len(served)], atol=1e-4)


@pytest.mark.parametrize(("scheme", "count"), THREE_LOOPS)
def test_texts_in_company_are_those_alone(scheme, count):
    config = small_config(scheme, count)
    requests = random_requests(8, sampled=True, log_probabilities=True)
    schedule(config, requests, prefix_blocks=100, arrive=lambda index: index * 2)
    assert_as_alone(config, requests)


@pytest.mark.parametrize(
    ("changed", "cache_dtype"),
    [({}, "int8"), ({"window": 70}, None), (MOE, None)],
    ids=["int8", "windows longer than the text", "experts"],
)
def test_other_caches_windows_and_layers(changed, cache_dtype):
    config = small_config("plt", 2, **changed)
    requests = random_requests(5, seed=3)
    schedule(config, requests, 100, cache_dtype, arrive=lambda index: index)
    assert_as_alone(config, requests, cache_dtype=cache_dtype)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    arrivals=st.lists(st.integers(0, 30), min_size=6, max_size=6),
    cancels=st.lists(st.one_of(st.none(), st.integers(0, 60)), min_size=6, max_size=6),
)
def test_texts_beside_cancelled_ones_are_those_alone(seed, arrivals, cancels):
    """A slot that is left at any step is the next request's as if nobody had been there."""
    config = small_config("plt", 3)
    requests = random_requests(6, seed=seed, sampled=True)
    scheduler = Scheduler(slot_model(config), PrefixCache(CHUNK, 1, 100), 100)
    for tick in range(61):
        arriving = [r for r, at in zip(requests, arrivals, strict=True) if at == tick]
        scheduler.submit(arriving)
        for request, at in zip(requests, cancels, strict=True):
            if at == tick:
                scheduler.cancel(request)
        scheduler.tick()
    run_to_end(scheduler)
    assert all(len(request.listener.ends) == 1 for request in requests)
    whole = [request for request in requests if request.listener.ends == [Finish.LENGTH]]
    if whole:
        assert_as_alone(config, whole)


@pytest.mark.parametrize(("scheme", "count"), THREE_LOOPS)
def test_steps_that_read_a_part_of_the_slots(monkeypatch, scheme, count):
    """Texts that outgrow it are read as a whole; the others go on beside them."""
    monkeypatch.setattr(slots, "LEAST_READ", 4)
    config = small_config(scheme, count)
    assert slot_model(config).reads == [4, 16, 64]
    requests = random_requests(6, sampled=True, log_probabilities=True)
    schedule(config, requests, arrive=lambda index: index * 4)
    assert_as_alone(config, requests)
    # One that nobody is beside grows past 4 and 16 positions, token by token.
    growing = Request([3], MOST_NEW, SlotSampling(), Recorder(), log_probabilities=True)
    assert_as_alone(config, schedule(config, [growing]))


@pytest.mark.parametrize("changed", [{}, MOE], ids=["dense", "experts"])
def test_weights_in_eight_bits(changed):
    config = small_config("plt", 2, **changed)
    requests = random_requests(5, seed=3)
    schedule(config, requests, 100, None, "int8", arrive=lambda index: index)
    weights = prepare_for_decode(config, random_params(config), "int8")
    assert_as_alone(config, requests, params=weights)


def test_log_probabilities_are_those_of_the_forward_pass():
    config = small_config("plt", 3)
    prompt = np.random.default_rng(1).integers(0, 31, 37).tolist()
    request = Request(
        prompt, 4, SlotSampling(), Recorder(), log_probabilities=True, score_prompt=True
    )
    schedule(config, [*random_requests(2), request])
    listener = request.listener
    whole = np.array([[*prompt, *listener.ids]])
    right = np.asarray(jax.nn.log_softmax(forward(config)(random_params(config), whole)))[0]
    scored = [*listener.scores, *listener.tokens]
    assert len(scored) == whole.shape[1] - 1
    for position, (entry, token) in enumerate(zip(scored, whole[0, 1:], strict=True)):
        assert abs(entry.log - right[position, token]) < 1e-4
        order = np.argsort(-right[position], kind="stable")[:20]
        np.testing.assert_allclose(entry.alternatives.logs, right[position, order], atol=1e-4)
        assert entry.alternatives.tokens[0] == order[0]


OWN_LOOPS = {
    "plt, normed between": small_config("plt", 3),
    "plt, raw between": small_config("plt", 3, normalize_between_loops=False),
    "vanilla_loop, raw between": small_config("vanilla_loop", 3, normalize_between_loops=False),
    "plt, behind a coda": small_config("plt", 3, layers=3, first_layer=1, last_layer=1),
}


@pytest.mark.parametrize("case", OWN_LOOPS)
def test_each_request_has_its_own_number_of_loops(case):
    config = OWN_LOOPS[case]
    requests = random_requests(6, seed=2, log_probabilities=True)
    for index, request in enumerate(requests):
        request.sampling = SlotSampling(loops=index % 3 + 1)
    # One prompt with other loops: what layers behind the loops keep of it is another.
    prompt = [token % 31 for token in range(33)]
    requests += [
        Request(prompt, 5, SlotSampling(loops=loops), Recorder(), log_probabilities=True)
        for loops in (3, 1, 3, 2, 1)
    ]
    schedule(config, requests, prefix_blocks=100, arrive=lambda index: 4 * index)
    for count in (1, 2, 3):
        fewer, params = with_loops(config, random_params(config), count)
        own = [request for request in requests if request.sampling.loops == count]
        assert_as_alone(fewer, own, params)


def penalized(config, request):
    """Greedy decoding with a request's penalties, by full forward passes and the definitions."""
    sampling, tokens, new = request.sampling, list(request.prompt), []
    for _ in range(request.max_new_tokens):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.array(forward(config)(random_params(config), padded))[0, len(tokens) - 1]
        for token in set(tokens):
            scale = sampling.repetition_penalty
            logits[token] = logits[token] / scale if logits[token] > 0 else logits[token] * scale
        for token in set(new):
            logits[token] -= sampling.presence_penalty
            logits[token] -= sampling.frequency_penalty * new.count(token)
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        new.append(int(np.argmax(logits)))
        tokens.append(new[-1])
    return new


def test_penalties_and_biases_are_each_requests_own():
    config = small_config("plt", 3)
    requests = random_requests(7, seed=4)
    settings = [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.2},
        {"frequency_penalty": 0.7},
        {"logit_bias": {3: 100.0}},
        {"logit_bias": {0: -100.0, 30: 1.5}, "repetition_penalty": 0.6},
        {},
        {"repetition_penalty": 1.3, "presence_penalty": -1.0, "frequency_penalty": 2.0},
    ]
    for request, setting in zip(requests, settings, strict=True):
        request.sampling = SlotSampling(**setting)
    schedule(config, requests, prefix_blocks=100)
    for request in requests:
        assert request.listener.ids == penalized(config, request)


def test_seeds_draw_the_same_whatever_the_company():
    config = small_config("plt", 3)

    def drawn(others):
        sampling = SlotSampling(temperature=2.0, seed=7, choice=2)
        schedule(config, [*others, one := Request([1, 2, 3], 12, sampling, Recorder())])
        return one.listener.ids

    first = drawn([])
    assert first == drawn(random_requests(5, seed=8, sampled=True))
    prompts, key = [[1, 2, 3]] * 3, jax.random.key(7)
    rows = generate(config, random_params(config), prompts, 12, Sampling(2.0), key)
    assert first == rows[2].tolist()


def test_no_request_compiles_a_program():
    config = small_config("plt", 2, vocab_size=33)
    # As a checkpoint's weights are: where they lie is decided.
    params = jax.device_put(random_params(config), jax.devices()[0])
    model = SlotModel(config, prepare_for_decode(config, params), SLOTS, CONTEXT, CHUNK)
    model.compile()
    requests = random_requests(8, sampled=True)
    requests += random_requests(4, seed=1, log_probabilities=True, score_prompt=True)
    requests[0].sampling = SlotSampling(0.5, 3, 0.5, 0.1, 1.1, 0.1, 0.1, {3: 1.0}, 5, 1, 1)
    scheduler = Scheduler(model, PrefixCache(CHUNK, 1, 100), 100)
    scheduler.submit(requests)
    before = programs()
    run_to_end(scheduler)
    assert all(len(request.listener.ends) == 1 for request in requests)
    assert programs() == before


def programs() -> dict[str, int]:
    """How many programs there are of each compiled function."""
    return {
        name: function._cache_size()
        for name, function in vars(slot_programs).items()
        if hasattr(function, "_cache_size")
    }


def test_the_bytes_of_a_block_are_counted():
    for dtype in (None, "int8"):
        config = small_config("plt", 3)
        model = slot_model(config, dtype)
        model.start(0, SlotSampling(), [0] * CHUNK)
        model.prefill(0, [0] * CHUNK, is_last=True)
        block = model.save_block(0, 0)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(block))
        assert block_bytes(config, CHUNK, dtype) == size


def test_weights_that_are_not_finite_fail_the_request():
    config = small_config("plt", 2)
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), random_params(config))
    model = SlotModel(config, prepare_for_decode(config, params), 1, CONTEXT, CHUNK)
    scheduler = Scheduler(model, PrefixCache(CHUNK, 1, 0), 10)
    scheduler.submit([request := Request([1], 5, SlotSampling(), Recorder())])
    run_to_end(scheduler)
    assert request.listener.ends == [Finish.FAILED]
