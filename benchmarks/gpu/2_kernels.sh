#!/usr/bin/env bash
# bash benchmarks/gpu/2_kernels.sh OUT: the operators' benchmarks as JSON, and the tables made from them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?usage: bash benchmarks/gpu/2_kernels.sh OUT}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv > "$out/gpu.csv" || true

measure() { # OPERATOR BASELINE TESTS
    python -m pytest "benchmarks/test_$1.py" -k "$3" --benchmark-only --benchmark-max-time 0.2 --benchmark-min-rounds 20 \
        --benchmark-json "$out/$1.json" -q
    python benchmarks/report.py "$out/$1.json" --baseline "$2" | tee "$out/$1.md"
}
measure ddim_step compiled_formula "not none"
measure attention pytorch bf16
measure group_norm_silu compiled bf16 # float32 would take as long again
