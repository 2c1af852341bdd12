#!/usr/bin/env bash
# The training figures that need a GPU, in less than eight minutes: tests of the attention's exactness
# on the GPU, and the paper's open dense shape in bfloat16 at sequences of 4096, as no_loop,
# vanilla_loop and PLT.
#
#   benchmarks/train_on_gpu.sh [FOLDER [CONFIG]]      FOLDER gets the tables and figures
#
# BATCH, ACCUMULATE, REMAT, LENGTH and ROUNDS change the sizes. A batch that does not fit asks for more
# micro-batches (ACCUMULATE).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/train_gpu}
config=${2:-configs/plt_dense_1b.yaml}
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
mkdir -p "$out"
started=$SECONDS
lap() { echo "== $1 ($((SECONDS - started)) s) =="; }

lap "exactness"
python -m pytest -q -p no:cacheprovider tests/training/test_step.py tests/model/test_blockwise.py \
    | tee "$out/tests.txt"
lap "schemes"
python -m plt_jax.benchmarks.train "$config" --schemes no_loop,vanilla_loop,plt --loops 2 \
    --training.batch_size "${BATCH:-16}" --training.accumulate "${ACCUMULATE:-4}" \
    --model.remat "${REMAT:-full}" --data.sequence_length "${LENGTH:-4096}" \
    --steps 3 --rounds "${ROUNDS:-5}" --out "$out/train.json" | tee "$out/train.txt"
lap "done"
