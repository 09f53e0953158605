#!/usr/bin/env bash
# Installs the package into .venv, then evaluates tiny-olmoe, which ships, with the stock lm_eval command
# on the demo tasks, which ship too: the model's own top-8 routing, then Benjamini-Hochberg routing.
# Only the installation needs a network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
make_venv

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The models are tiny: threads would cost more than they bring.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=runs/quickstart

evaluate() { # folder, model_args
    echo
    echo "\$ lm_eval --model hf-bh --model_args $2 --tasks bh_demo --batch_size 16 --output_path $out/$1"
    .venv/bin/lm_eval --model hf-bh --model_args "$2" --tasks bh_demo --batch_size 16 --output_path "$out/$1"
}

evaluate top8 pretrained=tiny-olmoe,rule=topk,max_k=8
evaluate bh_a040 pretrained=tiny-olmoe,alpha=0.4,max_k=8
"$python" -m lm_eval_bh.harness.quickstart "$out/top8" "$out/bh_a040"
