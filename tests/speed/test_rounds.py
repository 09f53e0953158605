"""The order of a speed phase: no position favours a configuration."""

from __future__ import annotations

import numpy as np

from lm_eval_bh.analysis.table.speed_phase import ratio_interval
from lm_eval_bh.speed.contestants import name_of
from lm_eval_bh.speed.rounds import orders, run_rounds
from lm_eval_bh.speed.task_text import decode_rows, prefill_batches


def test_every_round_has_everybody_once_in_an_order_of_its_own():
    drawn = list(orders(5, 40, seed=0))
    assert all(sorted(order) == list(range(5)) for order in drawn)
    assert len({tuple(order) for order in drawn}) > 20
    assert drawn == list(orders(5, 40, seed=0))
    assert drawn != list(orders(5, 40, seed=1))


def test_nobody_is_always_first():
    firsts = np.bincount([order[0] for order in orders(4, 400, seed=3)], minlength=4)
    assert firsts.min() > 70  # 100 each, less 3.5 standard deviations


def test_seconds_are_kept_by_contestant_not_by_turn():
    taken = []

    def turn(place):
        taken.append(place)
        return [place + 1.0, 10.0 * (place + 1)]

    found = run_rounds(3, 7, seed=0, turn=turn)
    assert [place for one in found for place in one["order"]] == taken
    assert all(one["seconds"] == [[1, 10], [2, 20], [3, 30]] for one in found)


def test_a_first_run_that_costs_much_more_favours_nobody():
    """A machine whose first turn of every round is 14 times as slow, as at the start of a process.

    Measured in sequence, the first would look 14 times as slow as an equal one; here none does.
    """
    place_in_round = iter(range(10**6))
    number = 4

    def turn(place):
        return [14.0 if next(place_in_round) % number == 0 else 1.0]

    found = run_rounds(number, 21, seed=0, turn=turn)
    seconds = np.array([one["seconds"] for one in found])[..., 0]
    for place in range(1, number):
        ratio, low, high = ratio_interval(seconds[:, 0], seconds[:, place])
        assert ratio == 1
        assert low <= 1 <= high


def test_a_configuration_has_one_name_whatever_the_order_of_its_arguments():
    one, other = {"alpha": 0.4, "max_k": 8}, {"max_k": 8, "alpha": 0.4, "dtype": "float32"}
    assert name_of(one) == name_of(other) == "alpha=0.4,max_k=8"


def test_batches_have_rows_of_one_length_and_no_padding():
    rows = [[n] * n for n in range(1, 12)]
    batches = prefill_batches(rows, 2, 3)
    assert [tuple(batch.shape) for batch in batches] == [(2, 10), (2, 8), (2, 4)]
    assert batches[0].tolist() == [[11] * 10, [10] * 10]
    assert [tuple(b.shape) for b in prefill_batches([[1, 2], [3]], 4, 3)] == [(4, 1)]


def test_rows_to_decode_are_the_text_one_after_the_other():
    assert decode_rows([[1, 2, 3], [4]], 2, 3).tolist() == [[1, 2, 3], [4, 1, 2]]
