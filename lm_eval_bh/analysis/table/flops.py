"""Counts the floating-point operations of a forward pass from a model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A decoder in which every layer has attention and a mixture of experts.

    Attributes
    ----------
    hidden_size, num_layers, vocab_size : int
        Width, depth, and number of rows of the output head.
    num_heads, num_key_value_heads, head_dim : int
        Sizes of the attention.
    num_experts : int
        Experts per layer.
    expert_size : int
        Inner width of one expert, a gated unit of three matrices (gate, up, down).
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    expert_size: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], moe_layers: int) -> Architecture | None:
        """Read a Hugging Face configuration.

        Parameters
        ----------
        config : mapping
            ``hidden_size``, ``num_hidden_layers`` and so on, as in
            :class:`~lm_eval_bh.schema.RunInfo`.
        moe_layers : int
            Number of layers with experts.

        Returns
        -------
        Architecture or None
            None if a number is missing, or if there are layers of another kind: their size is not
            in the configuration, and an incomplete count would be worse than none.
        """
        hidden = config.get("hidden_size")
        heads = config.get("num_attention_heads")
        expert = config.get("moe_intermediate_size") or config.get("intermediate_size")
        head_dim = config.get("head_dim") or (hidden // heads if hidden and heads else None)
        found: tuple[Any, ...] = (
            hidden,
            config.get("num_hidden_layers"),
            heads,
            config.get("num_key_value_heads") or heads,
            head_dim,
            config.get("num_experts"),
            expert,
            config.get("vocab_size"),
        )
        if any(not isinstance(number, int) or number < 1 for number in found):
            return None
        architecture = cls(*found)
        return architecture if architecture.num_layers == moe_layers else None

    def breakdown(self, experts: float, context_length: int) -> dict[str, float]:
        """Return the FLOPs per token in each part of the model; see :meth:`flops`."""
        attention = self.num_heads * self.head_dim
        keys_and_values = 2 * self.num_key_value_heads * self.head_dim
        layer = {
            "projections": 2 * self.hidden_size * (2 * attention + keys_and_values),
            "scores": 2 * 2 * context_length * attention,
            "routers": 2 * self.hidden_size * self.num_experts,
            "experts": experts * 3 * 2 * self.hidden_size * self.expert_size,
        }
        parts = {name: float(self.num_layers * count) for name, count in layer.items()}
        return parts | {"head": float(2 * self.hidden_size * self.vocab_size)}

    def flops(self, experts: float, context_length: int) -> float:
        r"""Return the FLOPs of the forward pass of one token through the whole model.

        A multiply-add is 2 FLOPs. With hidden size h, L layers, H query and G key-value heads of
        size d, context length n, N experts of inner size m of which k are computed, vocabulary V:

        .. math::

            L \, [\, 2h(2Hd + 2Gd) + 4nHd + 2hN + 6khm \,] + 2hV

        for the projections (query, output; key, value), the scores and the weighted sum of values,
        the router, the experts, and the head. Norms, activations, softmax, rotations and the lookup
        of embeddings are left out: they are small compared with matrix products.

        Parameters
        ----------
        experts : float
            Mean number of computed experts per token, over all layers.
        context_length : int
            Number of positions that a token attends to. Attention costs the same under every
            routing, so the longer the context, the smaller the share that fewer experts save.
        """
        return sum(self.breakdown(experts, context_length).values())
