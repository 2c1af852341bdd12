"""The decode step's Mosaic GPU kernel against the forward pass, and where it is refused. It is
interpreted where there is no Hopper GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax import decode_step, init_cache, prefill, prepare_for_decode
from plt_jax.config import ModelConfig
from plt_jax.decoding import fused_attention
from plt_jax.decoding.cache import slots_for
from plt_jax.decoding.mosaic_shape import Inputs, Shape
from plt_jax.errors import InputError
from tests.models import forward, random_params, random_tokens, small_config

NEEDED = (0, 12)
needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < NEEDED, reason="the kernel needs jax 0.12, and jax 0.12 Python 3.12"
)
LENGTHS = (3, 7)
CASES = {
    "gates of queries": small_config("plt", 2, qk_norm=True, gate_input="query"),
    "gates of inputs, a window that is never full": small_config(
        "plt", 3, window=50, gate_input="hidden", qkv_bias=True
    ),
    "no loops": small_config("no_loop", 1, qk_norm=True),
    "a shared cache without windows": small_config("clp_kv_share", 2),
    "the middle layers loop": small_config(
        "plt", 2, window=8, layers=3, first_layer=1, last_layer=1
    ),
    "heads of 128": small_config("plt", 2, head_width=128, kv_heads=1, window=1),
}


@pytest.fixture
def on_hopper(monkeypatch):
    """Lets the CPU pass for a Hopper GPU, and interprets what is written for one. On a Hopper GPU
    the kernel itself runs."""
    from jax.experimental.pallas import mosaic_gpu

    if fused_attention.is_hopper():
        yield
        return
    monkeypatch.setattr(fused_attention, "is_hopper", lambda: True)
    with mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams()):
        yield


def with_kernel(config: ModelConfig, kernel: str, **changes) -> ModelConfig:
    changes = {"head_width": max(config.head_width, 64), "dtype": "bfloat16"} | changes
    layers = config.layers if config.has_coda else 1
    return config.model_copy(update={"layers": layers, "decode_attention": kernel} | changes)


def room(config: ModelConfig, length: int) -> int:
    """The least number of positions from `length` on that fills slots to a multiple of 8."""

    def aligned(positions: int) -> bool:
        counts = [slots.count for slots in slots_for(config, 1, positions)]
        return not any(count % 8 for count in (counts if config.has_coda else counts[:1]))

    return next(n for n in range(length, length + 9) if aligned(n))


def decoded(config: ModelConfig, params, tokens):
    """The logits of three steps behind prompts of LENGTHS, [B, 3, V], and the cache after them."""
    weights = prepare_for_decode(config, params)
    cache = init_cache(config, len(LENGTHS), room(config, 10))
    # XLA's attention, whichever the configuration has.
    _, cache = prefill(config, weights, tokens[:, :7], jnp.array(LENGTHS), cache)
    logits = []
    for step in range(3):
        new = jnp.stack([tokens[row, length + step] for row, length in enumerate(LENGTHS)])
        made, cache = decode_step(config, weights, new, cache)
        logits.append(np.asarray(made))
    return np.stack(logits, 1), cache


@needs_pallas
@pytest.mark.slow(reason="interprets a GPU's kernel, thread by thread")
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_decodes_what_the_forward_pass_gives(on_hopper, case):
    """It is as near to the float32 forward pass as XLA's attention in bfloat16, up to a half."""
    exact = with_kernel(CASES[case], "xla", dtype="float32")
    params, tokens = random_params(exact), random_tokens(exact, 2, 10)
    all_logits = np.asarray(forward(exact)(params, tokens))
    expected = np.stack([all_logits[row, n : n + 3] for row, n in enumerate(LENGTHS)])
    by_xla, xla_cache = decoded(with_kernel(exact, "xla"), params, tokens)
    by_kernel, cache = decoded(with_kernel(exact, "mosaic"), params, tokens)
    assert np.abs(by_xla - expected).max() < 0.1  # of logits up to 3
    assert np.abs(by_kernel - expected).mean() < 1.5 * np.abs(by_xla - expected).mean()
    for stored, other in ((cache.keys, xla_cache.keys), (cache.values, xla_cache.values)):
        np.testing.assert_allclose(
            *(np.asarray(array[0][0], np.float32) for array in (stored, other)), atol=0.1
        )


@needs_pallas
@pytest.mark.slow(reason="interprets a GPU's kernel, thread by thread")
def test_parts_of_a_long_cache_are_merged(on_hopper):
    """Four parts, of which some have no key yet."""
    config = with_kernel(small_config("plt", 2, window=5, max_length=512), "xla", dtype="float32")
    params, tokens = random_params(config), random_tokens(config, 1, 301)
    expected = np.asarray(forward(config)(params, tokens))
    for length in (40, 300):
        found = {}
        for kernel in ("xla", "mosaic"):
            one = with_kernel(config, kernel)
            weights, cache = prepare_for_decode(one, params), init_cache(one, 1, 515)
            _, cache = prefill(one, weights, tokens[:, :length], jnp.array([length]), cache)
            logits, _ = decode_step(one, weights, tokens[:, length], cache)
            found[kernel] = np.abs(np.asarray(logits) - expected[:, length]).mean()
        assert found["mosaic"] < 1.5 * found["xla"] < 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small_config("vanilla_loop", 2), "vanilla_loop does not run its loops in one pass"),
        (small_config("clp", 2), "clp does not run its loops in one pass over one cache"),
        (small_config("plt", 2, head_width=32), "head_width is 32, not 64 or 128"),
        (
            small_config("plt", 8, heads=16, head_width=64),
            "loops and query heads of a key/value head make 80 rows",
        ),
        (small_config("plt", 2), "model.dtype and the cache's dtype are not both bfloat16"),
    ],
)
def test_what_it_cannot_run_is_refused(monkeypatch, config, message):
    monkeypatch.setattr(fused_attention, "is_hopper", lambda: True)
    monkeypatch.setattr(jax, "__version_info__", NEEDED)
    if "head_width" not in message:
        config = config.model_copy(update={"head_width": 64})
    config = config.model_copy(update={"decode_attention": "mosaic"})
    with pytest.raises(InputError, match=message):
        fused_attention.decode_kernel(config, init_cache(config, 1, 8))


def test_caches_that_it_cannot_read_are_refused(monkeypatch):
    monkeypatch.setattr(fused_attention, "is_hopper", lambda: True)
    monkeypatch.setattr(jax, "__version_info__", NEEDED)
    config = with_kernel(small_config(), "mosaic")
    assert fused_attention.decode_kernel(config, init_cache(config, 1, 11)) == "mosaic"
    elsewhere = init_cache(config, 1, 8)  # a GPU would make more slots of it
    elsewhere = elsewhere.replace(slots=elsewhere.slots._replace(count=13))
    with pytest.raises(InputError, match="13 slots, not a multiple of 8 as it has on GPUs; set it"):
        fused_attention.decode_kernel(config, elsewhere)
    with pytest.raises(InputError, match="cache's dtype are not both bfloat16; set it to auto"):
        fused_attention.decode_kernel(config, init_cache(config, 1, 8, "int8"))


def test_other_devices_and_versions_are_refused(monkeypatch):
    config = with_kernel(small_config(), "mosaic")
    cache = init_cache(config, 1, 8)
    monkeypatch.setattr(fused_attention, "is_hopper", lambda: False)
    monkeypatch.setattr(jax, "__version_info__", NEEDED)
    with pytest.raises(InputError, match="it needs an NVIDIA GPU of compute capability 9"):
        fused_attention.decode_kernel(config, cache)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(InputError, match=r"the kernel needs jax 0\.12"):
        fused_attention.decode_kernel(config, cache)
    for kernel in ("auto", "xla"):
        config = with_kernel(small_config(), kernel)
        assert fused_attention.decode_kernel(config, cache) == "xla"


@needs_pallas
@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize(("capacity", "window"), [(571, 5), (63, 1), (128, 64)])
def test_it_is_laid_out_as_its_loads_need(monkeypatch, head_width, capacity, window):
    """What only a GPU's compiler or a GPU would show: blocks that begin between tiles are refused,
    and rows that a program reads from the second on must not be swizzled."""
    from jax.experimental.mosaic.gpu import layout_inference, utils

    from plt_jax.decoding.mosaic_kernel import decode_attention

    modules = []
    infer = layout_inference.infer_layout

    def infer_and_keep(module, **settings):
        infer(module, **settings)
        modules.append(str(module))

    monkeypatch.setattr(utils, "_infer_arch", lambda: (9, 0))
    monkeypatch.setattr(layout_inference, "infer_layout", infer_and_keep)
    shape = Shape(2, 2, 2, 4, head_width, capacity, window)
    B, R, K, G, H, slots = *shape[:5], capacity + window

    def argument(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cache = argument(jnp.bfloat16, B, K, slots, H)
    inputs = Inputs(
        argument(jnp.bfloat16, B, R, K, G + 2, H),
        *[argument(jnp.float32, B, H // 2)] * 2,
        argument(jnp.float32, G + 1, H),
        argument(jnp.float32, K * G, H),
        argument(jnp.int32, B),
        *[cache] * 2,
    )
    run = jax.jit(lambda inputs: decode_attention(shape, inputs, 1e-6))
    run.trace(inputs).lower(lowering_platforms=("cuda",))
    (module,) = modules
    row_views = [line for line in module.splitlines() if f"memref<72x{H}xbf16" in line]
    transforms = set(re.findall(r"#mosaic_gpu\.(?:tile|swizzle)<[^>]*>", "\n".join(row_views)))
    assert transforms == {f"#mosaic_gpu.tile<[1, {H // 2}]>"}
