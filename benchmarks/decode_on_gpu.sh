#!/usr/bin/env bash
# The decode figures that need a GPU, in five to ten minutes (an estimate): exactness on the card,
# then the paper's open dense shape in bfloat16 by scheme, batch and context, with XLA's attention
# and with attention in one kernel, a trace of its kernels, and which targets are met.
#
#   benchmarks/decode_on_gpu.sh [FOLDER [CONFIG]]      FOLDER gets the tables, figures and plots
#
# BATCHES, CONTEXT and LONG change the sizes, ROUNDS the rounds, TESTS the tests. KERNEL=xla
# rehearses the part of the attention kernel where there is no Hopper GPU. TORCH_PYTHON names an
# interpreter that has torch and transformers; without it their llama is not measured.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/decode/gpu}
config=${2:-configs/plt_dense_1b.yaml}
context=${CONTEXT:-1024} long=${LONG:-8192} rounds=${ROUNDS:-7}
# PyTorch's process needs memory beside this one.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
mkdir -p "$out"
started=$SECONDS
lap() { echo "== $1 ($((SECONDS - started)) s) =="; }
measure() { # NAME OPTION...
    local name=$1
    shift
    python -m plt_jax.benchmarks.decode "$config" --dtype bfloat16 --tokens 31 \
        --rounds "$rounds" --out "$out/$name" "$@"
}

lap "exactness"
# A failure must not cost the figures; the summary repeats its last line.
python -m pytest -q -p no:cacheprovider tests/golden/test_model.py tests/decoding/test_splits.py \
    tests/decoding/test_fused_attention.py \
    -k "${TESTS:-golden or plt-2 or plt-3 or no_loop or bfloat16 or eight_bits or kernel or parts}" 2>&1 |
    tee "$out/tests.txt" || true
lap "batch 1 and 16"
measure by_batch --batch "${BATCHES:-1,16,4,64}" --context "$context" \
    --schemes no_loop,plt --loops 2,3 ${TORCH_PYTHON:+--torch "$TORCH_PYTHON"}
lap "attention in one kernel"
measure mosaic --batch 1,16,64 --context "$context" --schemes no_loop,plt --loops 2,3 \
    --decode_attention "${KERNEL:-mosaic}" || true
lap "the loop in turn"
measure vanilla --batch 1,16 --context "$context" --schemes no_loop,vanilla_loop --loops 2
lap "a long context"
measure long --batch 1,16 --context "$long" --schemes no_loop,plt --loops 2,3
lap "trace"
python -m benchmarks.decode_trace "$config" --context "$context" --out "$out/trace" || true
lap "what XLA chose"
XLA_FLAGS="${XLA_FLAGS:-} ${AUTOTUNE_DUMP:---xla_gpu_dump_autotune_results_to=$out/autotuned.txt}" \
    JAX_ENABLE_COMPILATION_CACHE=false python -m plt_jax.benchmarks.decode "$config" \
    --dtype bfloat16 --batch 1 --context "$context" --schemes plt --loops 2 --tokens 4 --rounds 1 ||
    true
lap "done"
{
    tail -n 1 "$out/tests.txt"
    python -m benchmarks.decode_targets "$out/by_batch" "$out/long"
    echo "with attention in one kernel:"
    python -m benchmarks.decode_targets "$out/mosaic" || true
} | tee "$out/targets.txt"
