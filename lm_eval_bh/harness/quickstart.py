"""The last step of scripts/quickstart.sh: runs of lm-eval side by side, as a table and a figure.

``python -m lm_eval_bh.harness.quickstart runs/quickstart/top8 runs/quickstart/bh_a040``
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lm_eval_bh.errors import BHError, DataError
from lm_eval_bh.files import replacing

# The metrics worth a panel, and which way is better.
PANELS = {
    ("bh_demo_wikitext", "byte_perplexity"): "lower is better",
    ("bh_demo_lambada", "perplexity"): "lower is better",
    ("bh_demo_hellaswag", "acc"): "higher is better",
    ("bh_demo_hellaswag", "acc_norm"): "higher is better",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: told apart by everybody
MARKERS = ("o", "s", "^", "D")
HATCHES = ("", "//", "..", "xx")


@dataclass
class Run:
    """What one run of lm-eval with ``--model hf-bh`` left behind."""

    label: str
    file: Path
    metrics: dict[tuple[str, str], tuple[float, float | None]]  # (task, metric) -> value, error
    mean_experts: float
    layers: dict[int, float]  # layer -> mean experts

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read the newest ``results_*.json`` in or below a folder.

        Raises
        ------
        DataError
            If there is none, or if it is not of an evaluation with ``hf-bh``.
        """
        files = sorted(folder.rglob("results_*.json"), key=lambda file: file.name)
        if not files:
            raise DataError(
                f"There is no results_*.json below {folder}: "
                f"run lm_eval with --output_path {folder}."
            )
        file = files[-1]  # the names carry the time
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            summary = content["config"]["bh"]["summary"]
            return cls(
                label=folder.name,
                file=file,
                metrics=_metrics(content["results"]),
                mean_experts=float(summary["mean_experts_per_token"]),
                layers={
                    int(layer["layer"]): float(layer["mean_experts"]) for layer in summary["layers"]
                },
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} is not the result of an evaluation with --model hf-bh ({error!r}): "
                f"run the evaluation again."
            ) from error


def _metrics(results: dict[str, Any]) -> dict[tuple[str, str], tuple[float, float | None]]:
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if not filter_name or name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr,{filter_name}")
            # lm-eval writes "N/A" where it has no standard error.
            found[task, name] = (
                float(value),
                float(error) if isinstance(error, (int, float)) else None,
            )
    return found


def table(runs: list[Run]) -> Table:
    """Return the runs as columns of a table, with their metrics and their experts as rows."""
    drawn = Table(title="tiny-olmoe on the demo tasks")
    drawn.add_column("task")
    drawn.add_column("metric")
    for run in runs:
        drawn.add_column(run.label, justify="right", no_wrap=True)
    task_before = None
    for task, name in runs[0].metrics:
        if task_before not in (None, task):
            drawn.add_section()
        cells = [_cell(*run.metrics.get((task, name), (None,))) for run in runs]
        drawn.add_row("" if task == task_before else task, name, *cells)
        task_before = task
    drawn.add_section()
    drawn.add_row("experts per token", "mean", *(_cell(run.mean_experts) for run in runs))
    for layer in _layers(runs):
        drawn.add_row("", f"  layer {layer}", *(_cell(run.layers.get(layer)) for run in runs))
    return drawn


def _cell(value: float | None, error: float | None = None) -> str:
    if value is None:
        return ""
    digits = 0 if abs(value) >= 1000 else 3
    return f"{value:,.{digits}f}" + ("" if error is None else f" ± {error:,.{digits}f}")


def _layers(runs: list[Run]) -> list[int]:
    return sorted({layer for run in runs for layer in run.layers})


def draw(runs: list[Run], path: Path) -> None:
    """Draw mean experts per layer and the quality metrics of the runs, side by side, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no display
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplot_mosaic([["layers", "layers", 0, 1], ["layers", "layers", 2, 3]])
    layers = axes["layers"]
    for index, run in enumerate(runs):
        layers.plot(
            list(run.layers.keys()),
            list(run.layers.values()),
            marker=MARKERS[index],
            color=COLOURS[index],
            linewidth=2,
            label=run.label,
        )
    layers.set(
        title="Experts that serve a token",
        xlabel="layer",
        ylabel="mean experts per token",
        xticks=_layers(runs),
    )
    layers.set_ylim(bottom=0)
    layers.grid(alpha=0.3)
    layers.legend()

    for place, (key, better) in enumerate(PANELS.items()):
        panel = axes[place]
        for index, run in enumerate(runs):
            value, error = run.metrics.get(key, (float("nan"), None))
            panel.bar(
                index,
                value,
                yerr=error,
                capsize=4,
                color=COLOURS[index],
                hatch=HATCHES[index],
                edgecolor="white",
            )
        task, name = key
        panel.set_title(f"{task.removeprefix('bh_demo_')}: {name}\n({better})", fontsize=10)
        panel.set_xticks(range(len(runs)), [run.label for run in runs])
        panel.set_ylabel(name.replace("_", " "), fontsize=9)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)

    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    plt.close(figure)


def main(folders: list[str]) -> int:
    """Print the table of the runs in these folders, draw the figure, say where everything is."""
    if not 1 <= len(folders) <= len(COLOURS):
        print(
            f"Give one to {len(COLOURS)} folders that lm_eval wrote to, not {len(folders)}.",
            file=sys.stderr,
        )
        return 2
    paths = [Path(folder) for folder in folders]
    try:
        runs = [Run.read(path) for path in paths]
    except BHError as error:
        print(error, file=sys.stderr)
        return 1
    figure = paths[0].parent / "quickstart.png"
    draw(runs, figure)
    console = Console()
    console.print()
    console.print(table(runs))
    for run in runs:
        console.print(
            f"Results of {run.label}: {run.file.resolve()}", soft_wrap=True, highlight=False
        )
    console.print(f"Figure: {figure.resolve()}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
