"""Computes the numbers of a league's row from its documents' sums, so anyone can check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from lm_eval_bh.policies.cost import EXPERTS
from lm_eval_bh.policies.document_losses import Floats
from lm_eval_bh.policies.fidelity import Fidelity
from lm_eval_bh.policies.paired_differences import Ladder, PairedBootstrap

SUMS = ("losses", "divergences", "changed")


class Standings:
    """Compares rows with the unchanged model, and with controls at the same cost.

    Parameters
    ----------
    tokens : list of int
        Scored tokens of each document.
    native : mapping
        The unchanged model's sums, with the ``losses`` of each document.
    controls : mapping of name to mapping of whole numbers to mapping
        For ``topk``, and for ``oea`` at equal distinct experts, the sums at several numbers of
        experts: ``losses``, ``divergences``, ``changed`` of each document, and the cost.
    cost : str
        Field of the cost: ``mean_experts`` or ``distinct_experts``.
    """

    def __init__(
        self,
        tokens: list[int],
        native: Mapping[str, list[float]],
        controls: Mapping[str, Mapping[Any, Mapping[str, Any]]],
        cost: str,
    ) -> None:
        self._tokens = np.array(tokens, dtype=float)
        self._bootstrap = PairedBootstrap(self._tokens)
        self._native = np.array(native["losses"])
        self._cost = cost
        self._controls = {
            name: {
                part: Ladder({sums[cost]: np.array(sums[part]) for sums in rungs.values()})
                for part in SUMS
            }
            for name, rungs in controls.items()
        }

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the comparisons of a measured row.

        Parameters
        ----------
        row : mapping
            Its cost, and the sums of its documents.

        Returns
        -------
        dict
            ``from_native`` and ``from_static``
            (:class:`~lm_eval_bh.policies.paired_differences.Difference`), ``fidelity``
            (:class:`~lm_eval_bh.policies.fidelity.Fidelity`) and ``kl_from_static`` (difference,
            low, high; nats per token), as plain values; at equal distinct experts ``from_oea`` too.
        """
        losses, divergences, changed = (np.array(row[part], dtype=float) for part in SUMS)
        mean = row[self._cost]
        kl = self._bootstrap.difference_of_means(divergences, self._at("divergences", mean))
        oea = {"from_oea": self._at("losses", mean, "oea")} if "oea" in self._controls else {}
        return {
            "from_native": asdict(self._bootstrap.compare(losses, self._native)),
            "from_static": asdict(self._bootstrap.compare(losses, self._at("losses", mean))),
            "fidelity": asdict(Fidelity.of(divergences, changed, self._tokens)),
            "kl_from_static": dict(zip(("difference", "low", "high"), kl, strict=True)),
            **{name: asdict(self._bootstrap.compare(losses, of)) for name, of in oea.items()},
        }

    def static_perplexities(self) -> dict[str, float]:
        """Return the perplexities of static top-k by cost."""
        rungs = self._controls["topk"]["losses"].rungs
        return {f"{k:g}": self._bootstrap.perplexity(losses) for k, losses in rungs.items()}

    def _at(self, part: str, mean: float, control: str = "topk") -> Floats:
        ladder = self._controls[control][part]
        return ladder.at(mean) if self._cost == EXPERTS.measured else ladder.within(mean)
