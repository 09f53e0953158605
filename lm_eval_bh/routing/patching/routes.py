"""Which experts a log has for the tokens of a forward pass, found by their text.

All tokens before a token decide its routing, so it is found by the ids of its row up to it, in a
tree of all rows of the log. Neither documents nor positions are asked for: they are known to an
evaluation alone, and whoever runs the model, ``generate`` or a training loop, need not tell them.
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

READ = "_read_before_replay"  # where a cache keeps what it holds, and copies of it do too
Paths = list[list[int]]  # of each row, where each of its tokens stands in the log
ROOT = NO_TOKEN = -1
SHOWN = 6  # token ids of a text in a message


class Routes:
    """The experts of a log.

    Parameters
    ----------
    log : LoggedRows
        Of a text that comes more than once, the first time serves.
    layers : sequence of int
        Of the log, one for each router of the model.
    num_experts : int
        Of a layer.
    """

    def __init__(self, log: LoggedRows, layers: Sequence[int], num_experts: int) -> None:
        self.folder, self.num_experts = log.folder, num_experts
        self._columns = np.searchsorted(log.layers, layers).tolist()
        experts = np.pad(log.experts, [(0, 1), (0, 0), (0, 0)], constant_values=-1)  # and no token
        experts[experts < 0] = num_experts
        self._experts = torch.from_numpy(experts)
        self._next: dict[int, int] = {}  # from the token before and an id to the token
        for row in log.rows:
            if _begins(log, row):
                before = ROOT
                for place, token in enumerate(log.ids(row).tolist(), start=row.tokens.start):
                    before = self._next.setdefault(_key(before, token), place)

    def places(
        self, input_ids: Tensor | None, real: Tensor | None, cache: Any
    ) -> tuple[Tensor, Paths]:
        """Return where the tokens of a pass stand in the log, and all that was read until then.

        Parameters
        ----------
        input_ids : Tensor or None
            int64 ``[rows, length]``.
        real : Tensor or None
            bool ``[rows * length]``, False for padding, which stands nowhere.
        cache : object or None
            What the model has read before.

        Returns
        -------
        Tensor, Paths
            int64 ``[rows * length]``; :func:`remember` them with the cache that the pass returns.

        Raises
        ------
        RoutingError
            If the log lacks a token, or nobody knows which tokens these are.
        """
        if input_ids is None:
            raise RoutingError("rule=replay finds tokens by their ids: give the model input_ids.")
        start = 0 if cache is None else int(cache.get_seq_length())
        read: Paths = getattr(cache, READ, None) or [[]] * len(input_ids)
        if len(read) != len(input_ids) or any(len(row) < start for row in read):
            raise RoutingError(
                f"The cache holds {start} tokens that nobody saw being read, so rule=replay does "
                "not know what text goes on: begin with an empty cache."
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
            If nobody knows which tokens these are.
        """
        if places is None:
            raise RoutingError(
                "A layer was called outside of its model, so rule=replay does not know which "
                "tokens it serves: call the model."
            )
        return self._experts[places, self._columns[layer]].to(device, torch.int64)

    def _lacks(self, token: int, place: int, before: list[int]) -> RoutingError:
        shown = " ".join(map(str, before[-SHOWN:]))
        # Whoever generates in batches runs rows on until all have ended, and no log has that.
        hint = "" if before or not place else "; replay generations one row at a time"
        return RoutingError(
            f"The log {self.folder} does not have the token with the id {token} at place {place} of"
            f" its row, after {shown or 'nothing'}: rule=replay serves the texts that were logged, "
            f"with the same tasks, tokenizer and max_length{hint}."
        )


def remember(cache: Any, paths: Paths) -> None:
    """Keep with a cache what was read into it: it dies with the cache, and goes into its copies."""
    if cache is not None:
        setattr(cache, READ, paths)


def routes_for(config: RoutingConfig, routers: Sequence[Router]) -> Routes | None:
    """Return the routes that a configuration replays; None if it replays none.

    Raises
    ------
    ParameterError
        If no log is named, or it is of another model.
    DataError
        If it cannot be read.
    """
    if not config.method.recorded:
        return None
    if config.routes is None:
        raise ParameterError(f"rule={config.rule} needs the folder of a full log: give routes=.")
    log, experts = read_logged_rows(config.routes), routers[0].num_experts
    if (most := int(log.experts.max())) >= experts:
        raise ParameterError(
            f"routes={config.routes} has an expert {most}, and the model has {experts} experts in "
            "a layer: give a log of this model."
        )
    if (most := log.experts.shape[-1]) > config.max_k:
        raise ParameterError(
            f"routes={config.routes} has up to {most} experts a token, and max_k is "
            f"{config.max_k}: give max_k={most}."
        )
    return Routes(log, _layers(config, log.layers, len(routers)), experts)


def _layers(config: RoutingConfig, logged: Ints, routers: int) -> list[int]:
    """Return the log's layer of each router; engines may count layers without one too."""
    if len(logged) == routers:
        return [int(layer) for layer in logged]
    if missing := sorted(set(config.select_layers(routers)) - set(logged.tolist())):
        raise DataError(
            f"routes={config.routes} has the layers {logged.tolist()} and lacks layer {missing[0]} "
            f"of the model's {routers}: log all layers, or replay some with layers=."
        )
    return list(range(routers))


def _begins(log: LoggedRows, row: LoggedRow) -> bool:
    """Whether a row is a text from its begin, or a window; a trace may lack the begin of a text."""
    return row.position == 0 or not np.isnan(log.loss[row.tokens]).all()


def _key(before: int, token: int) -> int:
    return (before + 1 << 32) + token
