#!/usr/bin/env bash
# bash benchmarks/gpu/1_correct.sh OUT: every test that needs a GPU, and compute-sanitizer on the native kernels.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?usage: bash benchmarks/gpu/1_correct.sh OUT}
mkdir -p "$out"

# Side by side, because most of the time goes into compilers: by pytest-xdist where it is installed, else a process a folder.
folders=(tests/csrc tests/ops tests/models tests/engine tests/interop tests/diffusion)
declare -A running
check() { # NAME, then what pytest takes
    OMP_NUM_THREADS=1 timeout 500 python -m pytest -m gpu "${@:2}" -p no:cacheprovider --junitxml "$out/$1.xml" > "$out/$1.log" 2>&1 &
    running[$1]=$!
}
if python -c "import xdist" 2> /dev/null; then
    check tests "${folders[@]}" -n auto --dist worksteal -v # -v: what failed is known before the end
else
    for folder in "${folders[@]}"; do check "$(basename "$folder")" "$folder" -q; done
fi

# A sample of the native kernels' tests, every thirteenth.
python -m pytest -m gpu tests/csrc --collect-only -q 2> /dev/null | grep :: | awk 'NR % 13 == 1' > "$out/sanitized.txt"
for tool in memcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python -m pytest -q -p no:cacheprovider "@$out/sanitized.txt" > "$out/$tool.log" 2>&1 &
    running[$tool]=$!
done
failed=0
for name in "${!running[@]}"; do
    wait "${running[$name]}" || failed=1
    echo "$name: $(tail -n 1 "$out/$name.log")"
done
exit "$failed"
