"""The PyTorch process that the decode benchmark compares with: see torch_llama.py."""

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
    """Environment variables without which PyTorch is slower or crashes."""
    variables = {}
    if compiled:
        # Without it, keys and values are copied for every query head.
        variables["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
    if dtype == "bfloat16":
        # On some virtual machines oneDNN uses instructions that the processor only claims to have.
        variables["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16"
    return variables


class TorchLlama:
    """The Llama of transformers, in a model's shape and with a static cache, in another process.

    It is idle between two calls, so that it can be timed in turn with other models.
    """

    def __init__(self, python: str, config: ModelConfig, batch: int, context: int, compiled: bool):
        """Starts the process.

        Args:
          python: the interpreter, which needs torch and transformers.
          batch: sequences decoded together.
          context: tokens in the cache before the timed ones.
          compiled: whether the step goes through torch.compile.

        Raises:
          InputError: the interpreter cannot run it.
        """
        shape = {name: getattr(config, name) for name in (*SHAPE, "tied_embeddings", "dtype")} | {
            "batch": batch,
            "context": context,
            "capacity": context + BLOCK,
            "compile": compiled,
            "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        }
        self.python = python
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(PROGRAM), json.dumps(shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(config.dtype, compiled) | os.environ,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._questions, self._answers = self.process.stdin, self.process.stdout
        self.about = self._answer()

    def __call__(self, tokens: int) -> float:
        """Seconds of decoding so many tokens of every sequence."""
        self._questions.write(f"{tokens}\n")
        self._questions.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        self._questions.close()
        self.process.wait()

    def _answer(self):
        line = self._answers.readline()
        if not line:
            raise InputError(
                f"--torch: {self.python} did not run transformers' llama; it needs "
                "torch and transformers, and memory for the model"
            )
        return json.loads(line)
