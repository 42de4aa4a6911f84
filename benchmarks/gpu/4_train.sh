#!/usr/bin/env bash
# bash benchmarks/gpu/4_train.sh NETWORK DATA RUN MINUTES [OPTIONS]: trains for so long, going on from the checkpoint in RUN if there
# is one. NETWORK is a preset, or a folder: a checkpoint whose weights to begin with, such as an earlier stage. OPTIONS of
# ddim_fast.train, such as --recipe fast, are for the run that begins. RUN/stage is what to keep: averaged weights in bf16.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ $# -ge 4 ] || { echo "usage: bash benchmarks/gpu/4_train.sh NETWORK DATA RUN MINUTES [OPTIONS]"; exit 2; }
network=$1 data=$2 run=$3 minutes=$4

if [ -f "$run/config.json" ]; then
    options=(--resume)
else
    [ -d "$network" ] && begin=--init || begin=--preset
    options=(--data "$data" "$begin" "$network" --compile --save-every 2000 --sample-every 10000 "${@:5}")
fi
python -m ddim_fast.train --out "$run" "${options[@]}" --minutes "$minutes" --quiet
tail -n 1 "$run/stats.jsonl"
rm -rf "$run/stage"
python -m ddim_fast.export --to checkpoint --model "$run" --dtype bfloat16 --max-shard-size 16MB --out "$run/stage"
