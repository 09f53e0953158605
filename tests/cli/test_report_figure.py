"""The command report --figure, on folders of lm-eval and on written tables."""

from __future__ import annotations

LAMBADA = "bh_lambada"


def test_it_draws_a_panel_of_folders_or_of_a_table(run, runs, tmp_path):
    run("aggregate", runs, "--no-figure", "--resamples", 99)
    pictures = []
    for number, source in enumerate((runs, runs / "bh_routing_results.csv")):
        path = tmp_path / f"{number}.svg"
        code, out, _ = run("report", source, "--panel", "layers", "--output", path)
        assert (code, str(path) in out.replace("\n", "")) == (0, True)
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]
    assert run("report", runs, "--panel", "accuracy", "--tasks", LAMBADA)[0] == 0
    assert (runs / "visualizations" / "accuracy.png").is_file()
