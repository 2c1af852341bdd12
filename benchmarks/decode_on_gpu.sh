#!/usr/bin/env bash
# The decode figures that need a GPU, in less than eight minutes: tests of exactness on the GPU, the
# paper's open dense shape in bfloat16 compared with the Llama of transformers, and growth with the
# context.
#
#   benchmarks/decode_on_gpu.sh [FOLDER [CONFIG]]      FOLDER gets the tables, figures and plots
#
# CONTEXT, BATCHES and CONTEXTS change the sizes, TORCH_PYTHON the interpreter that has torch and
# transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/decode_gpu}
config=${2:-configs/plt_dense_1b.yaml}
# PyTorch's process needs memory beside this one.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
mkdir -p "$out"
started=$SECONDS
lap() { echo "== $1 ($((SECONDS - started)) s) =="; }

lap "exactness"
python -m pytest -q -p no:cacheprovider tests/decoding/test_splits.py \
    -k "plt-2 or plt-3 or no_loop or vanilla_loop-2 or bfloat16 or eight_bits" | tee "$out/tests.txt"
lap "schemes by batch"
python -m plt_jax.benchmarks.decode "$config" --dtype bfloat16 \
    --batch "${BATCHES:-1,16,64}" --context "${CONTEXT:-1024}" --tokens 31 --rounds 9 \
    --schemes no_loop,plt --loops 2,3 --torch "${TORCH_PYTHON:-python}" --out "$out/by_batch"
lap "every scheme"
python -m plt_jax.benchmarks.decode "$config" --dtype bfloat16 \
    --batch 4 --context "${CONTEXT:-1024}" --tokens 31 --rounds 9 --loops 2 \
    --prompt "${CONTEXT:-1024}" --out "$out/schemes"
lap "by context"
python -m plt_jax.benchmarks.decode "$config" --dtype bfloat16 \
    --batch 1 --context "${CONTEXTS:-1024,32768}" --tokens 31 --rounds 5 \
    --schemes no_loop,plt --loops 2 --out "$out/by_context"
lap "done"
