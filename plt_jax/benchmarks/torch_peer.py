"""Starts and asks the PyTorch process that a decode benchmark compares with."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import jax

from plt_jax.config import ModelConfig
from plt_jax.decoding.generation import BLOCK
from plt_jax.errors import InputError

PROGRAM = Path(__file__).with_name("torch_llama.py")
SHAPE = ("vocab_size", "width", "ffn_width", "layers", "heads", "kv_heads", "head_width")


def environment(dtype: str, compiled: bool) -> dict[str, str]:
    """Variables without which PyTorch is slower, or dies; the user's own go first."""
    variables = {}
    if compiled:
        # It would else write out keys and values for every query head.
        variables["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
    if dtype == "bfloat16":
        # On some virtual machines oneDNN believes in what the processor says, and dies of SIGILL.
        variables["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16"
    return variables


class TorchLlama:
    """transformers' llama of a model's shape with a static cache, in a process of its own.

    It waits idle between two questions, so that it can be timed in turn with others.
    """

    def __init__(self, python: str, config: ModelConfig, batch: int, context: int, compiled: bool):
        """Starts it, with the interpreter given.

        Raises:
          InputError: that interpreter cannot run it.
        """
        shape = {name: getattr(config, name) for name in (*SHAPE, "tied_embeddings", "dtype")} | {
            "batch": batch,
            "context": context,
            "capacity": context + BLOCK,
            "compile": compiled,
            "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        }
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(PROGRAM), json.dumps(shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(config.dtype, compiled) | os.environ,
        )
        self.about = self._answer()

    def __call__(self, tokens: int) -> float:
        """Seconds that decoding so many tokens of every sequence takes."""
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise InputError(
                f"--torch: {self.process.args[0]} did not run transformers' llama; it needs "
                "torch and transformers, and memory for the model"
            )
        return json.loads(line)
