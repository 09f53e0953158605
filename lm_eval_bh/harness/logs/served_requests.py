"""The requests of one call of a request method: owners of rows, and losses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from lm_eval_bh.harness.logs.expected_rows import ExpectedRows, Place
from lm_eval_bh.harness.logs.ownership import Owner


class ServedRequests:
    """The instances of one call, with what is found out about them.

    Parameters
    ----------
    instances : sequence of Instance
        As lm-eval gives them: an instance occurs ``repeats`` times; further copies balance
        processes and have no owner.
    """

    def __init__(self, instances: Sequence[Any] = ()) -> None:
        seen: Counter[int] = Counter()
        self._instances: list[tuple[Any, int]] = []
        for instance in instances:
            self._instances.append((instance, seen[id(instance)]))
            seen[id(instance)] += 1
        self._windows: Iterator[Place] | None = None
        self._owners: list[Owner | None] = []
        self._scored_tokens: Counter[int] = Counter()  # by position
        self._waiting: dict[str, list[int]] = {}  # positions by prompt
        self._batch: list[str] = []

    def owner(self, position: int | None, offset: int = 0) -> Owner | None:
        """Return the owner of a request by its position; None for a copy or past the end."""
        if position is None or position >= len(self._instances):
            return None
        instance, repeat = self._instances[position]
        if repeat >= instance.repeats:
            return None
        return Owner(
            str(instance.task_name), int(instance.doc_id), int(instance.idx), repeat, offset
        )

    def expect_windows(self, places: Iterator[Place]) -> None:
        """Treat the next rows of :meth:`expected_rows` as windows at these places."""
        self._windows = places

    def expected_rows(self, requests: Sequence[Any], max_length: int, shared: bool) -> ExpectedRows:
        """Return the rows that HFLM will make of tokenised requests: see :class:`ExpectedRows`."""
        places: Iterable[Place] = ((position, 0) for position in range(len(requests)))
        owners: list[Owner | None] = []
        for (position, offset), (_, _, continuation) in zip(
            islice(self._windows or places, len(requests)), requests, strict=True
        ):
            if position is not None:
                self._scored_tokens[position] += len(continuation)
            owners.append(self.owner(position, offset))
        self._owners = owners
        return ExpectedRows(requests, owners, max_length, shared)

    def row_names(self, requests: Sequence[Any], shared: bool) -> list[tuple[str, Hashable]]:
        """Return task and row name of each request passed to :meth:`expected_rows`.

        Requests with equal names share a row.
        """
        return [
            (
                "" if owner is None else owner.task,
                tuple(context + continuation[:-1]) if shared else position,
            )
            for position, (owner, (_, context, continuation)) in enumerate(
                zip(self._owners, requests, strict=True)
            )
        ]

    def losses(self, log_likelihoods: Iterable[float]) -> Iterator[tuple[Owner, float]]:
        """Yield each owner and its loss in nats per scored token; empty documents have none."""
        for position, value in enumerate(log_likelihoods):
            owner = self.owner(position)
            if owner is not None and self._scored_tokens[position]:
                yield owner, -value / self._scored_tokens[position]

    def expect_prompts(self, positions: Iterable[int]) -> None:
        """Expect the prompts of the requests at these positions, in any order."""
        self._waiting = defaultdict(list)
        for position in positions:
            self._waiting[self._instances[position][0].args[0]].append(position)

    def note_batch(self, prompts: Sequence[str]) -> None:
        """Remember the prompts that the next call of ``generate`` continues."""
        self._batch = list(prompts)

    def take_batch(self) -> list[list[Owner]]:
        """Return the owners of every row of that call: one, or none."""
        owners = []
        for prompt in self._batch:
            waiting = self._waiting.get(prompt)
            owner = self.owner(waiting.pop(0)) if waiting else None
            owners.append([] if owner is None else [owner])
        self._batch = []
        return owners
