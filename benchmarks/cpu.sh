#!/usr/bin/env bash
# bash benchmarks/cpu.sh OUT: the CPU tables of docs/engines.md and of networks.md in benchmarks/results/zen4-two-cores, as JSON and
# Markdown, in about 15 minutes on two otherwise idle cores.
# The other programs come with pip install -c constraints.txt -e '.[dev,peers]'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: bash benchmarks/cpu.sh OUT}
mkdir -p "$out"

measure() { # NAME BASELINE
    python -m pytest "benchmarks/test_$1.py" --full --benchmark-only --benchmark-json "$out/$1.json" -q
    python benchmarks/report.py "$out/$1.json" --baseline "$2" | tee "$out/$1.md"
}
measure unet "diffusers fp32"
measure sampler "diffusers fp32"
measure approximations "20 steps fp32"
