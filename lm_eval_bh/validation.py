"""Compares JSON content with the TypedDict that describes it, for all readers."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

LARGEST = 2**63 - 1  # what numpy and Parquet can hold
SHOWN = 40  # characters of a value in a message

_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
_NAMES |= {type(None): "null", list: "a list", dict: "an object"}
_TYPES: dict[Any, set[type]] = {kind: {kind} for kind in (int, str, bool, type(None))}
_TYPES[float] = {int, float}


def mismatch(value: Any, kind: Any, place: str) -> str | None:
    """Return how a value differs from a type, or None if it matches.

    Parameters
    ----------
    value
        As :func:`json.loads` returns it.
    kind
        ``int``, ``float`` (which accepts integers), ``str``, ``bool``, ``None``, ``Any``,
        ``list[...]``, ``dict[str, ...]``, a union of them, or a TypedDict. Keys that a TypedDict
        does not name may have any value. Integers beyond 64 bits match no type.
    place : str
        Name of the value, such as ``config.bh``.

    Examples
    --------
    >>> mismatch({"files": [1]}, dict[str, list[str]], "the manifest")
    'the manifest.files[0] must be text, not 1'
    """
    if kind is Any:
        return None
    if typing.is_typeddict(kind):
        return _of_typed_dict(value, kind, place)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _of_union(value, inner, place)
    if origin is list and isinstance(value, list):
        if _all_of(value, inner[0]):
            return None
        elements = enumerate(value)
        found = (mismatch(element, inner[0], f"{place}[{i}]") for i, element in elements)
    elif origin is dict and isinstance(value, dict):
        items = value.items()
        found = (mismatch(element, inner[1], f"{place}.{name:.{SHOWN}}") for name, element in items)
    else:
        return None if _is(value, kind) else _wrong(value, (kind,), place)
    return next(filter(None, found), None)


def _of_typed_dict(value: Any, kind: Any, place: str) -> str | None:
    if not isinstance(value, dict):
        return _wrong(value, (dict,), place)
    if missing := sorted(kind.__required_keys__ - value.keys()):
        return f"{place} lacks {', '.join(missing)}"
    for name, inner in _fields(kind).items():
        if name in value and (found := mismatch(value[name], inner, f"{place}.{name}")):
            return found
    return None


def _of_union(value: Any, kinds: tuple[Any, ...], place: str) -> str | None:
    found = [mismatch(value, kind, place) for kind in kinds]
    if None in found:
        return None
    for kind, reason in zip(kinds, found, strict=True):
        if isinstance(value, _container(kind)):
            return reason  # the right kind, with something wrong inside
    return _wrong(value, kinds, place)


@functools.cache
def _fields(kind: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _container(kind: Any) -> Any:
    """Return list or dict for containers, and for other types a type without values."""
    if typing.is_typeddict(kind):
        return dict
    return origin if (origin := typing.get_origin(kind)) in (list, dict) else ()


def _is(value: Any, kind: Any) -> bool:
    if type(value) not in _TYPES.get(kind, ()):
        return False
    return type(value) is not int or -LARGEST <= value <= LARGEST


def _all_of(values: list[Any], kind: Any) -> bool:
    """Return whether all have one plain type, at C speed; False if uncertain."""
    found = set(map(type, values))
    if found == {int} and kind in (int, float):
        return bool(min(values) >= -LARGEST and max(values) <= LARGEST)
    return kind in _TYPES and int not in found and found <= _TYPES[kind]


def _wrong(value: Any, kinds: tuple[Any, ...], place: str) -> str:
    names = [_NAMES.get(_container(kind) or kind, "something else") for kind in kinds]
    return f"{place} must be {' or '.join(dict.fromkeys(names))}, not {shown(value)}"


def shown(value: Any) -> str:
    """Return a short text of any value for a message."""
    if isinstance(value, (list, dict)):
        return _NAMES[type(value)]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return f"an integer of {math.floor(math.log10(abs(value))) + 1} digits"
    text = repr(value) if value is not None else "null"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
