"""A table of bad inputs: each ends with one sentence and an exit code, and changes no file.

A row is a command line, part of the sentence that it must print, and the exit code: 1 for what is
wrong, 2 for a command line that is, 3 for files that were left out. ``{ground}`` is the folder of
``conftest.py``, which is the working directory too. Rows of :data:`MODEL_ARGS` are what
``lm_eval --model hf-bh --model_args`` is given, and rows of :data:`CALLS` are calls from Python.
"""

from __future__ import annotations

import shlex

import pytest
import torch

import lm_eval_bh
from lm_eval_bh.errors import BHError

MODEL = "--pretrained tiny-olmoe --text text.txt --tokens 64 --length 32"
SWEEP = "sweep --pretrained tiny-olmoe --tasks bh_demo_lambada --baselines 8 --limit 2"
OUT = "--output new.safetensors"

COMMANDS = [
    # The program.
    ("", "", 2),
    ("agregate runs", "No such command 'agregate'", 2),
    ("--version", "No such option: --version", 2),
    ("path olmoe", "did you mean 'tiny-olmoe'", 1),
    ("path '[red]olmoe[/]'", "'[red]olmoe[/]'", 1),
    ("path a b", "unexpected extra argument", 2),
    # calibrate.
    ("calibrate", "Missing option '--pretrained'", 2),
    (f"calibrate {OUT} --text text.txt --pretrained no/such-model", "could not be loaded", 1),
    (f"calibrate {OUT} --text text.txt --pretrained 'x/[/b]'", "'x/[/b]'", 1),
    (f"calibrate {OUT} --text text.txt --pretrained 'a[red]b'", "'a[red]b'", 1),
    (f"calibrate {OUT} --text text.txt --pretrained ''", "could not be loaded", 1),
    (f"calibrate {OUT} --text text.txt --pretrained file", "could not be loaded", 1),
    (f"calibrate {OUT} --text text.txt --pretrained models/no_config", "could not be loaded", 1),
    (f"calibrate {OUT} --text text.txt --pretrained models/no_weights", "could not be loaded", 1),
    (f"calibrate {OUT} --text text.txt --pretrained models/not_json", "could not be loaded", 1),
    (f"calibrate {OUT} --text text.txt --pretrained models/no_type", "could not be loaded", 1),
    (f"calibrate {OUT} --text text.txt --pretrained models/cut", "could not be loaded", 1),
    (f"calibrate {OUT} --text text.txt --pretrained models/dense", "mixture-of-experts", 1),
    (f"calibrate {OUT} {MODEL} --text none.txt", "could not be read", 1),
    (f"calibrate {OUT} {MODEL} --text folder", "could not be read", 1),
    (f"calibrate {OUT} {MODEL} --text latin.txt", "give a UTF-8 text file", 1),
    (f"calibrate {OUT} {MODEL} --text empty.txt", "text is empty", 1),
    (f"calibrate {OUT} {MODEL} --tokens 0", "'--tokens'", 2),
    (f"calibrate {OUT} {MODEL} --tokens many", "'--tokens'", 2),
    (f"calibrate {OUT} {MODEL} --length 0", "'--length'", 2),
    (f"calibrate {OUT} {MODEL} --length 100000", "more than the model's context", 1),
    (f"calibrate {OUT} {MODEL} --batch-size -3", "'--batch-size'", 2),
    (f"calibrate {OUT} {MODEL} --trim -1", "'--trim'", 2),
    (f"calibrate {OUT} {MODEL} --trim 40", "from 0 to 31", 1),
    (f"calibrate {OUT} {MODEL} --kernel box", "kernel", 1),
    (
        f"calibrate {OUT} {MODEL} --statistic norm",
        "statistic must be logit, weight, contribution",
        1,
    ),
    (f"calibrate {OUT} {MODEL} --null experts", "did you mean 'expert'", 1),
    (f"calibrate {OUT} {MODEL} --dtype float33", "dtype must be auto, float32", 1),
    (f"calibrate {OUT} {MODEL} --dtype float8_e4m3fn", "dtype must be auto, float32", 1),
    (f"calibrate {OUT} {MODEL} --dtype int8", "dtype must be auto, float32", 1),
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
    ("analyze", "Missing option '--pretrained'", 2),
    (f"analyze {MODEL} --pretrained no/such-model", "could not be loaded", 1),
    (f"analyze {MODEL} --pretrained models/dense", "mixture-of-experts", 1),
    (f"analyze {MODEL} --alphas '0.3;0.4'", "--alphas must be numbers joined by commas", 1),
    (f"analyze {MODEL} --alphas 0", "found 0.0", 1),
    (f"analyze {MODEL} --alphas 1", "found 1.0", 1),
    (f"analyze {MODEL} --alphas nan", "found nan", 1),
    (f"analyze {MODEL} --alphas inf", "found inf", 1),
    (f"analyze {MODEL} --alphas 1e999", "found inf", 1),
    (f"analyze {MODEL} --rules bhh", "did you mean 'bh'", 1),
    (f"analyze {MODEL} --rules ''", "The grid is empty", 1),
    (f"analyze {MODEL} --max-k ,", "The grid is empty", 1),
    (f"analyze {MODEL} --max-k 8.5", "--max-k must be integers joined by commas", 1),
    (f"analyze {MODEL} --max-k 65", "more than the model's 64 experts", 1),
    (f"analyze {MODEL} --max-k 0", "1 or more: found 0", 1),
    (f"analyze {MODEL} --max-k {'9' * 5000}", "max-k", 1),
    (f"analyze {MODEL} --min-k 0", "1 or more: found 0", 1),
    (f"analyze {MODEL} --min-k 9 --max-k 8", "max_k=8 is less than min_k=9", 1),
    (
        f"analyze {MODEL} --statistic norm",
        "statistic must be logit, weight, contribution",
        1,
    ),
    (f"analyze {MODEL} --null layer3", "null", 1),
    (f"analyze {MODEL} --kde none.safetensors", "none.safetensors", 1),
    (f"analyze {MODEL} --kde nulls/cut.safetensors", "cut.safetensors", 1),
    (f"analyze {MODEL} --kde nulls/empty.safetensors", "empty.safetensors", 1),
    (f"analyze {MODEL} --kde nulls/text.safetensors", "text.safetensors", 1),
    (f"analyze {MODEL} --kde nulls/weights.safetensors", "weights.safetensors", 1),
    (f"analyze {MODEL} --kde nulls/another.safetensors", "fingerprint", 1),
    (f"analyze {MODEL} --kde folder", "folder", 1),
    (f"analyze {MODEL} --tokens -1", "'--tokens'", 2),
    (f"analyze {MODEL} --length 513", "length=513 is more than the model's context", 1),
    (f"analyze {MODEL} --batch-size 0", "'--batch-size'", 2),
    (f"analyze {MODEL} --device abacus", "device must be cpu, cuda", 1),
    (f"analyze {MODEL} --dtype float99", "dtype must be auto, float32", 1),
    (f"analyze {MODEL} --output folder", "--output cannot be written", 1),
    (f"analyze {MODEL} --output /proc/none/x.json", "--output cannot be written", 1),
    # doctor.
    ("doctor --policy none.safetensors", "--policy needs --pretrained", 1),
    ("doctor tiny-olmoe", "unexpected extra argument", 2),
    # import-kde.
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
    ("import-routing empty.csv", "Missing option '--output'", 2),
    ("import-routing nowhere --output new", "There is no trace nowhere", 1),
    ("import-routing folder --output new", "folder holds no trace", 1),
    ("import-routing file --output new", "say --format vllm or sglang", 1),
    ("import-routing empty.csv --output new", "empty.csv could not be read", 1),
    ("import-routing binary.csv --output new", "binary.csv could not be read", 1),
    ("import-routing foreign.csv --output new", "foreign.csv has no column document", 1),
    ("import-routing foreign.csv --output new --format sgland", "did you mean 'sglang'", 1),
    ("import-routing foreign.csv --output new --num-experts 0", "'--num-experts'", 2),
    ("import-routing foreign.csv --output new --task a/b", "task must be a name", 1),
    ("import-routing foreign.csv --output file", "--output cannot be written", 1),
    ("import-routing foreign.csv --output runs", "--output runs exists and is not empty", 1),
    # sweep.
    ("sweep", "Missing option '--output-dir'", 2),
    ("sweep --output-dir new", "has no task", 1),
    ("sweep --output-dir new --tasks bh_demo", "The grid is empty", 1),
    ("sweep --output-dir new --preset quik", "did you mean 'quick'", 1),
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
    (f"{SWEEP} --output-dir new --tasks ''", "has no task", 1),
    (f"{SWEEP} --output-dir new --baselines 0", "1 or more: found 0", 1),
    (f"{SWEEP} --output-dir new --baselines 8,8", "baselines names 8 2 times", 1),
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
    (f"{SWEEP} --output-dir new --log-routing sample", "log_routing", 1),
    (f"{SWEEP} --output-dir new --log-samples -1", "log_samples", 1),
    (f"{SWEEP} --output-dir new --workers 2", "no meaning without --ray", 1),
    (f"{SWEEP} --output-dir new --model-args alpha=0.3", "model_args sets alpha", 1),
    (f"{SWEEP} --output-dir new --model-args dtype=float99", "dtype must be auto", 1),
    (f"{SWEEP} --output-dir new --model-args dtyp=float32", "did you mean 'dtype'", 1),
    (f"{SWEEP} --output-dir new --max-k 8 --alphas 0.4 --model-args kde=nowhere", "nowhere", 1),
    (f"{SWEEP} --output-dir new --max-k 8 --alphas 0.4 --model-args null=experts", "null", 1),
    (f"{SWEEP} --output-dir new --device cup", "device must be cpu, cuda", 1),
    (f"{SWEEP} --output-dir new --device cuda:77", "device='cuda:77' cannot be used", 1),
    (f"{SWEEP} --output-dir new --pretrained no/such", "could not be loaded", 1),
    (f"{SWEEP} --output-dir new --pretrained 'x/[/b]'", "could not be loaded", 1),
    (f"{SWEEP} --output-dir new --pretrained models/no_config", "could not be loaded", 1),
    (f"{SWEEP} --output-dir new --pretrained models/cut", "could not be loaded", 1),
    (f"{SWEEP} --output-dir swept", "holds another sweep", 1),
    # aggregate.
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
    ("aggregate runs --baseline best", "baseline must be native or max_k, not 'best'", 1),
    ("aggregate runs --context-length 0", "context_length must be", 1),
    ("aggregate runs --context-length -4", "context_length must be", 1),
    ("aggregate runs --context-length long", "'--context-length'", 2),
    ("aggregate runs --output-dir", "'--output-dir' requires an argument", 2),
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
    ("compare runs/top4 runs/bh --task wikitext", "use bh_hellaswag, bh_lambada, bh_wikitext", 1),
    ("compare runs/top4 runs/bh --margin 0", "margin must be a number between 0 and 1", 1),
    ("compare runs/top4 runs/bh --power 1", "power must be a number between 0 and 1", 1),
    ("compare runs/top4 runs/bh --power most", "'--power'", 2),
    ("compare runs/top4 runs/bh --output c.txt", "must end in .json or .csv", 1),
    ("compare runs/top4 runs/bh --output file/c.csv", "--output cannot be written", 1),
    # plot.
    ("plot", "Missing argument", 2),
    ("plot nowhere", "There is no folder nowhere", 1),
    ("plot folder", "There is no results_*.json", 1),
    ("plot runs_broken", "No run could be read", 3),
    ("plot none.csv", "none.csv could not be read", 1),
    ("plot empty.csv", "empty.csv could not be read", 1),
    ("plot ragged.csv", "ragged.csv could not be read", 1),
    ("plot binary.csv", "binary.csv", 1),
    ("plot headed.csv", "holds no experiments", 1),
    ("plot foreign.csv", "holds no experiments", 1),
    ("plot no_rule.csv", "no column", 1),
    ("plot words.csv", "must be numbers, not 'many'", 1),
    ("plot tables/bh_routing_results.csv runs", "is a table by itself", 1),
    ("plot runs --panel heat", "did you mean 'heatmap'", 1),
    ("plot runs --panel ''", "There is no panel ''", 1),
    ("plot runs --task arc", "No run did the task 'arc'", 1),
    ("plot runs --task bh_lambda", "did you mean 'bh_lambada'", 1),
    ("plot runs --output figure.gif", "ends in png, pdf, svg", 1),
    ("plot runs --output figure", "ends in png, pdf, svg", 1),
    ("plot runs --output file/figure.png", "--output cannot be written", 1),
    ("plot runs --output /proc/none/figure.png", "--output cannot be written", 1),
    # report.
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
    # patterns.
    ("patterns", "Missing argument", 2),
    ("patterns nowhere", "There is no folder nowhere", 1),
    ("patterns runs_broken", "No run could be read", 3),
    ("patterns alone", "log", 1),
    ("patterns runs --tokenizer none.json", "none.json", 1),
    ("patterns runs --tokenizer file", "file", 1),
    ("patterns runs --seed -1", "'--seed'", 2),
    ("patterns runs --seed 4294967296", "'--seed'", 2),
    ("patterns runs --output-dir file", "--output-dir cannot be written", 1),
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

NULL = "nulls/another.safetensors"  # of 2 layers and 8 experts


def compare(**options):
    from lm_eval_bh.analysis.results import load_experiments
    from lm_eval_bh.analysis.significance import compare

    return compare(load_experiments(["runs"]), **options)


def load_experiments(*folders, **options):
    from lm_eval_bh.analysis.results import load_experiments

    return load_experiments(folders, **options)


def select(**options):
    defaults = {"null": lm_eval_bh.NullModel.load(NULL), "layer": 0, "alpha": 0.4}
    return lm_eval_bh.select_experts(torch.zeros(3, 8), **defaults | options)


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


def assert_one_sentence(text: str) -> None:
    assert "\n" not in text
    assert text.endswith(".")
    assert "Traceback" not in text
    assert "Error(" not in text


def test_the_table_is_long_enough():
    assert len(COMMANDS) + len(MODEL_ARGS) + len(CALLS) >= 250
