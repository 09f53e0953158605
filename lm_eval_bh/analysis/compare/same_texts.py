"""Aligns the rows of two routing logs by their text."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np

from lm_eval_bh.errors import DataError
from lm_eval_bh.logged_rows import Ints, LoggedRow, LoggedRows

LEAST = 0.5  # share of the shorter row's tokens in a common prefix that makes two rows one text


@dataclass
class SameTokens:
    """Tokens that two logs have in common, each with all previous tokens.

    Attributes
    ----------
    a, b : int64 [tokens]
        Their places in either log.
    position : int64 [tokens]
        Positions in their request.
    left_out : tuple of int
        Numbers of tokens of A and B that the other log lacks.
    by_text : int
        Number of rows found by tokens, since the logs number documents differently.
    """

    a: Ints
    b: Ints
    position: Ints
    left_out: tuple[int, int]
    by_text: int


@dataclass
class _Pairs:
    a: list[Ints] = field(default_factory=list)
    b: list[Ints] = field(default_factory=list)
    position: list[Ints] = field(default_factory=list)


def same_tokens(a: LoggedRows, b: LoggedRows) -> SameTokens:
    """Align two logs by task, document and request, or else by text, checking token ids.

    Two rows are aligned up to the first token id that differs: everything after a different token
    is a different text.

    Raises
    ------
    DataError
        If less than half of the tokens of the smaller log are in the other.
    """
    named = {row[:5]: row for row in b.rows}
    texts = [tuple(b.ids(row).tolist()) for row in b.rows]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    ordered = [texts[place] for place in order]
    pairs, by_text, first_fault = _Pairs(), 0, ""
    for row in a.rows:
        ids = a.ids(row)
        other = named.get(row[:5])
        shared = 0 if other is None else _shared(ids, b.ids(other))
        if other is None or not _of_one_text(shared, row, other):
            if other is not None and not first_fault:
                first_fault = _fault(a, row, b, other, shared)
            # In sorted order, the text with the longest common beginning is a neighbour.
            near = bisect_left(ordered, tuple(ids.tolist()))
            some = [b.rows[order[place]] for place in (near - 1, near) if 0 <= place < len(order)]
            shared, other = max(
                ((_shared(ids, b.ids(one)), one) for one in some), key=lambda found: found[0]
            )
            if not _of_one_text(shared, row, other):
                continue
            by_text += 1
        pairs.a.append(np.arange(row.tokens.start, row.tokens.start + shared))
        pairs.b.append(np.arange(other.tokens.start, other.tokens.start + shared))
        pairs.position.append(np.arange(row.position, row.position + shared))
    totals = len(a.token_ids), len(b.token_ids)
    common = sum(map(len, pairs.a))
    if common < LEAST * min(totals):
        raise DataError(
            f"{a.folder} and {b.folder} are logs of different texts: of their {totals[0]} and "
            f"{totals[1]} tokens {common} have the same text before them"
            f"{first_fault}: give two logs of the same documents and tokenizer."
        )
    at_a, at_b = np.concatenate(pairs.a), np.concatenate(pairs.b)
    left_out = totals[0] - len(np.unique(at_a)), totals[1] - len(np.unique(at_b))
    return SameTokens(at_a, at_b, np.concatenate(pairs.position), left_out, by_text)


def _shared(a: Ints, b: Ints) -> int:
    """Return the length of the common prefix of two rows of token ids."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _of_one_text(shared: int, *rows: LoggedRow) -> bool:
    shorter: int = min(row.tokens.stop - row.tokens.start for row in rows)
    return shared >= LEAST * shorter


def _fault(a: LoggedRows, row: LoggedRow, b: LoggedRows, other: LoggedRow, at: int) -> str:
    """Return where a text differs, as part of a sentence."""
    ids = a.ids(row)[at], b.ids(other)[at]
    return (
        f" ({row} has the token id {ids[0]} at position {row.position + at} in one and {ids[1]} in "
        "the other)"
    )
