import time

import pytest
import torch

from lm_eval_bh.routing.fastest import fastest

CPU = torch.device("cpu")


def test_the_way_that_takes_least_is_found():
    ways = {"long": lambda: time.sleep(0.004), "short": lambda: None}
    assert fastest(ways, CPU, repeats=3, calls=2) == "short"
    assert fastest(dict(reversed(ways.items())), CPU, repeats=3, calls=2) == "short"


def test_every_way_is_called_in_turn_and_equally_often():
    called: list[str] = []
    fastest({name: lambda name=name: called.append(name) for name in "ab"}, CPU, 2, 3)
    assert "".join(called) == "aaabbb" * 4


@pytest.mark.parametrize("first", ["a", "b"])
def test_what_was_slow_once_is_not_the_slow_one(first):
    """The first call of a process pays for warm-up; two repeats do not count."""
    slow = iter([0.05])

    def warming():
        time.sleep(next(slow, 0.0))

    other = {"a": "b", "b": "a"}[first]
    ways = {first: warming, other: lambda: time.sleep(0.002)}
    assert fastest(ways, CPU, repeats=3, calls=1) == first
