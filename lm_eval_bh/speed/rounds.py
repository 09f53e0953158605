"""Rounds: every contestant runs once per round, in a random order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from lm_eval_bh.schema import SpeedRound


def orders(number: int, rounds: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of contestants in each round.

    Parameters
    ----------
    number : int
        Number of contestants, whose order does not depend on how they were given: equal sets get
        equal rounds.
    """
    generator = random.Random(seed)
    for _ in range(rounds):
        order = list(range(number))
        generator.shuffle(order)
        yield order


def run_rounds(
    number: int,
    rounds: int,
    seed: int,
    turn: Callable[[int], Sequence[float]],
    each_round: Callable[[], None] = lambda: None,
) -> list[SpeedRound]:
    """Run every contestant once in every round.

    Parameters
    ----------
    turn : callable
        Takes the index of a contestant and returns the seconds of its workloads.
    each_round : callable
        Called after each round.
    """
    found: list[SpeedRound] = []
    for order in orders(number, rounds, seed):
        seconds: dict[int, list[float]] = {place: list(turn(place)) for place in order}
        found.append({"order": order, "seconds": [seconds[place] for place in range(number)]})
        each_round()
    return found
