"""Parallel Loop Transformers (PLT, arXiv 2510.24824) in JAX and Flax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plt_jax.config import LoopConfig, ModelConfig, MoEConfig, RunConfig
    from plt_jax.decoding.cache import Cache, init_cache
    from plt_jax.decoding.early_exit import ExitRule
    from plt_jax.decoding.generation import generate
    from plt_jax.decoding.prefill import prefill
    from plt_jax.decoding.sampling import Sampling
    from plt_jax.decoding.step import decode_step
    from plt_jax.decoding.weights import prepare_for_decode
    from plt_jax.errors import InputError
    from plt_jax.interop.huggingface import load_huggingface, save_huggingface
    from plt_jax.model.transformer import Transformer
    from plt_jax.runs.configuration import load_config

# The public names load on first use: commands import this package before they parse their
# arguments, and JAX takes seconds to import.
_HOME = {
    "Cache": "decoding.cache",
    "ExitRule": "decoding.early_exit",
    "InputError": "errors",
    "LoopConfig": "config",
    "MoEConfig": "config",
    "ModelConfig": "config",
    "RunConfig": "config",
    "Sampling": "decoding.sampling",
    "Transformer": "model.transformer",
    "decode_step": "decoding.step",
    "generate": "decoding.generation",
    "init_cache": "decoding.cache",
    "load_config": "runs.configuration",
    "load_huggingface": "interop.huggingface",
    "prefill": "decoding.prefill",
    "prepare_for_decode": "decoding.weights",
    "save_huggingface": "interop.huggingface",
}

__all__ = [
    "Cache",
    "ExitRule",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"plt_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
