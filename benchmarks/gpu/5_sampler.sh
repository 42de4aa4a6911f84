#!/usr/bin/env bash
# bash benchmarks/gpu/5_sampler.sh OUT MODEL BATCH: whole sampling runs of 20 steps as JSON, and the table made from it.
# MODEL is cifar10-128 or fashion-mnist; BATCH is 1, 8, 64 or 512.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ $# -eq 3 ] || { echo "usage: bash benchmarks/gpu/5_sampler.sh OUT MODEL BATCH"; exit 2; }
out=$1 case=$2-batch$3
mkdir -p "$out"

# Each number of steps is compiled by itself, and the loop is the same.
python -m pytest benchmarks/test_sampler.py -k "$case-steps20" --benchmark-only --benchmark-json "$out/sampler-$case.json" -q
python benchmarks/report.py "$out/sampler-$case.json" --baseline "diffusers-compiled bf16" | tee "$out/sampler-$case.md"
