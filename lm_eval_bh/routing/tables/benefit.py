"""Measures how much the loss depends on each expert: its gradient by the expert's weight.

The layer's output is the sum of weights times expert outputs, so the derivative of the loss by a
weight is the dot product of the loss gradient with that expert's output: to first order, the change
of the loss per unit of weight taken away (Michel et al. 2019, arXiv:1905.10650, gate heads
likewise). One backward pass gives it for all tokens, layers and experts in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lm_eval_bh.errors import DataError, ModelError
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.measurement import Array, Measurement


class Benefits(Measurement):
    """Root mean square of loss gradient . expert's output, by a backward pass."""

    name = "benefits"

    def run(self, batches: Sequence[Tensor], progress: bool) -> None:
        """Measure them."""
        experts = find_routers(self.model)[0].num_experts
        self._found = measure_benefits(self.model, self.routers, batches, experts, progress)

    def result(self) -> Array:
        """Return the result of :func:`measure_benefits`, float64 ``[layers, experts]``."""
        return self._found


def measure_benefits(
    model: nn.Module,
    routers: Sequence[nn.Module],
    batches: Iterable[Tensor],
    experts: int,
    progress: bool = True,
) -> NDArray[np.float64]:
    """Return the root mean square, over the tokens of each expert, of dloss / dweight.

    Memory holds one batch at a time and, if the model supports gradient checkpointing, the
    activations of one layer. No parameter gets a gradient.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, not patched.
    routers : sequence of nn.Module
        Its routers in the order of the layers.
    batches : iterable of Tensor, int64 ``[batch, length]``
        Token ids without padding; the loss is the sum of the tokens' negative log-likelihoods.
    experts : int
        Experts per layer.
    progress : bool
        Whether to show a progress bar, which is quiet when not in a terminal.

    Returns
    -------
    ndarray, float64 ``[layers, experts]``
        In nats per unit of weight. An expert without tokens takes the root mean square of its
        layer's other experts.

    Raises
    ------
    ModelError
        If gradients cannot be computed.
    DataError
        If there are no batches.
    """
    squares = torch.zeros(len(routers), experts, dtype=torch.float64)
    tokens = torch.zeros(len(routers), experts, dtype=torch.float64)

    def note(layer: int, indices: Tensor, gradient: Tensor) -> None:
        chosen = indices.flatten().cpu()
        squares[layer].index_add_(0, chosen, gradient.detach().double().flatten().cpu() ** 2)
        tokens[layer].index_add_(0, chosen, torch.ones(len(chosen), dtype=torch.float64))

    device = next(model.parameters()).device
    bar = tqdm(batches, "Benefits", unit="batch", disable=None if progress else True)
    try:
        with _gradients_of_weights(model, routers, note), torch.enable_grad():
            for ids in bar:
                ids = ids.to(device)
                logits = model(input_ids=ids, use_cache=False).logits
                loss = F.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
                )
                loss.backward()
                del logits, loss
    except RuntimeError as error:  # from torch, for anything without a backward pass
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ModelError(
            f"The gradients of {type(model).__name__} cannot be computed ({reason}): "
            "use statistic=contribution, which needs none."
        ) from error
    finally:
        bar.close()
    used = tokens > 0
    if not bool(used.any(dim=-1).all()):
        raise DataError("There is no text to measure benefits on; pass at least one batch.")
    means = squares / tokens.clamp(min=1)
    others = (squares.sum(-1) / tokens.sum(-1)).unsqueeze(-1)
    found = torch.where(used & (means > 0), means, others).sqrt()
    if not bool((found > 0).all() & found.isfinite().all()):
        raise ModelError(
            f"The gradients of {type(model).__name__} by its router weights are zero or not "
            "finite: use statistic=contribution, which needs none."
        )
    return found.numpy()


@contextmanager
def _gradients_of_weights(
    model: nn.Module, routers: Sequence[nn.Module], note: Any
) -> Iterator[None]:
    """Pass on the gradients by the routers' weights, and restore the model afterwards."""
    needed = [parameter.requires_grad for parameter in model.parameters()]
    was_training = model.training
    checkpoints = bool(getattr(model, "supports_gradient_checkpointing", False))
    was_checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    handles: list[Any] = []
    try:
        for layer, router in enumerate(routers):
            handles.append(router.register_forward_hook(_hook(layer, note)))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if checkpoints and not was_checkpointing:
            _checkpointing(model, "enable")({"use_reentrant": False})
        # Layers checkpoint only in training mode; dropout stays off.
        model.train(checkpoints)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        if checkpoints and not was_checkpointing:
            _checkpointing(model, "disable")()
        model.train(was_training)
        for parameter, wanted in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(wanted)


def _checkpointing(model: nn.Module, what: str) -> Any:
    """Return transformers' method to enable or disable it, which 5.2x renamed."""
    old = f"gradient_checkpointing_{what}"
    new = f"activation_checkpointing_{what}"
    return getattr(model, new if hasattr(model, new) else old)


def _hook(layer: int, note: Any) -> Any:
    def listen(module: nn.Module, args: Any, output: Any) -> Any:
        logits, weights, indices = output
        if not weights.requires_grad:  # nothing below has a gradient: the graph starts here
            weights = weights.detach().requires_grad_()
        weights.register_hook(lambda gradient: note(layer, indices, gradient))
        return logits, weights, indices

    return listen
