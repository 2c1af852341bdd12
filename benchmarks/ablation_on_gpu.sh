#!/usr/bin/env bash
# The ablation on one GPU: on synthetic tasks that need depth, and on text at 32 million parameters.
#
#   benchmarks/ablation_on_gpu.sh synthetic|text FOLDER [SECONDS]
#
# Several rows train at the same time, because one small model does not fill a GPU. After SECONDS the
# rows are stopped, and the same command continues them. The text is that of
# benchmarks/speeches_and_code.py, in corpora/speeches_and_code. CONFIGS, ROWS, SEEDS and WORKERS
# change what is trained; MORE adds options.
set -euo pipefail
what=${1:?synthetic or text} out=$(realpath -m "${2:?a folder}") limit=${3:-100000}
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
# Seeds share their programs, and programs as small as these gain nothing from trials.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"
case $what in
    synthetic) configs=${CONFIGS:-permutations p_hop addition} seeds=${SEEDS:-3} workers=${WORKERS:-7} ;;
    text) configs=${CONFIGS:-30m} seeds=${SEEDS:-1} workers=${WORKERS:-3} ;;
    *) echo "give synthetic or text, not $what" >&2; exit 2 ;;
esac
rows=${ROWS:-plt-3 no_loop-2x_layers plt-2 vanilla_loop-2 clp-2 clp_kv_share-2 no_loop}
mkdir -p "$out/logs"

ablate() { # CONFIG ROW
    local left=$((end - $(date +%s)))
    [ "$left" -gt 0 ] || return 0
    # shellcheck disable=SC2086
    timeout "$left" python3 -m plt_jax.benchmarks.ablation "configs/ablation_$1.yaml" \
        --run_dir "$out/$1" --rows "$2" --seeds "$seeds" --decode_rounds 0 ${MORE:-} \
        >"$out/logs/$1.$2" 2>&1 || echo "$1 $2 ended with $?: $(tail -n 1 "$out/logs/$1.$2")"
}
export -f ablate
export out seeds end=$(($(date +%s) + limit))
for config in $configs; do
    for row in $rows; do echo "$config $row"; done
done | xargs -P "$workers" -L 1 bash -c 'ablate "$@"' ablate
for config in $configs; do
    echo "== $config, after $SECONDS s"
    tail -n +2 "$out/$config/ablation.txt" || true
done
