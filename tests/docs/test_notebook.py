"""The notebook runs, its policy wins, and it is stored with small outputs and without errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "examples" / "from_model_to_policy.ipynb"


def test_what_is_stored_is_small_and_of_one_run():
    assert FILE.stat().st_size < 60_000
    code = [c for c in json.loads(FILE.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [o.get("name", o["output_type"]) for cell in code for o in cell["outputs"]]
    assert set(kinds) == {"stdout", "execute_result", "display_data"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's libraries
def test_it_runs_and_its_policy_beats_static_top_k(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(FILE, as_version=4)
    check = "assert frame.perplexity['policy'] < frame.perplexity['top-4'] - 5\n"
    check += "assert frame.perplexity['BH 0.4'] > frame.perplexity['top-3'] + 5"
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert (tmp_path / "policy.safetensors").is_file()
