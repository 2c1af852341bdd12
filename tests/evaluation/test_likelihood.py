"""Likelihoods of given tokens, against the model's logits row by row."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.config import MeshConfig
from plt_jax.distributed.mesh import make_mesh
from plt_jax.errors import InputError
from plt_jax.evaluation import likelihood
from plt_jax.evaluation.likelihood import SHORTEST, Scored, likelihoods, padded_length
from tests.models import forward, random_params, small_config
from tests.training.runs import environment, simulated

CONFIG = small_config(max_length=40)
EXPERTS = small_config(max_length=40, moe={"experts": 4, "expert_width": 8})
MESH = make_mesh(MeshConfig())


def direct(config, tokens, first):
    """By the model's own logits of the sequence alone, unpadded, in float64."""
    if first == len(tokens):
        return 0.0, True
    inputs = np.array([tokens[:-1]], np.int32)
    logits = np.asarray(forward(config)(random_params(config), inputs)[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = range(first - 1, len(tokens) - 1)
    chosen = [log_p[row, tokens[row + 1]] for row in rows]
    return sum(chosen), all(log_p[row].argmax() == tokens[row + 1] for row in rows)


def draw_sequences(seed, count, config=CONFIG):
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        length = int(random.integers(2, config.max_length + 2))
        tokens = random.integers(0, config.vocab_size, length).tolist()
        sequences.append(Scored(tokens, int(random.integers(1, length + 1))))
    return sequences


@pytest.mark.slow(reason="compiles a program for every example")
@settings(max_examples=3)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 4]))
def test_batches_and_padding_change_nothing(seed, batch_size):
    sequences = draw_sequences(seed, 7)
    found = likelihoods(CONFIG, random_params(CONFIG), MESH, sequences, batch_size)
    for (tokens, first), one in zip(sequences, found, strict=True):
        log_probability, greedy = direct(CONFIG, tokens, first)
        assert one.log_probability == pytest.approx(log_probability, abs=1e-4)
        assert one.greedy == greedy


@pytest.mark.slow(reason="compiles several programs")
def test_rows_of_experts_do_not_see_one_another():
    sequences = draw_sequences(1, 5, EXPERTS)
    found = likelihoods(EXPERTS, random_params(EXPERTS), MESH, sequences, 5)
    for (tokens, first), one in zip(sequences, found, strict=True):
        expected, _ = direct(EXPERTS, tokens, first)
        assert one.log_probability == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow(reason="compiles several programs")
def test_what_greedy_decoding_gives_is_greedy():
    tokens = [3, 7]
    for _ in range(6):
        logits = forward(CONFIG)(random_params(CONFIG), np.array([tokens], np.int32))
        tokens.append(int(logits[0, -1].argmax()))
    sequences = [Scored(tokens, 2), Scored([*tokens[:-1], (tokens[-1] + 1) % 31], 2)]
    found = likelihoods(CONFIG, random_params(CONFIG), MESH, sequences, 2)
    assert [one.greedy for one in found] == [True, False]


@pytest.mark.slow(reason="compiles several programs")
def test_positions_that_take_turns_give_the_same(monkeypatch):
    sequences = draw_sequences(2, 4)
    params = random_params(CONFIG)
    whole = likelihoods(CONFIG, params, MESH, sequences, 4)
    likelihood._score.clear_cache()
    monkeypatch.setattr(likelihood, "LOGITS", 4 * 5 * CONFIG.vocab_size)
    parts = likelihoods(CONFIG, params, MESH, sequences, 4)
    likelihood._score.clear_cache()
    for one, other in zip(whole, parts, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5)
        assert one.greedy == other.greedy


DEVICES = """
import jax, numpy as np
from plt_jax.config import MeshConfig
from plt_jax.evaluation.likelihood import likelihoods
from plt_jax.distributed.mesh import make_mesh
from tests.evaluation.test_likelihood import CONFIG, draw_sequences
from tests.models import random_params

jax.config.update("jax_default_matmul_precision", "highest")
sequences, params = draw_sequences(3, 11), random_params(CONFIG)
alone = make_mesh(MeshConfig(), jax.devices()[:1])
one = likelihoods(CONFIG, params, alone, sequences, 3)
for sizes in (dict(), dict(data=1, context=8), dict(data=2, context=4)):
    several = likelihoods(CONFIG, params, make_mesh(MeshConfig(**sizes)), sequences, 8)
    print(max(abs(a.log_probability - b.log_probability) for a, b in zip(one, several)))
"""


@pytest.mark.slow(reason="a process of its own simulates eight devices")
def test_the_number_of_devices_changes_nothing():
    variables = environment(**simulated(8))
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert max(map(float, done.stdout.split())) < 1e-4


@pytest.mark.slow(reason="compiles several programs")
def test_few_lengths_are_compiled():
    lengths = {padded_length(length, 10_000) for length in range(1, 1025)}
    assert len(lengths) <= 1 + 4 * 5
    for length in range(1, 3000):
        padded = padded_length(length, 10_000)
        assert length <= padded <= max(SHORTEST, length * 1.25)
    assert padded_length(37, 39) == 39 and padded_length(5, 20) == 20


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (Scored([1] * 42, 1), "42 tokens are more than a context of 40"),
        (Scored([1, 2], 0), "cannot score from token 0 of 2: 1 is the earliest"),
        (Scored([1, 2], 3), "cannot score from token 3 of 2"),
    ],
)
def test_what_cannot_be_scored_is_refused(sequence, message):
    with pytest.raises(InputError, match=message):
        likelihoods(CONFIG, random_params(CONFIG), MESH, [sequence], 1)


def test_nothing_is_no_likelihood():
    assert likelihoods(CONFIG, random_params(CONFIG), MESH, [], 4) == []
    assert jax.device_count() == MESH.size
