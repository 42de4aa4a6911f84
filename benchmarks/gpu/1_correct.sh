#!/usr/bin/env bash
# bash benchmarks/gpu/1_correct.sh OUT: every test that needs a GPU, and compute-sanitizer on the native kernels.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?usage: bash benchmarks/gpu/1_correct.sh OUT}
mkdir -p "$out"

# Side by side, because most of the time goes into Triton's compiler.
declare -A running
for tests in tests/ops/test_group_norm_silu.py tests/ops/test_attention.py tests/ops/test_ddim_step.py tests/csrc tests/models; do
    name=$(basename "$tests" .py)
    timeout 500 python -m pytest -m gpu "$tests" -q -p no:cacheprovider --junitxml "$out/$name.xml" > "$out/$name.log" 2>&1 &
    running[$name]=$!
done
failed=0
for name in "${!running[@]}"; do
    wait "${running[$name]}" || failed=1
    echo "$name: $(tail -n 1 "$out/$name.log")"
done

# The sanitizer makes a kernel tens of times slower.
for tool in memcheck racecheck synccheck; do
    timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python -m pytest -m gpu tests/csrc -x -q -p no:cacheprovider > "$out/$tool.log" 2>&1
    result=$?
    echo "$tool: exit status $result, $(tail -n 1 "$out/$tool.log")"
    [ "$result" -eq 0 ] || failed=1
done
exit "$failed"
