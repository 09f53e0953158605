"""Clusters of documents with similar expert use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lm_eval_bh.analysis.patterns.log_counts import Counts
from lm_eval_bh.analysis.patterns.log_reader import Ints

MOST = 8  # most clusters tried
ENOUGH = 10  # minimum number of documents
MANY = 4000  # mini-batches are used from this many documents
SCORED = 2000  # documents for the silhouette
TYPICAL = 3  # experts named per cluster

Usage = NDArray[np.float32]


@dataclass(frozen=True)
class Clusters:
    """A clustering.

    Attributes
    ----------
    labels : int64 [documents]
        The cluster of each document, the largest cluster being 0.
    silhouettes : dict of int to float
        Silhouette of each number of clusters tried, -1 to 1; the highest is used.
    agreement : float
        Adjusted mutual information of cluster and task: 0 is chance, 1 identical.
    places : float64 [documents, 2]
        The first two principal components, to draw.
    """

    labels: Ints
    silhouettes: dict[int, float]
    agreement: float
    places: NDArray[np.float64]

    @property
    def number(self) -> int:
        """Number of clusters."""
        return int(self.labels.max()) + 1

    @property
    def silhouette(self) -> float:
        """Silhouette of the clustering."""
        return max(self.silhouettes.values())

    @property
    def remark(self) -> str:
        """Strength of the structure, by the usual bounds."""
        if self.silhouette <= 0.25:
            return "no substantial structure"
        return "weak structure" if self.silhouette <= 0.5 else "reasonable structure"


def cluster(usage: Usage, tasks: pd.Series, seed: int = 0) -> Clusters | None:
    """Cluster documents by their use of the experts: k-means, k chosen by the silhouette.

    Parameters
    ----------
    usage : float32 [documents, layers * experts]
        Share of a document's tokens routed to each expert.
    tasks : Series [documents]
        The task of each document; not used for clustering.
    seed : int
        Seed of k-means and of the silhouette's documents.

    Returns
    -------
    Clusters or None
        None with fewer than 10 documents, or if all are alike.

    References
    ----------
    Rousseeuw 1987, J. Comput. Appl. Math. 20:53; the bounds of the remark: Kaufman and Rousseeuw
    1990, Finding Groups in Data.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import adjusted_mutual_info_score, silhouette_score

    different = len(np.unique(usage, axis=0))
    if len(usage) < ENOUGH or different < 3:
        return None
    method = KMeans if len(usage) < MANY else MiniBatchKMeans
    tried: dict[int, Ints] = {}
    silhouettes: dict[int, float] = {}
    for k in range(2, min(MOST, different - 1) + 1):
        labels = method(k, n_init=4, random_state=seed).fit_predict(usage)
        if len(np.unique(labels)) == k:
            tried[k] = _by_size(labels)
            silhouettes[k] = float(
                silhouette_score(
                    usage, labels, sample_size=min(SCORED, len(usage)), random_state=seed
                )
            )
    labels = tried[max(silhouettes, key=lambda k: silhouettes[k])]
    return Clusters(
        labels,
        silhouettes,
        float(adjusted_mutual_info_score(tasks, labels)),
        PCA(2, random_state=seed).fit_transform(usage).astype(np.float64),
    )


def _by_size(labels: Ints) -> Ints:
    """Return labels that number the clusters from the largest to the smallest."""
    order = np.argsort(-np.bincount(labels), kind="stable")
    return np.argsort(order)[labels]


def cluster_table(
    clusters: Clusters | None, counts: Counts, documents: pd.DataFrame, usage: Usage
) -> pd.DataFrame:
    """Return one row per cluster: its documents by task, and the experts it uses more."""
    rows = []
    labels = clusters.labels if clusters else np.array([], dtype=np.int64)
    for number in np.unique(labels):
        inside = labels == number
        some = documents[inside]
        more = usage[inside].mean(0) - usage.mean(0)
        typical = [
            f"layer {counts.layers[i // counts.experts]} expert {i % counts.experts} "
            f"(+{100 * more[i]:.0f} %)"
            for i in np.argsort(-more)[:TYPICAL]
        ]
        rows.append(
            {
                "cluster": number,
                "documents": len(some),
                **{task: int((some["task"] == task).sum()) for task in counts.tasks},
                "mean_experts": float(np.average(some["mean_experts"], weights=some["tokens"])),
                "mean_loss": float(some["loss"].mean()),
                "uses_more": ", ".join(typical),
            }
        )
    return pd.DataFrame(rows)
