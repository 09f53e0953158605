"""The errors of this package: messages say in one sentence what is wrong and how to fix it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from types import TracebackType


class BHError(Exception):
    """Base class of every error that this package raises on purpose."""


class ParameterError(BHError, ValueError):
    """A parameter is unknown, out of range, or contradicts another one."""


class UnreachableError(ParameterError):
    """No parameter of a selection rule gives the target mean number of experts."""


class NullModelError(BHError, ValueError):
    """A null model is missing, damaged, or belongs to another router."""


class PolicyError(BHError, ValueError):
    """A policy is missing, damaged, or made for another model."""


class ModelError(BHError, RuntimeError):
    """A model cannot be loaded, has no routers, or is in the wrong state."""


class RoutingError(BHError, RuntimeError):
    """Routing cannot continue, for example because router logits are not finite."""


class DataError(BHError, RuntimeError):
    """A data or log file is missing or damaged."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ``" (did you mean 'alpha'?)"``, or ``""`` if no name is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def show_as_one_sentence() -> None:
    """Show uncaught errors of this package as one sentence, without a traceback.

    A traceback through the harness does not help with a misspelt parameter. Other errors keep
    theirs, and ours have one with ``LMEVAL_LOG_LEVEL=DEBUG``. Notebooks do not use
    ``sys.excepthook``.
    """
    before = sys.excepthook
    if getattr(before, "shows_one_sentence", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, BHError) and os.environ.get("LMEVAL_LOG_LEVEL", "").upper() != "DEBUG":
            print(f"lm-eval-bh: error: {error}", file=sys.stderr)
        else:
            before(kind, error, trace)

    hook.shows_one_sentence = True  # type: ignore[attr-defined]
    sys.excepthook = hook
