"""Counted costs against the parameters' arrays, the cache's arrays and XLA's own count."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from plt_jax import Transformer, init_cache, load_config
from plt_jax.model.costs import (
    cache_bytes,
    count_parameters,
    describe_loops,
    flops_by_loop,
)
from plt_jax.model.transformer import abstract_params
from tests.models import ALL, small_config
from tests.training.runs import command

CONFIGS = Path(__file__).parents[2] / "configs"
MIXTURE = {"experts": 8, "experts_per_token": 2, "expert_width": 8}


@pytest.mark.parametrize("moe", [{}, MIXTURE, MIXTURE | {"dense_layers": 1, "shared_width": 4}])
def test_parameters_are_those_of_the_arrays(moe):
    config = small_config(moe=moe)
    count = count_parameters(config)
    leaves = jax.tree.leaves(nn.unbox(abstract_params(config)))
    assert count.total == sum(leaf.size for leaf in leaves)
    mixtures = config.layers - config.moe.dense_layers if moe else 0
    assert count.total - count.active == mixtures * 6 * 3 * 16 * 8
    assert count.embeddings == 2 * 31 * 16


PAPER = {
    "plt_dense_1b": (1.2e9, 1.2e9),
    "plt_moe_680m_13b": (13e9, 680e6),
    "plt_moe_1.7b_40b": (40e9, 1.7e9),
    "moe_2.5b_60b": (60e9, 2.5e9),
    # Its name rounds: with 8 of its 64 experts, 16 layers of width 2048 make 1.08 billion active
    # parameters, or 1.28 with the embeddings.
    "plt_moe_1b_7b": (7e9, 1.28e9),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_shapes_have_the_sizes_in_their_names(name):
    count = count_parameters(load_config(CONFIGS / f"{name}.yaml").model)
    assert (count.total, count.active) == pytest.approx(PAPER[name], rel=0.03)


def test_plt_has_two_thirds_of_the_layers_of_the_model_it_matches():
    plt, plain = (
        load_config(CONFIGS / f"{name}.yaml").model for name in ("plt_moe_1.7b_40b", "moe_2.5b_60b")
    )
    assert 3 * plt.layers == 2 * plain.layers
    same = {"layers", "loop"}
    assert plt.model_dump(exclude=same) == plain.model_dump(exclude=same)


@pytest.mark.parametrize(("scheme", "count"), ALL)
def test_cache_bytes_are_those_of_the_arrays(scheme, count):
    config = small_config(scheme, count)
    counted = cache_bytes(config)
    arrays = jax.eval_shape(lambda: init_cache(config, 1, 32))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves((arrays.keys, arrays.values)))
    assert counted.per_token * 32 + counted.windows == size
    half = cache_bytes(config.model_copy(update={"dtype": "bfloat16"}))
    assert half.per_token == counted.per_token // 2


@pytest.mark.parametrize(("first", "last"), [(1, 2), (2, None), (0, 0)])
@pytest.mark.parametrize("scheme", ["vanilla_loop", "plt"])
def test_cache_bytes_of_layers_that_do_not_loop(scheme, first, last):
    config = small_config(scheme, 3, layers=4, first_layer=first, last_layer=last)
    counted = cache_bytes(config)
    arrays = jax.eval_shape(lambda: init_cache(config, 1, 32))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves((arrays.keys, arrays.values)))
    assert counted.per_token * 32 + counted.windows == size


def test_what_loops_over_part_of_the_stack_cost_by_hand():
    """The example of docs/design.md: layers 4 to 7 of 12 loop three times."""
    middle = small_config("plt", 3, layers=12, first_layer=4, last_layer=7)
    whole = small_config("plt", 3, layers=12)
    products = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
    gates = 2 * 16  # of a layer
    first, second, last = flops_by_loop(middle, 32)
    assert first.layers == 8 * products
    assert second.layers == 4 * (products + gates)
    assert last.layers == 8 * products + 4 * gates
    assert [one.head for one in (first, second, last)] == [0, 0, 2 * 16 * 31]
    # Of 32 keys a position sees 16.5 on average, and of the windows of 5 it sees 4.6875.
    per_key = 4 * 16
    assert first.attention == per_key * 8 * 16.5
    assert second.attention == per_key * 4 * (16.5 + 4.6875)
    assert last.attention == per_key * (8 * 16.5 + 4 * 4.6875)
    token = 2 * 2 * 4 * 4  # keys and values of a layer
    assert cache_bytes(middle) == (12 * token, 4 * 2 * 5 * token)
    assert cache_bytes(whole) == (12 * token, 12 * 2 * 5 * token)


@pytest.mark.parametrize("scheme", ["no_loop", "vanilla_loop", "plt"])
def test_flops_are_those_that_the_compiler_counts(scheme):
    """On one unrolled layer of products so wide that all else is small beside them."""
    count = 1 if scheme == "no_loop" else 2
    config = small_config(
        scheme, count, 4, width=256, heads=4, ffn_width=512, layers=1, vocab_size=512
    )
    params = nn.unbox(abstract_params(config))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    run = jax.jit(lambda params, tokens: Transformer(config).apply({"params": params}, tokens))
    counted = run.lower(params, tokens).compile().cost_analysis()["flops"]
    expected = 16 * sum(loop.total for loop in flops_by_loop(config, 16))
    assert counted == pytest.approx(expected, rel=0.05)


def test_flops_of_a_hand_counted_model():
    """Two layers of width 16, four heads of width 4 over two, 2 of 8 experts of width 8."""
    config = small_config("plt", 3, 5, moe=MIXTURE | {"dense_layers": 1})
    first, second, last = flops_by_loop(config, 9)
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16  # q, k and v, o
    layers = 2 * attention + 3 * 16 * 24 + 16 * 8 + 2 * 3 * 16 * 8
    assert first.layers == 2 * layers
    assert second.layers == last.layers == 2 * (layers + 2 * 16)  # the gates
    assert first.attention == 4 * 2 * 16 * 5  # positions 1 to 9 see 5 keys on average
    assert last.attention == first.attention + round(4 * 2 * 16 * (1 + 2 + 3 + 4 + 5 * 5) / 9)
    assert (first.head, second.head, last.head) == (0, 0, 2 * 16 * 31)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (small_config("no_loop", 1), "no_loop, one loop through 2 layers"),
        (small_config("plt", 3, layers=1), "plt, 3 loops through one layer"),
        (small_config("clp", 2, last_layer=0), "clp, 2 loops through layer 0 of 2 (from 0)"),
        (
            small_config("plt", 2, layers=4, first_layer=1, last_layer=2),
            "plt, 2 loops through layers 1 to 2 of 4 (from 0)",
        ),
    ],
)
def test_loops_in_words(config, words):
    assert describe_loops(config) == words


def test_the_description_names_the_figures():
    text = command("plt_jax.describe", CONFIGS / "plt_moe_1b_7b.yaml").out
    assert "plt, 2 loops through 16 layers of width 2048, 8 of 64 experts" in text
    assert re.search(r"^parameters +6,918,609,152$", text, re.MULTILINE)
    assert re.search(r"^  active per token +1,281,464,576$", text, re.MULTILINE)
    assert re.search(r"^  bytes per token +131,072$", text, re.MULTILINE)
    assert len(re.findall(r"^ +(1|2|all) ", text, re.MULTILINE)) == 3
