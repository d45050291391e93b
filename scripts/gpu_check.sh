#!/usr/bin/env bash
# All that needs a GPU, in under 8 minutes: bash scripts/gpu_check.sh [FOLDER]
# Runs tests/test_gpu.py, then measures training steps in float32 and bfloat16, uncompiled and compiled. The rows go to
# FOLDER/gpu_*.json, by default scripts/results. Without a GPU it rehearses the same commands at small sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-scripts/results}
mkdir -p "$folder"
python=${PYTHON:-python3}
failed=()

step() { # NAME SECONDS COMMAND...: the command's own output; a failure or a timeout is named at the end
  local name=$1 seconds=$2
  shift 2
  echo "== $name (at $SECONDS s)"
  timeout --signal=INT "$seconds" "$@" || failed+=("$name")
}

if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  mlp=(--models mlp --batch-sizes 64 1024 8192 --num-tangents 1 8)
  large=(--batch-sizes 64 --num-tangents 1 8 --rounds 5)
  compiled=(--batch-sizes 64 --num-tangents 1 --rounds 5 --compile)
  networks=(resnet18 vit_b_16)
  precisions=(32 bf16-mixed)
else
  echo "no GPU: a rehearsal at small sizes"
  mlp=(--models digits_mlp --batch-sizes 8 --num-tangents 1 2 --rounds 2)
  large=(--batch-sizes 2 --num-tangents 1 --rounds 1)
  compiled=(--batch-sizes 8 --num-tangents 1 --rounds 1 --compile)
  networks=(digits_mlp)
  precisions=(bf16-mixed)
fi

# pytest-benchmark, where it is installed, warns of pytest-xdist, and the tests turn warnings into errors.
step tests 180 "$python" -m pytest tests/test_gpu.py -m "slow or not slow" -n ${WORKERS:-8} --dist=load -q -p no:benchmark
step mlp 60 "$python" scripts/bench.py "${mlp[@]}" --json "$folder/gpu_mlp.json"
for precision in "${precisions[@]}"; do
  step "large $precision" 60 \
    "$python" scripts/bench.py --models "${networks[@]}" "${large[@]}" --precision "$precision" \
    --json "$folder/gpu_large_$precision.json"
done
for network in mlp "${networks[0]}"; do
  step "$network compiled" 120 \
    "$python" scripts/bench.py --models "$network" "${compiled[@]}" --json "$folder/gpu_${network}_compiled.json"
done

echo "== done in $SECONDS s; failed: ${failed[*]:-nothing}"
[[ ${#failed[@]} -eq 0 ]]
