#!/usr/bin/env bash
# bash benchmarks/gpu/slot_3.sh OUT: how fast are the operators and the network, beside PyTorch, torch.compile, diffusers and the machine's
# own copy and matmul rates? For the tables of docs/kernels.md. lib.sh says what SLOT_SECONDS, WORK and TINY are.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv >> "$results/log.txt" 2>&1

measure() { # OPERATOR BASELINE SECONDS TESTS
    step "$1" "$3" python -m pytest "benchmarks/test_$1.py" -k "$4" --benchmark-only --benchmark-max-time $(choose 0.2 0.01) \
        --benchmark-min-rounds $(choose 20 1) --benchmark-json "$results/$1.json" -q || return
    python benchmarks/report.py "$results/$1.json" --baseline "$2" | tee -a "$results/tables.md" || failed=1
    give
}
# float32 would take as long again.
measure attention pytorch 150 "$(choose bf16 "bf16 and batch1 and 1x16x256 and pytorch")"
measure group_norm_silu "$(choose compiled pytorch)" 240 "$(choose bf16 "bf16 and batch1 and 256x4x32 and pytorch and not contiguous")"
measure ddim_step "$(choose compiled_formula reference)" 90 "$(choose "not none" "test_fast_ddim_step and batch64 and reference")"
# What may take the place of PyTorch's in the network, and the tiles of the norm.
[ -n "$tiny" ] || step unet_parts 150 python benchmarks/gpu/unet_parts.py --out "$results/unet_parts.json"
[ -n "$tiny" ] || step tune 200 python benchmarks/gpu/tune.py --minutes 3 --out "$results/tune.json"
[ -n "$tiny" ] || measure unet "diffusers-compiled bf16" 300 "cifar10-128 and batch512" # max-autotune takes the most of it
exit "$failed"
