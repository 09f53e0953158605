"""Measure a table in docs/results: a model under top-k and under Benjamini-Hochberg routing.

    python scripts/table_tiny_olmoe.py --limit 200

The tasks' data sets come from the Hugging Face cache or hub. The table also has static top-k rows,
since an adaptive rule has to be compared with a fixed number of experts of the same mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import lm_eval
import typer
from lm_eval.tasks import TaskManager

from lm_eval_bh.files import replacing
from lm_eval_bh.resources import shipped

TASKS = ["bh_wikitext", "bh_lambada", "bh_hellaswag"]
HEADER = (
    "| routing | mean experts | WikiText-2 byte perplexity | LAMBADA perplexity | LAMBADA accuracy "
    "| HellaSwag accuracy (normalised) |\n|---|---:|---:|---:|---:|---:|"
)


def row(label: str, results: dict[str, Any]) -> str:
    """Return one line of the Markdown table."""
    wikitext, lambada, hellaswag = (results["results"][task] for task in TASKS)
    cells = [
        label,
        f"{results['config']['bh']['summary']['mean_experts_per_token']:.2f}",
        f"{wikitext['byte_perplexity,none']:.3f}",
        f"{lambada['perplexity,none']:,.0f} ± {lambada['perplexity_stderr,none']:,.0f}",
        f"{100 * lambada['acc,none']:.1f} ± {100 * lambada['acc_stderr,none']:.1f} %",
        f"{100 * hellaswag['acc_norm,none']:.1f} ± {100 * hellaswag['acc_norm_stderr,none']:.1f} %",
    ]
    return f"| {' | '.join(cells)} |"


def main(
    pretrained: str = "tiny-olmoe",
    limit: Annotated[int, typer.Option(help="Documents per task.")] = 200,
    batch_size: int = 8,
    top_k: Annotated[str, typer.Option(help="Static baselines.")] = "8,4,3,2",
    alphas: str = "0.3,0.4,0.5,0.6",
    output: Annotated[Path | None, typer.Option(help="JSON file for all results.")] = None,
) -> None:
    """Evaluate every configuration on the three data sets and print the table."""
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    configurations = [(f"top-{k}", f"rule=topk,max_k={k}") for k in top_k.split(",")]
    configurations += [(f"BH, alpha {a}, max_k 8", f"alpha={a},max_k=8") for a in alphas.split(",")]
    everything = {}
    lines = []
    for label, arguments in configurations:
        results = lm_eval.simple_evaluate(
            model="hf-bh",
            model_args=f"pretrained={pretrained},{arguments}",
            tasks=TASKS,
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
        )
        everything[label] = {name: results[name] for name in ("results", "config")}
        lines.append(row(label, results))
    print(HEADER, *lines, sep="\n")
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(everything, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
