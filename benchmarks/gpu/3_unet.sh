#!/usr/bin/env bash
# bash benchmarks/gpu/3_unet.sh OUT: the network's benchmark as JSON, and the table made from it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?usage: bash benchmarks/gpu/3_unet.sh OUT}
mkdir -p "$out"

# Batch 8 waits for another day: max-autotune compiles each batch for minutes.
python -m pytest benchmarks/test_unet.py -k "not batch8" --benchmark-only --benchmark-json "$out/unet.json" -q
python benchmarks/report.py "$out/unet.json" --baseline "diffusers-compiled bf16" | tee "$out/unet.md"
