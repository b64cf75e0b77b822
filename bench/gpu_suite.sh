#!/usr/bin/env bash
# Everything there is to know about the GPU backends on one NVIDIA machine, in under ten minutes: build, conformance suite,
# compute-sanitizer (memcheck, racecheck) on a few cases, benchmark. Nothing is downloaded; the package goes to a folder of
# its own, not into the environment.
#
#   bench/gpu_suite.sh [results folder]      default: bench/results/<GPU's name>
#   bench/gpu_suite.sh --list                the steps and their limits in seconds, and their sum
#   bench/gpu_suite.sh --dry-run [folder]    what can be tried without a GPU (default folder: build/gpu-dry-run)
#
# Needs python3 with torch for CUDA, triton, pytest (and pytest-xdist, if the conformance suite shall end in time) and pybind11; cmake,
# ninja and nvcc for the CUDA library (without nvcc the Triton backend alone is tested). The library is built for this GPU's
# architecture alone, or as RNP_CUDA_ARCHS says; GPU_SITE names a folder where the package is built already. A step that fails or runs out of time is recorded, and the next one runs
# all the same: suite.json holds environment, commit and, written as they come, every step with its status and seconds; *.log
# what each printed. The exit status is the number of failures.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

# Seconds that a step may take; killed two seconds later. With a second or two between steps, ten minutes hold them all.
declare -A LIMIT=([machine]=10 [build]=130 [doctor]=45 [conformance-cuda]=60 [conformance-triton]=140 [memcheck]=40
                  [racecheck]=40 [benchmark]=100)
STEPS=(machine build doctor conformance-cuda conformance-triton memcheck racecheck benchmark)
sum=0
for name in "${STEPS[@]}"; do sum=$((sum + LIMIT[$name])); done
if [ "${1:-}" = --list ]; then
  for name in "${STEPS[@]}"; do printf '%s\t%s\n' "$name" "${LIMIT[$name]}"; done
  printf 'sum\t%s\n' "$sum"
  exit 0
fi
dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  LIMIT[build]=1200  # on a machine that is not the GPU's: few cores, and no ten minutes to keep
  shift
fi

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))' 2> /dev/null) || gpu=
if [ -z "$gpu" ]; then
  echo "gpu_suite.sh: there is no GPU: $PYTHON's torch sees no CUDA device" >&2
  [ -n "$dry" ] || { echo "gpu_suite.sh: nothing was run (--dry-run tries what needs none)" >&2; exit 1; }
fi
if [ -n "$dry" ]; then out=${1:-build/gpu-dry-run}; else out=${1:-bench/results/$gpu}; fi
out=$(realpath -m "$out")
site=${GPU_SITE:-$PWD/build/gpu-site}
checkout=$PWD
mkdir -p "$out" build
: > "$out/steps.tsv"
failures=0

# suite.json, as far as it is known: the steps of steps.tsv beside the environment.
record() {
  "$PYTHON" bench/gpu_record.py "$out" || echo "gpu_suite.sh: suite.json could not be written" >&2
}

# step NAME COMMAND…: output to NAME.log and, its last lines, to the terminal
step() {
  local name=$1 begin=$SECONDS status
  shift
  printf '#### %s (at most %s s)\n' "$name" "${LIMIT[$name]}"
  timeout --kill-after=2 "${LIMIT[$name]}" "$@" > "$out/$name.log" 2>&1
  status=$?
  tail -n 5 "$out/$name.log"
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - begin)) "${LIMIT[$name]}" | tee -a "$out/steps.tsv"
  [ $status -eq 0 ] || failures=$((failures + 1))
  record
  return $status
}

if [ -z "${RNP_CUDA_ARCHS:-}" ]; then
  capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2> /dev/null) || capability=90
  case $capability in
    9*) RNP_CUDA_ARCHS=90a ;;
    *) RNP_CUDA_ARCHS=80 ;;
  esac
fi
export RNP_CUDA_ARCHS
record

step machine nvidia-smi
if [ -n "${GPU_SITE:-}" ]; then
  step build test -f "$site/rnp_kernels/__init__.py"
else
  step build "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --target "$site" .
fi
export PYTHONPATH=$site PYTHONUNBUFFERED=1
# Away from the checkout, whose rnp_kernels folder has no libraries and would shadow the one just built.
step doctor env -C "$out" "$PYTHON" -m rnp.cli doctor --json
cp "$out/doctor.log" "$out/doctor.json"
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --import-mode=importlib -c "$checkout/pyproject.toml" --rootdir "$checkout")
list=()
[ -n "$gpu" ] || list=(--collect-only)  # of a dry run: the tests are found, and skip for lack of a GPU
# On an H200 four workers took 36 seconds for the one; twelve 103 for Triton, which compiles a kernel for nearly every case.
few_workers=() workers=()
"$PYTHON" -c 'import xdist' 2> /dev/null && few_workers=(-n 4) workers=(-n "$(nproc)")
# The CPU's own backend is tested elsewhere, and would take the time of the others.
step conformance-cuda env -C "$out" "${pytest[@]}" "${list[@]}" "${few_workers[@]}" -k "not cpu and not triton" \
  --junitxml "$out/conformance-cuda.xml" "$checkout/tests/conformance"
step conformance-triton env -C "$out" "${pytest[@]}" "${list[@]}" "${workers[@]}" -k triton \
  --junitxml "$out/conformance-triton.xml" "$checkout/tests/conformance"

# Each kernel once: the sanitizer is some hundred times slower.
few='test_output and float16 and (3x3-None or everything or skipped or depthwise or (mixed and prefixes)) or
     test_agent_step and default or test_wgmma and cuda and bfloat16 and (inside or split)'
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
for tool in memcheck racecheck; do
  step "$tool" env -C "$out" "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all "${pytest[@]}" -x \
    -k "(${few//$'\n'/ }) and not cpu and not reference" "$checkout/tests/conformance"
done

limit=$((LIMIT[benchmark] - 30))  # the last row begins in time to end
step benchmark env -C "$out" "$PYTHON" "$checkout/bench/gpu.py" --limit "$limit" --json "$out/benchmark.json"

printf '#### %s of %s steps failed, %s s; results in %s\n' "$failures" "${#STEPS[@]}" "$SECONDS" "$out"
cat "$out/steps.tsv"
if [ -z "$gpu" ]; then
  echo "gpu_suite.sh: there was no GPU: this was a dry run, and no kernel ran" >&2
  [ "$failures" -gt 0 ] || failures=1
fi
exit "$failures"
