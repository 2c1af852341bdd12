"""Parallel Loop Transformers (PLT, arXiv 2510.24824) in JAX and Flax."""

from plt_jax.config import LoopConfig, ModelConfig, MoEConfig, RunConfig
from plt_jax.config_file import load_config
from plt_jax.decoding.cache import Cache, init_cache
from plt_jax.decoding.generation import generate
from plt_jax.decoding.layout import prepare_for_decode
from plt_jax.decoding.prefill import prefill
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.step import decode_step
from plt_jax.errors import InputError
from plt_jax.interop.huggingface import load_huggingface, save_huggingface
from plt_jax.model.transformer import Transformer

__all__ = [
    "Cache",
    "InputError",
    "LoopConfig",
    "MoEConfig",
    "ModelConfig",
    "RunConfig",
    "Sampling",
    "Transformer",
    "decode_step",
    "generate",
    "init_cache",
    "load_config",
    "load_huggingface",
    "prefill",
    "prepare_for_decode",
    "save_huggingface",
]
