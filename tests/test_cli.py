"""The command lm-eval-bh, run in this process through its own entry point."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

from lm_eval_bh import NullModel
from lm_eval_bh.resources import shipped, tiny_olmoe


def test_calibrate_fits_checks_and_writes_a_null_model(run, tmp_path):
    text = tmp_path / "text.txt"
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text().splitlines()
    pages = [json.loads(line)["page"] for line in lines]
    text.write_text("\n\n".join(page.replace("\n", " ") for page in pages))
    output = tmp_path / "null.safetensors"
    code, out, _ = run(
        "calibrate",
        "--pretrained",
        "tiny-olmoe",
        "--text",
        text,
        "--tokens",
        2048,
        "--length",
        128,
        "--output",
        output,
    )
    assert code == 0
    null = NullModel.load(output)
    assert (null.num_layers, null.header.num_experts, null.header.tokens) == (4, 64, 2048)
    assert null.header.model == "tiny-olmoe"
    assert null.header.text == "text.txt"
    assert (
        null.header.fingerprint
        == NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors").header.fingerprint
    )
    assert "KS distance" in out
    assert "held-out tokens" in out


@pytest.fixture
def text(tmp_path):
    """Return a text file with some of the demo articles."""
    path = tmp_path / "text.txt"
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text().splitlines()[:12]
    path.write_text("\n\n".join(json.loads(line)["page"].replace("\n", " ") for line in lines))
    return path


def test_calibrate_measures_contributions_and_draws_its_health(run, text, tmp_path):
    output, figure = tmp_path / "null.safetensors", tmp_path / "health.png"
    code, out, _ = run(
        *("calibrate", "--pretrained", "tiny-olmoe", "--text", text, "--tokens", 1024),
        *("--length", 128, "--statistic", "contribution", "--null", "expert", "--trim", 2),
        *("--output", output, "--figure", figure),
    )
    assert code == 0
    null = NullModel.load(output)
    assert (null.header.statistic, null.header.null_scope) == ("contribution", "expert")
    assert null.header.trim == 2
    assert [layer["layer"] for layer in null.header.health] == [0, 1, 2, 3]
    assert all(0 < layer["ks_distance"] < 1 for layer in null.header.health)
    assert null.norms.shape == (4, 64)
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(figure) in out.replace("\n", "")


def test_calibrate_on_a_text_that_leaves_nothing_to_check_on(run, text, tmp_path):
    output = tmp_path / "null.safetensors"
    code, out, _ = run(
        "calibrate", "--pretrained", "tiny-olmoe", "--text", text, "--output", output
    )
    assert code == 0
    assert "none were left to check on" in " ".join(out.split())
    assert NullModel.load(output).header.health is None


def test_analyze_prints_a_row_for_every_configuration(run, text, tmp_path):
    code, out, _ = run(
        *("analyze", "--pretrained", "tiny-olmoe", "--text", text, "--tokens", 512),
        *("--rules", "topk,bh,top_p", "--alphas", "0.3,0.6", "--max-k", "8,16"),
        *("--output", tmp_path / "grid.json"),
    )
    assert code == 0
    content = json.loads((tmp_path / "grid.json").read_text())
    assert content["tokens"] == 512
    rows = content["rows"]
    assert [row["config"]["rule"] for row in rows] == ["topk"] * 2 + ["bh"] * 4 + ["top_p"] * 4
    assert rows[0]["mean_experts"] == 8
    assert rows[0]["overlap"] == 1
    assert rows[2]["mean_experts"] < rows[3]["mean_experts"] < rows[5]["mean_experts"]
    for row in rows:
        assert f"{row['mean_experts']:.2f}" in out
    assert "The model ran as it is" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("analyze", "--alphas", "0.3;0.4"), "is no list of numbers"),
        (("analyze", "--rules", "bhh"), "did you mean 'bh'"),
        (("analyze", "--max-k", "65"), "more than the model's 64 experts"),
        (("analyze", "--rules", ""), "The grid is empty"),
        (("analyze", "--max-k", ","), "The grid is empty"),
        (("analyze", "--device", "abacus"), "device='abacus' cannot be used"),
        (
            ("calibrate", "--statistic", "norm"),
            "statistic must be logit or contribution: found 'norm'",
        ),
        (("calibrate", "--figure", "health.foo"), "name a file that ends in png, pdf, svg"),
        (("calibrate", "--trim", "40"), "from 0 to 31 with 64 experts"),
    ],
)
def test_bad_arguments_of_calibrate_and_analyze_are_one_sentence(run, text, arguments, sentence):
    code, _, errors = run(*arguments, "--pretrained", "tiny-olmoe", "--text", text)
    assert code == 1
    assert sentence in errors
    assert "Traceback" not in errors


def test_import_kde_converts_the_real_tables(run, shared, tmp_path):
    code, out, _ = run(
        "import-kde",
        shared / "olmoe_kde",
        "--output",
        tmp_path / "olmoe.safetensors",
        "--model",
        "OLMoE",
    )
    assert (code, out.startswith("16 layers written")) == (0, True)
    null = NullModel.load(tmp_path / "olmoe.safetensors")
    expected = NullModel.from_pickles(shared / "olmoe_kde")
    assert all((null.cdf(layer)[1] == expected.cdf(layer)[1]).all() for layer in range(16))


class Hostile:
    """A pickle that would run a command."""

    def __reduce__(self):
        import os

        return os.system, ("echo executed",)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("calibrate", "--pretrained", "no/such-model"), "tiny-olmoe, which ships and needs none"),
        (("calibrate", "--pretrained", "tiny-olmoe", "--text", "{tmp}/none.txt"), "cannot be read"),
        (("calibrate", "--pretrained", "tiny-olmoe", "--dtype", "float33"), "no dtype of torch"),
        (("import-kde", "{tmp}/nowhere", "--output", "{tmp}/x.safetensors"), "nowhere"),
        (("import-kde", "{tmp}/hostile", "--output", "{tmp}/x.safetensors"), "system"),
        (("path", "olmoe"), "ask for tiny-olmoe, tasks or kde_models"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(run, tmp_path, arguments, sentence):
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / "distribution_model_layer_0.pkl").write_bytes(pickle.dumps(Hostile()))
    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate on. " * 50)
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if arguments[0] == "calibrate":
        arguments += ["--output", str(tmp_path / "x.safetensors")]
        if "--text" not in arguments:
            arguments += ["--text", str(text)]
    code, out, err = run(*arguments)
    assert code == 1
    assert sentence in err
    assert err.startswith("lm-eval-bh: error: ")
    assert len(err.strip().splitlines()) == 1
    assert "executed" not in out
    assert not list(tmp_path.glob("x.safetensors*"))


def test_path_tells_where_the_demo_model_lies(run):
    assert run("path")[1].strip() == str(tiny_olmoe())
    assert run("path", "tasks")[1].strip() == str(shipped("tasks"))


def test_importing_the_package_and_asking_for_help_need_no_torch():
    code = "import sys, lm_eval_bh, lm_eval_bh.cli; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
