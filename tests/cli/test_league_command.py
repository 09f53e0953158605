"""``lm-eval-bh league`` writes tables, a figure and a page, resumes, and checks its files."""

from __future__ import annotations

import csv
import json

SIZES = ("--tokens", "600", "--length", "64", "--device", "cpu")


def test_it_writes_what_people_and_programs_read_and_checks_it(run, tmp_path, long_text):
    folder = tmp_path / "league"
    arguments = ("league", "--model", "tiny-olmoe", "--text", long_text, "--targets", "3,4")
    code, out, err = run(*arguments, "--methods", "topk,min_w,by", "--output-dir", folder, *SIZES)
    assert code == 0, err
    league = json.loads((folder / "league.json").read_text())
    for wanted in ("A mean of 3 experts", "A mean of 4 experts", "loses least"):
        assert wanted in out
    assert "not measured: by, mean 3: target_experts=3.0 cannot be reached" in err

    with (folder / "league.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["target"], row["method"]) for row in rows] == [
        (f"{row['target']}", row["name"]) for row in league["rows"]
    ]
    for row, full in zip(rows, league["rows"], strict=True):
        if full["failed"]:
            assert row["failed"] == full["failed"]
            assert not row["loss"]
        else:
            assert float(row["kl"]) == float(f"{full['fidelity']['kl']:.8g}")
            assert float(row["loss"]) == float(f"{full['from_native']['relative']:.8g}")
    page = (folder / "league.html").read_text(encoding="utf-8")
    table = (folder / "league.md").read_text(encoding="utf-8")
    for text in (page, table):
        assert "min_w" in text
        assert "Methods that failed" in text
    assert "https://" not in page
    assert (folder / "league.png").read_bytes().startswith(b"\x89PNG")

    code, out, err = run("league", "--check", folder / "league.json")
    assert code == 0, err
    assert "4 measured rows of tiny-olmoe" in out
    league["rows"][0]["from_native"]["perplexity"] += 1
    (folder / "other.json").write_text(json.dumps(league))
    code, _, err = run("league", "--check", folder / "other.json")
    assert code == 1
    assert "from_native.perplexity is" in err
    assert len(err.strip().splitlines()) == 1

    code, _, err = run(*arguments, "--output-dir", folder, *SIZES, "--length", "32")
    assert code == 1
    assert "other settings (length" in err
