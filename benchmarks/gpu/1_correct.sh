#!/usr/bin/env bash
# bash benchmarks/gpu/1_correct.sh OUT: every test that needs a GPU, and compute-sanitizer on the native kernels.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?usage: bash benchmarks/gpu/1_correct.sh OUT}
mkdir -p "$out"

python -m pytest -m gpu tests --junitxml "$out/gpu.xml" 2>&1 | tee "$out/gpu.log"
failed=$?

# The sanitizer makes a kernel tens of times slower, so the tests of the native kernels alone, and of those the small shapes.
for tool in memcheck racecheck synccheck; do
    timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python -m pytest -m gpu tests/csrc -x -q -p no:cacheprovider 2>&1 | tee "$out/$tool.log"
    result=$?
    echo "$tool: exit status $result"
    [ "$result" -eq 0 ] || failed=1
done
exit "$failed"
