"""Reads what vLLM returns with ``--enable-return-routed-experts``.

A response of its OpenAI server has ``routed_experts`` in every choice: of later releases the
base64 text of a NumPy file, whose rows are the tokens of prompt and answer but the last; of earlier
ones nested lists of the answer's tokens, with those of the prompt in ``prompt_routed_experts``
beside the choices and -1 where the prompt's cache answered. Token ids are there if they were asked
for with ``return_token_ids``. From Python, ``CompletionOutput.routed_experts`` is the array itself,
which ``numpy.save`` writes. Rows are ``[MoE layers, k]``.

Sources: vLLM's documentation, training/routed_experts_replay (0.21) and training/routed_experts;
vllm-project/vllm pull request 28284; vllm-project/router pull request 184.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.traces.trace_document import TraceDocument

Array = NDArray[Any]


def read_vllm(file: Path, first: int) -> Iterator[TraceDocument]:
    """Yield the documents of a trace: one a response, and one of a ``.npy`` file.

    Parameters
    ----------
    file : Path
        A response or a list of them (``.json``), one a line (``.jsonl``), or an array (``.npy``).
    first : int
        Number of the first document.

    Raises
    ------
    DataError
        If it is damaged, or vLLM was not asked for the experts.
    """
    if file.suffix == ".npy":
        document = TraceDocument.of(str(file), first, _array(file.read_bytes(), str(file)))
        if document is not None:
            yield document
        return
    for number, response in enumerate(_responses(file)):
        yield from _documents(response, f"Response {number + 1} of {file}", first + number)


def _responses(file: Path) -> Iterator[Any]:
    try:
        with file.open(encoding="utf-8") as lines:
            if file.suffix == ".jsonl":
                yield from (json.loads(line) for line in lines if line.strip())
                return
            content = json.load(lines)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} could not be read: {error}; record the trace again.") from error
    yield from content if isinstance(content, list) else [content]


def _documents(response: Any, where: str, document: int) -> Iterator[TraceDocument]:
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise DataError(f"{where} has no choices: save what vLLM's server answers.")
    for repeat, choice in enumerate(choices):
        if choice.get("routed_experts") is None:
            raise DataError(
                f"{where} has no routed_experts: serve with --enable-return-routed-experts."
            )
        experts = _array(choice["routed_experts"], where)
        prompt = _ids(choice.get("prompt_token_ids") or response.get("prompt_token_ids"), where)
        answer = _ids(choice.get("token_ids"), where)
        start = 0
        if response.get("prompt_routed_experts") is not None:
            of_prompt = _array(response["prompt_routed_experts"], where)
            if of_prompt.ndim != 3 or of_prompt.shape[1:] != experts.shape[1:]:
                raise DataError(
                    f"{where} is damaged: prompt and answer have experts of other shapes, "
                    f"{list(of_prompt.shape)} and {list(experts.shape)}; record the trace again."
                )
            experts = np.concatenate([of_prompt, experts])
        elif prompt and answer and len(experts) == len(answer) and len(prompt) > 1:
            start = len(prompt)  # of the answer alone
        tokens = (prompt + answer)[start : start + len(experts)]
        found = TraceDocument.of(
            where,
            document,
            experts,
            positions=np.arange(start, start + len(experts)),
            tokens=tokens if len(tokens) == len(experts) else None,
            repeat=repeat,
        )
        if found is not None:
            yield found


def _ids(value: Any, where: str) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise DataError(f"{where} is damaged: token ids must be integers; record the trace again.")
    return value


def _array(value: Any, where: str) -> Array:
    """Return the array of nested lists, of a NumPy file, or of the base64 text of one."""
    try:
        if isinstance(value, str):
            value = base64.b64decode(value, validate=True)
        if isinstance(value, bytes):
            return _numpy_file(value)
        return np.array(value, dtype=None if value else np.int64)
    except (binascii.Error, ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{where} is damaged: its routed_experts are no array ({error}); record the trace "
            "again."
        ) from error


def _numpy_file(content: bytes) -> Array:
    """Return the array of a NumPy file, whose header is believed only where the bytes are there."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"NumPy format {version}")
    read = np.lib.format.read_array_header_1_0
    if version == (2, 0):
        read = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    left = len(content) - stream.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"{dtype} {list(shape)} in {left} bytes")
    found = np.frombuffer(content, dtype, offset=stream.tell())
    return found.reshape(shape, order="F" if fortran else "C")
