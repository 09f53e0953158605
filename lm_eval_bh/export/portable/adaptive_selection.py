"""How many experts a token gets, and which: one layer's routing policy, in plain torch.

An exported folder holds this file beside its weights, so it may need nothing but torch. All that it
decides by stands in its settings, and in tables that are stored with the model's weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEAST = 0.05  # share of an expert's mean norm that a prediction does not fall below
# Tables in float64; all others are float32.
DOUBLE = ("critical_values", "null_x", "null_cdf")


def as_bits(table: Tensor) -> Tensor:
    """Return the bits of a float table as integers, which no cast of a model's dtype rounds."""
    return table.view(torch.int64 if table.dtype == torch.float64 else torch.int32)


class AdaptiveSelection(nn.Module):
    """Selects the experts of a layer's tokens.

    Parameters
    ----------
    settings : dict
        As ``layer_tables.py`` of lm-eval-bh makes them.
    unused : "repeat" or "skip"
        What stands in slots that a token does not use: its first expert again, with weight 0; or
        the number of experts, which transformers' experts do no work for.
    """

    bounds: Tensor

    def __init__(self, settings: dict[str, Any], unused: str = "repeat") -> None:
        super().__init__()
        if unused not in ("repeat", "skip"):
            raise ValueError(f"unused must be 'repeat' or 'skip': found {unused!r}.")
        self.settings = settings
        self.unused = unused
        # The least and the most experts. Always there, so that no engine takes a router that holds
        # this for a plain top-k and replaces it by its own.
        self.register_buffer("bounds", torch.zeros(2, dtype=torch.int64))
        for name, shape in settings["tables"].items():
            kind = torch.int64 if name in DOUBLE else torch.int32
            self.register_buffer(name, torch.zeros(shape, dtype=kind))

    def forward(self, router_logits: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Select experts.

        Parameters
        ----------
        router_logits : Tensor
            float ``[tokens, experts]``.
        hidden_states : Tensor
            float ``[tokens, hidden]``, what the router was given.

        Returns
        -------
        weights, indices : Tensor
            float32 and int64 ``[tokens, max_k]``; unused slots weigh 0.
        """
        own = self.settings
        logits = router_logits.float()
        plain = torch.softmax(logits, dim=-1)
        first = plain.topk(own["max_k"], dim=-1).indices
        counts, experts = self._decide(logits, hidden_states, first)
        tempered = plain
        if own["temperature"] != 1:
            tempered = torch.softmax(logits / own["temperature"], dim=-1)
        weights = tempered.gather(-1, experts)
        used = torch.arange(own["max_k"], device=counts.device) < counts.unsqueeze(-1)
        if own["normalizes"] and own["mass"] is None:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.masked_fill(~used, 0.0)
        if own["mass"] is not None:
            native = tempered.topk(own["native_k"], dim=-1).values.sum(-1, keepdim=True)
            weights = weights * (native / weights.sum(-1, keepdim=True)) ** own["mass"]
            if own["normalizes"]:
                weights = weights / native
        elif own["rescales"]:
            weights = weights / weights.sum(-1, keepdim=True)
        nothing = logits.shape[-1] if self.unused == "skip" else experts[:, :1]
        return weights, torch.where(used, experts, nothing)

    def _decide(
        self, logits: Tensor, hidden_states: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return how many experts, int64 ``[tokens]``, of which: int64 ``[tokens, max_k]``."""
        own = self.settings
        by_logit = own["ranks_by_logit"]
        if own["rule"] == "fixed" and by_logit:
            return self.bounds[1].expand(len(logits)), first
        scores = self._scores(logits, hidden_states)
        p_values = self._p_values(scores) if own["by_p_value"] else None
        if own["first_only"]:  # what the router ranks first competes; scores rank it
            scores = scores.gather(-1, first)
            p_values = None if p_values is None else p_values.gather(-1, first)
        if p_values is None:
            ascending, order = (-scores).sort(dim=-1, stable=True)
        else:
            by_score = scores.argsort(dim=-1, descending=True, stable=True)  # for equal p-values
            ascending, by_p = p_values.gather(-1, by_score).sort(dim=-1, stable=True)
            order = by_score.gather(-1, by_p)
        if by_logit:
            experts = first
        elif own["first_only"]:
            experts = first.gather(-1, order)
        else:
            experts = order[:, : own["max_k"]]
        counts = self._count(ascending).clamp(self.bounds[0], self.bounds[1])
        return counts, experts

    def _scores(self, logits: Tensor, hidden_states: Tensor) -> Tensor:
        own = self.settings
        if own["scores"] == "logit":
            return logits
        scores = torch.log_softmax(logits, dim=-1)
        if own["factors"] == "measured":
            scores = scores + self._table("log_factors")
        elif own["factors"] == "predicted":
            predictor = self._table("predictor")
            norms = torch.addmm(predictor[-2], hidden_states.float(), predictor[:-2])
            scores = scores + torch.maximum(norms, LEAST * predictor[-1]).log()
        return scores

    def _p_values(self, scores: Tensor) -> Tensor:
        """Return 1 - F(score), each expert under its own piecewise linear F: ``[tokens, experts]``.

        Constant beyond the ends of F.
        """
        x, cdf = self._table("null_x"), self._table("null_cdf")
        z = scores.double().T.contiguous()
        left = torch.searchsorted(x, z, right=True).sub(1).clamp(0, x.shape[-1] - 2)
        low, high = cdf.gather(-1, left), cdf.gather(-1, left + 1)
        start, end = x.gather(-1, left), x.gather(-1, left + 1)
        share = (z.clamp(x[:, :1], x[:, -1:]) - start) / (end - start)
        value = (low + share * (high - low)).clamp(low, high)
        return (1 - torch.where(z >= x[:, -1:], cdf[:, -1:], value)).T

    def _count(self, ascending: Tensor) -> Tensor:
        """Return how many of the ascending scores or p-values the rule takes, ``[tokens]``."""
        rule: str = self.settings["rule"]
        alpha: float = self.settings["alpha"]
        if rule == "fixed":
            return self.bounds[1].expand(len(ascending))
        if rule in ("top_p", "min_p"):
            weights = torch.softmax(-ascending, dim=-1)
            if rule == "min_p":
                return (weights >= alpha * weights[:, :1]).sum(-1)
            cumulative = weights.cumsum(-1)
            wanted = cumulative.new_full((len(cumulative), 1), alpha)
            return 1 + torch.searchsorted(cumulative, wanted).squeeze(-1)
        by_p_value = self.settings["by_p_value"]
        thresholds = self._table("critical_values" if by_p_value else "thresholds")
        if rule == "each":
            return (ascending <= thresholds[0, 0]).sum(-1)
        passes = ascending <= thresholds[0]
        if rule == "two_stage":
            passes = ascending <= thresholds[_last(passes)]
        elif rule == "storey":
            passes = ascending <= thresholds[1 + (~passes).sum(-1)]
        elif rule == "step_down":
            passes = passes.long().cumprod(-1).bool()
        return _last(passes)

    def _table(self, name: str) -> Tensor:
        bits: Tensor = getattr(self, name)
        return bits.view(torch.float64 if name in DOUBLE else torch.float32)


def _last(passes: Tensor) -> Tensor:
    """Return the last True rank of bool ``[tokens, N]``, 0 if there is none: int64 ``[tokens]``."""
    rank = torch.arange(1, passes.shape[-1] + 1, device=passes.device)
    return (passes * rank).amax(-1)
