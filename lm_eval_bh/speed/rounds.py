"""Who runs when: every contestant once a round, in an order drawn for that round."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from lm_eval_bh.schema import SpeedRound


def orders(number: int, rounds: int, seed: int) -> Iterator[list[int]]:
    """Yield for each round the places of the contestants in the order in which they run.

    Parameters
    ----------
    number : int
        Of contestants, which come in an order that does not depend on how they were given: the same
        set always gets the same rounds.
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
    """Give every contestant its turn in every round.

    Parameters
    ----------
    turn : callable
        Takes the place of a contestant and returns the seconds of each of its workloads.
    each_round : callable
        Called after each round.
    """
    found: list[SpeedRound] = []
    for order in orders(number, rounds, seed):
        seconds: dict[int, list[float]] = {place: list(turn(place)) for place in order}
        found.append({"order": order, "seconds": [seconds[place] for place in range(number)]})
        each_round()
    return found
