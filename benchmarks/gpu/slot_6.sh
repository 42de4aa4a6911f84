#!/usr/bin/env bash
# bash benchmarks/gpu/slot_6.sh OUT: faces at 64x64, begun as the stage of 32x32 in examples/faces with one level more, and measured as that
# was. FACES is the split data (default: made of CELEBA, a Parquet file), START another network to begin with; lib.sh says the rest.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
faces=${FACES:-data/faces-64}
[ -d "$faces" ] || step split 60 python examples/faces/split.py "${CELEBA:-data/celeba-6k.parquet}" 64 "$faces" || exit 1
start=${START:-examples/faces/stage/raw}
train "$work/run" --init "$start" --set sample_size=64 --data "$faces/train" --recipe fast --min-snr-gamma 100 --batch-size 128 \
    --lr 3e-4 --ema 0.999 --seed 1 && stage "$work/run" && {
    if [ -n "$tiny" ]; then
        REFERENCE=$faces/held-out quality unipc "$work/stage/averaged" --solver unipc --steps 10
    else
        step quality 240 bash examples/faces/evaluate.sh "$work/stage/averaged" "$faces" "${INCEPTION:-data/inception}" "$work/quality"
        cp "$work"/quality/{evaluation.json,evaluation.md,nearest.png} "$results" && give
    fi
    give_parts
}
exit "$failed"
