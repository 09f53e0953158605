"""The table and the figure at the end of the quick start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm_eval_bh.harness import quickstart


def result(byte_perplexity: float, experts: float) -> dict:
    """Return what matters of a results file of lm-eval."""
    return {
        "results": {
            "bh_demo_wikitext": {
                "alias": "bh_demo_wikitext",
                "byte_perplexity,none": byte_perplexity,
                "byte_perplexity_stderr,none": "N/A",
            },
            "bh_demo_lambada": {"perplexity,none": 12345.6, "perplexity_stderr,none": 99.4},
        },
        "config": {
            "bh": {
                "summary": {
                    "mean_experts_per_token": experts,
                    "layers": [{"layer": i, "mean_experts": experts} for i in range(3)],
                }
            }
        },
    }


def write(folder: Path, content: object, time: str = "2026-01-01T00-00-00.0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{time}.json").write_text(json.dumps(content))
    return folder


def test_table_and_figure(tmp_path, capsys):
    top8 = write(tmp_path / "top8" / "tiny-olmoe", result(4.5, 8.0)).parent
    bh = write(tmp_path / "bh" / "tiny-olmoe", result(9.9, 9.0)).parent
    write(bh / "tiny-olmoe", result(4.75, 2.25), time="2026-01-02T00-00-00.0")  # the newest counts
    assert quickstart.main([str(top8), str(bh)]) == 0
    shown = capsys.readouterr().out
    for text in ("top8", "4.500", "4.750", "12,346 ± 99", "8.000", "2.250", "layer 2"):
        assert text in shown
    assert "9.9" not in shown
    figure = tmp_path / "quickstart.png"
    assert str(figure) in shown
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bh", "quickstart.png", "top8"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no results_*.json below"),
        ({"results": {}, "config": {}}, "is not the result of an evaluation with --model hf-bh"),
        ([], "is not the result of an evaluation with --model hf-bh"),
    ],
)
def test_foreign_folders(tmp_path, capsys, content, message):
    folder = tmp_path / "run"
    if content is not None:
        write(folder, content)
    assert quickstart.main([str(folder)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "quickstart.png").exists()


def test_no_folders(capsys):
    assert quickstart.main([]) == 2
    assert "Give one to 4 folders" in capsys.readouterr().err
