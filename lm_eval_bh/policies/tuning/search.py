"""Finds the policy with the smallest loss at a cost, and compares it on unseen text.

All choices use validation text: all methods and statistics on a little of it, then gains with the
best of these, then a second gain with the best, then the few best on all of it. Only the chosen
policy then runs over text that no choice has seen: one comparison, which needs no correction for
the number of policies tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from lm_eval_bh.errors import ParameterError, UnreachableError
from lm_eval_bh.policies.cost import EXPERTS, Cost
from lm_eval_bh.policies.document_losses import Floats
from lm_eval_bh.policies.fidelity import Fidelity
from lm_eval_bh.policies.layer_budgets import allocate, config_of
from lm_eval_bh.policies.paired_differences import Difference, Ladder, PairedBootstrap
from lm_eval_bh.policies.tuning.candidates import (
    MASSES,
    Family,
    adaptive_families,
    gains_of,
    named,
    static,
    step_families,
    winner,
)
from lm_eval_bh.policies.tuning.journal import Row
from lm_eval_bh.policies.tuning.subject import CONFIRMATION, SCREEN, VALIDATION, Subject
from lm_eval_bh.routing.config import RoutingConfig

PER_LAYER = Family("topk per layer", {"rule": "topk"})
SHARED = named("oea")  # the control with an adjustable number of loaded experts per token
STEP = 0.25  # step of the mean in the search for the fewest experts
MOVES = 0.05  # relative error allowed for the mean on other text than it was solved on
NEAR = 1e-9  # tolerance for whole-number means
SAME = 1e-3  # relative difference of every document's loss, below which two policies decide alike
WITH_GAINS, FINALISTS = 3, 6  # of a first look: best families to try gains with, and number to keep


@dataclass(frozen=True)
class Tried:
    """A policy and static top-k at the same cost, on validation text or a part of it."""

    family: Family
    config: RoutingConfig
    row: Row
    difference: Difference | None


class Search:
    """The search for a policy.

    Parameters
    ----------
    subject : Subject
        The model and the texts.
    families : sequence of Family, optional
        The adaptive policies to try, by default all; more than :data:`FINALISTS` get a first look
        on little text.
    cost : Cost
        Cost of the comparison; for distinct experts, all families are those of a step.
    progress : bool
        Whether to show a progress bar, which is quiet when not in a terminal.
    """

    def __init__(
        self,
        subject: Subject,
        families: Sequence[Family] | None = None,
        progress: bool = True,
        cost: Cost = EXPERTS,
    ) -> None:
        self.subject, self.cost = subject, cost
        if families is None:
            families = adaptive_families() if cost is EXPERTS else step_families()
        self.families = list(families)
        self.tried: dict[str, Tried] = {}
        self.screened: dict[str, Tried] = {}
        self._bootstraps = {
            text: PairedBootstrap(documents.tokens) for text, documents in subject.documents.items()
        }
        self._bar = tqdm(desc="Policies", unit="run", disable=None if progress else True)

    def for_mean(self, mean: float, only: Family | None = None) -> Tried:
        """Return the policy with the smallest loss at a mean cost, on validation text.

        Parameters
        ----------
        mean : float
            Between 1 and the model's own cost.
        only : Family, optional
            Try only this family.

        Raises
        ------
        ParameterError, UnreachableError
            If the mean is out of range, or no policy meets it.
        """
        self.check(mean)
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
                f"No policy reaches a mean of {mean:g} {self.cost.words} on this model"
                f"{': ' + reason.rstrip('.') if reason else ''}; use another target."
            )
        return min(found)[-1]

    def _families(self, mean: float) -> list[Family]:
        controls = [*map(static, MASSES), PER_LAYER, static()]
        if self.cost is not EXPERTS:
            controls = [SHARED, static()]
        if len(self.families) <= FINALISTS:
            return [*controls, *self.families]
        # The current recipe always takes part: a winner has to beat it on all of the text.
        finalists = {family.name: family for family in self.finalists(mean, FINALISTS)}
        today = winner(self.cost)
        return [*controls, *(finalists | {today.name: today}).values()]

    def finalists(self, mean: float, most: int) -> list[Family]:
        """Return the best families, some with gains, after a first look on little text.

        Parameters
        ----------
        mean : float
            Mean of the cost.
        most : int
            Number of families to return.
        """
        best = self._look(self.families, mean)
        for number in (WITH_GAINS, 1):  # gains can be combined
            tried = [one for family in best[:number] for one in gains_of(family)]
            best = self._look(tried, mean)
        return best[:most]

    def _look(self, families: Sequence[Family], mean: float) -> list[Family]:
        self.expect(len(families))
        for family in families:
            self.screened[f"{family.name} {mean:g}"] = self._try(family, mean, SCREEN)
        return self._order(mean)

    def _order(self, mean: float) -> list[Family]:
        """Return the families of a first look, the best first, without duplicates.

        A fixed threshold on p-values equals one on scores, so methods of different names may select
        the same experts, and would take the places of others.
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

        The bound applies to the upper end of the interval of the relative rise in perplexity, on
        validation text. The best family is chosen at half of the model's own top-k.

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
        """Compare the chosen policy with the controls, on unseen text.

        Returns
        -------
        dict
            ``mean_experts``, ``distinct_experts``, ``controls`` (name to :class:`Difference`, at
            the same measured cost),
            ``native`` (:class:`Difference` from the unchanged model), ``better`` (whether all
            intervals are below 0) and ``fidelity``, as plain values.
        """
        bootstrap = self._bootstraps[CONFIRMATION]
        self._bar.total += 1
        row = self.run(CONFIRMATION, chosen.family, chosen.config, faithful=True)
        mean = self.cost.of(row)
        fidelity = self._fidelity(row, mean)
        controls: dict[str, Difference] = {}
        for name, ladder in self._controls(mean).items():
            if name != chosen.family.name:
                controls[name] = bootstrap.compare(row.sums, ladder(CONFIRMATION)(mean))
        native = self._measure(CONFIRMATION, static(), self.subject.native)
        self.close()
        return {
            "mean_experts": row.mean_experts,
            "distinct_experts": row.distinct_experts,
            "controls": {name: asdict(difference) for name, difference in controls.items()},
            "native": asdict(bootstrap.compare(row.sums, native.sums)),
            "better": all(difference.high < 0 for difference in controls.values()),
            "fidelity": fidelity,
        }

    def _fidelity(self, row: Row, mean: float) -> dict[str, Any]:
        """Return the fidelity of a policy, of static top-k at its mean, and the difference."""
        tokens = self.subject.documents[CONFIRMATION].tokens
        own = np.array(row.divergences), np.array(row.changed)
        static_ = [
            self._ladder(CONFIRMATION, static(), mean, part)(mean)
            for part in ("divergences", "changed")
        ]
        difference = self._bootstraps[CONFIRMATION].difference_of_means(own[0], static_[0])
        return {
            "policy": asdict(Fidelity.of(*own, tokens)),
            "topk": asdict(Fidelity.of(static_[0], static_[1], tokens)),
            "kl_difference": dict(zip(("difference", "low", "high"), difference, strict=True)),
        }

    def static_curve(self) -> dict[float, float]:
        """Return the perplexities of static top-k by cost, on validation text."""
        self._bar.total += self.subject.native
        bootstrap = self._bootstraps[VALIDATION]
        rows = [self._measure(VALIDATION, static(), k) for k in range(1, self.subject.native + 1)]
        return {self.cost.of(row): bootstrap.perplexity(row.sums) for row in rows}

    def _controls(self, mean: float) -> dict[str, Callable[[str], Callable[[float], Floats]]]:
        """Return static top-k, the better compensated one, and static top-k per layer.

        At equal distinct experts: static top-k, and the published method for them.
        """
        if self.cost is not EXPERTS:
            families = (static(), SHARED)
            return {f.name: partial(self._ladder, family=f, mean=mean) for f in families}
        compensated = [
            (tried.difference.relative, family)
            for mass in MASSES
            for tried in self.tried.values()
            if (family := static(mass)) == tried.family and tried.difference is not None
        ]
        mass = min(compensated, key=lambda pair: pair[0])[1] if compensated else static(MASSES[-1])
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
            config = self.choose(family, mean, text)
        row = self.run(text, family, config)
        if row.failed is not None:
            return Tried(family, config, row, None)
        at = self.cost.of(row)
        control = self._ladder(text, static(), at)(at)
        difference = self._bootstraps[text].compare(row.sums, control)
        return Tried(family, config, row, difference)

    def choose(self, family: Family, amount: float, text: str) -> RoutingConfig:
        """Return a family's member at a cost; for integer parameters the last within it."""
        if self.cost is not EXPERTS and family.rung in ("max_k", "k0"):
            low = self.below(text, family, amount)
            high = self._measure(text, family, low + 1)
            near = high.failed is None and self.cost.of(high) <= amount * (1 + MOVES)
            return self.member(family, low + near)
        return self.member(family, amount)

    def member(self, family: Family, amount: float) -> RoutingConfig:
        """Return a family's member at a cost, see :meth:`Family.at`."""
        subject = self.subject
        return family.at(amount, subject.native, self.cost, subject.decode_batch)

    def below(self, text: str, family: Family, amount: float) -> int:
        """Return the largest integer parameter within a cost, below the model's own top-k."""
        if self.cost is EXPERTS:
            return min(max(math.floor(amount + NEAR), 1), self.subject.native - 1)
        low, high = 1, self.subject.native
        while high - low > 1:
            middle = (low + high) // 2
            row = self._measure(text, family, middle)
            fits = row.failed is None and self.cost.of(row) <= amount
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _ladder(
        self, text: str, family: Family, mean: float, part: str = "losses"
    ) -> Callable[[float], Floats]:
        """Return the losses of a static policy, interpolated around a cost."""
        low = self.below(text, family, mean)
        faithful = part != "losses"
        rows = [self._measure(text, family, k, faithful) for k in (low, low + 1)]
        ladder = Ladder({self.cost.of(row): np.array(getattr(row, part)) for row in rows})
        return ladder.at if self.cost is EXPERTS else ladder.within

    def _layer_ladder(self, text: str, mean: float) -> Callable[[float], Floats]:
        layers, native = self.subject.layers, self.subject.native
        low = min(max(math.floor(mean * layers + NEAR), layers), layers * native - 1)
        rungs = {}
        for budget in (low, low + 1):
            config = config_of(allocate(self.subject.sensitivities(), budget))
            rungs[budget / layers] = self.run(text, PER_LAYER, config).sums
        return Ladder(rungs).at

    def _measure(self, text: str, family: Family, k: int, faithful: bool = False) -> Row:
        return self.run(text, family, self.member(family, k), faithful)

    def expect(self, runs: int) -> None:
        """Add runs to the progress bar's total."""
        self._bar.total = (self._bar.total or 0) + runs

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def run(self, text: str, family: Family, config: RoutingConfig, faithful: bool = False) -> Row:
        """Measure a policy on a text, once, see :meth:`Subject.measure`."""
        self._bar.set_postfix_str(f"{family.name} on {text} text")
        row = self.subject.measure(text, family, config, faithful)
        self._bar.update()
        return row

    def _meets(self, row: Row, mean: float) -> bool:
        # The mean was solved on other text; a static policy may also take less than the target,
        # since layers have whole numbers.
        slack = MOVES * mean
        least = mean - max(slack, 1 / self.subject.layers - NEAR)
        return least <= self.cost.of(row) <= mean + slack

    def check(self, mean: float, text: str = VALIDATION) -> None:
        """Raise a :class:`ParameterError` if the mean is out of range."""
        subject, name = self.subject, self.cost.target
        most: float = subject.native
        takes = f"uses {most} experts itself"
        if self.cost is not EXPERTS:
            if subject.decode_batch is None or subject.decode_batch < 2:
                raise ParameterError(
                    f"{name} needs a decode_batch of at least 2: a step of one token reads its own "
                    "experts; give decode_batch, or target_experts."
                )
            most = min(subject.routers[0].num_experts, subject.decode_batch * subject.native)
            if 1 < mean < most:
                most = self.cost.of(self._measure(text, static(), subject.native))
            takes = f"reads at most {most:.4g} per layer in a step of {subject.decode_batch} rows"
        if not 1 < mean < most:
            raise ParameterError(
                f"{name}={mean:g} is out of reach: this model {takes}, "
                f"so use a number between 1 and {most:.4g}."
            )
