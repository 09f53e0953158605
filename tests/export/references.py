"""A slow, plain reference of every method: one token at a time, in float64, from the formulas.

It shares no code with the package: p-values are NumPy's interpolation, multiple testing is
statsmodels' where it has the procedure.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from statsmodels.stats.multitest import multipletests

STATSMODELS = {
    "bh": "fdr_bh",
    "by": "fdr_by",
    "bonferroni": "bonferroni",
    "hochberg": "simes-hochberg",
    "fdr_tsbh": "fdr_tsbh",
}
OF_THE_FIRST = ("min_w", "p_value", "alloc_moe", "modes", "ace")


@dataclass
class Reference:
    """A method on one router.

    Attributes
    ----------
    rule, alpha, parameters
        The method, its level, and its configuration's values by name.
    native_k, rescales
        The router's own top-k, and whether it rescales weights to one.
    factors : ndarray or None
        ``[experts]``, or a predictor ``[hidden + 2, experts]``.
    nulls : list of (x, cdf)
        One per expert, or a single one; empty without a test.
    layer : int
        The layer, on which random experts depend.
    tables : dict of ndarray
        Further measured tables, ``[layers, ...]``.
    """

    rule: str
    alpha: float
    parameters: dict[str, Any]
    native_k: int
    rescales: bool
    factors: Any = None
    nulls: Any = ()
    layer: int = 0
    tables: Any = None

    def experts(self, logits: Any, hidden: Any) -> dict[int, float]:
        """Return one token's experts, the best first, and their weights."""
        z = np.asarray(logits, dtype=float)
        order = sorted(range(len(z)), key=lambda e: -z[e])  # the router's
        kept = self._kept(z, np.asarray(hidden, dtype=float), order)
        tempered = softmax(z / self.parameters["temperature"])
        native = sum(tempered[e] for e in order[: self.native_k])
        weights = {e: tempered[e] / (native if self.rescales else 1) for e in kept}
        total, mass, k2 = sum(weights.values()), self.parameters["mass"], self.parameters["k2"]
        if k2 is not None:
            first = sum(tempered[e] for e in order[:k2])
            kept_sum = sum(tempered[e] for e in kept)
            scale = native / first if self.rescales else 1  # p / sum of the first k2, as published
            factor = scale * (first / kept_sum) ** (mass or 0)
        elif mass is not None or self.parameters["fold"]:
            wanted = 1 if self.rescales else native  # the sum of the native top-k's
            factor = (wanted / total) ** (mass or 0)
        elif self.parameters["renormalize"] is True or self.rescales:
            factor = 1 / total
        else:
            factor = 1
        weights = {e: weight * factor for e, weight in weights.items()}
        if self.parameters["fold"]:
            scalars, errors = self.tables["folds"][self.layer]
            for s in set(order[: self.native_k]) - set(kept):
                t = min(kept, key=lambda e: errors[s, e])
                weights[t] += scalars[s, t] * tempered[s] / (native if self.rescales else 1)
        return weights

    def _kept(self, z: Any, hidden: Any, order: list[int]) -> list[int]:
        least, most = self.parameters["min_k"], self.parameters["max_k"]
        if self.rule == "random_k":
            return sorted(self._drawn(order, most), key=lambda e: -z[e])
        score = self._scores(z, hidden, order)
        ranked = sorted(range(len(z)), key=lambda e: -score[e])
        if self.rule in (
            "min_w",
            "p_value",
            "alloc_moe",
            "modes",
            "ace",
        ):  # others than the router's first do not compete
            ranked = [e for e in ranked if e in order[:most]]
        if self.rule == "topk":
            return ranked[:most]
        if self.nulls:
            p = np.array([self._p_value(e, score[e]) for e in range(len(z))])
            if len(self.nulls) > 1:
                ranked = sorted(ranked, key=lambda e: p[e])
            count = self._rejections(p, ranked)
        elif self.rule == "min_w":
            count = sum(math.exp(score[e]) >= self.alpha for e in ranked)
        elif self.rule in ("lexi", "alloc_moe", "modes", "ace"):
            count = self._by_tables(score, ranked)
        else:
            share = softmax(score)[ranked]
            if self.rule == "top_p":
                count = next(n for n in range(1, len(z) + 1) if share[:n].sum() >= self.alpha)
            elif self.rule == "elbow":
                chord = np.linspace(share[0], share[-1], len(z)) - share[0]
                count = int(np.argmin(share - self.alpha * chord))
            elif self.rule == "adaptive_k":
                entropy = -sum(w * math.log(w) for w in share)
                steps = self.parameters["k_values"] or f"{least}-{(least + most) // 2}-{most}"
                limits = [self.alpha + i * self.parameters["gap"] for i in range(steps.count("-"))]
                count = int(steps.split("-")[sum(entropy >= limit for limit in limits)])
            elif self.rule == "naee":
                ratios = self.tables["ratios"][self.layer]
                count = sum(share >= np.quantile(ratios, self.alpha) * share[0])
            else:
                count = sum(share >= self.alpha * share[0])
        return ranked[: min(max(count, least), most)]

    def _by_tables(self, score: Any, ranked: list[int]) -> int:
        if self.rule == "modes":
            importance = self.tables["layer_kl"]
            share = importance[self.layer] / importance.sum()
            return sum(share * math.exp(score[e]) >= self.alpha for e in ranked)
        if self.rule == "ace":
            return sum(math.exp(score[e]) >= self.alpha for e in ranked)
        costs = self.tables["perturbations" if self.rule == "lexi" else "isolated"]
        layers, native = costs.shape
        most = min(native, self.parameters["max_k"])
        every = list(itertools.product(range(self.parameters["min_k"], most + 1), repeat=layers))

        def own(total: int) -> int:
            fitting = [each for each in every if sum(each) == total] or [(most,) * layers]
            best = min(fitting, key=lambda each: sum(costs[i][n - 1] for i, n in enumerate(each)))
            return best[self.layer]

        total = math.floor(self.alpha * layers)
        k = own(total)
        if self.rule == "lexi":
            return k
        k += (self.alpha * layers - total) * (own(total + 1) - k)  # between two whole totals
        least = np.quantile(self.tables["slot_weights"][self.layer], 1 - k / native)
        return sum(score[e] >= least for e in ranked)

    def _scores(self, z: Any, hidden: Any, order: list[int]) -> Any:
        statistic = self.parameters.get("statistic", "logit")
        weights = softmax(z)
        if self.rule == "ace":
            views = [weights * self.tables[name][self.layer] for name in ("spectra", "responses")]
            native = order[: self.native_k]
            share = np.maximum(*(view / view[native].sum() for view in views))
            share[order[0]] = 1  # the first is never skipped
            return np.log(share)
        if statistic == "logit" and self.rule not in ("min_w", "alloc_moe", "modes"):
            return z
        if self.parameters.get("of") == "own" and self.rescales:
            weights = weights / sum(weights[e] for e in order[: self.native_k])
        if statistic in ("logit", "weight"):
            return np.log(weights)
        if statistic == "predicted":
            coefficients, intercept, mean = self.factors[:-2], self.factors[-2], self.factors[-1]
            return np.log(weights * np.maximum(hidden @ coefficients + intercept, 0.05 * mean))
        return np.log(weights * self.factors)

    def _p_value(self, expert: int, score: float) -> float:
        x, cdf = self.nulls[expert if len(self.nulls) > 1 else 0]
        return 1 - np.interp(score, x, cdf)

    def _rejections(self, p: Any, ranked: list[int]) -> int:
        if self.rule == "p_value":
            return int(sum(p[e] <= self.alpha for e in ranked))
        if self.rule == "storey":
            share = (1 + sum(p > 0.5)) / (len(p) / 2)
            levels = [min(k * self.alpha / share / len(p), 0.5) for k in range(1, len(p) + 1)]
            return max([k + 1 for k, low in enumerate(sorted(p)) if low <= levels[k]], default=0)
        if self.rule == "holm":  # statsmodels takes 70 ms a token for it
            fails = [low > self.alpha / (len(p) - k) for k, low in enumerate(sorted(p))]
            return [*fails, True].index(True)
        return int(multipletests(p, self.alpha, STATSMODELS[self.rule])[0].sum())

    def _drawn(self, order: list[int], most: int) -> list[int]:
        state = mixed(self.parameters["seed"] * 65537 + self.layer)
        for expert in order[:8]:
            state = mixed(state + expert)
        lots = [mixed(state + e) for e in range(len(order))]
        signed = [lot - 2**64 if lot >= 2**63 else lot for lot in lots]
        return sorted(range(len(order)), key=lambda e: signed[e])[:most]


def softmax(z: Any) -> Any:
    """Return shares that sum to one."""
    exact = np.exp(z - np.max(z))
    return exact / exact.sum()


def mixed(state: int) -> int:
    """Return a step of SplitMix64, in Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)
