"""Every call on the pages of release 0.2 equals its new form, and names it."""

from __future__ import annotations

import pytest
from command_lines import parsed

MODEL = "allenai/OLMoE-1B-7B-0924"

# A call of 0.2, the same call now, and the new names on stderr.
CALLS = [
    ("path tasks", "doctor path tasks", ["doctor path"]),
    ("path", "doctor path", ["doctor path"]),
    ("doctor --pretrained tiny-olmoe", "doctor --model tiny-olmoe", ["--model"]),
    ("doctor --pretrained=tiny-olmoe", "doctor --model=tiny-olmoe", ["--model"]),
    (
        "calibrate --pretrained tiny-olmoe --text a.txt --tokens 4096 --length 64 --null expert "
        "--output n.safetensors",
        "calibrate --model tiny-olmoe --text-file a.txt --tokens 4096 --window 64 "
        "--null-scope expert --output n.safetensors",
        ["--model", "--text-file", "--window", "--null-scope"],
    ),
    (
        "analyze --pretrained tiny-olmoe --rules topk,bh --alphas 0.4,0.6 --max-k 8 --text a.txt "
        "--tokens 4096 --length 64 --kde n.safetensors --output grid.json",
        "tune --preview --model tiny-olmoe --rules topk,bh --alphas 0.4,0.6 --max-k 8 "
        "--text-file a.txt --tokens 4096 --window 64 --null-model n.safetensors --output grid.json",
        ["tune --preview", "--model", "--text-file", "--window", "--null-model"],
    ),
    (
        "tune --pretrained tiny-olmoe --target-experts 4 --preset winner --text a.txt --length 64 "
        "--output-dir tuned",
        "tune --model tiny-olmoe --target-experts 4 --preset winner --text-file a.txt --window 64 "
        "--output-dir tuned",
        ["--model", "--text-file", "--window"],
    ),
    (
        f"tune --pretrained {MODEL} --dtype bfloat16 --max-loss 1% --output-dir tuned",
        f"tune --model {MODEL} --dtype bfloat16 --max-loss 1% --output-dir tuned",
        ["--model"],
    ),
    (
        "sweep --pretrained tiny-olmoe --tasks bh_demo --baselines 4,8 --rules bh,by --alphas 0.4 "
        "--max-k 8 --policies tiny-olmoe --limit 10 --output-dir runs --speed",
        "sweep --model tiny-olmoe --tasks bh_demo --baselines 4,8 --rules bh,by --alphas 0.4 "
        "--max-k 8 --policies tiny-olmoe --limit 10 --output-dir runs --speed",
        ["--model"],
    ),
    (
        "sweep --preset full --output-dir r --dry-run",
        "sweep --preset full --output-dir r --dry-run",
        [],
    ),
    (
        "aggregate runs --force --no-figure",
        "aggregate runs --keep-groups --no-figure",
        ["--keep-groups"],
    ),
    ("report runs --force", "report runs --keep-groups", ["--keep-groups"]),
    ("plot runs", "report --figure runs", ["report --figure"]),
    (
        "plot runs --panel pareto --output pareto.pdf",
        "report --figure runs --panel pareto --output pareto.pdf",
        ["report --figure"],
    ),
    (
        "plot runs/bh_routing_results.csv --task a --task b",
        "report --figure runs/bh_routing_results.csv --tasks a --tasks b",
        ["report --figure", "--tasks", "--tasks"],
    ),
    (
        "patterns runs --tokenizer t.json --seed 3 --force",
        "report --patterns runs --tokenizer t.json --seed 3 --keep-groups",
        ["report --patterns", "--keep-groups"],
    ),
    ("compare a b --task x --task y", "compare a b --tasks x --tasks y", ["--tasks", "--tasks"]),
    (
        "bench alpha=0.4 --pretrained tiny-olmoe --documents 8 --rounds 7",
        "bench alpha=0.4 --model tiny-olmoe --limit 8 --rounds 7",
        ["--model", "--limit"],
    ),
    (
        "view --model-args alpha=0.4 --string 'The fox' --documents 2 --tokens 64",
        "view --model-args alpha=0.4 --text 'The fox' --limit 2 --max-tokens 64",
        ["--text", "--limit", "--max-tokens"],
    ),
    (
        "import-routing trace.csv --num-experts 8 --output runs --force",
        "import-routing trace.csv --num-experts 8 --output-dir runs --overwrite",
        ["--output-dir", "--overwrite"],
    ),
    (
        "policy --model-args pretrained=tiny-olmoe,alpha=0.4 --output p --force",
        "policy --model-args pretrained=tiny-olmoe,alpha=0.4 --output p --overwrite",
        ["--overwrite"],
    ),
    ("policy show p.safetensors", "policy show p.safetensors", []),
    (
        f"export p.safetensors --to vllm --output served --link --force --pretrained {MODEL}",
        "policy export p.safetensors --to vllm --output-dir served --link --overwrite "
        f"--model {MODEL}",
        ["policy export", "--output-dir", "--overwrite", "--model"],
    ),
    (
        "verify p.safetensors --engine hf --documents 5 --length 64 --pretrained tiny-olmoe",
        "policy verify p.safetensors --engine hf --limit 5 --max-tokens 64 --model tiny-olmoe",
        ["policy verify", "--limit", "--max-tokens", "--model"],
    ),
]


@pytest.mark.parametrize(("former", "now", "told"), CALLS)
def test_a_call_of_an_earlier_release_means_what_the_new_one_means(former, now, told, capsys):
    meant = parsed(now)
    assert capsys.readouterr().err == ""
    assert parsed(former) == meant
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("is now called ")[2].removeprefix("lm-eval-bh ") for line in lines] == [
        f"{name}." for name in told
    ]


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("path kde_models", "doctor path kde_models"),
        (
            "compare {a} {b} --task bh_lambada --resamples 99",
            "compare {a} {b} --tasks bh_lambada --resamples 99",
        ),
        (
            "aggregate {runs} --force --no-figure --resamples 99",
            "aggregate {runs} --keep-groups --no-figure --resamples 99",
        ),
        (
            "plot {runs} --panel layers --task bh_lambada",
            "report {runs} --panel layers --tasks bh_lambada",
        ),
        (
            "view --model-args pretrained=tiny-olmoe,rule=topk,device=cpu --string Fox --tokens 8 "
            "--output {runs}/v.html",
            "view --model tiny-olmoe --model-args rule=topk --device cpu --text Fox --max-tokens 8 "
            "--output {runs}/v.html",
        ),
    ],
)
def test_both_run(run, runs, former, now):
    """And write the same files."""
    results = []
    for line in (now, former):
        words = line.format(runs=runs, a=runs / "top4", b=runs / "bh").split()
        code, out, err = run(*words)
        assert code == 0, err
        notes = [text for text in err.splitlines() if "is now called" in text]
        files = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
        results.append((out, bool(notes), files))
    assert results[0] == (results[1][0], False, results[1][2])
    assert results[1][1]


def test_view_takes_a_file_as_text_as_it_did(run, text, tmp_path):
    """Unless --text is not a file, since it is now the text itself."""
    common = ("--model", "tiny-olmoe", "--model-args", "rule=topk", "--device", "cpu")
    written = []
    for option in ("--text-file", "--text"):
        page = tmp_path / f"{option}.html"
        words = ("view", *common, option, text, "--limit", 1, "--max-tokens", 8, "--output", page)
        code, _, err = run(*words)
        assert code == 0, err
        assert ("use --text-file" in err) == (option == "--text")
        written.append(page.read_bytes())
    assert written[0] == written[1]


def test_a_value_that_is_called_like_an_option_stays(run, tmp_path):
    """Words after -- are not options."""
    code, _, err = run("policy", "show", "--", "--force")
    assert code == 1
    assert "There is no policy --force" in err
