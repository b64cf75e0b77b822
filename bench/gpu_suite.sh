#!/usr/bin/env bash
# Everything there is to know about the GPU backends on one NVIDIA machine, in under ten minutes: build, conformance suite,
# compute-sanitizer (memcheck, racecheck) on a few cases, benchmark. Nothing is downloaded; the package goes to a folder of
# its own, not into the environment.
#
#   bench/gpu_suite.sh [results folder]      default: bench/results/<GPU's name>
#
# Needs python3 with torch for CUDA, triton, pytest and pybind11; cmake, ninja and nvcc for the CUDA library (without nvcc the
# Triton backend alone is tested). A step that fails or runs out of time is recorded, and the next one runs all the same:
# steps.tsv lists every step with its status and seconds, *.log what it printed. The exit status is the number of failures.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') ||
  { echo "gpu_suite.sh: torch sees no CUDA device; nothing was run" >&2; exit 1; }
out=$(realpath -m "${1:-bench/results/$gpu}")
site=$PWD/build/gpu-site
mkdir -p "$out" build
: > "$out/steps.tsv"
failures=0

# step NAME SECONDS COMMAND…: output to NAME.log and, its last lines, to the terminal
step() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  printf '#### %s\n' "$name"
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  tail -n 5 "$out/$name.log"
  printf '%s\t%s\t%s s\n' "$name" "$([ $status -eq 0 ] && echo passed || echo "FAILED ($status)")" $((SECONDS - begin)) |
    tee -a "$out/steps.tsv"
  [ $status -eq 0 ] || failures=$((failures + 1))
  return $status
}

git rev-parse HEAD > "$out/commit.txt" 2> /dev/null || echo "not a checkout" > "$out/commit.txt"
step machine 20 nvidia-smi
step build 200 "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --target "$site" .
export PYTHONPATH=$site PYTHONUNBUFFERED=1
# Away from the checkout, whose rnp_kernels folder has no libraries and would shadow the one just built.
checkout=$PWD
step doctor 60 env -C "$out" "$PYTHON" -m rnp.cli doctor --json
cp "$out/doctor.log" "$out/doctor.json"
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --import-mode=importlib -c "$checkout/pyproject.toml" --rootdir "$checkout")
step conformance 180 env -C "$out" "${pytest[@]}" --junitxml "$out/conformance.xml" "$checkout/tests/conformance"

# Each kernel once: the sanitizer is some hundred times slower.
few='test_output and float16 and (3x3-None or everything or skipped or depthwise) or test_agent_step and default'
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
for tool in memcheck racecheck; do
  step "$tool" 60 env -C "$out" "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all "${pytest[@]}" -x \
    -k "($few) and not cpu and not reference" "$checkout/tests/conformance/test_every_backend.py"
done

step benchmark 260 env -C "$out" "$PYTHON" "$checkout/bench/gpu.py" --limit 200 --json "$out/benchmark.json"

printf '#### %s failed steps, %s s; results in %s\n' "$failures" "$SECONDS" "$out"
cat "$out/steps.tsv"
exit "$failures"
