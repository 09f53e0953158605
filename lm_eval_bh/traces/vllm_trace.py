"""Reads what vLLM returns with ``--enable-return-routed-experts``.

A response of its OpenAI server, or a line that ``vllm run-batch`` wrote around one, has
``routed_experts`` in every choice. Later releases write the base64 text of a NumPy file: rows
``[hidden layers, k]`` for the tokens of prompt and answer except the last; with
``routed_experts_prompt_start``, or where prefixes are omitted, the prompt's first tokens have no
rows. Earlier releases write nested lists ``[MoE layers, k]`` for the answer's tokens, with the
prompt's in ``prompt_routed_experts`` beside the choices, -1 where the prefix cache answered, and
null for a preempted request. Token ids are present if requested with ``return_token_ids``. In
Python, ``CompletionOutput.routed_experts`` is the array itself, which ``numpy.save`` writes.

Sources: vLLM's documentation, training/routed_experts_replay (0.21) and features/routed_experts;
vllm-project/vllm pull requests 28284 and 57966; vllm/entrypoints/openai/run_batch.py.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import UNUSED
from lm_eval_bh.traces.integers import of_lists, of_numpy_file
from lm_eval_bh.traces.notes import Notes
from lm_eval_bh.traces.trace_document import TraceDocument
from lm_eval_bh.validation import mismatch, shown

Array = NDArray[Any]
MOST_ANSWERS = 2**15 - 1
SERVE = "serve with --enable-return-routed-experts"


class Usage(TypedDict, total=False):
    """Token counts of a request."""

    prompt_tokens: int | None
    completion_tokens: int | None


class Choice(TypedDict, total=False):
    """Fields that are read from an answer to a prompt."""

    index: int | None
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    routed_experts: Any


class _MayHave(TypedDict, total=False):
    prompt_token_ids: list[int] | None
    prompt_routed_experts: Any
    usage: Usage | None


class Response(_MayHave):
    """Fields that are read from a response of the server."""

    choices: list[Choice]


class BatchResponse(TypedDict, total=False):
    """Fields that are read from the response in a line of ``vllm run-batch``."""

    body: dict[str, Any] | None


class BatchLine(TypedDict, total=False):
    """Fields that are read from a line of ``vllm run-batch``."""

    custom_id: str | None
    response: BatchResponse | None


def read_vllm(files: Sequence[Path], first: int, notes: Notes) -> Iterator[TraceDocument]:
    """Yield the documents of traces: one per response and prompt, and one per ``.npy`` file.

    Parameters
    ----------
    files : sequence of Path
        A response or a list of them (``.json``), one per line (``.jsonl``), or an array (``.npy``).
    first : int
        Number of the first document.
    notes : Notes
        Filled with what was left out or aligned.

    Raises
    ------
    DataError
        If a file is damaged, or vLLM was not told to return the experts.
    """
    for file in files:
        if file.suffix == ".npy":
            experts = _array(file.read_bytes(), str(file))
            if not len(experts):
                notes.name(str(file), "it has no tokens and is left out.")
                continue
            yield TraceDocument.of(str(file), first, experts, buffer=True)
            first += 1
            continue
        for number, content in enumerate(_contents(file)):
            where = f"Response {number + 1} of {file}"
            found = _response(content, where, notes)
            if found is None:
                continue
            response, where = found
            for document in _documents(response, where, first, notes):
                yield document
                first = document.document + 1


def is_vllm(content: Any) -> bool:
    """Return whether vLLM wrote a line of a file."""
    return isinstance(content, dict) and ("choices" in content or "custom_id" in content)


def _contents(file: Path) -> Iterator[Any]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if file.suffix == ".jsonl":
                yield from (json.loads(line) for line in lines if line.strip())
                return
            content = json.load(lines)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} could not be read: {error}; record the trace again.") from error
    yield from content if isinstance(content, list) else [content]


def _response(content: Any, where: str, notes: Notes) -> tuple[Response, str] | None:
    """Return a response and its name for messages; None for a failed request."""
    if isinstance(content, dict) and "choices" not in content and "custom_id" in content:
        _expect(mismatch(content, BatchLine, "the line"), where)
        where = f"{where} (custom_id {shown(content['custom_id'])})"
        content = (content.get("response") or {}).get("body")
        if not isinstance(content, dict) or "choices" not in content:
            notes.name(where, "the request failed, or is not a completion; it is left out.")
            return None
    if isinstance(content, dict) and "choices" not in content and content.get("error"):
        notes.name(where, "the request failed; it is left out.")
        return None
    if not isinstance(content, dict) or not isinstance(content.get("choices"), list):
        raise DataError(f"{where} has no choices: save the complete response of vLLM's server.")
    _expect(mismatch(content, Response, "the response"), where)
    return cast(Response, content), where


def _expect(reason: str | None, where: str) -> None:
    if reason is not None:
        raise DataError(f"{where} is damaged: {reason}; record the trace again.")


def _documents(
    response: Response, where: str, document: int, notes: Notes
) -> Iterator[TraceDocument]:
    """Yield the choices as documents: answers to one prompt share a document."""
    choices = response["choices"]
    if not choices:
        notes.name(where, "it has no choices and is left out.")
        return
    if all("routed_experts" not in choice for choice in choices):
        raise DataError(f"{where} has no routed_experts: {SERVE}.")
    indices = [index for choice in choices if (index := choice.get("index")) is not None]
    if len(set(indices)) < len(indices) or any(not 0 <= i <= MOST_ANSWERS for i in indices):
        raise DataError(
            f"{where} is damaged: each of its choices must have an index from 0 to {MOST_ANSWERS}; "
            "record the trace again."
        )
    usage = response.get("usage") or {}
    if len(choices) > 1:
        usage = {}  # counts all choices together
    answers: dict[tuple[int, ...], int] = {}  # prompt -> the number of its last answer
    if len(indices) == len(choices):
        choices = sorted(choices, key=lambda choice: choice["index"] or 0)
    for place, choice in enumerate(choices):
        prompt = choice.get("prompt_token_ids")
        if prompt is None:
            prompt = response.get("prompt_token_ids")
        ids = tuple(prompt or [])
        if ids not in answers and len(choices) > 1 and not ids:
            notes.name(
                where, "its choices have no prompt_token_ids: they count as answers to one prompt."
            )
        repeat = answers[ids] = answers.get(ids, -1) + 1
        name = where if len(choices) == 1 else f"Choice {place + 1} of {where}"
        if choice.get("routed_experts") is None:
            notes.name(
                name,
                "its routed_experts are null, as for a preempted request; it is left out "
                f"(if all are, {SERVE}).",
            )
            continue
        experts = _array(choice["routed_experts"], name)
        of_prompt = response.get("prompt_routed_experts")
        start, experts = _Lengths(
            name,
            _length(prompt, usage.get("prompt_tokens"), "prompt", name),
            _length(choice.get("token_ids"), usage.get("completion_tokens"), "answer", name),
            isinstance(choice["routed_experts"], str),
            notes,
        ).aligned(experts, None if of_prompt is None else _array(of_prompt, name))
        if not len(experts):
            notes.name(name, "it has no tokens and is left out.")
            continue
        answer = choice.get("token_ids")
        tokens = None
        if prompt is not None and start + len(experts) <= len(prompt) + len(answer or []):
            tokens = (prompt + (answer or []))[start : start + len(experts)]
        yield TraceDocument.of(
            name,
            document + list(answers).index(ids),
            experts,
            positions=np.arange(start, start + len(experts)),
            tokens=tokens,
            repeat=repeat,
            buffer=True,
        )


def _length(ids: list[int] | None, used: int | None, what: str, where: str) -> int | None:
    """Return the number of tokens of a prompt or an answer, where the response says."""
    if ids is not None and used is not None and len(ids) != used:
        raise DataError(
            f"{where} is damaged: its {what} has {len(ids)} token ids, but usage says {used} "
            "tokens; record the trace again."
        )
    return used if ids is None else len(ids)


@dataclass(frozen=True)
class _Lengths:
    """Lengths of prompt and answer of a choice, by which its rows are assigned."""

    where: str
    prompt: int | None
    answer: int | None
    text: bool  # base64, as in later releases
    notes: Notes

    def aligned(self, experts: Array, of_prompt: Array | None) -> tuple[int, Array]:
        """Return the position of the first row, and the rows.

        Raises
        ------
        DataError
            If there are more rows than tokens, or rows are missing without a reason.
        """
        rows = len(experts)
        if of_prompt is not None:
            if of_prompt.ndim != 3 or experts.ndim != 3 or _shape(of_prompt) != _shape(experts):
                raise DataError(
                    f"{self.where} is damaged: the experts of prompt and answer differ in shape, "
                    f"{list(of_prompt.shape)} and {list(experts.shape)}; record the trace again."
                )
            if self.prompt is not None and len(of_prompt) != self.prompt:
                raise self._wrong(len(of_prompt), "prompt", self.prompt)
            if self.answer is not None and rows > self.answer:
                raise self._wrong(rows, "answer", self.answer)
            self._note_fewer(rows)
            return 0, np.concatenate([of_prompt, experts])
        if self.prompt is None:
            self.notes.name(
                self.where,
                "it has no token ids of the prompt, so positions are counted from its first row "
                "(ask with return_token_ids).",
            )
            if not self.text and self.answer is not None and rows <= self.answer:
                self.notes.name(self.where, "its rows are those of the answer alone.")
            return 0, experts
        if not self.text and self.answer is not None and rows <= self.answer:
            self.notes.name(self.where, "its rows are those of the answer alone.")
            self._note_fewer(rows)
            return self.prompt, experts
        if self.answer is None:
            if rows < self.prompt:
                raise self._wrong(rows, "prompt", self.prompt)
            self.notes.name(
                self.where,
                "it has no token ids of the answer, so its first row is assumed to be the prompt's "
                "first token (ask with return_token_ids).",
            )
            return 0, experts
        forwarded = self.prompt + max(self.answer - 1, 0)  # the last token has no pass of its own
        if rows > forwarded:
            raise self._wrong(rows, "prompt and answer without its last", forwarded)
        if rows < self.answer:
            raise self._wrong(rows, "answer", self.answer)
        if rows < forwarded:
            self.notes.count(
                forwarded - rows,
                "tokens of prompts",
                "have no experts, as with routed_experts_prompt_start or an omitted prefix: "
                "rows are those of the last tokens.",
            )
        return forwarded - rows, experts

    def _note_fewer(self, rows: int) -> None:
        self.notes.count((self.answer or rows) - rows, "last tokens of answers", "have no experts.")

    def _wrong(self, rows: int, what: str, tokens: int) -> DataError:
        return DataError(
            f"{self.where} is damaged: {rows} rows of experts do not fit {tokens} tokens of its "
            f"{what}; record the trace again with return_token_ids."
        )


def _shape(experts: Array) -> tuple[int, ...]:
    return experts.shape[1:]


def _array(value: Any, where: str) -> Array:
    """Return the array in nested lists, a NumPy file, or the base64 text of one."""
    try:
        if isinstance(value, str):
            value = base64.b64decode(value, validate=True)
        found = of_numpy_file(value) if isinstance(value, bytes) else of_lists(value, 3)
    except (binascii.Error, ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{where} is damaged: its routed_experts must be an integer array [tokens, layers, k] "
            f"({error}); record the trace again."
        ) from error
    return _signed(found)


def _signed(experts: Array) -> Array:
    """Return experts with -1 restored where an unsigned type wrapped it.

    The largest 8-bit number may also be an expert: it is one where a row names it once.
    """
    if experts.dtype.kind != "u" or experts.dtype.itemsize > 2 or experts.ndim != 3:
        return experts
    largest = experts == np.iinfo(experts.dtype).max
    if experts.dtype.itemsize == 1:
        largest &= largest.sum(-1, keepdims=True) > 1
    return np.where(largest, UNUSED, experts.astype(np.int32))
