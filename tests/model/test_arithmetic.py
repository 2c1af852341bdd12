"""FLOPs of a step: model and executed."""

import pytest

from plt_jax.config import RunConfig
from plt_jax.model.arithmetic import decode_flops, train_flops
from plt_jax.model.costs import flops_by_loop

T = 1024


def run_config(loops: int = 2, **model) -> RunConfig:
    shape = {"vocab_size": 512, "max_length": T, "width": 128, "layers": 3, "heads": 2}
    loop = {"scheme": "plt", "count": loops, "window": 64}
    model = {**shape, "kv_heads": 1, "ffn_width": 256, "loop": loop, **model}
    return RunConfig(model=model, training={"batch_size": 4})


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_model_flops_are_three_forward_passes_of_every_loop(loops):
    config = run_config(loops)
    forward = [one.total for one in flops_by_loop(config.model, T)]
    assert train_flops(config).by_loop == tuple(3 * 4 * T * one for one in forward)


def attention(config: RunConfig) -> int:
    """Forward, in blocks of 512 (three of four are seen), and of 256 for windows (seven of 16)."""
    pairs = 2 * 3 * 512**2 + 7 * 256**2
    return 4 * config.training.batch_size * 4 * 3 * 64 * 2 * pairs // 4


@pytest.mark.parametrize(("remat", "layers", "forwards"), [("none", 3, 1), ("full", 4, 2)])
def test_executed_flops_count_what_is_computed_again(remat, layers, forwards):
    config = run_config(remat=remat)
    loops = flops_by_loop(config.model, T)
    products = sum(4 * T * (layers * one.layers + 3 * one.head) for one in loops)
    expected = products + (forwards + 3.5) * attention(config)
    assert train_flops(config).executed == expected


def test_the_policy_that_keeps_products_computes_experts_again():
    moe = {"experts": 8, "experts_per_token": 2, "expert_width": 64}
    none, dots, full = (
        train_flops(run_config(moe=moe, remat=remat)).executed for remat in ("none", "dots", "full")
    )
    assert none < dots < full


def test_a_decode_step_attends_to_the_whole_cache():
    config = run_config(2).model
    short, long = (decode_flops(config, 8, context) for context in (100, 200))
    per_key = 4 * config.layers * config.heads * config.head_width
    assert long.model - short.model == 8 * 2 * per_key * 100
    assert short.executed == short.model
