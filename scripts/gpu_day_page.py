"""Summarises a folder of scripts/gpu_day.sh in gpu_day.json and gpu_day.md.

python scripts/gpu_day_page.py runs/gpu_day --device cuda
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lm_eval_bh.analysis.show.report_page import escape_markdown, fenced
from lm_eval_bh.analysis.show.report_tables import speed_table
from lm_eval_bh.analysis.table.speed_phase import conditions
from lm_eval_bh.files import write_text
from lm_eval_bh.schema import read_speed

TAIL = 15  # lines shown of a failed step's log


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Return the steps in order, with exit code None for skipped ones."""
    found = []
    for line in (folder / "steps.tsv").read_text(encoding="utf-8").splitlines():
        name, code, seconds, command = line.split("\t")
        log = folder / f"{name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if code else []
        found.append(
            {
                "name": name,
                "exit_code": int(code) if code else None,
                "seconds": int(seconds) if seconds else None,
                "command": command,
                "last_lines": lines[-TAIL:],
            }
        )
    return found


def commit() -> str:
    """Return the commit of the checkout, and whether the checkout has changes."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def row(*cells: Any) -> str:
    return "| " + " | ".join(escape_markdown(str(cell)) for cell in cells) + " |"


def table(title: list[str], rows: list[list[Any]]) -> list[str]:
    return [row(*title), row(*["---"] * len(title)), *(row(*cells) for cells in rows), ""]


def of_benchmark(numbers: dict[str, Any]) -> list[str]:
    """Return the medians of bench_routing.py, and its targets."""
    lines = [
        f"{numbers['dtype']} on {numbers['device']}, {numbers['threads']} threads; matrix product "
        f"{numbers['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s.",
        "",
    ]
    results = [
        [
            r["part"],
            r["workload"],
            r["row"],
            f"{r['mean_k']:.2f}",
            f"{1e3 * r['median_seconds']:.3g}",
            f"{r['times_floor']:.1f}",
        ]
        for r in numbers["results"]
    ]
    lines += table(["part", "workload", "row", "mean k", "ms", "times the floor"], results)
    checks = [
        [
            c["what"],
            f"{c['ratio']:.3f}",
            "" if c["limit"] is None else c["limit"],
            {True: "yes", False: "NO", None: ""}[c["reached"]],
        ]
        for c in numbers["checks"]
        if c["limit"] is not None or c["what"].startswith("hook of")
    ]
    return lines + (table(["ratio of", "measured", "at most", "reached"], checks) if checks else [])


def of_steps(numbers: dict[str, Any]) -> list[str]:
    """Return the ratios of bench_steps.py, the line through its times, and the decisions' cost."""
    line = numbers["line"]
    lines = [
        f"{numbers['dtype']} on {numbers['device']}, a step of {numbers['rows']} rows: "
        f"{1e3 * line['seconds_per_expert_read']:.3g} ms for each expert read, "
        f"{1e6 * line['seconds_per_expert_applied']:.3g} us for each expert of a token, R² "
        f"{line['r_squared']:.3f}.",
        "",
    ]
    cells = [
        [*cell.split("/"), f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"]
        for cell, (ratio, low, high) in numbers["cells"].items()
    ]
    lines += table(["distinct experts", "experts per token", "time", "95 % interval"], cells)
    shares = [[name, f"{100 * share:.2f}"] for name, share in numbers["decision_share"].items()]
    return lines + table(["method of a step", "% of the layer's time"], shares)


def main(
    folder: Annotated[Path, typer.Argument(help="Where gpu_day.sh has written.")],
    device: Annotated[str, typer.Option(help="That it ran on.")] = "cuda",
) -> None:
    """Write both files."""
    steps = steps_of(folder)
    content: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "machine": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "transformers", "lm_eval")},
        "steps": steps,
    }
    failed = [step["name"] for step in steps if step["exit_code"]]
    lines = [
        "# GPU day",
        "",
        f"{content['date']}, commit {content['commit']}, on {content['device']}, "
        + ", ".join(f"{name} {number}" for name, number in content["versions"].items())
        + ".",
        "",
        f"**Failed: {', '.join(failed)}.**" if failed else "Every step that ran ended well.",
        "",
    ]
    how = {None: "left out", 0: "well", 124: "took too long"}
    lines += table(
        ["step", "ended", "seconds", "command"],
        [
            [
                s["name"],
                how.get(s["exit_code"], f"exit code {s['exit_code']}"),
                "" if s["seconds"] is None else s["seconds"],
                s["command"],
            ]
            for s in steps
        ],
    )
    for step in steps:
        if step["exit_code"]:
            text = fenced("\n".join(step["last_lines"])).replace("bash", "", 1)
            lines += [f"## {step['name']} failed", "", text, ""]
    for name in ("bench_routing", "full_size"):
        if (file := folder / f"{name}.json").is_file():
            content[name] = json.loads(file.read_text(encoding="utf-8"))
            lines += [f"## {name}", "", *of_benchmark(content[name])]
    if (file := folder / "bench_steps.json").is_file():
        content["bench_steps"] = json.loads(file.read_text(encoding="utf-8"))
        lines += ["## bench_steps", "", *of_steps(content["bench_steps"])]
    if (file := folder / "bh_speed.json").is_file():
        measured = read_speed(file)
        content["speed"] = measured
        shown = speed_table([measured])
        lines += ["## speed", "", conditions(measured), ""]
        lines += table(
            list(shown.columns), [[c.text for c in r.cells.values()] for r in shown.rows]
        )
    if (file := folder / "vllm_speed.json").is_file():
        content["vllm_speed"] = json.loads(file.read_text(encoding="utf-8"))
        said = (folder / "vllm_speed.log").read_text(encoding="utf-8", errors="replace")
        lines += ["## vllm_speed", "", fenced(said).replace("bash", "", 1), ""]
    write_text(folder / "gpu_day.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "gpu_day.md", "\n".join(lines).rstrip() + "\n")
    print(f"Written to {folder / 'gpu_day.json'} and {folder / 'gpu_day.md'}")


if __name__ == "__main__":
    typer.run(main)
