#!/usr/bin/env bash
# What to measure when a GPU is at hand for 9 minutes, in order of worth.
#
#   benchmarks/gpu.sh [OUT]
#
# OUT is the folder of the results (default benchmarks/results), which can be committed. Variables:
#   WHEELS=DIR    wheels that the machine lacks (deepspeed, bitsandbytes, webdataset, nibabel, monai
#                 and what they need), installed into a temporary folder without a network
#   SIZE=large    configuration; SIZE=tiny tries every command on a CPU
#   PYTHON=python3
#   SECONDS_IN_ALL=540
#
# Every measurement has a time limit of its own and writes its own result folder as soon as it is
# done, so that what was measured is there whatever comes later. The last lines say which failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

out=${1:-benchmarks/results}
size=${SIZE:-large}
python=${PYTHON:-python3}
seconds_in_all=${SECONDS_IN_ALL:-540}
failures=()
mkdir -p "$out"
out=$(cd "$out" && pwd)

if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# measure LIMIT COMMAND...: run a command for at most LIMIT seconds of those that are left.
measure() {
  local limit=$1 left=$((seconds_in_all - SECONDS))
  shift
  if [ "$left" -le 5 ]; then
    failures+=("no time left: $*")
    return
  fi
  # A trial shows that the commands run, on a machine of any speed.
  [ "$size" != tiny ] || limit=$left
  echo "== $SECONDS s: $*"
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@"
  local status=$?
  [ "$status" -eq 0 ] || failures+=("exit code $status: $*")
}

if [ "$size" = tiny ]; then
  sides=(2) batches=(1 2) rounds=1 tokens=4 micro_batches=(1)
else
  sides=(16 32) batches=(1 16) rounds=3 tokens=32 micro_batches=(1 4)
fi
step() { measure "$1" "$python" -m benchmarks.engine_step --config "$size" --rounds "$rounds" --out "$out" "${@:2}"; }

# Collecting all tests would take longer than running these.
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
measure 120 "$python" -m pytest -q -m gpu "${gpu_tests[@]}"
measure 45 "$python" -m benchmarks.attention --sides "${sides[@]}" --rounds "$rounds" --out "$out"
measure 60 "$python" -m benchmarks.encoder --config "$size" --rounds "$rounds" --out "$out"
step 75 --phases 2 --micro-batch "${micro_batches[@]}"
step 150 --phases 3 --variants zero3 zero2 --micro-batch "${micro_batches[@]}"
step 60 --phases 3 --variants zero3-no-leaf --micro-batch 1
measure 60 "$python" -m benchmarks.generation --config "$size" --batch "${batches[@]}" --tokens "$tokens" --rounds "$rounds" --out "$out"
measure 30 "$python" -m benchmarks.machine_limits --rounds "$rounds" --out "$out"

echo "== $SECONDS s, results in $out"
for failure in ${failures[@]+"${failures[@]}"}; do echo "failed: $failure"; done
[ "${#failures[@]}" -eq 0 ]
