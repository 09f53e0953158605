"""Identifies an evaluation's documents, so that only runs on equal ones are compared.

A request knows its document's place among those evaluated, not its id in the task: with lm-eval's
``--samples`` these differ. The hash is the one that lm-eval writes into its samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string

from lm_eval_bh.schema import Sample


class EvaluatedDocuments:
    """The documents of one evaluation.

    Attributes
    ----------
    hashes : dict
        Task -> place of the document among those evaluated -> hash.
    """

    def __init__(self) -> None:
        self.hashes: dict[str, dict[int, str]] = {}
        self._hidden = False

    def add(self, requests: Iterable[Any]) -> None:
        """Record the documents of lm-eval's instances."""
        for request in requests:
            of_task = self.hashes.setdefault(str(request.task_name), {})
            if request.doc_id not in of_task:
                of_task[int(request.doc_id)] = _hash(request.doc)

    def collect(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Add the documents of other processes, from ``documents`` in their states."""
        for state in states:
            for task, of_task in state["documents"].items():
                self.hashes.setdefault(task, {}).update(of_task)
            self._hidden |= state["cached_requests"] > 0

    def name(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        """Add the document's hash to every sample of a log."""
        for task, some in samples.items():
            for sample in some:
                if found := self.hashes.get(task, {}).get(sample["sample_id"]):
                    sample["doc_hash"] = found

    def digests(self, cached_requests: int = 0) -> dict[str, str]:
        """Return a digest per task that is equal for evaluations of the same documents.

        Their order does not matter. Nothing is returned if a cache has answered requests: the model
        has not seen these, and does not know their documents.
        """
        if cached_requests or self._hidden:
            return {}
        return {
            task: hashlib.sha256("".join(sorted(of_task.values())).encode()).hexdigest()
            for task, of_task in sorted(self.hashes.items())
        }


def _hash(document: Any) -> str:
    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))
