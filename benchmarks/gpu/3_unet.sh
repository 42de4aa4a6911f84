#!/usr/bin/env bash
# bash benchmarks/gpu/3_unet.sh OUT: the network's benchmark as JSON, and the table made from it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?usage: bash benchmarks/gpu/3_unet.sh OUT}
mkdir -p "$out"

# float32 waits for another day: max-autotune compiles for minutes.
python -m pytest benchmarks/test_unet.py -k bf16 --benchmark-only --benchmark-max-time 1 --benchmark-json "$out/unet.json" -q
python benchmarks/report.py "$out/unet.json" --baseline diffusers-compiled | tee "$out/unet.md"
