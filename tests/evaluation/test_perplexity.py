"""Losses of every loop against NumPy, and how they add up over batches."""

import jax
import numpy as np
import pytest

from plt_jax import Transformer
from plt_jax.config import RunConfig
from plt_jax.data.packing import PackedExamples
from plt_jax.data.pipeline import evaluation_batches
from plt_jax.data.streams import DocumentStream
from plt_jax.data.tokens import TokenizedDocuments
from plt_jax.distributed.mesh import make_mesh
from plt_jax.evaluation import perplexity
from plt_jax.evaluation.perplexity import make_evaluate, score
from tests.models import random_params, small_config

TOKEN_BYTES = np.arange(31, dtype=np.int32) % 5

losses_by_loop = jax.jit(perplexity.losses_by_loop, static_argnums=0)


@pytest.fixture(scope="module")
def examples() -> PackedExamples:
    """Three documents that make seven examples of 10, the last one incomplete."""
    random = np.random.default_rng(4)
    documents = TokenizedDocuments(random.integers(0, 31, 66, np.uint16), np.array([0, 17, 41]))
    return PackedExamples(DocumentStream(documents), 10)


@pytest.fixture(scope="module")
def batch(examples):
    (batch,) = evaluation_batches(examples, 8)
    return batch


def summed_losses(config, params, batch) -> float:
    """The nats of a batch's targets by the model's own logits."""
    logits = np.asarray(
        jax.jit(Transformer(config).apply)(
            {"params": params}, batch["tokens"], batch["segment_ids"]
        ),
        np.float64,
    )
    log_z = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return float(((log_z - chosen) * batch["weights"]).sum())


def shorter(config, count):
    loop = config.loop.model_copy(update={"count": count})
    return config.model_copy(update={"loop": loop})


@pytest.mark.slow(reason="compiles models of every number of loops")
@pytest.mark.parametrize(
    ("scheme", "count", "settings"),
    [
        ("plt", 3, {}),
        ("vanilla_loop", 2, {"normalize_between_loops": False, "tied_embeddings": True}),
    ],
)
def test_losses_by_loop_are_those_of_models_with_fewer_loops(batch, scheme, count, settings):
    # A loop's readout is what the same parameters give when the loops end there.
    config = small_config(scheme, count, window=3, layers=1, **settings)
    params = random_params(config)
    got = np.asarray(losses_by_loop(config, params, batch))
    expected = [summed_losses(shorter(config, n + 1), params, batch) for n in range(count)]
    assert got.shape == (count,)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert len({round(value, 3) for value in expected}) == count


def evaluate(examples, batch_size, limit=None, config=None):
    config = config or small_config("no_loop", 1, layers=1)
    run = RunConfig(model=config, evaluation={"batch_size": batch_size})
    mesh = make_mesh(run.mesh, jax.devices()[:1])
    return make_evaluate(run, mesh, TOKEN_BYTES)(random_params(config), examples, limit)


def test_scores_do_not_depend_on_the_batch_size(examples):
    assert len(examples) == 7
    one, *others = (evaluate(examples, size) for size in (3, 7, 8))
    for other in others:
        assert (other.tokens, other.text_bytes) == (one.tokens, one.text_bytes)
        assert other.score == pytest.approx(one.score, rel=1e-5)


def test_the_score_is_over_all_tokens_and_their_bytes(examples, batch):
    config = small_config("no_loop", 1, layers=1)
    got = evaluate(examples, 3)
    nats = summed_losses(config, random_params(config), batch)
    counted = batch["weights"] > 0
    # All tokens but the three that begin a document.
    assert got.tokens == counted.sum() == 63
    assert got.text_bytes == TOKEN_BYTES[batch["targets"][counted]].sum()
    assert got.score.loss == pytest.approx(nats / 63, rel=1e-5)
    assert got.score.perplexity == pytest.approx(np.exp(nats / 63), rel=1e-4)
    bits_per_byte = nats / np.log(2) / got.text_bytes
    assert got.score.bits_per_byte == pytest.approx(bits_per_byte, rel=1e-5)


def test_a_limit_reads_examples_that_are_evenly_spaced(examples):
    batches = list(evaluation_batches(examples, 3, 2))
    config = small_config("no_loop", 1, layers=1)
    nats = sum(summed_losses(config, random_params(config), batch) for batch in batches)
    got = evaluate(examples, 3, limit=2)
    assert got.tokens == sum(int(batch["weights"].sum()) for batch in batches) < 21
    assert got.score.loss == pytest.approx(nats / got.tokens, rel=1e-5)
    assert got.score != evaluate(examples, 3, limit=3).score
    assert evaluate(examples, 3, limit=99) == evaluate(examples, 3)


def test_score_is_the_definition():
    got = score(nats=10.0, tokens=4, text_bytes=20)
    assert got.loss == 2.5
    assert got.perplexity == pytest.approx(np.exp(2.5))
    assert got.bits_per_byte == pytest.approx(10.0 / np.log(2) / 20)


def test_a_score_is_a_number_without_tokens_and_for_the_worst_model():
    assert np.isfinite(score(0.0, 0, 0)).all()
    assert np.isfinite(score(1e9, 3, 9)).all()


def test_as_json_loops_are_numbered_from_one(examples):
    config = small_config("plt", 3, window=3, layers=1)
    evaluation = evaluate(examples, 8, config=config)
    values = evaluation.to_json()
    assert [row["loop"] for row in values["by_loop"]] == [1, 2, 3]
    last = {name: value for name, value in values["by_loop"][-1].items() if name != "loop"}
    assert last == evaluation.score._asdict()
    assert {name: values[name] for name in last} == last
    assert (values["tokens"], values["bytes"]) == (evaluation.tokens, evaluation.text_bytes)
