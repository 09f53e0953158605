#!/usr/bin/env bash
# A sweep as a plain loop over the stock lm_eval command, for those who want to read every step:
#
#   bash scripts/sweep.sh runs/shell                                             # 4 baselines + 16 BH, x 3 tasks
#   TASKS=bh_demo_lambada BASELINES=8 MAX_K=8 ALPHAS="0.4 0.5" LIMIT=50 \
#       PRETRAINED=tiny-olmoe bash scripts/sweep.sh runs/shell                   # a small one
#   lm-eval-bh aggregate runs/shell
#
# lm-eval-bh sweep runs the same experiments with one loaded model, many times faster. Finished experiments
# are not run again.
set -euo pipefail

out=${1:?"Give the folder to write to: bash scripts/sweep.sh runs/shell"}
lm_eval=${LM_EVAL:-lm_eval}
pretrained=${PRETRAINED:-allenai/OLMoE-1B-7B-0924}
tasks=${TASKS:-"bh_wikitext bh_lambada bh_hellaswag"}
limit=${LIMIT:-200}
log_samples=${LOG_SAMPLES:-8}

evaluate() { # experiment, task, routing arguments
    local folder=$out/runs/$1
    if [ -e "$folder/done" ]; then
        echo "$1 is done."
        return
    fi
    rm -rf "$folder" # what a killed run has left
    echo "$1"
    "$lm_eval" --model hf-bh \
        --model_args "pretrained=$pretrained,$3,log_routing=samples,log_dir=$folder/routing,log_samples=$log_samples" \
        --tasks "$2" --limit "$limit" --batch_size "${BATCH_SIZE:-8}" ${DEVICE:+--device "$DEVICE"} \
        ${SEED:+--seed "$SEED"} --log_samples --output_path "$folder"
    touch "$folder/done" # lm_eval writes several files, one after the other
}

for k in ${BASELINES:-8 16 32 64}; do # phase 1: static top-k
    for task in $tasks; do
        evaluate "${k}experts_topk_baseline_${task#bh_}" "$task" "rule=topk,max_k=$k"
    done
done
for k in ${MAX_K:-8 16 32 64}; do # phase 2: Benjamini-Hochberg
    for alpha in ${ALPHAS:-0.30 0.40 0.50 0.60}; do
        level=$(LC_ALL=C printf %.2f "$alpha") # 0.4 and 0.40 are called a040, 0.125 is called a0125
        awk "BEGIN { exit !($level == $alpha) }" || level=$alpha
        for task in $tasks; do
            evaluate "${k}experts_bh_a${level/./}_${task#bh_}" "$task" "alpha=$level,max_k=$k"
        done
    done
done
