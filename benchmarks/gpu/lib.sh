# What the slots share: a budget of time, steps that are done once, results that are given as they come. For `source`, by a script
# called as `bash benchmarks/gpu/slot_N.sh OUT`, with these variables:
#   SLOT_SECONDS  the budget (default 780). What does not fit is left to a rerun, which goes on.
#   WORK          the folder of what a rerun goes on with (default runs/slot_N)
#   TRAIN_SECONDS of training in a slot that trains (default 480)
#   TINY=1        a rehearsal in minutes on a CPU: few steps and images, whose numbers mean nothing
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$(realpath -m "${1:?usage: bash $0 OUT}")
work=${WORK:-runs/$(basename "$0" .sh)}
results=$work/results budget=${SLOT_SECONDS:-780} tiny=${TINY:-} failed=0
mkdir -p "$out" "$work/done" "$results"
export PYTHONUNBUFFERED=1

left() { echo $((budget - SECONDS)); }
choose() { [ -n "$tiny" ] && echo "$2" || echo "$1"; } # FULL TINY
give() { cp -rf "$results/." "$out"; }
stopped='kill $(jobs -p) 2> /dev/null; wait; give; exit 143'
trap "$stopped" INT TERM
beside() { (trap "$stopped" TERM && "$@") & } # COMMAND...: in the background; `wait` for it

step() { # NAME SECONDS COMMAND...: once, for at most so long or what is left. The exit status says whether it is done.
    local name=$1 limit=$2 code=0 begun=$SECONDS
    [ ! -e "$work/done/$name" ] || return 0
    [ -z "$tiny" ] && [ "$limit" -le "$(left)" ] || limit=$(left)
    [ "$limit" -ge 5 ] || { echo "$name: no time is left; a rerun goes on with it"; failed=1; return 1; }
    echo "$(date -u +%T) $name: ${*:3}" >> "$results/log.txt"
    # In the background, so that a signal to this script is served at once. SIGTERM: bash has background processes ignore SIGINT.
    timeout --kill-after=20 "$limit" "${@:3}" >> "$results/log.txt" 2>&1 &
    wait $! || code=$?
    [ "$code" -ne 0 ] || touch "$work/done/$name"
    echo "$name: exit status $code after $((SECONDS - begun)) s, $(left) s left" | tee -a "$results/log.txt"
    give
    [ "$code" -eq 0 ] || failed=1
    return "$code"
}

# The training. A cosine should end with the time, so the first minute and a half, with the compiling in it, measures the speed, and
# the number of steps follows from that. Until then there are so many steps that the rate is constant; where the compiling took
# all of that time it stays so, and --minutes ends the run.
train() { # RUN OPTIONS...: goes on where RUN was stopped
    local run=$1 seconds=$((${TRAIN_SECONDS:-480} - 90)) options=("${@:2}" --save-every 2000 --sample-every 1000000 --quiet)
    if [ -n "$tiny" ]; then
        options+=(--batch-size 2 --steps 4 --log-every 1 --dtype float32)
    else
        options+=(--compile --steps 1000000 --minutes 1.5)
    fi
    [ -f "$run/config.json" ] || step begin 240 python -m ddim_fast.train --out "$run" "${options[@]}" || return
    [ -s "$run/steps" ] || python - "$run" "$seconds" > "$run/steps" <<'EOF'
import json, pathlib, sys
run, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
batch = json.loads((run / "train.json").read_text())["batch_size"]
starting = 30  # to read and compile again, from the compiler's cache
steps = lines[-1]["step"] + int(max(line["images_per_s"] for line in lines) / batch * (seconds - starting))
print(steps if len(lines) > 3 else 1000000)
EOF
    step train $((seconds + 120)) python -m ddim_fast.train --out "$run" --resume --steps "$(choose "$(cat "$run/steps")" 5)" \
        --minutes $(((seconds + 59) / 60)) --quiet || return
    cp "$run/stats.jsonl" "$results/training.jsonl"
}

# A stage, whose two checkpoints are given as archives in parts of 16 MB: `cat raw.tar.* | tar x` joins them again.
stage() { # RUN
    [ -d "$work/stage" ] ||
        step stage 120 python -m ddim_fast.export --to stage --model "$1" --dtype bfloat16 --max-shard-size 16MB --out "$work/stage" &&
        step parts 60 bash -c 'cd "$0" && mkdir -p parts given && for name in averaged raw; do
            tar -C stage -c "$name" stage.json | split -d -b 16000000 - "parts/$name.tar."; done' "$work"
}

give_parts() { # as many as fit eight files with the results, and at most four, 64 MB: a rerun gives the next
    local room=$((8 - $(ls "$results" | wc -l)))
    for part in $(ls "$work"/parts/*.tar.* 2> /dev/null | head -n $((room < 4 ? room : 4))); do
        cp "$part" "$out" && mv "$part" "$work/given"
    done
    echo "parts of the stage left to give: $(ls "$work"/parts/*.tar.* 2> /dev/null | wc -l)"
    echo "given: $(ls "$out" | wc -l) files, $(cat "$out"/* | wc -c | awk '{printf "%.1f MiB", $1 / 1048576}')"
}

# FID, and where REFERENCE is a data set KID, precision and recall. Eagerly, a thousand at a time: compiling takes longer than it saves.
quality() { # NAME MODEL OPTIONS...
    local of=(--reference "${REFERENCE:-data/cifar10/fid-train-stats.npz}" --inception "${INCEPTION:-data/inception}")
    step "$1" 300 python -m ddim_fast.evaluate --model "$2" "${of[@]}" --dtype bfloat16 --batch-size $(choose 1000 2) \
        --num-images $(choose 50000 4) --quiet --out "$work/quality" "${@:3}"
    cp "$work"/quality/evaluation.{json,md} "$results" && give
}
