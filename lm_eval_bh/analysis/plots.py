"""Stand-in until the nine panels are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd


def create_comprehensive_visualization(
    results_df: pd.DataFrame, output_path: Path | str | None = None, *, layers: Any = None
) -> Any:
    """Draw experts against perplexity, nine times."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 12), layout="constrained")
    for axes in figure.subplots(3, 3).flat:
        axes.scatter(results_df["mean_experts_model"], results_df["byte_perplexity"])
        axes.set(xlabel="mean experts", ylabel="byte perplexity")
    if output_path is not None:
        Path(output_path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output_path, dpi=100)
    return figure
