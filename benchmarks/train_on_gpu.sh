#!/usr/bin/env bash
# The training figures that need a GPU, in less than ten minutes: tests of the attention's and the
# loss's exactness on the GPU, the paper's open dense shape in bfloat16 at sequences of 4096, as
# no_loop, vanilla_loop and PLT, and PLT with less recomputation.
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
    tests/model/test_loss.py | tee "$out/tests.txt"
measure() {  # SCHEMES REMAT NAME
    python -m plt_jax.benchmarks.train "$config" --schemes "$1" --loops 2 \
        --training.batch_size "${BATCH:-16}" --training.accumulate "${ACCUMULATE:-4}" \
        --model.remat "$2" --data.sequence_length "${LENGTH:-4096}" \
        --steps 2 --rounds "${ROUNDS:-3}" --out "$out/$3.json" | tee "$out/$3.txt"
}
lap "schemes"
measure no_loop,vanilla_loop,plt "${REMAT:-full}" train
for remat in attention dots_and_attention; do
    lap "plt, remat $remat"
    measure plt "$remat" "train_$remat" || echo "not measured; more micro-batches need less memory"
done
lap "done"
