#!/usr/bin/env bash
# bash benchmarks/gpu/slot_7.sh OUT: cifar10-64 tuned to make images in two steps, and in one. DATA, REFERENCE and INCEPTION name what is
# read, START another network to begin with; lib.sh says the rest.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
train "$work/run" --init "${START:-cifar10-64}" --consistency 999,400 --data "${DATA:-data/cifar10/train-*.parquet}" --batch-size 256 \
    --lr 4e-4 --lr-schedule cosine --warmup 30 --ema 0.999 --seed 1 && stage "$work/run" && {
    quality few "$work/stage/averaged" --solver consistency --spacing adaptive --steps 1,2
    give_parts
}
exit "$failed"
