"""Keeps lm-eval's request cache from answering for a different routing.

``--use_cache`` looks answers up by the request alone. A cache filled at another alpha would answer
silently for this one, so the cache is marked with the routing that filled it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sqlitedict import SqliteDict

from lm_eval_bh.errors import ParameterError

MARK = "lm_eval_bh routing"


class CountingCache(SqliteDict):
    """A cache that reports every request that it answers."""

    on_hit: Callable[[], None]

    def __contains__(self, key: object) -> bool:
        """Look a request up; lm-eval asks once for each."""
        found = bool(super().__contains__(key))
        if found:
            self.on_hit()
        return found


def guard(cache: Any, routing: dict[str, Any], on_hit: Callable[[], None]) -> None:
    """Mark a new cache with the routing, refuse another routing's, and count its answers.

    Parameters
    ----------
    cache : SqliteDict
        lm-eval's cache.
    routing : dict
        Everything that answers depend on, as plain values.
    on_hit : callable
        Called for every request that the cache answers.

    Raises
    ------
    ParameterError
        If the cache was filled under another routing, or by another model class.
    """
    mine = json.dumps(routing, sort_keys=True)
    found = cache.get(MARK)
    if found is None and len(cache) == 0:
        cache[MARK] = mine
    elif found != mine:
        raise ParameterError(
            f"The cache {cache.filename} was filled {_difference(found, routing)}: "
            "give --use_cache another path."
        )
    cache.on_hit = on_hit
    cache.__class__ = CountingCache  # lm-eval holds this object, so it cannot be wrapped


def _difference(found: str | None, routing: dict[str, Any]) -> str:
    if found is None:
        return "by another model than hf-bh"
    before = json.loads(found)
    name = next(
        name for name in sorted({*before, *routing}) if before.get(name) != routing.get(name)
    )
    return f"with {name}={before.get(name)!r}, and this run has {name}={routing.get(name)!r}"
