#!/usr/bin/env bash
# All that needs a GPU, in one call: builds for it, runs the conformance kernels and the tests, looks
# for faults with compute-sanitizer, measures.
#
#   bench/gpu_check.sh [FOLDER]     writes there, else to $OUT, else to build/gpu/results
#
# Needs a GPU, nvcc, cmake, ninja, a C++20 compiler, and a Python (PYTHON, else python3) with a torch
# for CUDA, pybind11, pytest and hypothesis. Fetches nothing. A part that fails does not stop the rest;
# summary.txt says which did.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="$(command -v "${PYTHON:-python3}")"
out="$(realpath -m "${1:-${OUT:-build/gpu/results}}")"
build="$PWD/build/gpu"
mkdir -p "$out" "$build/package"
: > "$out/summary.txt"

# part NAME COMMAND...: its output goes to NAME.log, its outcome to the summary
part() {
  local name="$1" begin=$SECONDS state=ok
  shift
  "$@" > "$out/$name.log" 2>&1 || state="FAILED ($?)"
  printf '%-14s %-12s %4d s   %s\n' "$name" "$state" $((SECONDS - begin)) \
    "$(tail -n 1 "$out/$name.log" | cut -c1-120)" | tee -a "$out/summary.txt"
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  nvcc --version | tail -n 1
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, torch.version.cuda)'
  git log -1 --format='commit %H' && git status --short
}

build_it() {
  cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$PYTHON" -DSTATESCAN_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES=native || return
  ninja -C "$build" || return
  cp -r python/statescan "$build/package/" && rm -f "$build"/package/statescan/*.so
  cp "$build"/_C*.so "$build/package/statescan/" && python_here -m statescan
}

python_here() { PYTHONPATH="$build/package" "$PYTHON" "$@"; }

conformance() {
  nvcc -std=c++20 -O2 -arch=native -Icsrc -Itests/simt tests/simt/conformance.cu \
    tests/simt/conformance_main.cpp -o "$build/conformance" && "$build/conformance"
}

# A few cases: each tool slows kernels down a hundredfold.
sanitize() {
  compute-sanitizer --tool "$1" --error-exitcode 9 "$build/conformance" &&
    PYTHONPATH="$build/package" compute-sanitizer --tool "$1" --error-exitcode 9 \
      "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/simt \
      -k "cuda and (ragged_lengths or seq_idx or strides)"
}

part facts facts
part build build_it
part conformance conformance
part tests python_here -m pytest -q -p no:cacheprovider tests -k cuda
part registers "$PYTHON" tools/check_ptxas.py --json "$out/ptxas.json"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do part "$tool" sanitize "$tool"; done
else
  echo "no compute-sanitizer here: not run" | tee -a "$out/summary.txt"
fi
part bench python_here bench/bench_gpu.py --json "$out/bench.json"
cat "$out/bench.log"
! grep -q FAILED "$out/summary.txt"
