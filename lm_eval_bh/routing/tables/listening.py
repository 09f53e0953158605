"""Runs a model over text and passes on the output of its routers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm_eval_bh.errors import DataError, ModelError
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.methods.steps import steps_of
from lm_eval_bh.routing.router_reader import RouterReader
from lm_eval_bh.routing.routers import find_routers

Hear = Callable[[int, RouterOutput], None]


def collect_router_logits(
    model: nn.Module, routers: Sequence[nn.Module], batches: Iterable[Tensor], progress: bool = True
) -> dict[int, Tensor]:
    """Run the model without its language head and return its router logits.

    Parameters
    ----------
    model : PreTrainedModel
        A mixture-of-experts model; put into evaluation mode during the run.
    routers : sequence of nn.Module
        Its routers in the order of the layers; element 0 of their output is the router logits.
    batches : iterable of Tensor, int64 [batch, length]
        Token ids without padding.
    progress : bool
        Whether to show a progress bar, which is quiet when not in a terminal.

    Returns
    -------
    dict of layer index to Tensor, float32 [tokens, experts]
        On the CPU.

    Raises
    ------
    ModelError
        If there are no routers, or one does not run or returns anything else.
    DataError
        If there are no batches.
    """
    heard: list[list[Tensor]] = [[] for _ in routers]
    listen(
        model,
        routers,
        batches,
        lambda layer, said: heard[layer].append(said.logits.float().cpu()),
        progress,
    )
    return {layer: torch.cat(parts) for layer, parts in enumerate(heard)}


def listen(
    model: nn.Module,
    routers: Sequence[nn.Module],
    batches: Iterable[Tensor],
    hear: Hear,
    progress: bool = True,
    slots: int = 1,
) -> None:
    """Run the model without its language head and pass on its routers' output.

    Parameters
    ----------
    model, routers, batches, progress
        As in :func:`collect_router_logits`.
    hear : callable
        Takes a layer, and its router's output for a batch, on its device; the tokens at one
        position of the batch form a step.
    slots : int
        Minimum number of experts that the routers have to rank.

    Raises
    ------
    ModelError, DataError
        As :func:`collect_router_logits`.
    """
    if not routers:
        raise ModelError("There are no routers to listen to; give a mixture-of-experts model.")
    known = {id(router.module): router for router in find_routers(model)}
    heard = [0] * len(routers)
    steps: list[Tensor] = []  # of the current batch
    handles = []
    backbone = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    was_training = model.training
    bar = tqdm(batches, "Router logits", unit="batch", disable=None if progress else True)
    model.eval()
    try:
        for layer, router in enumerate(routers):
            reader = RouterReader(known[id(router)], slots) if id(router) in known else None
            # Before other hooks: the router's own output, even if the model is patched.
            note = _listener(layer, heard, hear, reader, steps)
            handles.append(router.register_forward_hook(note, prepend=True))
        with torch.inference_mode():
            for ids in bar:
                steps[:] = [steps_of(ids.shape[0], ids.shape[1], device=device).of]
                backbone(input_ids=ids.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
        bar.close()
    if not any(heard):
        raise DataError("There is no text to collect router logits on; pass at least one batch.")
    for layer, times in enumerate(heard):
        if not times:
            raise ModelError(f"Router {layer} never ran; give the routers of this model.")


def _listener(
    layer: int, heard: list[int], hear: Hear, reader: RouterReader | None, steps: list[Tensor]
) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) and output else None
        if reader is None or not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ModelError(
                f"Router {layer} ({type(module).__name__}) does not return a tuple with router "
                "logits [tokens, experts] first; give a model of a supported family."
            )
        heard[layer] += 1
        said = reader(module, inputs, output)
        hear(layer, said._replace(step=steps[0].to(said.logits.device)))

    return note
