"""A table of bad inputs: each ends with one sentence and an exit code, and changes no file.

A row is a command line, part of the message that it must print, and the exit code: 1 for errors, 2
for invalid command lines, 3 for files that were left out. ``{ground}`` is the folder of
``conftest.py``, which is also the working directory. Rows of :data:`MODEL_ARGS` are arguments of
``lm_eval --model hf-bh --model_args``, and rows of :data:`CALLS` are calls from Python.
"""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import lm_eval_bh
from lm_eval_bh.errors import BHError

MODEL = "--model tiny-olmoe --text-file text.txt --tokens 64 --window 32"
SWEEP = "sweep --model tiny-olmoe --tasks bh_demo_lambada --baselines 8 --limit 2"
BENCH = "bench --model tiny-olmoe --tasks bh_demo_lambada --device cpu"
OUT = "--output new.safetensors"
TOP4 = "policies/top4.safetensors"
LEAGUE = "league --model tiny-olmoe --text-file text.txt --tokens 64 --window 32 --targets 4"
DISTINCT = "league --model tiny-olmoe --text-file text.txt --output-dir new --target-distinct"
TUNE = "tune --model tiny-olmoe --text-file text.txt --output-dir new"
VIEW = "view --model tiny-olmoe"

COMMANDS = [
    # The program.
    ("", "", 2),
    ("agregate runs", "No such command 'agregate'", 2),
    ("--verison", "No such option", 2),
    ("doctor path olmoe", "not one of 'tiny-olmoe', 'tiny-glm'", 2),
    ("doctor path '[red]olmoe[/]'", "'[red]olmoe[/]'", 2),
    ("doctor path tasks b", "unexpected extra argument", 2),
    # calibrate.
    ("calibrate", "Missing option '--model'", 2),
    (f"calibrate {OUT} --text-file text.txt --model no/such-model", "could not be loaded", 1),
    (f"calibrate {OUT} --text-file text.txt --model 'x/[/b]'", "'x/[/b]'", 1),
    (f"calibrate {OUT} --text-file text.txt --model 'a[red]b'", "'a[red]b'", 1),
    (f"calibrate {OUT} --text-file text.txt --model ''", "could not be loaded", 1),
    (f"calibrate {OUT} --text-file text.txt --model file", "could not be loaded", 1),
    (f"calibrate {OUT} --text-file text.txt --model models/no_config", "could not be loaded", 1),
    (f"calibrate {OUT} --text-file text.txt --model models/no_weights", "could not be loaded", 1),
    (f"calibrate {OUT} --text-file text.txt --model models/not_json", "could not be loaded", 1),
    (f"calibrate {OUT} --text-file text.txt --model models/no_type", "could not be loaded", 1),
    (f"calibrate {OUT} --text-file text.txt --model models/cut", "could not be loaded", 1),
    (f"calibrate {OUT} --text-file text.txt --model models/dense", "mixture-of-experts", 1),
    (f"calibrate {OUT} {MODEL} --text-file none.txt", "could not be read", 1),
    (f"calibrate {OUT} {MODEL} --text-file folder", "could not be read", 1),
    (f"calibrate {OUT} {MODEL} --text-file latin.txt", "give a UTF-8 text file", 1),
    (f"calibrate {OUT} {MODEL} --text-file empty.txt", "text is empty", 1),
    (f"calibrate {OUT} {MODEL} --null-from selected", "not one of 'all', 'unselected'", 2),
    (f"calibrate {OUT} {MODEL} --tokens 0", "'--tokens'", 2),
    (f"calibrate {OUT} {MODEL} --tokens many", "'--tokens'", 2),
    (f"calibrate {OUT} {MODEL} --window 0", "'--window'", 2),
    (f"calibrate {OUT} {MODEL} --window 100000", "more than the model's context", 1),
    (f"calibrate {OUT} {MODEL} --batch-size -3", "'--batch-size'", 2),
    (f"calibrate {OUT} {MODEL} --trim -1", "'--trim'", 2),
    (f"calibrate {OUT} {MODEL} --trim 40", "from 0 to 31", 1),
    (f"calibrate {OUT} {MODEL} --kernel box", "'--kernel'", 2),
    (
        f"calibrate {OUT} {MODEL} --statistic norm",
        "not one of 'logit', 'weight', 'contribution'",
        2,
    ),
    (f"calibrate {OUT} {MODEL} --null-scope experts", "not one of 'layer', 'expert'", 2),
    (f"calibrate {OUT} {MODEL} --dtype float33", "not one of 'auto', 'float32'", 2),
    (f"calibrate {OUT} {MODEL} --dtype float8_e4m3fn", "not one of 'auto'", 2),
    (f"calibrate {OUT} {MODEL} --dtype int8", "not one of 'auto'", 2),
    (f"calibrate {OUT} {MODEL} --device cup", "device must be cpu, cuda", 1),
    (f"calibrate {OUT} {MODEL} --device cuda:77", "device='cuda:77' cannot be used", 1),
    (f"calibrate {OUT} {MODEL} --device cuda:x", "device must be cpu, cuda", 1),
    (f"calibrate {OUT} {MODEL} --device meta", "device must be cpu, cuda", 1),
    (f"calibrate {MODEL} --output /proc/none/null", "--output cannot be written", 1),
    (f"calibrate {MODEL} --output file/null", "--output cannot be written", 1),
    (f"calibrate {MODEL} --output folder", "--output cannot be written", 1),
    (f"calibrate {MODEL} --output {'n' * 300}", "--output cannot be written", 1),
    (f"calibrate {OUT} {MODEL} --figure health.foo", "ends in png, pdf, svg", 1),
    (f"calibrate {OUT} {MODEL} --figure health", "ends in png, pdf, svg", 1),
    (f"calibrate {OUT} {MODEL} --figure file/health.png", "--figure cannot be written", 1),
    (f"calibrate {MODEL} --output a.png --figure a.png", "name the same file", 1),
    # analyze.
    ("tune --preview", "Missing option '--model'", 2),
    (f"tune --preview {MODEL} --model no/such-model", "could not be loaded", 1),
    (f"tune --preview {MODEL} --model models/dense", "mixture-of-experts", 1),
    (f"tune --preview {MODEL} --alphas '0.3;0.4'", "--alphas must be numbers joined by commas", 1),
    (f"tune --preview {MODEL} --alphas 0", "found 0.0", 1),
    (f"tune --preview {MODEL} --alphas 1", "found 1.0", 1),
    (f"tune --preview {MODEL} --alphas nan", "found nan", 1),
    (f"tune --preview {MODEL} --alphas inf", "found inf", 1),
    (f"tune --preview {MODEL} --alphas 1e999", "found inf", 1),
    (f"tune --preview {MODEL} --rules bhh", "did you mean 'bh'", 1),
    (f"tune --preview {MODEL} --rules ''", "The grid is empty", 1),
    (f"tune --preview {MODEL} --max-k ,", "The grid is empty", 1),
    (f"tune --preview {MODEL} --max-k 8.5", "--max-k must be integers joined by commas", 1),
    (f"tune --preview {MODEL} --max-k 65", "more than the model's 64 experts", 1),
    (f"tune --preview {MODEL} --max-k 0", "1 or more: found 0", 1),
    (f"tune --preview {MODEL} --max-k {'9' * 5000}", "max-k", 1),
    (f"tune --preview {MODEL} --min-k 0", "1 or more: found 0", 1),
    (f"tune --preview {MODEL} --min-k 9 --max-k 8", "max_k=8 is less than min_k=9", 1),
    (
        f"tune --preview {MODEL} --statistic norm",
        "not one of 'logit', 'weight', 'contribution'",
        2,
    ),
    (f"tune --preview {MODEL} --null-scope layer3", "'--null-scope'", 2),
    (f"tune --preview {MODEL} --null-model none.safetensors", "none.safetensors", 1),
    (f"tune --preview {MODEL} --null-model nulls/cut.safetensors", "cut.safetensors", 1),
    (f"tune --preview {MODEL} --null-model nulls/empty.safetensors", "empty.safetensors", 1),
    (f"tune --preview {MODEL} --null-model nulls/text.safetensors", "text.safetensors", 1),
    (f"tune --preview {MODEL} --null-model nulls/weights.safetensors", "weights.safetensors", 1),
    (f"tune --preview {MODEL} --null-model nulls/another.safetensors", "fingerprint", 1),
    (f"tune --preview {MODEL} --null-model folder", "folder", 1),
    (f"tune --preview {MODEL} --tokens -1", "'--tokens'", 2),
    (f"tune --preview {MODEL} --window 513", "length=513 is more than the model's context", 1),
    (f"tune --preview {MODEL} --batch-size 0", "'--batch-size'", 2),
    (f"tune --preview {MODEL} --device abacus", "device must be cpu, cuda", 1),
    (f"tune --preview {MODEL} --dtype float99", "not one of 'auto'", 2),
    (f"tune --preview {MODEL} --target-experts 4", "--preview has no goal and no folder", 1),
    (f"tune {MODEL} --target-experts 4", "tune needs --output-dir", 1),
    (f"tune {MODEL} --target-experts 4 --output-dir new --rules bh", "--rules needs --preview", 1),
    (f"tune {MODEL} --target-experts 4 --output-dir new --null-from unselected", "--preview", 1),
    (f"tune --preview {MODEL} --output folder", "--output cannot be written", 1),
    (f"tune --preview {MODEL} --output /proc/none/x.json", "--output cannot be written", 1),
    # export.
    ("policy export", "Missing argument", 2),
    (f"policy export {TOP4}", "Missing option '--to'", 2),
    (
        f"policy export {TOP4} --to ollama --output-dir new",
        "'ollama' is not one of 'hf', 'vllm'",
        2,
    ),
    (f"policy export {TOP4} --to hf", "--to hf needs --output-dir", 1),
    ("policy export none.safetensors --to hf --output-dir new", "There is no policy", 1),
    ("policy export file --to hf --output-dir new", "is damaged", 1),
    ("policy export nulls/another.safetensors --to hf --output-dir new", "is not a policy", 1),
    ("policy export policies/cut.safetensors --to hf --output-dir new", "is damaged", 1),
    (
        "policy export policies/another.safetensors --to hf --output-dir new",
        "differ from those of tiny-olmoe",
        1,
    ),
    (
        "policy export policies/random.safetensors --to vllm --output-dir new",
        "rule=topk with the same",
        1,
    ),
    ("policy export policies/nameless.safetensors --to hf --output-dir new", "give --model", 1),
    (f"policy export {TOP4} --to hf --output-dir new --model no/such", "could not be read", 1),
    (
        f"policy export {TOP4} --to hf --output-dir new --model models/no_config",
        "could not be read",
        1,
    ),
    (f"policy export {TOP4} --to hf --output-dir new --model models/cut", "could not be read", 1),
    (
        f"policy export {TOP4} --to hf --output-dir new --model models/no_weights",
        "could not be read",
        1,
    ),
    (
        f"policy export {TOP4} --to hf --output-dir new --model models/not_json",
        "could not be read",
        1,
    ),
    (
        f"policy export {TOP4} --to hf --output-dir new --model models/no_type",
        "could not be read",
        1,
    ),
    (
        f"policy export {TOP4} --to hf --output-dir new --model models/dense",
        "cannot be exported",
        1,
    ),
    (f"policy export {TOP4} --to hf --output-dir file", "is not a folder", 1),
    (
        f"policy export {TOP4} --to hf --output-dir runs --overwrite",
        "something other than an exported",
        1,
    ),
    (f"policy export {TOP4} --to hf --output-dir /proc/none", "--output-dir cannot be written", 1),
    (f"policy export {TOP4} --to llama.cpp --output-dir new", "writes nothing", 1),
    (
        "policy export policies/another.safetensors --to llama.cpp",
        "differ from those of tiny-olmoe",
        1,
    ),
    # league.
    ("league", "league needs --model and --output-dir and --targets", 1),
    (f"{LEAGUE}", "league needs --output-dir", 1),
    (f"{LEAGUE} --output-dir file", "--output-dir cannot be written", 1),
    (f"{LEAGUE} --output-dir new", "too few to calibrate, choose and confirm on", 1),
    (f"{LEAGUE} --output-dir new --targets four", "--targets must be numbers", 1),
    ("league --model tiny-olmoe --output-dir new --targets ,", "There is no target", 1),
    (f"{LEAGUE} --output-dir new --methods bhh", "did you mean 'bh'", 1),
    (f"{LEAGUE} --output-dir new --methods 'bh benefits'", "did you mean 'benefit'", 1),
    (f"{LEAGUE} --output-dir new --methods ,", "There is no method to measure", 1),
    (f"{LEAGUE} --output-dir new --tokens 0", "'--tokens'", 2),
    (f"{LEAGUE} --output-dir new --target-distinct 9", "are two leagues", 1),
    (f"{DISTINCT} 9 --decode-batch 1", "--decode-batch of at least 2: found 1", 1),
    (f"{DISTINCT} 9 --decode-batch -1", "'--decode-batch'", 2),
    (f"{DISTINCT} nine", "--target-distinct must be numbers", 1),
    (f"{TUNE} --target-distinct 9 --decode-batch 1", "'--decode-batch'", 2),
    (f"{TUNE} --target-distinct 9 --target-experts 4", "tune needs one goal", 1),
    ("league --check none.json", "could not be read as JSON", 1),
    ("league --check folder", "could not be read as JSON", 1),
    ("league --check pipe", "could not be read as JSON", 1),
    ("league --check file", "could not be read as JSON", 1),
    # verify.
    (f"policy verify {TOP4}", "Missing option '--engine'", 2),
    (f"policy verify {TOP4} --engine vlm", "not one of 'hf', 'vllm'", 2),
    ("bench rule=topk --model tiny-olmoe --engine vllm", "needs vLLM beside lm-eval-bh", 1),
    ("policy verify policies/cut.safetensors --engine hf", "is damaged", 1),
    (
        "policy verify policies/another.safetensors --engine hf",
        "differ from those of tiny-olmoe",
        1,
    ),
    (f"policy verify {TOP4} --engine hf --limit 0", "'--limit'", 2),
    (f"policy verify {TOP4} --engine hf --max-tokens 1", "'--max-tokens'", 2),
    (f"policy verify {TOP4} --engine hf --limit 1 --python nowhere", "cannot be run", 1),
    (f"policy verify {TOP4} --engine hf --limit 1 --python true", "cannot be read: there is no", 1),
    (f"policy verify {TOP4} --engine hf --timeout 0", "'--timeout'", 2),
    (f"policy verify {TOP4} --engine hf --timeout nan", "'--timeout'", 2),
    (f"tune --preview {MODEL} --null-model pipe", "is not a file", 1),
    (f"tune --preview {MODEL} --null-model nulls/flat.safetensors", "select none", 1),
    (f"tune --preview {MODEL} --null-model nulls/full.safetensors", "select all experts", 1),
    (f"tune --preview {MODEL} --null-model nulls/float8.safetensors", "float8.safetensors", 1),
    (f"tune --preview {MODEL} --null-model nulls/half.safetensors", "float16, not float64", 1),
    (f"tune --preview {MODEL} --null-model nulls/no_points.safetensors", "2 or more points", 1),
    (f"tune --preview {MODEL} --null-model nulls/one_point.safetensors", "2 or more points", 1),
    (f"tune --preview {MODEL} --null-model nulls/no_experts.safetensors", "2 or more points", 1),
    (f"tune --preview {MODEL} --null-model nulls/nan.safetensors", "is not finite", 1),
    (f"tune --preview {MODEL} --null-model nulls/falling.safetensors", "does not rise", 1),
    (f"tune --preview {MODEL} --null-model nulls/wild.safetensors", "is too wide", 1),
    (f"tune --preview {MODEL} --null-from selected", "not one of 'all', 'unselected'", 2),
    (f"tune --preview {MODEL} --tokens 1e3", "'--tokens'", 2),
    # policy.
    ("policy", "policy needs --output and --model or --model-args", 1),
    ("policy --output new.safetensors", "policy needs --output and --model or", 1),
    ("policy --model-args alpha=0.4 --output folder", "--output cannot be written", 1),
    ("policy --model-args alpha=0.4 --output file/p", "--output cannot be written", 1),
    ("policy --model-args alpha=0.4 --output policy.safetensors", "use --overwrite", 1),
    ("policy --model tiny-olmoe --model-args rule=bhh --output new", "did you mean 'bh'", 1),
    ("policy --model tiny-olmoe --model-args device=cup --output new", "device must be", 1),
    ("policy show", "Missing argument", 2),
    ("policy show none", "There is no policy none", 1),
    ("policy show folder", "There is no policy folder", 1),
    ("policy show pipe", "There is no policy pipe", 1),
    ("policy show file", "The policy file is damaged", 1),
    ("policy show cut_policy.safetensors", "is damaged", 1),
    ("policy show changed_policy.safetensors", "its checksum differs", 1),
    ("policy show nulls/another.safetensors", "is not a policy", 1),
    ("policy shoe x", "No such command 'shoe'", 2),
    # doctor.
    ("doctor --policy none.safetensors", "--policy needs --model", 1),
    ("doctor tiny-olmoe", "No such command 'tiny-olmoe'", 2),
    # import-kde.
    (f"import-kde pickles/pipe {OUT}", "it is not a file", 1),
    (f"import-kde pipe {OUT}", "There is no folder pipe", 1),
    ("import-kde", "Missing argument", 2),
    ("import-kde pickles/none", "Missing option '--output'", 2),
    (f"import-kde nowhere {OUT}", "nowhere", 1),
    (f"import-kde file {OUT}", "file", 1),
    (f"import-kde pickles/none {OUT}", "pickles/none", 1),
    (f"import-kde pickles/hostile {OUT}", "system", 1),
    (f"import-kde pickles/garbage {OUT}", "pickles/garbage", 1),
    (f"import-kde pickles/number {OUT}", "pickles/number", 1),
    ("import-kde pickles/none --output folder", "--output cannot be written", 1),
    ("import-kde pickles/none --output file/x", "--output cannot be written", 1),
    # import-routing; broken traces of every format are in tests/traces.
    ("import-routing", "Missing argument", 2),
    ("import-routing empty.csv", "Missing option '--output-dir'", 2),
    ("import-routing nowhere --output-dir new", "There is no trace nowhere", 1),
    ("import-routing folder --output-dir new", "folder holds no trace", 1),
    ("import-routing file --output-dir new", "add --format vllm or sglang", 1),
    ("import-routing empty.csv --output-dir new", "empty.csv could not be read", 1),
    ("import-routing binary.csv --output-dir new", "binary.csv could not be read", 1),
    ("import-routing foreign.csv --output-dir new", "foreign.csv has no column document", 1),
    (
        "import-routing foreign.csv --output-dir new --format sgland",
        "not one of 'vllm', 'sglang'",
        2,
    ),
    ("import-routing foreign.csv --output-dir new --num-experts 0", "'--num-experts'", 2),
    ("import-routing foreign.csv --output-dir new --task a/b", "task must be a valid", 1),
    ("import-routing foreign.csv --output-dir file", "--output-dir cannot be written", 1),
    (
        "import-routing foreign.csv --output-dir runs",
        "--output-dir runs exists and is not empty",
        1,
    ),
    # sweep.
    ("sweep", "Missing option '--output-dir'", 2),
    ("sweep --output-dir new", "has no task", 1),
    ("sweep --output-dir new --tasks bh_demo", "The grid is empty", 1),
    ("sweep --output-dir new --preset quik", "not one of 'quick', 'seeds'", 2),
    ("sweep --output-dir new --preset quick --include-path none", "is not a folder", 1),
    ("sweep --output-dir new --preset quick --include-path file", "is not a folder", 1),
    ("sweep --output-dir new --config none.yaml", "none.yaml could not be read", 1),
    ("sweep --output-dir new --config folder", "folder could not be read", 1),
    ("sweep --output-dir new --config unknown.yaml", "did you mean 'limit'", 1),
    ("sweep --output-dir new --config list.yaml", "must hold keys with values", 1),
    ("sweep --output-dir new --config empty.yaml", "must hold keys with values", 1),
    ("sweep --output-dir new --config syntax.yaml", "fix or remove the file", 1),
    ("sweep --output-dir new --config binary.yaml", "fix or remove the file", 1),
    ("sweep --output-dir new --config preset.yaml", "did you mean 'quick'", 1),
    ("sweep --output-dir new --preset quick --config types.yaml", "not 'many'", 1),
    ("sweep --output-dir new --preset quick --config alphas.yaml", "'high'", 1),
    (f"{SWEEP} --output-dir file", "--output-dir cannot be written", 1),
    (f"{SWEEP} --output-dir file/x", "--output-dir cannot be written", 1),
    (f"{SWEEP} --output-dir /proc/none", "--output-dir cannot be written", 1),
    (f"{SWEEP} --output-dir new --dry-run --tasks bh_demo_lambda", "'bh_demo_lambada'", 1),
    ("sweep --output-dir new --baselines 8 --tasks ''", "has no task", 1),
    (f"{SWEEP} --output-dir new --baselines 0", "1 or more: found 0", 1),
    (f"{SWEEP} --output-dir new --baselines 8", "baselines names 8 2 times", 1),
    (f"{SWEEP} --output-dir new --baselines eight", "--baselines must be integers", 1),
    (f"{SWEEP} --output-dir new --baselines 65", "more than the model's 64 experts", 1),
    (f"{SWEEP} --output-dir new --baselines 65 --dry-run", "more than the model's 64 experts", 1),
    (f"{SWEEP} --output-dir new --model-args dtyp=float32 --dry-run", "did you mean 'dtype'", 1),
    (f"{SWEEP} --output-dir new --model-args dtype=float99 --dry-run", "dtype must be", 1),
    (f"{SWEEP} --output-dir new --model-args kde=nope --dry-run", "not a file or folder", 1),
    (f"{SWEEP} --output-dir file --dry-run", "--output-dir cannot be written", 1),
    (f"{SWEEP} --output-dir new --max-k 8 --alphas 2", "found 2.0", 1),
    (f"{SWEEP} --output-dir new --max-k 8 --alphas high", "--alphas must be numbers", 1),
    (f"{SWEEP} --output-dir new --max-k '[8]' --alphas 0.4", "--max-k must be integers", 1),
    (f"{SWEEP} --output-dir new --rules bhh", "did you mean 'bh'", 1),
    (f"{SWEEP} --output-dir new --limit 0", "limit must be an integer number of documents", 1),
    (f"{SWEEP} --output-dir new --limit all", "'--limit'", 2),
    (f"{SWEEP} --output-dir new --batch-size large", "batch_size must be", 1),
    (f"{SWEEP} --output-dir new --batch-size 0", "batch_size must be", 1),
    (f"{SWEEP} --output-dir new --seed -1", "'--seed'", 2),
    (f"{SWEEP} --output-dir new --seed 4294967296", "'--seed'", 2),
    (f"{SWEEP} --output-dir new --repeat 0", "'--repeat'", 2),
    (f"{SWEEP} --output-dir new --repeat 1000000", "'--repeat'", 2),
    (f"{SWEEP} --output-dir new --shard 0/4", "invalid shard '0/4'", 1),
    (f"{SWEEP} --output-dir new --shard 5/4", "invalid shard '5/4'", 1),
    (f"{SWEEP} --output-dir new --shard x", "use i/n", 1),
    (f"{SWEEP} --output-dir new --log-routing sample", "'--log-routing'", 2),
    (f"{SWEEP} --output-dir new --log-samples -1", "log_samples", 1),
    (f"{SWEEP} --output-dir new --workers 2", "no meaning without --ray", 1),
    (f"{SWEEP} --output-dir new --model-args alpha=0.3", "model_args sets alpha", 1),
    (f"{SWEEP} --output-dir new --model-args dtype=float99", "dtype must be auto", 1),
    (f"{SWEEP} --output-dir new --model-args dtyp=float32", "did you mean 'dtype'", 1),
    (f"{SWEEP} --output-dir new --max-k 8 --alphas 0.4 --model-args kde=nowhere", "nowhere", 1),
    (f"{SWEEP} --output-dir new --max-k 8 --alphas 0.4 --model-args null=experts", "null", 1),
    (f"{SWEEP} --output-dir new --device cup", "device must be cpu, cuda", 1),
    (f"{SWEEP} --output-dir new --device cuda:77", "device='cuda:77' cannot be used", 1),
    (f"{SWEEP} --output-dir new --model no/such", "could not be loaded", 1),
    (f"{SWEEP} --output-dir new --model 'x/[/b]'", "could not be loaded", 1),
    (f"{SWEEP} --output-dir new --model models/no_config", "could not be loaded", 1),
    (f"{SWEEP} --output-dir new --model models/cut", "could not be loaded", 1),
    (f"{SWEEP} --output-dir swept", "holds another sweep", 1),
    (f"{SWEEP} --output-dir new --device cup --dry-run", "device must be cpu, cuda", 1),
    (f"{SWEEP} --output-dir new --device cuda:77 --dry-run", "'cuda:77' cannot be used", 1),
    (f"{SWEEP} --output-dir new --config pipe", "it is not a file", 1),
    (f"{SWEEP} --output-dir pipe", "--output-dir cannot be written", 1),
    (f"{SWEEP} --output-dir new --model-args batch_size=2", "model_args sets batch_size", 1),
    (f"{SWEEP} --output-dir new --model-args device=cpu", "model_args sets device", 1),
    (f"{SWEEP} --output-dir new --model-args log_dir=x", "model_args sets log_dir", 1),
    (f"{SWEEP} --output-dir new --model-args bnb_4bit_quant_type=nf4", "without load_in_4bit", 1),
    (f"{SWEEP} --output-dir new --model-args load_in_4bit=True,load_in_8bit=True", "both True", 1),
    (f"{SWEEP} --output-dir new --max-k 8 --alphas 0.4 --model-args kde=pipe", "is not a file", 1),
    (f"{SWEEP} --output-dir new --ray local --workers 0", "workers=0 is not a number", 1),
    # aggregate.
    ("aggregate pipe", "There is no folder pipe", 1),
    ("aggregate", "Missing argument", 2),
    ("aggregate nowhere", "There is no folder nowhere", 1),
    ("aggregate folder", "There is no results_*.json", 1),
    ("aggregate file", "could not be read", 3),
    ("aggregate runs_broken", "No run could be read", 3),
    ("aggregate runs_list", "No run could be read", 3),
    ("aggregate runs_empty", "No run could be read", 3),
    ("aggregate runs_foreign", "No run could be read", 3),
    ("aggregate incomparable", "max_length 32 and 64", 1),
    ("aggregate runs --output-dir file", "--output-dir cannot be written", 1),
    ("aggregate runs --output-dir /proc/none", "--output-dir cannot be written", 1),
    ("aggregate runs --margin 2", "margin must be a number between 0 and 1, not 2.0", 1),
    ("aggregate runs --margin nan", "margin must be", 1),
    ("aggregate runs --margin little", "'--margin'", 2),
    ("aggregate runs --accuracy-margin 0", "accuracy_margin must be", 1),
    ("aggregate runs --confidence 1", "confidence must be", 1),
    ("aggregate runs --confidence 95", "confidence must be", 1),
    ("aggregate runs --resamples 0", "resamples must be an integer from 1 to 1000000", 1),
    ("aggregate runs --resamples 999999999999", "resamples must be an integer from 1", 1),
    ("aggregate runs --seed -1", "'--seed'", 2),
    ("aggregate runs --seed 1.5", "'--seed'", 2),
    ("aggregate runs --baseline best", "not one of 'native', 'max_k'", 2),
    ("aggregate runs --context-length 0", "context_length must be", 1),
    ("aggregate runs --context-length -4", "context_length must be", 1),
    ("aggregate runs --context-length long", "'--context-length'", 2),
    ("aggregate runs --output-dir", "'--output-dir' requires an argument", 2),
    # bench.
    ("bench --model tiny-olmoe", "Missing argument", 2),
    ("bench alpha=0.4", "Missing option '--model'", 2),
    (f"{BENCH} none.safetensors", "There is no policy none.safetensors", 1),
    (f"{BENCH} folder", "There is no policy folder", 1),
    (f"{BENCH} file", "is damaged", 1),
    (f"{BENCH} alpha=high", "alpha", 1),
    (f"{BENCH} alpha=2", "found 2", 1),
    (f"{BENCH} rule=bhh", "did you mean 'bh'", 1),
    (f"{BENCH} rule=topk,alpha=0.4", "alpha=0.4 has no meaning with rule=topk", 1),
    (f"{BENCH} alpha=0.4,dtype=float32", "sets dtype, which must be the same for all", 1),
    (f"{BENCH} alpha=0.4,alfa=0.3", "sets alfa", 1),
    (f"{BENCH} alpha=0.4 alpha=0.4", "is named twice", 1),
    (f"{BENCH} alpha=0.4,max_k=8 max_k=8,alpha=0.4", "is named twice", 1),
    (f"{BENCH} alpha=0.4,policy={TOP4}", "contradicts policy=", 1),
    (f"{BENCH} alpha=0.4,null_model=nowhere", "not a file or folder", 1),
    (f"{BENCH} alpha=0.4 --model-args alpha=0.3", "--model-args sets alpha", 1),
    (f"{BENCH} alpha=0.4 --model-args dtype=float99", "dtype must be", 1),
    (f"{BENCH} alpha=0.4 --model-args dtyp=float32", "did you mean 'dtype'", 1),
    (f"{BENCH} alpha=0.4,max_k=65", "more than the model's 64 experts", 1),
    (f"{BENCH} alpha=0.4 --rounds 6", "rounds must be 7 or more", 1),
    (f"{BENCH} alpha=0.4 --rounds many", "'--rounds'", 2),
    (f"{BENCH} alpha=0.4 --steps 0", "'--steps'", 2),
    (f"{BENCH} alpha=0.4 --prompt 512", "more than the model's context of 512", 1),
    (f"{BENCH} alpha=0.4 --tasks bh_demo_lambda", "'bh_demo_lambada'", 1),
    ("bench --model tiny-olmoe alpha=0.4 --tasks ''", "bench needs a task", 1),
    (f"{BENCH} alpha=0.4 --seed -1", "'--seed'", 2),
    (f"{BENCH} alpha=0.4 --device cup", "device must be cpu, cuda", 1),
    (f"{BENCH} alpha=0.4 --output-dir file", "--output-dir cannot be written", 1),
    (f"{BENCH} alpha=0.4 --model no/such", "could not be loaded", 1),
    # compare.
    ("compare runs/top4", "Missing argument 'B'", 2),
    ("compare runs/top4 nowhere", "There is no folder nowhere", 1),
    ("compare folder runs/top4", "There is no results_*.json in or below folder", 1),
    ("compare runs/top4 file", "There is no results_*.json", 1),
    ("compare runs/top4 runs_broken", "There is no results_*.json", 1),
    ("compare runs/top4 runs_deep", "There is no results_*.json", 1),
    ("compare runs/top4 runs_foreign", "There is no results_*.json", 1),
    ("compare runs runs/bh", "runs has 2 runs of bh_hellaswag: give the one to compare", 1),
    ("compare runs/bh runs/bh", "A and B are the same run", 1),
    ("compare runs/top4 runs/bh --tasks wikitext", "use bh_hellaswag, bh_lambada, bh_wikitext", 1),
    ("compare runs/top4 runs/bh --margin 0", "margin must be a number between 0 and 1", 1),
    ("compare runs/top4 runs/bh --power 1", "power must be a number between 0 and 1", 1),
    ("compare runs/top4 runs/bh --power most", "'--power'", 2),
    ("compare runs/top4 runs/bh --output c.txt", "must end in .json or .csv", 1),
    ("compare runs/top4 runs/bh --output file/c.csv", "--output cannot be written", 1),
    # plot.
    ("report --figure", "Missing argument", 2),
    ("report --figure nowhere", "There is no folder nowhere", 1),
    ("report --figure folder", "There is no results_*.json", 1),
    ("report --figure runs_broken", "No run could be read", 3),
    ("report --figure none.csv", "none.csv could not be read", 1),
    ("report --figure empty.csv", "empty.csv could not be read", 1),
    ("report --figure ragged.csv", "ragged.csv could not be read", 1),
    ("report --figure binary.csv", "binary.csv", 1),
    ("report --figure headed.csv", "holds no experiments", 1),
    ("report --figure foreign.csv", "holds no experiments", 1),
    ("report --figure no_rule.csv", "no column", 1),
    ("report --figure words.csv", "must be numbers, not 'many'", 1),
    ("report --figure tables/bh_routing_results.csv runs", "is a table by itself", 1),
    ("report --figure runs --panel heat", "'heat' is not one of 'perplexity'", 2),
    ("report --figure runs --panel ''", "'' is not one of 'perplexity'", 2),
    ("report --figure runs --tasks arc", "No run has the task 'arc'", 1),
    ("report --figure runs --tasks bh_lambda", "did you mean 'bh_lambada'", 1),
    ("report --figure runs --output figure.gif", "ends in png, pdf, svg", 1),
    ("report --figure runs --output figure", "ends in png, pdf, svg", 1),
    ("report --figure runs --output file/figure.png", "--output cannot be written", 1),
    ("report --figure runs --output /proc/none/figure.png", "--output cannot be written", 1),
    ("report --figure pipe", "There is no folder pipe", 1),
    # report.
    ("report pipe", "There is no folder pipe", 1),
    ("report runs --accuracy-margin nan", "accuracy_margin must be", 1),
    ("report", "Missing argument", 2),
    ("report nowhere", "There is no folder nowhere", 1),
    ("report folder", "There is no results_*.json", 1),
    ("report runs_broken", "No run could be read", 3),
    ("report incomparable", "max_length 32 and 64", 1),
    ("report runs --margin 0", "margin must be", 1),
    ("report runs --confidence nan", "confidence must be", 1),
    ("report runs --resamples 999999999999", "resamples must be an integer from 1", 1),
    ("report runs --seed -1", "'--seed'", 2),
    ("report runs --output-dir file", "--output-dir cannot be written", 1),
    # route-diff.
    ("route-diff runs/top4", "Missing argument 'B'", 2),
    ("route-diff nowhere runs/bh", "There is no folder nowhere", 1),
    ("route-diff file runs/bh", "There is no folder file", 1),
    ("route-diff runs/bh runs/bh", "runs/bh has no log of every token", 1),
    ("route-diff runs/bh runs/bh --output d.txt", "must end in .json", 1),
    ("route-diff runs/bh runs/bh --output file/d.json", "--output cannot be written", 1),
    ("route-diff runs/bh runs/bh --figure d.gif", "name a file that ends in png, pdf, svg", 1),
    ("route-diff runs/bh runs/bh --fail-above most", "must be a share like 1% or 0.01", 1),
    # patterns.
    ("report --patterns", "Missing argument", 2),
    ("report --patterns nowhere", "There is no folder nowhere", 1),
    ("report --patterns runs_broken", "No run could be read", 3),
    ("report --patterns alone", "log", 1),
    ("report --patterns runs --tokenizer none.json", "none.json", 1),
    ("report --patterns runs --tokenizer file", "file", 1),
    ("report --patterns runs --tokenizer pipe", "it is not a file", 1),
    ("report --patterns runs --tokenizer folder", "folder", 1),
    ("report --patterns pipe", "There is no folder pipe", 1),
    ("report --patterns runs --seed -1", "'--seed'", 2),
    ("report --patterns runs --seed 4294967296", "'--seed'", 2),
    ("report --patterns runs --output-dir file", "--output-dir cannot be written", 1),
    # view.
    ("view", "give either --model or --model-args, or one or two folders", 1),
    (
        "view runs/bh --model-args alpha=0.4",
        "give either --model or --model-args, or one or two folders",
        1,
    ),
    ("view --model-args ''", "give either --model or --model-args, or one or two folders", 1),
    (f"{VIEW} --model-args alpha=2", "alpha", 1),
    (f"{VIEW} --model-args alpah=0.4", "did you mean 'alpha'", 1),
    (f"{VIEW} --against rule=bhh", "did you mean 'bh'", 1),
    (f"{VIEW} --against pretrained=no/such", "could not be loaded", 1),
    (f"{VIEW} --against layers=0", "The two configurations route different layers", 1),
    (f"{VIEW} --text-file none.txt", "could not be read", 1),
    (f"{VIEW} --text-file folder", "it is not a file", 1),
    (f"{VIEW} --text-file pipe", "it is not a file", 1),
    (f"{VIEW} --text-file latin.txt", "give a UTF-8 text file", 1),
    (f"{VIEW} --text-file empty.txt", "holds no text", 1),
    (f"{VIEW} --text-file pipe", "it is not a file", 1),
    (f"{VIEW} --text-file /dev/zero", "it is not a file", 1),
    (f"calibrate {OUT} {MODEL} --text-file pipe", "it is not a file", 1),
    (f"calibrate {OUT} {MODEL} --text-file /dev/zero", "it is not a file", 1),
    (f"tune --preview {MODEL} --text-file /dev/zero", "it is not a file", 1),
    (
        "tune --model tiny-olmoe --target-experts 4 --output-dir new --text-file pipe",
        "it is not a file",
        1,
    ),
    (
        "tune --model tiny-olmoe --target-experts 4 --output-dir new --text-file /dev/zero",
        "it is not a file",
        1,
    ),
    (f"{VIEW} --text ' '", "holds no text", 1),
    (f"{VIEW} --text a --text-file text.txt", "The text is given twice", 1),
    (f"{VIEW} --task bh_lambada", "--task needs finished runs", 1),
    (f"{VIEW} --tokenizer file", "--tokenizer needs finished runs", 1),
    (f"{VIEW} --limit 0", "'--limit'", 2),
    (f"{VIEW} --max-tokens 1", "'--max-tokens'", 2),
    (f"{VIEW} --output folder", "--output cannot be written", 1),
    (f"{VIEW} --output file/view.html", "--output cannot be written", 1),
    (
        f"{VIEW} --model-args pretrained=tiny-glm",
        "pretrained is given twice: use either --model",
        1,
    ),
    (f"{VIEW} --model-args dtype=float32 --dtype float32", "dtype is given twice", 1),
    ("view nowhere", "There is no folder nowhere", 1),
    ("view runs_broken", "could not be read", 1),
    ("view runs/bh", "has no log of every token", 1),
    ("view runs/bh runs/top4 alone", "At most two runs", 1),
    ("view runs/bh --against rule=topk", "--against needs a model", 1),
    ("view runs/bh --text text", "--text needs a model", 1),
    ("view runs/bh --text-file text.txt", "--text-file needs a model", 1),
]

if not torch.cuda.is_available():  # lm_eval's own default is cuda:0, on every machine
    COMMANDS += [
        (f"{SWEEP} --output-dir new --device cuda:0", "device='cuda:0' cannot be used", 1),
    ]

MODEL_ARGS = [
    ("alpha=0", "alpha"),
    ("alpha=1", "alpha"),
    ("alpha=high", "alpha"),
    ("alpha=nan", "alpha"),
    ("alpha=0.4,max_k=0", "max_k"),
    ("alpha=0.4,max_k=65", "64 experts"),
    ("alpha=0.4,max_k=8.5", "max_k"),
    ("alpha=0.4,min_k=9", "min_k"),
    ("rule=bhh", "did you mean 'bh'"),
    ("rule=topk,alpha=0.4", "alpha"),
    ("mode=watch", "mode"),
    ("temperature=0", "temperature"),
    ("renormalize=maybe", "renormalize"),
    ("layers=top3", "layers"),
    ("layers=9", "layers"),
    ("statistic=norm", "statistic"),
    ("null=experts", "null"),
    ("trim=-1", "trim"),
    ("rule=random_k,seed=-1", "seed"),
    ("target_experts=90", "target_experts"),
    ("budget=token", "budget"),
    ("experts=fast", "experts"),
    ("kde=nowhere", "nowhere"),
    ("kde=nulls/cut.safetensors", "cut.safetensors"),
    ("kde=nulls/text.safetensors", "text.safetensors"),
    ("kde=nulls/another.safetensors", "fingerprint"),
    ("kde=pickles/hostile", "system"),
    ("kde=pickles/none", "pickles/none"),
    ("log_routing=sample", "log_routing"),
    ("log_routing=full", "log_dir"),
    ("log_routing=full,log_dir=file", "file"),
    ("log_routing=full,log_dir=/proc/none", "/proc/none"),
    ("log_samples=-1", "log_samples"),
    ("alpha=0.4,temperature=1e-40", "at least 1e-30"),
    ("temperature=inf", "temperature"),
    ("max_k=99999999999999999999", "max_k"),
    ("layers=last999999999999", "layers"),
    ("rule=topk,k_per_layer=8-8", "k_per_layer"),
    ("rule=topk,k_per_layer=8-x-8-8", "k_per_layer"),
    ("k_per_layer=8-8-8-8", "has no meaning with rule=bh"),
    ("mass=2", "mass must be a number from 0 to 1"),
    ("mass=0.5,renormalize=True", "contradicts mass"),
    ("family=layer", "family must be token or all"),
    ("rule=topk,family=all", "family='all' has no meaning"),
    ("null_from=selected", "null_from must be all or unselected"),
    ("rule=topk,null_from=unselected", "has no meaning with rule=topk"),
    ("null_scope=layer,null=expert", "given twice"),
    ("kde=auto,null_model=auto", "given twice"),
    ("rule=topk,kde=nulls/another.safetensors", "has no meaning with rule=topk"),
    ("budget=layer", "has no meaning without target_experts"),
    ("target_experts=4,alpha=0.4", "contradicts target_experts"),
    ("kde=pipe", "is not a file"),
    ("kde=nulls/flat.safetensors", "select none"),
    ("kde=nulls/float8.safetensors", "float8.safetensors"),
    ("kde=nulls/no_points.safetensors", "2 or more points"),
    ("policy=missing", "There is no policy missing"),
    ("policy=pipe", "There is no policy pipe"),
    ("policy=file", "is damaged"),
    ("policy=changed_policy.safetensors", "its checksum differs"),
    ("policy=policy.safetensors", "make one for"),
    ("policy=policy.safetensors,alpha=0.4", "contradicts policy="),
    ("dtype=float16,policy=policy.safetensors", "dtype=bfloat16 or float32"),
    ("dtype=float16,kde=nulls/another.safetensors", "dtype=bfloat16 or float32"),
    ("batch_size=2", "batch_size is given twice, as 2 in --model_args and as 1 by --batch_size"),
    ("load_in_8bit=True,load_in_4bit=True", "only one can be used"),
    ("bnb_4bit_compute_dtype=float16", "without load_in_4bit=True"),
    ("load_in_4bit=True,bnb_4bit_quant_type=int4", "must be fp4 or nf4, not 'int4'"),
    ("load_in_4bit=True,bnb_4bit_compute_dtype=float99", "float99"),
    ("quantization_config=int8", "use load_in_8bit=True or load_in_4bit=True"),
    ("alpah=0.4", "did you mean 'alpha'"),
    ("dtype=float99", "dtype must be auto"),
    ("dtype=float8_e4m3fn", "dtype must be auto"),
    ("device=cup", "device must be cpu"),
    ("device=cuda:77", "cuda:77"),
    ("device=3", "device must be cpu"),
    ("pretrained=no/such", "could not be loaded"),
    ("pretrained=models/no_weights", "could not be loaded"),
    ("pretrained=models/cut", "could not be loaded"),
    ("pretrained=models/dense", "mixture-of-experts"),
]

if importlib.util.find_spec("bitsandbytes") is None:
    MODEL_ARGS += [
        ("load_in_8bit=True", "pip install bitsandbytes"),
        ("load_in_4bit=True,bnb_4bit_quant_type=nf4", "pip install bitsandbytes"),
    ]

NULL = "nulls/another.safetensors"  # of 2 layers and 8 experts
ZEROS = torch.zeros(3, 8)
DRAWS = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
HUGE = 10**400


def compare(**options):
    from lm_eval_bh.analysis.results import load_experiments
    from lm_eval_bh.analysis.significance import compare

    return compare(load_experiments(["runs"]), **options)


def load_experiments(*folders, **options):
    from lm_eval_bh.analysis.results import load_experiments

    return load_experiments(folders, **options)


def select(logits=ZEROS, **options):
    defaults = {"null": lm_eval_bh.NullModel.load(NULL), "layer": 0, "alpha": 0.4}
    return lm_eval_bh.select_experts(logits, **defaults | options)


def fit(logits, **options):
    return lm_eval_bh.NullModel.fit(logits, **options)


def integrate(**options):
    from transformers import AutoModelForCausalLM

    from lm_eval_bh.resources import tiny_olmoe

    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe())
    return lm_eval_bh.BHRoutingIntegration(model, **options)


def policy(**counts):
    known = {"fingerprint": "0" * 64, "num_layers": 2, "num_experts": 8, "native_top_k": 2}
    return lm_eval_bh.Policy(lm_eval_bh.RoutingConfig(rule="topk"), **known | counts)


def reject(p_values, **options):
    from lm_eval_bh.routing.selection import reject

    return reject(p_values, **{"alpha": 0.4} | options)


def sweep(**settings):
    from lm_eval_bh.harness.sweep.sweep_config import SweepConfig

    return SweepConfig(**{"tasks": ["bh_demo"], "baselines": [8]} | settings)


def draw(table, *panel, path=None):
    import pandas as pd

    if panel:
        return lm_eval_bh.create_single_panel(pd.read_csv(table), *panel, path)
    return lm_eval_bh.create_comprehensive_visualization(pd.read_csv(table), path)


CALLS = [
    (lambda: lm_eval_bh.RoutingConfig(alpha=2), "alpha"),
    (lambda: lm_eval_bh.RoutingConfig(alpha=None), "alpha"),
    (lambda: lm_eval_bh.RoutingConfig(alpha=True), "alpha"),
    (lambda: lm_eval_bh.RoutingConfig(max_k=8.0), "max_k"),
    (lambda: lm_eval_bh.RoutingConfig(rule=None), "rule"),
    (lambda: lm_eval_bh.RoutingConfig(temperature=float("nan")), "temperature"),
    (lambda: lm_eval_bh.NullModel.load("nowhere"), "nowhere"),
    (lambda: lm_eval_bh.NullModel.load("folder"), "folder"),
    (lambda: lm_eval_bh.NullModel.load("nulls/cut.safetensors"), "cut.safetensors"),
    (lambda: lm_eval_bh.NullModel.load("nulls/weights.safetensors"), "weights.safetensors"),
    (lambda: lm_eval_bh.NullModel.from_pickles("nowhere"), "nowhere"),
    (lambda: lm_eval_bh.NullModel.from_pickles("pickles/hostile"), "system"),
    (lambda: lm_eval_bh.NullModel.load(NULL).save("file/x"), "file/x"),
    (lambda: lm_eval_bh.NullModel.load(NULL).save("folder"), "folder"),
    (lambda: select(alpha=0), "alpha"),
    (lambda: select(rule="bhh"), "did you mean 'bh'"),
    (lambda: select(max_k=9), "8 experts"),
    (lambda: select(layer=2), "layer"),
    (lambda: lm_eval_bh.BHRoutingIntegration(torch.nn.Linear(2, 2)), "mixture-of-experts"),
    # Kinds of values that are none of the parameters' kinds.
    (lambda: lm_eval_bh.RoutingConfig(alpha=HUGE), "alpha"),
    (lambda: lm_eval_bh.RoutingConfig(alpha=10**5000), "a number of thousands of digits"),
    (lambda: lm_eval_bh.RoutingConfig(max_k=HUGE), "max_k"),
    (lambda: lm_eval_bh.RoutingConfig(max_k="8"), "max_k"),
    (lambda: lm_eval_bh.RoutingConfig(min_k=np.float64(2)), "min_k"),
    (lambda: lm_eval_bh.RoutingConfig(alpha=np.array([0.4])), "alpha"),
    (lambda: lm_eval_bh.RoutingConfig(alpha=0.4 + 0j), "alpha"),
    (lambda: lm_eval_bh.RoutingConfig(temperature=1e-40), "at least 1e-30"),
    (lambda: lm_eval_bh.RoutingConfig(temperature=HUGE), "temperature"),
    (lambda: lm_eval_bh.RoutingConfig(renormalize="yes"), "renormalize"),
    (lambda: lm_eval_bh.RoutingConfig(layers=True), "layers"),
    (lambda: lm_eval_bh.RoutingConfig(layers=-1), "layers"),
    (lambda: lm_eval_bh.RoutingConfig(layers=[0, 1]), "layers"),
    (lambda: lm_eval_bh.RoutingConfig(layers="9" * 5000), "layers"),
    (lambda: lm_eval_bh.RoutingConfig(rule="topk", k_per_layer="9" * 5000), "k_per_layer"),
    (lambda: lm_eval_bh.RoutingConfig(rule="topk", k_per_layer=[8, None]), "k_per_layer"),
    (lambda: lm_eval_bh.RoutingConfig(rule="random_k", seed=2**32), "seed"),
    (lambda: lm_eval_bh.RoutingConfig(rule="random_k", seed=1.0), "seed"),
    (lambda: lm_eval_bh.RoutingConfig(trim=HUGE), "trim"),
    (lambda: lm_eval_bh.RoutingConfig(target_experts=float("nan")), "target_experts"),
    (lambda: lm_eval_bh.RoutingConfig(alhpa=0.4), "routing parameter (did you mean 'a"),
    (lambda: lm_eval_bh.RoutingConfig.named({"alhpa": 0.4}), "did you mean 'alpha'"),
    # Logits and p-values.
    (lambda: select([[1.0], [1.0, 2.0]]), "lists of equal length"),
    (lambda: select("logits"), "router_logits must be"),
    (lambda: select(None), "router_logits must be"),
    (lambda: select(np.array([[None] * 8])), "an array of object"),
    (lambda: select([[1] * 8]), "floating-point"),
    (lambda: select(ZEROS.to(torch.complex64)), "floating-point"),
    (lambda: select(ZEROS[0]), "[tokens, experts]"),
    (lambda: select(ZEROS + torch.nan), "NaN or infinite"),
    (lambda: select(ZEROS - torch.inf), "NaN or infinite"),
    (lambda: select(ZEROS[:, :0]), "0 experts"),
    (lambda: select(ZEROS[:, :7], max_k=4), "8 experts"),
    (lambda: select(layer=None), "layer"),
    (lambda: select(layer=True), "layer"),
    (lambda: select(layer=HUGE), "layer"),
    (lambda: select(null=None), "needs a null model"),
    (lambda: select(null=3), "A path must be text or a Path"),
    (lambda: select(null="nowhere"), "nowhere"),
    (lambda: select(null="nulls/flat.safetensors"), "select none"),
    (lambda: select(null=lm_eval_bh.NullModel.load(NULL), null_model=NULL), "given twice"),
    (lambda: select(alhpa=0.4), "parameter of select_experts (did you mean 'alpha'?)"),
    (lambda: reject([[0.1], [0.1, 0.2]]), "lists of equal length"),
    (lambda: reject(None), "p_values must be"),
    (lambda: reject([[0.1, float("nan")]]), "from 0 to 1"),
    (lambda: reject([[0.1, 1.5]]), "from 0 to 1"),
    (lambda: reject([[0.1, 0.5]], rule="topk"), "is not a test"),
    (lambda: reject([[0.1, 0.5]], alpha=1), "alpha"),
    # Null models and policies.
    (lambda: lm_eval_bh.NullModel.load(None), "A path must be text or a Path"),
    (lambda: lm_eval_bh.NullModel.load(3), "A path must be text or a Path"),
    (lambda: lm_eval_bh.NullModel.load("a\0b"), "There is no null model"),
    (lambda: lm_eval_bh.NullModel.load("pipe"), "is not a file"),
    (lambda: lm_eval_bh.NullModel.load("nulls/half.safetensors"), "not float64"),
    (lambda: lm_eval_bh.NullModel.from_pickles(None), "A path must be text or a Path"),
    (lambda: lm_eval_bh.NullModel.from_pickles("pickles/pipe"), "it is not a file"),
    (lambda: lm_eval_bh.NullModel.from_pickles("pickles/none", modle="x"), "has no field 'modle'"),
    (lambda: lm_eval_bh.NullModel.load(NULL).save(None), "A path must be text or a Path"),
    (lambda: fit(None), "by their numbers"),
    (lambda: fit([DRAWS]), "by their numbers"),
    (lambda: fit({}), "layers 0, 1"),
    (lambda: fit({1: DRAWS}), "layers 0, 1"),
    (lambda: fit({0: "logits"}), "The logits of layer 0 must be"),
    (lambda: fit({0: [[1.0], [1.0, 2.0]]}), "lists of equal length"),
    (lambda: fit({0: DRAWS[0]}), "[tokens, experts]"),
    (lambda: fit({0: DRAWS[:0]}), "0 samples"),
    (lambda: fit({0: ZEROS}), "equal 0"),
    (lambda: fit({0: DRAWS * torch.nan}), "NaN or infinite"),
    (lambda: fit({0: DRAWS, 1: DRAWS[:, :4]}), "the same number of experts in every layer"),
    (lambda: fit({0: DRAWS}, trim=4), "trim must be an integer from 0 to 3"),
    (lambda: fit({0: DRAWS}, points=10**12), "points=1000000000000 is out of range"),
    (lambda: fit({0: DRAWS}, points=0), "points=0 is out of range"),
    (lambda: fit({0: DRAWS}, bandwidth=0), "bandwidth=0 is out of range"),
    (lambda: fit({0: DRAWS}, bandwidth=1e-300), "too few for the bandwidth"),
    (lambda: fit({0: DRAWS}, bandwidth="silverman"), "bandwidth='silverman' is unknown"),
    (lambda: fit({0: DRAWS}, kernel="box"), "kernel='box' is unknown"),
    (lambda: fit({0: DRAWS}, top_k=8), "top_k must be an integer from 1 to 7"),
    (lambda: fit({0: DRAWS}, kernle="box"), "did you mean 'kernel'"),
    (lambda: policy(num_layers=2**63), "num_layers must be an integer from 1 to 65536"),
    (lambda: policy(num_layers=HUGE), "num_layers must be an integer from 1 to 65536"),
    (lambda: policy(num_experts=2.0), "num_experts must be an integer from 1 to 65536"),
    (lambda: policy(native_top_k=0), "native_top_k must be an integer from 1 to 65536"),
    (lambda: policy(num_experts=4), "more than the model's 4 experts"),
    (lambda: lm_eval_bh.Policy.load(3), "A path must be text or a Path"),
    (lambda: lm_eval_bh.Policy.load("pipe"), "There is no policy pipe"),
    (lambda: lm_eval_bh.Policy.load("changed_policy.safetensors"), "its checksum differs"),
    (lambda: lm_eval_bh.Policy.load("policy.safetensors").save(None), "A path must be"),
    # Models.
    (lambda: lm_eval_bh.BHRoutingIntegration(None), "is not a loaded model"),
    (lambda: lm_eval_bh.BHRoutingIntegration("tiny-olmoe"), "is not a loaded model"),
    (lambda: integrate(null_model=3), "A path must be text or a Path"),
    (lambda: integrate(kde="pipe"), "is not a file"),
    (lambda: integrate(kde="nowhere"), "nowhere"),
    (lambda: integrate(kde=NULL), "fingerprint"),
    (lambda: integrate(alpha=2), "alpha"),
    (lambda: integrate(alhpa=0.4), "did you mean 'alpha'"),
    (lambda: integrate(max_k=65), "64 experts"),
    (lambda: integrate(layers=4), "layers"),
    (lambda: integrate(experts="fast"), "experts"),
    (lambda: integrate(policy=3), "A path must be text or a Path"),
    (lambda: integrate(policy="policy.safetensors"), "make one for"),
    (lambda: integrate(policy="policy.safetensors", alpha=0.4), "leave out the others"),
    # Tables and sweeps.
    (lambda: load_experiments("nowhere"), "There is no folder nowhere"),
    (lambda: load_experiments("folder"), "There is no results_*.json"),
    (lambda: load_experiments("incomparable"), "max_length 32 and 64"),
    (lambda: load_experiments("runs", context_length=0), "context_length"),
    (lambda: compare(margin=0), "margin"),
    (lambda: compare(resamples=10**12), "resamples"),
    (lambda: compare(seed=-1), "seed"),
    (lambda: compare(baseline="best"), "baseline"),
    (lambda: sweep(limit=0), "limit"),
    (lambda: sweep(seed=2**32), "seed"),
    (lambda: sweep(batch_size=True), "batch_size"),
    (lambda: sweep(model_args="dtype=float32"), "model_args"),
    (lambda: sweep(tasks=["bh_dem"]), "did you mean 'bh_demo"),
    (lambda: sweep().experiments(0), "repeat"),
    (lambda: draw("foreign.csv"), "no column"),
    (lambda: draw("words.csv"), "must be numbers"),
    (lambda: draw("tables/bh_routing_results.csv", "heat"), "did you mean 'heatmap'"),
    (lambda: draw("tables/bh_routing_results.csv", path="figure.gif"), "ends in png, pdf, svg"),
]


@pytest.mark.parametrize(("line", "sentence", "code"), COMMANDS)
def test_a_bad_command_line_ends_with_a_sentence(run, unchanged, line, sentence, code):
    ended, _, errors = run(*shlex.split(line))
    assert ended == code
    assert sentence in errors
    if code == 3:
        assert errors.startswith("left out: ")
        assert "nothing was written" in errors
    elif line:
        assert errors.startswith("lm-eval-bh: error: ")
        assert_one_sentence(errors.removesuffix("\n"))


@pytest.mark.parametrize(("arguments", "sentence"), MODEL_ARGS)
def test_bad_model_args_are_one_sentence(unchanged, arguments, sentence):
    from lm_eval_bh.harness.model import BHLM

    if "pretrained=" not in arguments:
        arguments = f"pretrained=tiny-olmoe,{arguments}"
    with pytest.raises(BHError) as raised:
        BHLM.create_from_arg_string(arguments, {"batch_size": 1})
    assert sentence in str(raised.value)
    assert_one_sentence(str(raised.value))


@pytest.mark.parametrize(("call", "sentence"), CALLS)
def test_a_bad_call_is_one_sentence(unchanged, call, sentence):
    with pytest.raises(BHError) as raised:
        call()
    assert sentence in str(raised.value)
    assert_one_sentence(str(raised.value))


def select_plain():
    return select().counts.tolist()


TAKEN = [
    (lambda: lm_eval_bh.RoutingConfig(max_k=np.int64(8)).max_k, 8),
    (lambda: lm_eval_bh.RoutingConfig(max_k=np.array(8)).max_k, 8),
    (lambda: lm_eval_bh.RoutingConfig(alpha=np.float64(0.4)).alpha, 0.4),
    (lambda: lm_eval_bh.RoutingConfig(alpha=np.float32(0.5)).alpha, 0.5),
    (lambda: lm_eval_bh.RoutingConfig(alpha=torch.tensor(0.5)).alpha, 0.5),
    (lambda: lm_eval_bh.RoutingConfig(renormalize=np.True_).renormalize, True),
    (lambda: lm_eval_bh.RoutingConfig(rule=np.str_("by")).rule, "by"),
    (lambda: lm_eval_bh.RoutingConfig(layers=3).layers, "3"),
    (lambda: lm_eval_bh.RoutingConfig(layers=np.int64(3)).layers, "3"),
    (lambda: select(ZEROS.numpy()).counts.tolist(), select_plain),
    (lambda: select(ZEROS.tolist()).counts.tolist(), select_plain),
    (lambda: select(null=NULL).counts.tolist(), select_plain),
    (lambda: select(null=Path(NULL)).counts.tolist(), select_plain),
    (lambda: select(layer=np.int64(0)).counts.tolist(), select_plain),
    (lambda: select(temperature=1e-30).weights.isnan().any().item(), False),
    (lambda: reject(np.array([[0.01, 0.9]])).tolist(), [[True, False]]),
    (lambda: reject([[0.01, 0.9]]).tolist(), [[True, False]]),
]


@pytest.mark.parametrize(("call", "expected"), TAKEN)
def test_what_is_like_a_value_is_one(unchanged, call, expected):
    found = call()
    assert found == (expected() if callable(expected) else expected)
    assert type(found) in (bool, int, float, str, list)


def assert_one_sentence(text: str) -> None:
    assert "\n" not in text
    assert text.endswith(".")
    assert "Traceback" not in text
    assert "Error(" not in text


def test_the_table_is_long_enough():
    assert len(COMMANDS) + len(MODEL_ARGS) + len(CALLS) >= 450
