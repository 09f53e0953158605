#!/usr/bin/env bash
# Everything that needs an accelerator, in under 25 minutes on one card and without network: the tests that
# compare the card with the CPU, bench_routing.py in bfloat16 at OLMoE's true size (with the
# hook of every method, and two of them under torch.compile), all 16 layers with random weights, a layer's time over
# the distinct experts of a step (bench_steps.py), the speed phase,
# and vLLM's tests and speeds where vLLM is installed. It ends with one JSON file and one page, gpu_day.json and
# gpu_day.md. A step that fails is named there and does not stop the others; the exit code says so.
#
#   bash scripts/gpu_day.sh [--device cuda] [--pretrained tiny-olmoe] [--output runs/gpu_day]
#   bash scripts/gpu_day.sh --device cpu --small      # the same steps on little, to see that they work
#
# PYTHON is the interpreter, by default that of .venv; nothing is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cuda small= pretrained=tiny-olmoe output=runs/gpu_day
while [ $# -gt 0 ]; do
    case $1 in
    --small) small=1 && shift && continue ;;
    --device | --pretrained | --output) ;;
    *) echo "gpu_day.sh: '$1' is unknown: use --device, --pretrained, --output or --small." >&2 && exit 2 ;;
    esac
    [ $# -gt 1 ] || { echo "gpu_day.sh: $1 needs a value." >&2 && exit 2; }
    declare "${1#--}=$2"
    shift 2
done
python=${PYTHON:-$PWD/.venv/bin/python}
"$python" -c 'import lm_eval_bh, torch, sys; torch.empty(1, device=sys.argv[1])' "$device" || {
    echo "gpu_day.sh: $python cannot use lm_eval_bh on $device: set PYTHON, or give another --device." >&2
    exit 2
}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false LM_EVAL_BH_DEVICE=$device
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
rm -rf "$output"
mkdir -p "$output"
failed=0

# step NAME MINUTES COMMAND...: runs it, and keeps its output, its seconds and its exit code.
step() {
    local name=$1 minutes=$2 start=$SECONDS code=0
    shift 2
    echo "$name ..."
    timeout "$((minutes * 60))" "$@" >"$output/$name.log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || failed=1
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" "$*" >>"$output/steps.tsv"
    echo "$name: exit code $code, $((SECONDS - start)) s"
}

tests=(tests/device tests/routing/test_selection.py)
routing=(--dtype bfloat16 --compiled)
full=(--full-size)
steps=(--rounds 25)
speed=(--tasks bh_demo --model-args dtype=bfloat16)
if [ -n "$small" ]; then
    tests=(tests/device -k "selection and topk or nothing_changes")
    routing=(--dtype bfloat16 --small --quick)
    full=(--full-size --small --quick)
    steps=(--small --rounds 2)
    speed=(--tasks bh_demo_lambada --rounds 7 --steps 1 --prompt 4 --batches 1 --limit 2)
fi
step suite 6 "$python" -m pytest -p no:cacheprovider "${tests[@]}"
step bench_routing 7 "$python" scripts/bench_routing.py --device "$device" "${routing[@]}" \
    --output "$output/bench_routing.json"
step full_size 5 "$python" scripts/bench_routing.py --device "$device" "${full[@]}" \
    --output "$output/full_size.json"
step bench_steps 2 "$python" scripts/bench_steps.py --device "$device" --dtype bfloat16 "${steps[@]}" \
    --output "$output/bench_steps.json"
step speed 4 "$python" -m lm_eval_bh bench alpha=0.4,max_k=8 alpha=0.5,max_k=8 rule=topk,max_k=4 \
    --model "$pretrained" --device "$device" "${speed[@]}" --output-dir "$output"
vllm=${VLLM_VENV:-.venv-vllm}/bin/python
[ -x "$vllm" ] || vllm=$python
if "$vllm" -c 'import vllm' 2>/dev/null; then
    step vllm 3 "$vllm" -m pytest -p no:cacheprovider tests/export/test_vllm.py -k "static or bh"
    step vllm_speed 4 "$vllm" -m lm_eval_bh bench rule=topk,max_k=4 alpha=0.4,max_k=8 --engine vllm \
        --pretrained "$pretrained" --model-args dtype=bfloat16 --rounds 7 --output-dir "$output"
else
    printf '%s\t\t\tvLLM is not installed\n' vllm vllm_speed >>"$output/steps.tsv"
fi
"$python" scripts/gpu_day_page.py "$output" --device "$device" || failed=1
exit "$failed"
