#!/usr/bin/env bash
# All that needs a GPU, in one call: builds for it, runs the conformance kernels and the tests, looks
# for faults with compute-sanitizer, measures.
#
#   bench/gpu_check.sh [FOLDER]     writes there, else to $OUT, else to build/gpu/results
#
# Needs a GPU, nvcc, cmake, ninja, a C++20 compiler, and a Python (PYTHON, else python3) with a torch
# for CUDA, pybind11, pytest and hypothesis. Fetches nothing. A part that fails does not stop the rest;
# summary.txt says which did. Ends within SECONDS_IN_ALL (600): each part has a limit, and what is left
# of all is another.
#
# COMPETITORS names a folder with wheels or source packages of mamba-ssm and causal-conv1d; they are
# installed into a folder of the build.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="$(command -v "${PYTHON:-python3}")"
out="$(realpath -m "${1:-${OUT:-build/gpu/results}}")"
build="$PWD/build/gpu"
rivals="$build/rivals"
mkdir -p "$out" "$build/package" "$rivals"
: > "$out/summary.txt"
end=$((SECONDS + ${SECONDS_IN_ALL:-600}))

left() { echo $((end > SECONDS ? end - SECONDS : 0)); }

# within SECONDS COMMAND...: for functions of this file too. If it takes longer, all that it started is
# ended, and the result is 143.
within() {
  local limit="$1" job clock code
  shift
  set -m
  ("$@") &
  job=$!
  (sleep "$limit" && kill -- -"$job") > /dev/null 2>&1 &
  clock=$!
  set +m
  wait "$job"
  code=$?
  kill -- -"$clock" 2> /dev/null
  return "$code"
}

# part NAME LIMIT COMMAND...: its output goes to NAME.log, its outcome to the summary. LIMIT: in seconds.
part() {
  local name="$1" limit="$2" begin=$SECONDS state=ok
  shift 2
  limit=$(($(left) < limit ? $(left) : limit))
  if ((limit < 5)); then
    printf '%-14s FAILED: no time was left\n' "$name" | tee -a "$out/summary.txt"
    return
  fi
  within "$limit" "$@" > "$out/$name.log" 2>&1 || state="FAILED ($?)"
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

python_here() { PYTHONPATH="$build/package:$rivals" "$PYTHON" "$@"; }

# Built for this GPU alone where their setup listens, and from the folder alone: it would look for
# finished builds elsewhere first.
install_rivals() {
  local arch name
  arch="$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')" || return
  export MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE TORCH_CUDA_ARCH_LIST="$arch"
  for name in causal-conv1d mamba-ssm; do
    "$PYTHON" -m pip install --no-index --find-links "$COMPETITORS" --no-deps \
      --no-build-isolation --upgrade --target "$rivals" "$name" || echo "without $name"
  done
  PYTHONPATH="$rivals" "$PYTHON" -c 'import causal_conv1d, mamba_ssm'
}

# Of this GPU, with the instructions that are Hopper's alone.
arch="sm_$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)"
arch="${arch/%sm_90/sm_90a}"

first_measurements() {
  nvcc -std=c++20 -O3 -arch="$arch" -Icsrc -Itests/simt bench/first_measurements.cu \
    -o "$build/first_measurements" && "$build/first_measurements" | tee "$out/measured.json"
}

bench() {
  python_here bench/bench_gpu.py --json "$out/bench.json" --measured "$out/measured.json" \
    --seconds $(($(left) - 20))
}

# On Hopper: the kernels for all GPUs, beside its own.
portable() {
  export STATESCAN_PORTABLE=1
  python_here -m pytest -q -p no:cacheprovider tests -k "cuda and ssd_scan" &&
    python_here bench/bench_gpu.py --op ssd_scan --json "$out/portable.json" \
      --measured "$out/measured.json" --seconds $(($(left) - 10))
}

conformance() {
  nvcc -std=c++20 -O2 -arch="$arch" -Icsrc -Itests/simt tests/simt/conformance.cu \
    tests/simt/conformance_main.cpp -o "$build/conformance" && "$build/conformance"
}

# A few cases: each tool slows kernels down a hundredfold.
sanitize() {
  compute-sanitizer --tool "$1" --error-exitcode 9 "$build/conformance" &&
    PYTHONPATH="$build/package" compute-sanitizer --tool "$1" --error-exitcode 9 \
      "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/simt \
      -k "cuda and (ragged_lengths or seq_idx or strides)"
}

part facts 30 facts
part build 300 build_it
part conformance 60 conformance
part first 60 first_measurements
part tests 150 python_here -m pytest -q -p no:cacheprovider tests -k cuda
if [[ -n "${COMPETITORS:-}" ]]; then part competitors 240 install_rivals; fi
part bench 300 bench
if [[ "$arch" == sm_90a ]]; then part portable 90 portable; fi
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do part "$tool" 60 sanitize "$tool"; done
else
  echo "no compute-sanitizer here: not run" | tee -a "$out/summary.txt"
fi
part registers 120 "$PYTHON" tools/check_ptxas.py --json "$out/ptxas.json"
if [[ -f "$out/bench.log" ]]; then cat "$out/bench.log"; fi
! grep -q FAILED "$out/summary.txt"
