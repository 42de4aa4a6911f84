#!/usr/bin/env bash
# bash benchmarks/gpu/4_train.sh PRESET DATA RUN MINUTES [OPTIONS]: trains for so long, going on from the checkpoint in RUN if there is
# one. OPTIONS of ddim_fast.train, such as --recipe fast, are for the stage that begins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ $# -ge 4 ] || { echo "usage: bash benchmarks/gpu/4_train.sh PRESET DATA RUN MINUTES [OPTIONS]"; exit 2; }
preset=$1 data=$2 run=$3 minutes=$4

if [ -f "$run/config.json" ]; then
    options=(--resume)
else
    options=(--data "$data" --preset "$preset" --compile --save-every 2000 --sample-every 10000 "${@:5}")
fi
# An interrupted run keeps its last checkpoint, and 124 says that the time is up.
timeout --signal=INT "${minutes}m" python -m ddim_fast.train --out "$run" "${options[@]}" --quiet || [ $? -eq 124 ]
tail -n 1 "$run/stats.jsonl"
