"""Finds the policy that loses least, and compares it on unseen text with three controls.

Everything is chosen on validation text: all methods and statistics on little of it, then gains with
the best of these, then the few best altogether on all of it. What is chosen, and nothing else, then
runs over text that no choice has seen: one comparison, which needs no correction for how many
policies were tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from lm_eval_bh.errors import ParameterError, UnreachableError
from lm_eval_bh.policies.fidelity import Fidelity
from lm_eval_bh.policies.layer_budgets import allocate, config_of
from lm_eval_bh.policies.paired_differences import Difference, Ladder, PairedBootstrap
from lm_eval_bh.policies.tuning.candidates import (
    MASSES,
    Family,
    adaptive_families,
    gains_of,
    static,
    winner,
)
from lm_eval_bh.policies.tuning.journal import Row
from lm_eval_bh.policies.tuning.subject import CONFIRMATION, SCREEN, VALIDATION, Subject
from lm_eval_bh.routing.config import RoutingConfig

PER_LAYER = Family("topk per layer", {"rule": "topk"})
STEP = 0.25  # of the mean number of experts, in the search for the fewest
MOVES = 0.05  # share of the target that the mean may be off by on text it was not solved on
NEAR = 1e-9  # means that are whole numbers but for rounding
SAME = 1e-6  # share by which the losses of one policy differ by rounding
WITH_GAINS, FINALISTS = 3, 6  # of a first look: what gains are tried with, and what goes on


@dataclass(frozen=True)
class Tried:
    """A policy on validation text, or on little of it, beside static top-k at its own mean."""

    family: Family
    config: RoutingConfig
    row: Row
    difference: Difference | None


class Search:
    """One search.

    Parameters
    ----------
    subject : Subject
        The model and the texts.
    families : sequence of Family, optional
        The adaptive policies to try, by default all of them; more than :data:`FINALISTS` get a
        first look on little text.
    progress : bool
        Whether to show a progress bar, which is quiet when not in a terminal.
    """

    def __init__(
        self,
        subject: Subject,
        families: Sequence[Family] | None = None,
        progress: bool = True,
    ) -> None:
        self.subject = subject
        self.families = adaptive_families() if families is None else list(families)
        self.tried: dict[str, Tried] = {}
        self.screened: dict[str, Tried] = {}
        self._bootstraps = {
            text: PairedBootstrap(documents.tokens) for text, documents in subject.documents.items()
        }
        self._bar = tqdm(desc="Policies", unit="run", disable=None if progress else True)

    def for_mean(self, mean: float, only: Family | None = None) -> Tried:
        """Return what loses least at a mean number of experts, on the validation text.

        Parameters
        ----------
        mean : float
            Between 1 and the model's own top-k.
        only : Family, optional
            Try this alone.

        Raises
        ------
        ParameterError, UnreachableError
            If the mean is out of range, or no policy meets it.
        """
        check_mean(mean, self.subject.native)
        families = [only] if only else self._families(mean)
        found: list[tuple[float, int, Tried]] = []
        for family in families:
            self.expect(1)
            tried = self._try(family, mean)
            self.tried[f"{family.name} {mean:g}"] = tried
            if tried.difference is not None and self._meets(tried.row, mean):
                found.append((tried.difference.relative, len(found), tried))
        if not found:
            reason = next((t.row.failed for t in self.tried.values() if t.row.failed), "")
            raise UnreachableError(
                f"No policy reaches a mean of {mean:g} experts on this model"
                f"{': ' + reason.rstrip('.') if reason else ''}; use another target."
            )
        return min(found)[-1]

    def _families(self, mean: float) -> list[Family]:
        controls = [*map(static, MASSES), PER_LAYER, static()]
        if len(self.families) <= FINALISTS:
            return [*controls, *self.families]
        # Today's recipe is asked in any case: what wins has to beat it on all of the text.
        finalists = {family.name: family for family in self.finalists(mean, FINALISTS)}
        return [*controls, *(finalists | {winner().name: winner()}).values()]

    def finalists(self, mean: float, most: int) -> list[Family]:
        """Return the best of a first look on little text: of all families, and of some with gains.

        Parameters
        ----------
        mean : float
            Number of experts.
        most : int
            How many to return.
        """
        best = self._look(self.families, mean)
        further = [gained for family in best[:WITH_GAINS] for gained in gains_of(family)]
        self._look(further, mean)
        return self._order(mean)[:most]

    def _look(self, families: Sequence[Family], mean: float) -> list[Family]:
        self.expect(len(families))
        for family in families:
            self.screened[f"{family.name} {mean:g}"] = self._try(family, mean, SCREEN)
        return self._order(mean)

    def _order(self, mean: float) -> list[Family]:
        """Return the families of a first look, the best first, each policy once.

        One fixed threshold on the p-values of a null distribution is one on the scores: methods of
        different names may select the same experts, and would take the places of others.
        """
        found = [
            (tried.difference.relative, number, tried)
            for number, (name, tried) in enumerate(self.screened.items())
            if tried.difference is not None and name == f"{tried.family.name} {mean:g}"
        ]
        kept: list[Tried] = []
        for _, _, tried in sorted(found):
            if not any(np.allclose(tried.row.sums, k.row.sums, rtol=SAME) for k in kept):
                kept.append(tried)
        return [tried.family for tried in kept]

    def within_loss(self, most: float, only: Family | None = None) -> Tried:
        """Return the policy with the fewest experts whose loss stays within a bound.

        The bound holds for the upper end of the interval of the perplexity relative to the model as
        it is, on the validation text. The best family is chosen at half of the model's own top-k.

        Raises
        ------
        UnreachableError
            If the bound is exceeded at every mean.
        """
        native = self.subject.native
        family = self.for_mean(native / 2, only).family
        reference = self._measure(VALIDATION, static(), native).sums
        steps = [step * STEP for step in range(int(1 / STEP) + 1, int(native / STEP))]
        low, high, best = 0, len(steps), None
        while low < high:
            middle = (low + high) // 2
            self._bar.total += 1
            tried = self._try(family, steps[middle])
            self.tried[f"{family.name} {steps[middle]:g}"] = tried
            within = tried.row.failed is None and (
                self._bootstraps[VALIDATION].compare(tried.row.sums, reference).relative_high
                <= most
            )
            if within:
                best, high = tried, middle
            else:
                low = middle + 1
        if best is None:
            raise UnreachableError(
                f"No mean below {native} experts stays within a loss of {100 * most:g} %: at "
                f"{steps[-1]:g} experts {family.name} loses more; use a larger --max-loss."
            )
        return best

    def confirm(self, chosen: Tried) -> dict[str, Any]:
        """Compare what was chosen with the controls, on text that it was not chosen on.

        Returns
        -------
        dict
            ``mean_experts``, ``controls`` (name to :class:`Difference`, at the same measured mean),
            ``native`` (:class:`Difference` from the model as it is), ``better`` (whether all
            intervals lie below 0) and ``fidelity``, as plain values.
        """
        bootstrap = self._bootstraps[CONFIRMATION]
        self._bar.total += 1
        row = self.run(CONFIRMATION, chosen.family, chosen.config, faithful=True)
        mean = _mean(row)
        fidelity = self._fidelity(row, mean)
        controls: dict[str, Difference] = {}
        for name, ladder in self._controls(mean).items():
            if name != chosen.family.name:
                controls[name] = bootstrap.compare(row.sums, ladder(CONFIRMATION).at(mean))
        native = self._measure(CONFIRMATION, static(), self.subject.native)
        self.close()
        return {
            "mean_experts": mean,
            "controls": {name: asdict(difference) for name, difference in controls.items()},
            "native": asdict(bootstrap.compare(row.sums, native.sums)),
            "better": all(difference.high < 0 for difference in controls.values()),
            "fidelity": fidelity,
        }

    def _fidelity(self, row: Row, mean: float) -> dict[str, Any]:
        """Return the fidelity of a policy and of static top-k at its mean, and the difference."""
        tokens = self.subject.documents[CONFIRMATION].tokens
        own = np.array(row.divergences), np.array(row.changed)
        static_ = [
            self._ladder(CONFIRMATION, static(), mean, part).at(mean)
            for part in ("divergences", "changed")
        ]
        difference = self._bootstraps[CONFIRMATION].difference_of_means(own[0], static_[0])
        return {
            "policy": asdict(Fidelity.of(*own, tokens)),
            "topk": asdict(Fidelity.of(static_[0], static_[1], tokens)),
            "kl_difference": dict(zip(("difference", "low", "high"), difference, strict=True)),
        }

    def static_curve(self) -> dict[int, float]:
        """Return the perplexity of static top-k on the validation text, from 1 to the model's k."""
        self._bar.total += self.subject.native
        bootstrap = self._bootstraps[VALIDATION]
        return {
            k: bootstrap.perplexity(self._measure(VALIDATION, static(), k).sums)
            for k in range(1, self.subject.native + 1)
        }

    def _controls(self, mean: float) -> dict[str, Callable[[str], Ladder]]:
        """Return static top-k, the better compensated one, and static top-k per layer."""
        compensated = [
            (tried.difference.relative, family)
            for mass in MASSES
            for tried in self.tried.values()
            if (family := static(mass)) == tried.family and tried.difference is not None
        ]
        mass = min(compensated, key=lambda pair: pair[0])[1] if compensated else static(MASSES[1])
        return {
            static().name: lambda text: self._ladder(text, static(), mean),
            mass.name: lambda text: self._ladder(text, mass, mean),
            PER_LAYER.name: lambda text: self._layer_ladder(text, mean),
        }

    def _try(self, family: Family, mean: float, text: str = VALIDATION) -> Tried:
        if family == PER_LAYER:
            budget = math.floor(mean * self.subject.layers + NEAR)
            config = config_of(allocate(self.subject.sensitivities(), budget))
        else:
            config = family.at(mean, self.subject.native)
        row = self.run(text, family, config)
        if row.failed is not None:
            return Tried(family, config, row, None)
        at = _mean(row)
        control = self._ladder(text, static(), at).at(at)
        difference = self._bootstraps[text].compare(row.sums, control)
        return Tried(family, config, row, difference)

    def _ladder(self, text: str, family: Family, mean: float, part: str = "losses") -> Ladder:
        """Return a static policy at the whole numbers around a mean."""
        low = min(max(math.floor(mean + NEAR), 1), self.subject.native - 1)
        faithful = part != "losses"
        rows = {k: self._measure(text, family, k, faithful) for k in (low, low + 1)}
        return Ladder({k: np.array(getattr(row, part)) for k, row in rows.items()})

    def _layer_ladder(self, text: str, mean: float) -> Ladder:
        layers, native = self.subject.layers, self.subject.native
        low = min(max(math.floor(mean * layers + NEAR), layers), layers * native - 1)
        rungs = {}
        for budget in (low, low + 1):
            config = config_of(allocate(self.subject.sensitivities(), budget))
            rungs[budget / layers] = self.run(text, PER_LAYER, config).sums
        return Ladder(rungs)

    def _measure(self, text: str, family: Family, k: int, faithful: bool = False) -> Row:
        return self.run(text, family, family.at(k, self.subject.native), faithful)

    def expect(self, runs: int) -> None:
        """Let the progress bar expect so many more runs."""
        self._bar.total = (self._bar.total or 0) + runs

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def run(self, text: str, family: Family, config: RoutingConfig, faithful: bool = False) -> Row:
        """Measure a policy on a text, once, see :meth:`Subject.measure`."""
        self._bar.set_postfix_str(f"{family.name} on {text} text")
        row = self.subject.measure(text, family, config, faithful)
        self._bar.update()
        return row

    def _meets(self, row: Row, mean: float) -> bool:
        # Solved on other text, so the mean moves; a static policy may also take less than was asked
        # for, by what a layer's whole numbers leave.
        slack = MOVES * mean
        return mean - max(slack, 1 / self.subject.layers - NEAR) <= _mean(row) <= mean + slack


def check_mean(mean: float, native: int) -> None:
    """Raise a :class:`ParameterError` if no policy could have this mean and lose something."""
    if not 1 < mean < native:
        raise ParameterError(
            f"target_experts={mean:g} is out of reach: this model takes {native} experts itself, "
            f"so use a number between 1 and {native}."
        )


def _mean(row: Row) -> float:
    assert row.mean_experts is not None
    return row.mean_experts
