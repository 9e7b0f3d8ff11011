#!/usr/bin/env bash
# Measures on one GPU, within 8 minutes: correctness, loss, step at the shapes of a 0.5B and a 7B model, generation, a whole
# run. Results are JSON in FOLDER, with how each part ended and its seconds in parts.jsonl; a part that fails or takes too long
# does not stop the others.
#   bash benchmarks/gpu.sh [FOLDER]
#   TINY=1 bash benchmarks/gpu.sh [FOLDER]    the same on a CPU, at the sizes of a test
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-results}
mkdir -p "$out"
rm -f "$out/parts.jsonl"
python=${PYTHON:-python}
failed=0

part() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 since=$SECONDS status=0
    shift 2
    timeout "$((limit * patience))" "$@" > "$out/$name.log" 2>&1 || status=$?
    [ "$status" = 0 ] || failed=1
    echo "{\"part\": \"$name\", \"exit\": $status, \"seconds\": $((SECONDS - since))}" | tee -a "$out/parts.jsonl"
}

measured() {  # NAME SECONDS ARGUMENTS...: of `python -m benchmarks`, with the result in NAME.json
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m benchmarks "$@" "${size[@]}" --json "$out/$name.json"
}

size=() run=() patience=1
small=qwen2.5-0.5b large=qwen2.5-7b
if [ "${TINY:-0}" = 1 ]; then
    size=(--shape tiny --device cpu --tokens 24 --prompt 4 --completion 8 --batch 2 --accumulation 1 --repetitions 1)
    run=(--use_cpu true --max_steps 1 --max_eval_rows 2 --max_completion_length 4)
    small=tiny large=tiny patience=10
fi

part tests 90 "$python" -m pytest -p no:cacheprovider -m gpu tests/end_to_end/test_gpu.py
measured loss 30 loss --shape "$small" --tokens 4096 --impls ours plain
measured step-0.5b 90 step --shape "$small" --batch 8 --prompt 128 --completion 512 --seconds 30 \
    --impls "star ours" "star plain" "star limit"
measured step-0.5b-long-passes 50 step --shape "$small" --batch 8 --prompt 128 --completion 512 --seconds 15 \
    --impls "star ours" --token_budget 24576
measured step-7b 100 step --shape "$large" --batch 2 --accumulation 8 --prompt 128 --completion 1024 --seconds 1 \
    --impls "star equal ours"
measured generate 50 generate --shape "$small" --prompt 128 --completion 256 --batch 4 --seconds 15
part run 70 "$python" -m unisd train --output_dir "$out/run" "${run[@]}"
exit "$failed"
