#!/usr/bin/env bash
# Installs the package into .venv, then evaluates tiny-olmoe, which ships, on texts that ship too. The stock lm_eval
# command runs the policy that ships, then static top-k with the same mean number of experts, then Benjamini-Hochberg
# routing. A sweep of three tasks compares more configurations and shows as a table and a figure what they cost and
# save. Only the installation needs a network. Arguments go to the sweep: bash scripts/quickstart.sh --limit 40
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
make_venv

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The models are tiny: threads cost more than they save.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=runs/quickstart

show() { # a command, which is printed and run
    echo
    echo "\$ $*"
    ".venv/bin/$1" "${@:2}"
}

rm -rf "$out" # of an earlier call
for routing in policy=tiny-olmoe rule=topk,max_k=4 alpha=0.4,max_k=8; do
    show lm_eval --model hf-bh --model_args "pretrained=tiny-olmoe,$routing" --tasks bh_demo_wikitext \
        --batch_size 8 --log_samples --output_path "$out/lm_eval/$routing"
done
show lm-eval-bh compare "$out/lm_eval/rule=topk,max_k=4" "$out/lm_eval/policy=tiny-olmoe"
show lm-eval-bh sweep --preset quick --output-dir "$out/sweep" "$@"
show lm-eval-bh aggregate "$out/sweep"
