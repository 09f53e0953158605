"""The program around the subcommands: start-up, usage, errors, names with markup, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import typer.main

from lm_eval_bh.cli.app import app

COMMAND = [sys.executable, "-m", "lm_eval_bh"]


def test_importing_the_package_and_asking_for_help_need_no_torch():
    code = (
        "import sys, lm_eval_bh, lm_eval_bh.cli\n"
        "sys.argv = ['lm-eval-bh', '--help']\n"
        "try:\n    lm_eval_bh.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print({'torch', 'pandas', 'numpy', 'transformers', 'lm_eval'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().splitlines()[-1] == "set()"


def test_every_option_is_explained():
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params if name != "lm-eval" else ():
            assert parameter.help, f"{name} {parameter.name}"


def test_without_arguments_the_help_is_shown(run):
    code, out, err = run()
    assert code == 2
    assert "Usage: lm-eval-bh [OPTIONS] COMMAND" in out + err


def test_lm_eval_gets_all_that_follows_its_name(monkeypatch, run):
    import lm_eval.__main__

    seen = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.append(sys.argv))
    assert run("lm-eval", "--help", "--model", "hf-bh")[0] == 0
    assert seen == [["lm_eval", "--help", "--model", "hf-bh"]]


def test_names_are_no_markup(run, runs, write, tmp_path):
    """Neither in tables nor in lines, and where a name is not UTF-8 it is shown escaped."""
    write("odd", alpha=0.5, pretrained="x/[/b]")
    folder = tmp_path / "a[red]b:smile:[/nothing]"
    code, out, err = run("aggregate", runs, "--keep-groups", "--no-figure", "--output-dir", folder)
    assert code == 0, err
    assert f"Written to {folder}/bh_routing_results.csv" in out
    folder = os.fsdecode(bytes(tmp_path) + b"/caf\xe9\x1b[31m")
    code, out, err = run("aggregate", runs, "--keep-groups", "--no-figure", "--output-dir", folder)
    assert code == 0, err
    assert "/caf\\udce9\\x1b[31m/bh_routing_results.csv" in out


def test_a_title_with_markup_is_shown_as_it_is(run, tmp_path, tiny_model_folder, text):
    odd = tmp_path / "x[b]y[red]"
    odd.symlink_to(tiny_model_folder)
    arguments = (
        "--text-file",
        text,
        "--tokens",
        64,
        "--window",
        64,
        "--rules",
        "topk",
        "--max-k",
        8,
    )
    code, out, err = run("tune", "--preview", "--model", odd, *arguments)
    assert code == 0, err
    assert "x[b]y[red]" in "".join(out.split())


def test_an_error_after_loading_is_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    arguments = [
        "tune",
        "--preview",
        "--model",
        "tiny-olmoe",
        "--text-file",
        tmp_path / "empty.txt",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("lm-eval-bh: error: ")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_leaves_no_half_written_file(commands, tmp_path):
    """While a model runs over more text than it can read meanwhile."""
    text, output = tmp_path / "text.txt", tmp_path / "x.safetensors"
    text.write_text("The tide is high , and the boats lie in the harbour .\n\n" * 40_000)
    arguments = ["calibrate", "--model", "tiny-olmoe", "--text-file", text, "--output", output]
    arguments += ["--tokens", 2_000_000]
    process = subprocess.Popen(
        [commands / "lm-eval-bh", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        time.sleep(4)  # its imports are done
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()  # nothing, if it has ended
    assert (process.returncode, out) == (130, "")
    assert err == (
        "lm-eval-bh: interrupted: no file is half-written; "
        "run the same command again to start over.\n"
    )
    assert list(tmp_path.iterdir()) == [text]
