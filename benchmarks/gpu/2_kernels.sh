#!/usr/bin/env bash
# bash benchmarks/gpu/2_kernels.sh OUT: the benchmarks of the operators and the U-Net as JSON, and the tables made from them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?usage: bash benchmarks/gpu/2_kernels.sh OUT}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv > "$out/gpu.csv" || true

for pair in ddim_step:compiled_formula group_norm_silu:compiled attention:pytorch unet:diffusers-compiled; do
    operator=${pair%%:*}
    python -m pytest "benchmarks/test_$operator.py" --benchmark-only --benchmark-max-time 0.2 --benchmark-min-rounds 20 \
        --benchmark-json "$out/$operator.json" -q
    python benchmarks/report.py "$out/$operator.json" --baseline "${pair##*:}" | tee "$out/$operator.md"
done
