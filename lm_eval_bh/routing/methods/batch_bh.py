"""BH over a step: an expert's p-values over all tokens are combined into one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .batch import BatchMethod, summed
from .declare import Parameter, choice, level
from .router import RouterOutput
from .step_up import FDR, TESTED, last_rank
from .survival import survival

SMALLEST = 1e-300  # its logarithm is finite


class BatchBH(BatchMethod):
    """Combine each expert's p-values over a step's tokens, and step up over the experts.

    Simes' combination of n p-values is the minimum of n p_(i) / i; Fisher's is the survival of
    -2 sum log p under chi-squared with 2 n degrees of freedom, exact for independent p-values.

    References
    ----------
    Simes 1986, Biometrika 73:751; Fisher 1932; Benjamini and Hochberg 1995, J. R. Stat. Soc. B
    57:289. Combined over the tokens of a step by this project.
    """

    name, label, alpha = "batch_bh", "batch BH", FDR
    source = "Simes 1986 or Fisher 1932 over a step's tokens, then Benjamini and Hochberg 1995"
    tests = True
    declared: ClassVar[dict[str, Parameter]] = (
        BatchMethod.declared
        | {"alpha": level(FDR)}
        | TESTED
        | {
            "combine": Parameter(
                "simes",
                "how an expert's p-values are combined over a step: `simes` or `fisher`",
                *choice(["simes", "fisher"]),
            )
        }
    )

    @classmethod
    def scored_by(cls, settings: Any) -> str:
        """Return the given statistic."""
        return str(settings.get("statistic", "logit"))

    def level(self, alpha: float) -> Tensor:
        """Return BH's critical values, float64 ``[experts]``."""
        ranks = torch.arange(1, self.num_experts + 1, dtype=torch.float64)
        return ranks / self.num_experts * alpha

    def fit(self, tables: Any, alpha: float) -> None:
        """Take a layer's tables; see :meth:`Method.fit`."""
        super().fit(tables, alpha)
        self.keep("null_x", torch.tensor(tables.x))
        self.keep("null_cdf", torch.tensor(tables.cdf))

    def load(self, router: RouterOutput, step: Tensor, steps: int) -> Tensor:
        """Return which experts are rejected, see :meth:`BatchMethod.load`."""
        z = self.score(router).double()
        x, cdf = self.table("null_x"), self.table("null_cdf")
        wide = x.ndim == 2  # one distribution per expert
        p = survival(x, cdf, z.T).T if wide else survival(x, cdf, z.flatten()).view(z.shape)
        everyone = torch.arange(self.num_experts, device=z.device).expand_as(z)
        ones = torch.ones_like(z)
        tokens = summed(ones, everyone, step, steps, self.num_experts)
        if self.settings["combine"] == "fisher":
            logs = summed(p.clamp(SMALLEST).log(), everyone, step, steps, self.num_experts)
            combined = torch.special.gammaincc(tokens.clamp(1), -logs)
        else:
            combined = _simes(p, step, tokens)
        combined = torch.where(tokens > 0, combined, 1.0)
        ranked, order = combined.sort(dim=-1, stable=True)
        count = last_rank(ranked <= self.table("thresholds"))
        rank = torch.arange(self.num_experts, device=z.device)
        taken = rank < count.unsqueeze(-1)
        return torch.zeros_like(taken).scatter(-1, order, taken)


def _simes(p: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
    """Return the minimum of n p_(i) / i over a step's tokens, float64 ``[steps, experts]``."""
    by_p = p.argsort(dim=0, stable=True)
    by_step = step[by_p].argsort(dim=0, stable=True)  # sorted by step, then by p
    order = by_p.gather(0, by_step)
    owner = step[order]
    ahead = tokens[:, :1].cumsum(0) - tokens[:, :1]  # tokens of the steps before
    place = torch.arange(len(p), device=p.device).unsqueeze(-1) + 1
    scaled = p.gather(0, order) * tokens.gather(0, owner) / (place - ahead[owner].squeeze(-1))
    return torch.ones_like(tokens).scatter_reduce(0, owner, scaled, "amin")
