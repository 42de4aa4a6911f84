#!/usr/bin/env bash
# bash benchmarks/gpu/6_quality.sh OUT MODEL REFERENCE STEPS [OPTIONS]: FID, KID, precision and recall of 50,000 images, a row a number
# of steps, as JSON, table and plot in OUT. OPTIONS of ddim_fast.evaluate, such as --spacing quadratic,adaptive, come last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ $# -ge 4 ] || { echo "usage: bash benchmarks/gpu/6_quality.sh OUT MODEL REFERENCE STEPS [OPTIONS]"; exit 2; }
out=$1 model=$2 reference=$3 steps=$4

python -m ddim_fast.evaluate --fetch-inception || true # where pip reaches no registry, --inception among the OPTIONS names the file
code=0
timeout --signal=INT 570 python -m ddim_fast.evaluate --model "$model" --reference "$reference" --steps "$steps" \
    --compile --batch-size 500 --quiet --out "$out" "${@:5}" || code=$?
[ "$code" -ne 124 ] || echo "The time is up. The same command goes on from here."
exit "$code"
