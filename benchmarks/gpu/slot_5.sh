#!/usr/bin/env bash
# bash benchmarks/gpu/slot_5.sh OUT: a second stage of cifar10-64, and its FID without guidance and with that which was the best after the
# first. DATA, REFERENCE and INCEPTION name what is read, START another network to begin with; lib.sh says the rest.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
train "$work/run" --init "${START:-cifar10-64}" --data "${DATA:-data/cifar10/train-*.parquet}" --recipe fast --min-snr-gamma 100 \
    --batch-size 256 --lr 5e-4 --seed 1 && stage "$work/run" && {
    quality unipc "$work/stage/averaged" --solver unipc --steps 10 --guide cifar10-small --guidance 3 --guidance-interval 300 900
    quality ddim "$work/stage/averaged" --steps 10,20
    quality guided "$work/stage/averaged" --solver unipc --steps 10 --guidance 2.5 --guidance-interval 100 700
    give_parts
}
exit "$failed"
