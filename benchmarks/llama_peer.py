"""Decoding beside llama.cpp, on a model of the same shape.

python -m benchmarks.llama_peer configs/decode_150m.yaml --batch 1,8

It needs the packages llama-cpp-python and gguf. llama.cpp gets a llama of the shape of the config's
model without loops, with random weights in f16 and in q8_0, and decodes as many sequences of the
same length. Its threads are as many as the machine has cores. All are measured in turn.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from plt_jax.benchmarks.decode import DecodeSettings, Workload
from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.prepared import prepare_all
from plt_jax.benchmarks.rounds import interleave, positive_integers, spread
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import ModelConfig
from plt_jax.config.variants import variants_of
from plt_jax.decoding.generation import BLOCK
from plt_jax.runs.configuration import load_config

QUANTIZED = ("f16", "q8_0")


def main() -> None:
    parser = CommandParser(
        prog="python -m benchmarks.llama_peer",
        description="Measure decoding beside llama.cpp, on a model of the same shape.",
    )
    parser.add_argument("config", help="YAML file of a dense model")
    parser.add_argument("--batch", type=positive_integers, default=[1], help="batch sizes")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache before")
    parser.add_argument("--tokens", type=int, default=16, help=f"tokens timed, below {BLOCK}")
    parser.add_argument("--rounds", type=int, default=7, help="how many times each is measured")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    model = load_config(arguments.config).model.model_dump()
    room = arguments.context + 2 * BLOCK
    base = ModelConfig(**model | {"dtype": "bfloat16", "max_length": room})
    rows = prepare_all(variants_of(["no_loop", "plt"], [2]), base, [None, "int8"])
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.llama_peer", *sys.argv[1:]]),
        "machine": machine(),
        "cells": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"{kind}.gguf" for kind in QUANTIZED}
        for kind, path in files.items():
            write_gguf(base, kind, path)
        for batch in arguments.batch:
            settings = DecodeSettings(tokens=arguments.tokens)
            workload = Workload(base, batch, arguments.context, settings)
            timers: dict[str, Callable[[], float]] = {
                row.label: functools.partial(workload.decode_seconds, row) for row in rows
            }
            for kind, path in files.items():
                peer = LlamaCpp(base, path, batch, arguments)
                timers[f"llama.cpp, {kind}"] = peer.decode_seconds
            seconds = interleave(timers, arguments.rounds)
            found = {
                name: spread("ms", [1e3 * one / arguments.tokens for one in values])
                for name, values in seconds.items()
            }
            report["cells"].append({"batch": batch, "context": arguments.context, "rows": found})
            print(f"batch {batch}, context {arguments.context}: ms per step")
            for name, row in found.items():
                print(f"  {name:20}{row['ms']:8.2f}  ({row['ms_min']:.2f}-{row['ms_max']:.2f})")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_gguf(config: ModelConfig, kind: str, path: Path) -> None:
    """Writes a llama of the model's shape with random weights."""
    import gguf  # pyright: ignore[reportMissingImports]

    D, F, V = config.width, config.ffn_width, config.vocab_size
    N, K, H = config.heads, config.kv_heads, config.head_width
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(D)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_rope_dimension_count(H)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        weight = rng.normal(scale=0.02, size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + weight)
        elif kind == "f16":
            writer.add_tensor(f"{name}.weight", weight.astype(np.float16))
        else:
            dtype = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(weight, dtype)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=dtype)

    add("token_embd", V, D)
    add("output_norm", D)
    if not config.tied_embeddings:
        add("output", V, D)
    for layer in range(config.layers):
        for name, shape in {
            "attn_norm": (D,),
            "attn_q": (N * H, D),
            "attn_k": (K * H, D),
            "attn_v": (K * H, D),
            "attn_output": (D, N * H),
            "ffn_norm": (D,),
            "ffn_gate": (F, D),
            "ffn_up": (F, D),
            "ffn_down": (D, F),
        }.items():
            add(f"blk.{layer}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model of llama.cpp with sequences of a length."""

    def __init__(self, config: ModelConfig, path: Path, batch: int, arguments: argparse.Namespace):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._library, self._batch, self._context = llama_cpp, batch, arguments.context
        self._tokens, self._vocab = arguments.tokens, config.vocab_size
        cores = os.cpu_count() or 1
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = batch * (arguments.context + 2 * BLOCK)
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = batch
        settings.n_threads = settings.n_threads_batch = cores
        self._model = model
        self._state = llama_cpp.llama_init_from_model(model, settings)
        self._rows = llama_cpp.llama_batch_init(512, 0, 1)
        for sequence in range(batch):
            for start in range(0, arguments.context, 512):
                positions = range(start, min(start + 512, arguments.context))
                self._run([(at % self._vocab, at, sequence) for at in positions], logits=False)

    def decode_seconds(self) -> float:
        """Seconds of `tokens` greedy steps of all sequences, behind one that is not timed."""
        newest = list(range(self._batch))
        began = 0.0
        for index in range(self._tokens + 1):
            if index == 1:
                began = time.perf_counter()
            at = self._context + index
            self._run([(token, at, row) for row, token in enumerate(newest)], logits=True)
            for row in range(self._batch):
                found = self._library.llama_get_logits_ith(self._state, row)
                newest[row] = int(np.argmax(np.ctypeslib.as_array(found, (self._vocab,))))
        seconds = time.perf_counter() - began
        memory = self._library.llama_get_memory(self._state)
        for row in range(self._batch):
            self._library.llama_memory_seq_rm(memory, row, self._context, -1)
        return seconds

    def _run(self, rows: list[tuple[int, int, int]], logits: bool) -> None:
        """Appends tokens, each with its position and its sequence."""
        batch = self._rows
        batch.n_tokens = len(rows)
        for index, (token, position, sequence) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = logits
        status = self._library.llama_decode(self._state, batch)
        assert status == 0, f"llama_decode returned {status}"


if __name__ == "__main__":
    run_command(main)
