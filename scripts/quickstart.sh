#!/usr/bin/env bash
# Installs the package into .venv, then evaluates tiny-olmoe, which ships, on texts that ship too: once with the
# stock lm_eval command under Benjamini-Hochberg routing, then a sweep over levels and static top-k; and shows
# what that costs as a table and a picture. Only the installation needs a network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
make_venv

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The models are tiny: threads cost more than they save.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=runs/quickstart
common=(--tasks bh_demo_wikitext --batch_size 16)

show() { # a command, which is printed and run
    echo
    echo "\$ $*"
    ".venv/bin/$1" "${@:2}"
}

rm -rf "$out" # of an earlier call
show lm_eval --model hf-bh --model_args pretrained=tiny-olmoe,alpha=0.4,max_k=8 "${common[@]}" \
    --log_samples --output_path "$out/bh_a040"
show lm-eval-bh sweep --pretrained tiny-olmoe --baselines 2,3,4,8 --max-k 8 --alphas 0.3,0.5,0.6 \
    "${common[@]/--batch_size/--batch-size}" --output-dir "$out/sweep"
show lm-eval-bh aggregate "$out" --no-figure
show lm-eval-bh plot "$out" --panel pareto --output "$out/pareto.png"
