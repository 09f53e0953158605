"""Finds the logged experts of a forward pass's tokens by their text.

A token's routing depends on all tokens before it, so it is found by the token ids of its row up to
it, in a tree of all rows of the log. Documents and positions are not used: only an evaluation knows
them, whereas ``generate`` or a training loop does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_bh.errors import DataError, ParameterError, RoutingError
from lm_eval_bh.logged_rows import Ints, LoggedRow, LoggedRows, read_logged_rows
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.routers import Router

READ = "_read_before_replay"  # attribute of a cache, which its copies keep
Paths = list[list[int]]  # per row, the places of its tokens in the log
ROOT = NO_TOKEN = -1
SHOWN = 6  # token ids shown in a message


class Routes:
    """The experts of a log.

    Parameters
    ----------
    log : LoggedRows
        The log; of repeated texts, the first one serves.
    layers : sequence of int
        Layers of the log, one per router of the model.
    num_experts : int
        Experts per layer.
    """

    def __init__(self, log: LoggedRows, layers: Sequence[int], num_experts: int) -> None:
        self.folder, self.num_experts = log.folder, num_experts
        self._columns = np.searchsorted(log.layers, layers).tolist()
        experts = np.pad(log.experts, [(0, 1), (0, 0), (0, 0)], constant_values=-1)  # and no token
        experts[experts < 0] = num_experts
        self._experts = torch.from_numpy(experts)
        self._next: dict[int, int] = {}  # (previous token, id) -> token
        for row in log.rows:
            if _begins(log, row):
                before = ROOT
                for place, token in enumerate(log.ids(row).tolist(), start=row.tokens.start):
                    before = self._next.setdefault(_key(before, token), place)

    def places(
        self, input_ids: Tensor | None, real: Tensor | None, cache: Any
    ) -> tuple[Tensor, Paths]:
        """Return the places of a pass's tokens in the log, and those of everything read so far.

        Parameters
        ----------
        input_ids : Tensor or None
            int64 ``[rows, length]``.
        real : Tensor or None
            bool ``[rows * length]``, False for padding, which has no place.
        cache : object or None
            The model's cache.

        Returns
        -------
        Tensor, Paths
            int64 ``[rows * length]``; :func:`remember` them with the cache that the pass returns.

        Raises
        ------
        RoutingError
            If the log lacks a token, or the tokens are unknown.
        """
        if input_ids is None:
            raise RoutingError("rule=replay finds tokens by their ids: give the model input_ids.")
        start = 0 if cache is None else int(cache.get_seq_length())
        read: Paths = getattr(cache, READ, None) or [[]] * len(input_ids)
        if len(read) != len(input_ids) or any(len(row) < start for row in read):
            raise RoutingError(
                f"The cache holds {start} tokens that were read without rule=replay, so it does "
                "not know which text continues: begin with an empty cache."
            )
        paths, found = [row[:start] for row in read], []
        text = torch.ones_like(input_ids) if real is None else real.view_as(input_ids)
        for path, ids, known in zip(paths, input_ids.tolist(), text.tolist(), strict=True):
            before = path[-1] if path else ROOT
            for place, (token, is_text) in enumerate(zip(ids, known, strict=True)):
                if is_text:
                    after = self._next.get(_key(before, token))
                    if after is None:
                        raise self._lacks(token, start + place, ids[:place])
                    before = after
                found.append(before if is_text else NO_TOKEN)
                path.append(before)
        return torch.tensor(found), paths

    def recorded(self, layer: int, places: Tensor | None, device: torch.device) -> Tensor:
        """Return the experts of a layer's tokens, int64 ``[tokens, k]``, ``num_experts`` if unused.

        Raises
        ------
        RoutingError
            If the tokens are unknown.
        """
        if places is None:
            raise RoutingError(
                "A layer was called outside of its model, so rule=replay cannot tell which "
                "tokens it serves: call the model."
            )
        return self._experts[places, self._columns[layer]].to(device, torch.int64)

    def _lacks(self, token: int, place: int, before: list[int]) -> RoutingError:
        shown = " ".join(map(str, before[-SHOWN:]))
        # Batched generation feeds finished rows until all have ended, which no log holds.
        hint = "" if before or not place else "; replay generations one row at a time"
        return RoutingError(
            f"The log {self.folder} does not have the token with the id {token} at place {place} of"
            f" its row, after {shown or 'nothing'}: rule=replay serves the texts that were logged, "
            f"with the same tasks, tokenizer and max_length{hint}."
        )


def remember(cache: Any, paths: Paths) -> None:
    """Keep the paths of a cache's tokens with the cache, as long as it and its copies live."""
    if cache is not None:
        setattr(cache, READ, paths)


def routes_for(config: RoutingConfig, routers: Sequence[Router]) -> Routes | None:
    """Return the routes that a configuration replays; None without a replay.

    Raises
    ------
    ParameterError
        If no log is named, or it belongs to another model.
    DataError
        If the log cannot be read.
    """
    if not config.method.recorded:
        return None
    if config.routes is None:
        raise ParameterError(f"rule={config.rule} needs the folder of a full log: give routes=.")
    log, experts = read_logged_rows(config.routes), routers[0].num_experts
    if (most := int(log.experts.max())) >= experts:
        raise ParameterError(
            f"routes={config.routes} has an expert {most}, and the model has {experts} experts per "
            "layer: give a log of this model."
        )
    if (most := log.experts.shape[-1]) > config.max_k:
        raise ParameterError(
            f"routes={config.routes} has up to {most} experts per token, and max_k is "
            f"{config.max_k}: give max_k={most}."
        )
    return Routes(log, _layers(config, log.layers, len(routers)), experts)


def _layers(config: RoutingConfig, logged: Ints, routers: int) -> list[int]:
    """Return the log's layer of each router; engines may also count layers without routers."""
    if len(logged) == routers:
        return [int(layer) for layer in logged]
    if missing := sorted(set(config.select_layers(routers)) - set(logged.tolist())):
        raise DataError(
            f"routes={config.routes} has the layers {logged.tolist()} and lacks layer {missing[0]} "
            f"of the model's {routers}: log all layers, or replay some with layers=."
        )
    return list(range(routers))


def _begins(log: LoggedRows, row: LoggedRow) -> bool:
    """Return whether a row starts a text or window; traces may lack the start of a text."""
    return row.position == 0 or not np.isnan(log.loss[row.tokens]).all()


def _key(before: int, token: int) -> int:
    return (before + 1 << 32) + token
