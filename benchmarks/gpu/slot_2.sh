#!/usr/bin/env bash
# bash benchmarks/gpu/slot_2.sh OUT: how good is the papers' network after eight minutes, begun as cifar10-64 with twice the channels?
# DATA, REFERENCE and INCEPTION name what is read, START another network to begin with; lib.sh says the rest.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
start=${START:-$work/wide}
[ -d "$start" ] || step widen 60 python -m ddim_fast.export --to checkpoint --widen cifar10-128 --model cifar10-64 --out "$start"
train "$work/run" --init "$start" --data "${DATA:-data/cifar10/train-*.parquet}" --recipe fast --min-snr-gamma 100 --batch-size 256 \
    --lr 5e-4 --seed 1 && stage "$work/run" && {
    quality ddim "$work/stage/averaged" --steps 20
    quality unipc "$work/stage/averaged" --solver unipc --steps 10 --guide cifar10-64 --guidance 3 --guidance-interval 300 900
    give_parts
}
exit "$failed"
