#!/usr/bin/env bash
# bash benchmarks/gpu/slot_1.sh OUT: is everything right, and how fast are whole runs beside diffusers? Needs diffusers and, for the
# native kernels, nvcc. lib.sh says what SLOT_SECONDS, WORK and TINY are.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv >> "$results/log.txt" 2>&1

# Side by side, because most of the time goes into compilers: by pytest-xdist where it is installed. -v: what failed is known before
# the end. They spend their time on the CPU, so nothing is timed beside them.
folders=$(choose "tests/csrc tests/ops tests/models tests/engine tests/interop tests/diffusion" tests/ops/test_noise.py)
python -c "import xdist" 2> /dev/null && side_by_side="-n auto --dist worksteal" || side_by_side=
OMP_NUM_THREADS=1 beside step tests 300 python -m pytest -m "$(choose gpu "not gpu")" $folders $side_by_side -v

# A sample of the native kernels' tests, every thirteenth. Where the tool cannot reach the device it says so in its first line.
sanitize() {
    python -m pytest -m gpu tests/csrc --collect-only -q 2> /dev/null | grep :: | awk 'NR % 13 == 1' > "$work/sanitized.txt"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 240 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python -m pytest -q "@$work/sanitized.txt"
}
beside sanitize
wait
[ -e "$work/done/tests" ] && [ -e "$work/done/memcheck" ] || failed=1

# Each table is made without max-autotune first, which compiles diffusers' network for minutes. ATEN leaves Triton's convolutions out of
# its search, and the results should say so.
export TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS=ATEN
whole_runs() { # NAME SECONDS BATCH IMPLEMENTATIONS
    step "$1-$3" "$2" python -m pytest benchmarks/test_sampler.py -k "$(choose cifar10-128-batch$3-steps20 fashion-mnist-batch$3-steps10)" \
        --implementations "$4" --benchmark-only --benchmark-json "$results/$1-$3.json" -q
}
ours="compiled bf16,captured bf16"
if [ -z "$tiny" ]; then
    for batch in 512 1; do whole_runs sampler 200 $batch "diffusers-compiled bf16,$ours"; done
    for batch in 512 1; do whole_runs autotuned 600 $batch "diffusers-autotuned bf16,$ours"; done
else
    whole_runs sampler 200 1 "eager bf16"
fi
give
exit "$failed"
