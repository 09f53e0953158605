"""Counts the work of a model's experts under any routing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lm_eval_bh.routing.patching.experts_switch import experts_of


class ExpertWork:
    """Counts expert rows, and experts whose weights a pass reads, within the context.

    Parameters
    ----------
    model : nn.Module
        A model whose experts are stacked in one module per layer, as in transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = experts_of(model)
        self._handles: list[Any] = []
        self.reset()

    @property
    def rows(self) -> int | None:
        """Number of rows: one expert applied to one token. None without such modules."""
        return self._rows if self._modules else None

    @property
    def touched(self) -> int | None:
        """Number of (pass, layer, expert) with at least one token. None without such modules."""
        return self._touched if self._modules else None

    def reset(self) -> None:
        """Reset the counts."""
        self._rows = self._touched = 0

    def __enter__(self) -> ExpertWork:
        for module in self._modules:
            handle = module.register_forward_pre_hook(self._count, with_kwargs=True)
            self._handles.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        indices: Tensor = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        used = indices[indices < module.num_experts]
        self._rows += used.numel()
        self._touched += used.unique().numel()
