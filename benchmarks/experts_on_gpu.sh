#!/usr/bin/env bash
# The figures of mixtures that need a GPU, in less than eight minutes: tests of exactness on the GPU,
# grouped products with every kernel, and the latency of one-pass decoding.
#
#   benchmarks/experts_on_gpu.sh [FOLDER]      FOLDER gets the tables, figures and plots
#
# TOKENS, WIDTHS, OUTPUTS and CONFIG change the sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/experts_gpu}
export PYTHONUNBUFFERED=1
mkdir -p "$out"
started=$SECONDS
lap() { echo "== $1 ($((SECONDS - started)) s) =="; }

lap "exactness"
python -m pytest -q -p no:cacheprovider tests/model/test_grouped.py tests/model/test_moe.py \
    tests/decoding/test_ops.py | tee "$out/tests.txt"
lap "grouped products"
python -m benchmarks.grouped --dtype bfloat16 --tokens "${TOKENS:-4096,32768}" --experts 64 \
    --per_token 8 --widths "${WIDTHS:-2048}" --outputs "${OUTPUTS:-1024}" --out "$out/grouped.json" \
    | tee "$out/grouped.txt"
lap "decoding"
python -m plt_jax.benchmarks.decode "${CONFIG:-configs/plt_moe_1b_7b.yaml}" --dtype bfloat16 \
    --batch 1,16 --context 1024 --tokens 31 --rounds 9 --loops 2 \
    --schemes no_loop,vanilla_loop,plt --out "$out/decode"
lap "done"
