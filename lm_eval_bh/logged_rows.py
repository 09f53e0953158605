"""The rows of a full routing log: the experts of each token that a model read.

``route-diff`` compares two logs; ``rule=replay`` serves one again. Both identify a token by itself
and all tokens before it in its row, which decide its routing, not by its position alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.files import as_path
from lm_eval_bh.schema import MANIFEST, TOKENS, UNUSED, read_manifest

Ints = NDArray[np.int64]

NO_ID = -1  # of a token whose id is missing in an imported trace
_KEYS = ("doc_id", "request", "repeat", "layer", "position")


class LoggedRow(NamedTuple):
    """One row that the model read: a request, a window of a long one, or a generation.

    Attributes
    ----------
    task : str
        Name of the task.
    document, request, repeat : int
        Numbers of the document, of its request, and of the repetition.
    position : int
        Position of the first token in the request.
    tokens : slice
        Its tokens within the log.
    """

    task: str
    document: int
    request: int
    repeat: int
    position: int
    tokens: slice

    def __str__(self) -> str:
        return f"{self.task}, document {self.document}"


@dataclass(frozen=True)
class LoggedRows:
    """A full log in memory.

    Attributes
    ----------
    folder : Path
        Folder of the log.
    rows : list of LoggedRow
        Rows in the order of their tokens.
    layers : int64 [layers]
        Numbers of the layers, ascending.
    token_ids : int64 [tokens]
        Token ids; :data:`NO_ID` if missing.
    experts : int16 [tokens, layers, k]
        Experts, the best first, padded with -1.
    weights : float32 [tokens, layers, k] or None
        Weights, 0 where unused; None if the log has none.
    loss : float32 [tokens]
        Loss in nats; NaN for tokens without a loss.
    """

    folder: Path
    rows: list[LoggedRow]
    layers: Ints
    token_ids: Ints
    experts: NDArray[np.int16]
    weights: NDArray[np.float32] | None
    loss: NDArray[np.float32]

    def ids(self, row: LoggedRow) -> Ints:
        """Return the token ids of a row."""
        return self.token_ids[row.tokens]


def read_logged_rows(path: Path | str) -> LoggedRows:
    """Read the full log of a run.

    Parameters
    ----------
    path : path
        The run's log, or a folder somewhere above it.

    Raises
    ------
    DataError
        If there is no log, or more than one; if it is damaged, or lacks token ids.
    """
    folder = find_log(path)
    try:
        columns = _columns(folder)
        found = _rows(folder, columns)
    except (ImportError, KeyError, OSError, ValueError, TypeError) as error:
        raise DataError(
            f"The log {folder} could not be read ({' '.join(str(error).split())[:200]}): run the "
            "evaluation again."
        ) from error
    if (found.token_ids == NO_ID).any():
        raise DataError(
            f"The log {folder} has no token ids, so its rows cannot be assigned to "
            "tokens: import a trace with token ids."
        )
    return found


def find_log(path: Path | str) -> Path:
    """Return the folder of the only full log in or below a folder.

    Raises
    ------
    DataError
        If there is none, or more than one.
    """
    path = as_path(path)
    if not path.is_dir():
        raise DataError(f"There is no folder {path}: use one with a log of log_routing=full.")
    full = [
        manifest.parent
        for manifest in sorted(path.rglob(MANIFEST))
        if any(name.startswith(f"{TOKENS}/") for name in read_manifest(manifest.parent)["files"])
    ]
    if not full:
        raise DataError(
            f"{path} has no log of every token: evaluate with log_routing=full and a log_dir, or "
            "import a trace."
        )
    if len(full) > 1:
        raise DataError(
            f"{path} has {len(full)} logs, such as {full[0]} and {full[1]}: name the folder of one."
        )
    return full[0]


def _columns(folder: Path) -> dict[str, Any]:
    """Return the columns of a log, one entry per token and layer; lists padded to ``[rows, k]``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [n for n in read_manifest(folder)["files"] if n.startswith(f"{TOKENS}/")]
    table = pa.concat_tables([pq.read_table(folder / name) for name in names]).combine_chunks()
    if not table.num_rows:
        raise ValueError("it has no tokens")

    def column(name: str) -> pa.Array:
        one = table.column(name)
        return one.chunk(0) if one.num_chunks == 1 else one.combine_chunks()

    for name in ("task", *_KEYS, "experts"):
        if column(name).null_count:
            raise ValueError(f"{name} is null in {column(name).null_count} rows")
    found: dict[str, Any] = {n: np.asarray(column(n).cast(pa.int64())) for n in _KEYS}
    tasks = column("task").cast(pa.string()).dictionary_encode()
    found["task"] = np.asarray(tasks.indices, dtype=np.int64)
    found["tasks"] = tasks.dictionary.to_pylist()
    found["token_id"] = np.asarray(column("token_id").cast(pa.int64()).fill_null(NO_ID))
    found["loss"] = np.full(table.num_rows, np.nan, dtype=np.float32)
    if "loss" in table.column_names:  # not in earlier logs
        found["loss"] = column("loss").to_numpy(zero_copy_only=False).astype(np.float32)
    lists = column("experts")
    counts = np.diff(np.asarray(lists.offsets))
    used = np.arange(max(counts.max(), 1)) < counts[:, None]
    found["experts"] = np.full(used.shape, UNUSED, dtype=np.int16)
    found["experts"][used] = np.asarray(lists.flatten().cast(pa.int16()))
    if (found["experts"][used] < 0).any():
        raise ValueError("it has an expert below 0")
    found["weights"] = None
    if column("weights").null_count == 0:
        found["weights"] = np.zeros(used.shape, dtype=np.float32)
        found["weights"][used] = np.asarray(column("weights").flatten())
    return found


def _rows(folder: Path, columns: dict[str, Any]) -> LoggedRows:
    """Sort a log by text and layer, keeping the written order of tokens."""
    texts = np.stack([columns[n] for n in ("task", "doc_id", "request", "repeat")])
    named, text = np.unique(texts, axis=1, return_inverse=True)
    layers, layer = np.unique(columns["layer"], return_inverse=True)
    text = text.reshape(-1)
    order = np.lexsort((layer, text))  # stable: keeps the written order
    # All layers of a pass have the same tokens, so each text is a block [layers, tokens].
    sizes = np.bincount(text, minlength=named.shape[1])
    per_layer = np.bincount(text * len(layers) + layer, minlength=named.shape[1] * len(layers))
    lengths, left = np.divmod(sizes, len(layers))
    if left.any() or (per_layer.reshape(-1, len(layers)) != lengths[:, None]).any():
        raise ValueError("a text differs in its tokens between layers")
    starts = np.cumsum(sizes) - sizes
    of_text = np.repeat(np.arange(len(sizes)), lengths)
    place = np.arange(len(of_text)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # [tokens, layers]: the rows of each token
    at = order[
        (starts[of_text] + place)[:, None] + np.arange(len(layers)) * lengths[of_text][:, None]
    ]
    for name in ("position", "token_id"):
        if (columns[name][at] != columns[name][at[:, :1]]).any():
            raise ValueError(f"layers differ in the {name} of a token")
    weights = columns["weights"]
    found = LoggedRows(
        folder,
        [],
        layers,
        columns["token_id"][at[:, 0]],
        columns["experts"][at],
        None if weights is None else weights[at],
        columns["loss"][at[:, 0]],
    )
    found.rows.extend(_cut(columns, named, of_text, columns["position"][at[:, 0]], found.loss))
    return found


def _cut(
    columns: dict[str, Any], named: Ints, of_text: Ints, position: Ints, loss: NDArray[np.float32]
) -> Iterator[LoggedRow]:
    """Yield the rows of texts as they were fed: each window of a long text is a row.

    The first token of a row has no loss, unless the whole text has none.
    """
    known = ~np.isnan(loss)
    scored = np.zeros(named.shape[1], dtype=bool)
    scored[of_text[known]] = True
    begins = np.ones(len(of_text), dtype=bool)
    begins[1:] = (of_text[1:] != of_text[:-1]) | (position[1:] != position[:-1] + 1)
    begins |= ~known & scored[of_text]
    edges = [*np.flatnonzero(begins).tolist(), len(of_text)]
    for start, end in pairwise(edges):
        task, document, request, repeat = named[:, of_text[start]].tolist()
        where = columns["tasks"][task], document, request, repeat, int(position[start])
        yield LoggedRow(*where, slice(start, end))
