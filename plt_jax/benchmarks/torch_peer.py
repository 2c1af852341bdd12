"""The PyTorch processes that benchmarks compare with: see torch_llama.py and
torch_llama_training.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax

from plt_jax.config import ModelConfig, RunConfig
from plt_jax.decoding.generation import BLOCK
from plt_jax.errors import InputError

DECODING = Path(__file__).with_name("torch_llama.py")
TRAINING = Path(__file__).with_name("torch_llama_training.py")
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
    """The Llama of transformers, in a model's shape, in another process.

    It is idle between two calls, so that it can be timed in turn with other models.
    """

    def __init__(self, python: str, program: Path, shape: dict[str, Any]):
        """Starts the process.

        Args:
          python: the interpreter, which needs torch and transformers.
          program: the file that it runs; see there.
          shape: what that file needs to know; see `shape_of`.

        Raises:
          InputError: the interpreter cannot run it.
        """
        self.python = python
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(program), json.dumps(shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(shape["dtype"], shape["compile"]) | os.environ,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._questions, self._answers = self.process.stdin, self.process.stdout
        self.about = self._answer()

    def __call__(self, count: int) -> float:
        """Seconds of so many tokens of every sequence, or training steps."""
        self._questions.write(f"{count}\n")
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


def decoding_llama(
    python: str, config: ModelConfig, batch: int, context: int, compiled: bool
) -> TorchLlama:
    """The Llama that decodes with a static cache; its calls are of tokens of every sequence.

    Args:
      python: the interpreter, which needs torch and transformers.
      batch: sequences decoded together.
      context: tokens in the cache before the timed ones.
      compiled: whether the step goes through torch.compile.

    Raises:
      InputError: the interpreter cannot run it.
    """
    shape = {"batch": batch, "context": context, "capacity": context + BLOCK}
    return TorchLlama(python, DECODING, shape_of(config, compiled) | shape)


def training_llama(python: str, config: RunConfig, compiled: bool) -> TorchLlama:
    """The Llama that is trained on random tokens; its calls are of steps.

    Args:
      python: the interpreter, which needs torch and transformers.
      compiled: whether the model goes through torch.compile.

    Raises:
      InputError: the interpreter cannot run it.
    """
    shape = {
        "batch": config.training.batch_size,
        "accumulate": config.training.accumulate,
        "length": config.sequence_length,
    }
    return TorchLlama(python, TRAINING, shape_of(config.model, compiled) | shape)


def shape_of(config: ModelConfig, compiled: bool) -> dict[str, Any]:
    """What both programs need to know of a model."""
    return {name: getattr(config, name) for name in (*SHAPE, "tied_embeddings", "dtype")} | {
        "compile": compiled,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
    }
