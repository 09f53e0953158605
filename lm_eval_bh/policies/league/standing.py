"""What a row of the league says, made of its documents' sums alone: whoever has these can check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from lm_eval_bh.policies.document_losses import Floats
from lm_eval_bh.policies.fidelity import Fidelity
from lm_eval_bh.policies.paired_differences import Ladder, PairedBootstrap

SUMS = ("losses", "divergences", "changed")


class Standings:
    """Puts rows beside the model as it is, and beside static top-k at their own means.

    Parameters
    ----------
    tokens : list of int
        Scored tokens of each document.
    native : mapping
        The sums of the model as it is, ``losses`` of each document.
    static : mapping of number of experts to mapping
        The sums of static top-k: ``losses``, ``divergences``, ``changed`` of each document.
    """

    def __init__(
        self,
        tokens: list[int],
        native: Mapping[str, list[float]],
        static: Mapping[Any, Mapping[str, list[float]]],
    ) -> None:
        self._tokens = np.array(tokens, dtype=float)
        self._bootstrap = PairedBootstrap(self._tokens)
        self._native = np.array(native["losses"])
        self._static = {
            part: Ladder({float(k): np.array(sums[part]) for k, sums in static.items()})
            for part in SUMS
        }

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a measured row says.

        Parameters
        ----------
        row : mapping
            Its ``mean_experts``, and the sums of its documents.

        Returns
        -------
        dict
            ``from_native`` and ``from_static``
            (:class:`~lm_eval_bh.policies.paired_differences.Difference`), ``fidelity``
            (:class:`~lm_eval_bh.policies.fidelity.Fidelity`) and ``kl_from_static`` (difference,
            low, high; nats a token), as plain values.
        """
        losses, divergences, changed = (np.array(row[part], dtype=float) for part in SUMS)
        mean = row["mean_experts"]
        kl = self._bootstrap.difference_of_means(divergences, self._at("divergences", mean))
        return {
            "from_native": asdict(self._bootstrap.compare(losses, self._native)),
            "from_static": asdict(self._bootstrap.compare(losses, self._at("losses", mean))),
            "fidelity": asdict(Fidelity.of(divergences, changed, self._tokens)),
            "kl_from_static": dict(zip(("difference", "low", "high"), kl, strict=True)),
        }

    def static_perplexities(self) -> dict[str, float]:
        """Return the perplexity of static top-k by its number of experts."""
        rungs = self._static["losses"].rungs
        return {f"{k:g}": self._bootstrap.perplexity(losses) for k, losses in rungs.items()}

    def _at(self, part: str, mean: float) -> Floats:
        return self._static[part].at(mean)
