#!/usr/bin/env bash
# bash examples/faces/evaluate.sh MODEL DATA INCEPTION OUT: what is measured after each stage, against the people in DATA/held-out, whom
# the model in the folder MODEL has not seen: loss, FID-2k, KID, precision and recall by DDIM in 20 steps and by UniPC in 10, all in OUT.
# As many training faces, in OUT/training-faces, say what there is to reach.
set -euo pipefail
[ $# -eq 4 ] || { echo "usage: bash examples/faces/evaluate.sh MODEL DATA INCEPTION OUT"; exit 2; }
model=$1 data=$2 out=$4
of=(--reference "$data/held-out" --inception "$3" --num-images 2000 --quiet)

python -m ddim_fast.evaluate --model "$model" --data "$data/held-out" --loss --quiet --out "$out"
python -m ddim_fast.evaluate --model "$model" "${of[@]}" --solver ddim --steps 20 --out "$out"
python -m ddim_fast.evaluate --model "$model" "${of[@]}" --solver unipc --steps 10 --out "$out"
python -m ddim_fast.evaluate --images "$data/train" "${of[@]}" --out "$out/training-faces"
python "$(dirname "${BASH_SOURCE[0]}")/nearest.py" "$model" "$data/train" "$data/held-out" "$3" "$out/nearest.png"
