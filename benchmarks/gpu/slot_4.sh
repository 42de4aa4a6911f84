#!/usr/bin/env bash
# bash benchmarks/gpu/slot_4.sh OUT: a second stage of slot 2's network. START is the first one's raw weights (default
# data/stage-1/raw), for which `cat raw.tar.* | tar x -C data/stage-1` joins their parts. The other variables are slot 2's.
START=${START:-data/stage-1/raw} WORK=${WORK:-runs/slot_4} exec bash "$(dirname "${BASH_SOURCE[0]}")/slot_2.sh" "$@"
