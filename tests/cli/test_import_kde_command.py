"""The command import-kde, on the real tables and on hostile ones."""

from __future__ import annotations

import pickle

from lm_eval_bh import NullModel


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

        return os.system, ("touch executed",)


def test_a_pickle_that_would_run_a_command_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / "distribution_model_layer_0.pkl").write_bytes(pickle.dumps(Hostile()))
    code, _, err = run("import-kde", tmp_path / "hostile", "--output", tmp_path / "x.safetensors")
    assert code == 1
    assert "system" in err
    assert not (tmp_path / "executed").exists()
    assert not list(tmp_path.glob("*x.safetensors*"))
