"""Runs a model over text, collects its router logits, and fits and examines null models on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm_eval_bh.errors import DataError, ModelError, NullModelError
from lm_eval_bh.routing.nulls.fingerprint import router_fingerprint
from lm_eval_bh.routing.nulls.fitting import check_trim
from lm_eval_bh.routing.nulls.kde import check_kernel
from lm_eval_bh.routing.nulls.null_kind import LOGITS_OF_A_LAYER, NullKind
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.nulls.texts import WIKITEXT, text_batches, wikitext_train_texts
from lm_eval_bh.routing.scores.contribution import measuring_norms

__all__ = [
    "WIKITEXT",
    "LayerHealth",
    "calibrate",
    "calibrate_and_check",
    "collect_router_logits",
    "health",
    "listen",
    "text_batches",
    "wikitext_train_texts",
]


def collect_router_logits(
    model: nn.Module, routers: Sequence[nn.Module], batches: Iterable[Tensor], progress: bool = True
) -> dict[int, Tensor]:
    """Run the model over token ids and return what its routers said, without its language head.

    Parameters
    ----------
    model : PreTrainedModel
        A mixture-of-experts model; put into evaluation mode for the run and back after it.
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
        If there are no routers, one does not run, or one returns something else.
    DataError
        If there are no batches.
    """
    heard: list[list[Tensor]] = [[] for _ in routers]
    listen(
        model,
        routers,
        batches,
        lambda layer, logits: heard[layer].append(logits.float().cpu()),
        progress,
    )
    return {layer: torch.cat(parts) for layer, parts in enumerate(heard)}


def listen(
    model: nn.Module,
    routers: Sequence[nn.Module],
    batches: Iterable[Tensor],
    hear: Callable[[int, Tensor], None],
    progress: bool = True,
) -> None:
    """Run the model over token ids and hand on what its routers say, without its language head.

    Parameters
    ----------
    model, routers, batches, progress
        As in :func:`collect_router_logits`.
    hear : callable
        Takes a layer and the router logits ``[tokens, experts]`` of a batch, on their device.

    Raises
    ------
    ModelError, DataError
        As :func:`collect_router_logits`.
    """
    if not routers:
        raise ModelError("There are no routers to listen to; give a mixture-of-experts model.")
    heard = [0] * len(routers)
    handles = []
    backbone = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    was_training = model.training
    bar = tqdm(batches, "Router logits", unit="batch", disable=None if progress else True)
    model.eval()
    try:
        for layer, router in enumerate(routers):
            handles.append(router.register_forward_hook(_listener(layer, heard, hear)))
        with torch.inference_mode():
            for ids in bar:
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
            raise ModelError(f"Router {layer} never ran; give the routers of this very model.")


def _listener(
    layer: int, heard: list[int], hear: Callable[[int, Tensor], None]
) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) and output else None
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ModelError(
                f"Router {layer} ({type(module).__name__}) does not return a tuple with router "
                "logits [tokens, experts] first; give a model of a supported family."
            )
        heard[layer] += 1
        hear(layer, logits)

    return note


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    routers: Sequence[nn.Module],
    texts: Iterable[str],
    *,
    model_name: str,
    revision: str | None,
    text_name: str,
    tokens: int = 65536,
    length: int = 512,
    batch: int = 8,
    kind: NullKind = LOGITS_OF_A_LAYER,
    kernel: str = "gaussian",
    bandwidth: str | float = "scott",
    experts: int | None = None,
    progress: bool = True,
) -> NullModel:
    """Fit a null model on the router logits that a model gives on text.

    Parameters
    ----------
    model, routers, progress
        As in :func:`collect_router_logits`.
    tokenizer, texts, tokens, length, batch
        As in :func:`text_batches`.
    model_name, revision, text_name : str
        What the header says about model and text.
    kind : NullKind
        What the null distribution is of; for contributions the same pass measures the experts'
        output norms.
    kernel, bandwidth
        As in :meth:`NullModel.fit`.
    experts : int, optional
        The number of experts that the routers should have; checked if given.

    Raises
    ------
    ParameterError, DataError, ModelError, NullModelError
        If a parameter, the text, the routers, or their logits are unfit.
    """
    check_kernel(kernel)  # the run takes minutes, so what can be checked is checked before it
    kind = kind.made()
    if experts is not None:
        check_trim(kind.trim or 0, experts)
    header = {
        "model": model_name,
        "revision": revision,
        "text": text_name,
        "fingerprint": router_fingerprint(map(_weight, routers)),
    }
    batches = text_batches(tokenizer, texts, tokens=tokens, length=length, batch=batch)
    norms = None
    if kind.statistic == "contribution":
        with measuring_norms(model, routers) as measured:
            logits = collect_router_logits(model, routers, batches, progress)
        norms = measured.result()
    else:
        logits = collect_router_logits(model, routers, batches, progress)
    found = logits[0].shape[1]
    if experts is not None and experts != found:
        raise NullModelError(
            f"The routers of {model_name} give {found} logits a token, not {experts}; "
            "check the list of routers."
        )
    return NullModel.fit(
        logits,
        kernel=kernel,
        bandwidth=bandwidth,
        trim=kind.trim or 0,
        null_scope=kind.null_scope or "layer",
        norms=norms,
        header=header,
    )


def calibrate_and_check(
    model: nn.Module,
    tokenizer: Any,
    routers: Sequence[nn.Module],
    texts: Sequence[str],
    *,
    tokens: int = 65536,
    length: int = 512,
    batch: int = 8,
    progress: bool = True,
    **others: Any,
) -> tuple[NullModel, list[LayerHealth]]:
    """Fit a null model, and compare it with the text that follows, an eighth as much.

    Parameters
    ----------
    model, tokenizer, routers, texts, tokens, length, batch, progress, **others
        As in :func:`calibrate`.

    Returns
    -------
    (NullModel, list of LayerHealth)
        The null model with its health in its header; without, and an empty list, where the text
        leaves no window of ``length`` tokens beyond those to fit on.

    Raises
    ------
    ParameterError, DataError, ModelError, NullModelError
        As :func:`calibrate`.
    """
    null = calibrate(
        model,
        tokenizer,
        routers,
        texts,
        tokens=tokens,
        length=length,
        batch=batch,
        progress=progress,
        **others,
    )
    fitted_on = -(-tokens // length)
    wanted = fitted_on * length + max(length, tokens // 8)
    windows = text_batches(tokenizer, texts, tokens=wanted, length=length, batch=1)
    held_out = [window for window in windows[fitted_on:] if window.shape[1] == length]
    if not held_out:
        return null, []
    batches = torch.cat(held_out).split(batch)
    report = health(null, collect_router_logits(model, routers, batches, progress))
    return with_health(null, report), report


def _weight(router: nn.Module) -> Tensor:
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(f"{type(router).__name__} has no weight; give the routers themselves.")
    return weight


@dataclass(frozen=True)
class LayerHealth:
    """How well a null model fits one layer's logits on text it was not fitted on.

    Attributes
    ----------
    layer : int
        Index of the MoE layer.
    ks_distance : float
        Kolmogorov-Smirnov distance of the p-values from the uniform distribution, 0 to 1; where
        every expert has a distribution of its own, the mean of the experts' distances. No p-value
        goes with it: the pooled logits of one token, and of tokens in one text, are not
        independent, so the test's own would be far too small.
    floor_share : float
        Share of p-values that are exactly 1: logits below the whole null distribution.
    ceiling_share : float
        Share of p-values that are exactly 0: logits above it, which every level rejects.
    tokens : int
        Tokens examined.
    quantiles : tuple of float
        The p-values' 0, 1, ..., 100 % quantiles; of a perfect null 0, 0.01, ..., 1.
    """

    layer: int
    ks_distance: float
    floor_share: float
    ceiling_share: float
    tokens: int
    quantiles: tuple[float, ...]


def with_health(null: NullModel, report: Sequence[LayerHealth]) -> NullModel:
    """Return the null model with its health, less the quantiles, in its header."""
    kept = [dataclasses.asdict(layer) for layer in report]
    for layer in kept:
        del layer["quantiles"]
    return dataclasses.replace(null, header=dataclasses.replace(null.header, health=kept))


def health(null: NullModel, logits_by_layer: Mapping[int, Tensor]) -> list[LayerHealth]:
    """Compare held-out router logits with their null model.

    With ``trim`` the null leaves out the experts that were called for, so a distance is intended.

    Parameters
    ----------
    null : NullModel
        The null model.
    logits_by_layer : mapping of layer index to Tensor [tokens, experts]
        From :func:`collect_router_logits`, on text that the null model has not seen.

    Raises
    ------
    ParameterError
        If the null model lacks one of the layers.
    NullModelError
        If logits are missing or not finite.
    """
    from scipy.stats import kstest  # half a second to import, which no evaluation needs

    report = []
    for layer, logits in sorted(logits_by_layer.items()):
        p = null.p_values(layer, logits).cpu().numpy()
        if p.size == 0 or not bool(logits.isfinite().all()):
            raise NullModelError(
                f"The held-out logits of layer {layer} are empty, NaN or infinite; "
                "use other text or look for the fault in the model."
            )
        samples = p.T if null.header.null_scope == "expert" else [p.ravel()]
        distance = np.mean([kstest(s, "uniform", method="asymp").statistic for s in samples])
        shares = float((p == 1).mean()), float((p == 0).mean())
        quantiles = tuple(np.quantile(p, np.linspace(0, 1, 101)).tolist())
        report.append(LayerHealth(layer, float(distance), *shares, len(logits), quantiles))
    return report
