"""Two calls of each command, which end its help."""

from __future__ import annotations

CALLS = """\
tune --model tiny-olmoe --target-experts 4 --output-dir runs/tuned
sweep --preset quick --output-dir runs/quick

sweep --preset quick --output-dir runs/quick
sweep --model tiny-olmoe --tasks bh_demo --baselines 4,8 --alphas 0.4 --max-k 8 --output-dir runs/a

aggregate runs/quick
aggregate runs/a runs/b --keep-groups --output-dir runs/tables

compare runs/top8 runs/policy
compare runs/top8 runs/policy --tasks bh_demo_wikitext --output change.csv

bench policy=tiny-olmoe rule=topk,max_k=4 --model tiny-olmoe
bench alpha=0.4,max_k=8 --model tiny-olmoe --limit 16 --output-dir runs/speed

import-routing trace.csv --num-experts 8 --output-dir runs/imported
import-routing responses.jsonl --format vllm --model MODEL --output-dir runs/vllm

route-diff runs/float32 runs/bfloat16 --figure diff.png
route-diff runs/hf runs/vllm --output diff.json --fail-above 1%

report runs/quick
report runs/quick --panel pareto --output pareto.pdf

view --model tiny-olmoe --model-args policy=tiny-olmoe --against rule=topk,max_k=4
view runs/full --limit 5 --output lambada.html

tune --model tiny-olmoe --target-experts 4 --output-dir runs/tuned
tune --model tiny-olmoe --preview --rules topk,bh --alphas 0.4,0.6 --max-k 8

league --model tiny-olmoe --targets 3,4,5 --output-dir runs/league
league --check runs/league/league.json

calibrate --model tiny-olmoe --output null.safetensors
calibrate --model tiny-olmoe --text-file articles.txt --null-scope expert --figure fit.png

policy --model tiny-olmoe --model-args alpha=0.4,max_k=8 --output bh.safetensors
policy show bh.safetensors

policy show bh.safetensors
policy show runs/tuned/policy.safetensors

policy export policy.safetensors --to hf --output-dir adaptive-olmoe
policy export policy.safetensors --to vllm --output-dir served-olmoe --link

policy verify policy.safetensors --engine hf --limit 5
policy verify policy.safetensors --engine vllm --python /path/to/vllm/bin/python

doctor
doctor --model tiny-olmoe --policy policy.safetensors

doctor path tasks
doctor path tiny-olmoe

import-kde FOLDER --output olmoe.safetensors
import-kde FOLDER --output olmoe.safetensors --model allenai/OLMoE-1B-7B-0924
"""


def examples(command: str) -> str:
    """Return the block that begins with a command, as the help shows it; the first is for none."""
    block, *others = CALLS.split("\n\n")
    if command:
        block = next(b for b in others if f"{b.splitlines()[0]} ".startswith(f"{command} "))
    lines = (f"    lm-eval-bh {line}" for line in block.splitlines())
    return "\n".join(["Examples:", "", *lines])
