"""Measures the methods of a league: each is solved for each mean, and scored on unseen text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from lm_eval_bh.errors import BHError, ParameterError
from lm_eval_bh.policies.league.standing import SUMS, Standings
from lm_eval_bh.policies.paired_differences import RESAMPLES
from lm_eval_bh.policies.tuning.candidates import Family, named, published, static
from lm_eval_bh.policies.tuning.journal import Row
from lm_eval_bh.policies.tuning.search import FINALISTS, NEAR, Search, check_mean
from lm_eval_bh.policies.tuning.subject import CONFIRMATION, Subject
from lm_eval_bh.routing.methods import METHODS

FORMAT_VERSION = 1
ALL = "all"
LIBRARIES = ("lm-eval-bh", "torch", "transformers")
JOURNAL = "measurements.json"


def families_of(methods: str) -> list[Family] | None:
    """Return what is asked for by names that are joined by commas; None where that is ``all``.

    Raises
    ------
    ParameterError
        If a name is unknown, given twice, or there is none.
    """
    if methods.strip() == ALL:
        return None
    names = [name for part in methods.split(",") if (name := " ".join(part.split()))]
    if not names:
        raise ParameterError(
            f"There is no method to measure: give {ALL}, or names joined by commas."
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ParameterError(f"The methods name {twice!r} twice: name it once.")
    return [named(name) for name in names]


def compete(
    subject: Subject,
    targets: Sequence[float],
    families: Sequence[Family] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure families at means, and compare them.

    Parameters
    ----------
    subject : Subject
        The model and the texts; rows are scored on its confirmation text.
    targets : sequence of float
        Mean numbers of experts a token.
    families : sequence of Family, optional
        What to measure; by default every method as it declares itself, and what a search on
        validation text finds best among statistics and gains.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    dict
        The content of ``league.json``, see
        :class:`~lm_eval_bh.policies.league.league_file.LeagueFile`.

    Raises
    ------
    ParameterError
        If a mean is out of range or given twice.
    """
    for target in targets:
        check_mean(target, subject.native)
    if len(set(targets)) < len(targets):
        raise ParameterError("The targets name a mean twice: name it once.")
    search = Search(subject, progress=progress)
    entries = []
    for target in targets:
        asked = families
        if asked is None:
            best = search.finalists(target, FINALISTS)
            asked = list({family.name: family for family in (*published(), *best)}.values())
        search.expect(len(asked))
        entries += [_entry(search, family, target) for family in asked]
    native = search.run(CONFIRMATION, static(), static().at(subject.native, subject.native), True)
    means = [entry["mean_experts"] for entry in entries if entry["failed"] is None]
    rungs = {
        str(k): _sums(search.run(CONFIRMATION, static(), static().at(k, subject.native), True))
        for k in _rungs(means or list(targets), subject.native)
    }
    search.close()
    tokens = [int(size) for size in subject.documents[CONFIRMATION].tokens]
    standings = Standings(tokens, _sums(native), rungs)
    for entry in entries:
        if entry["failed"] is None:
            entry |= standings.of(entry)
    settings = subject.journal.settings
    return {
        "format_version": FORMAT_VERSION,
        "versions": {name: version(name) for name in LIBRARIES},
        "resamples": RESAMPLES,
        "model": {
            "name": subject.name,
            "fingerprint": subject.fingerprint,
            "weights": settings["weights"],
            "dtype": settings["dtype"],
            "device": settings["device"],
            "layers": subject.layers,
            "experts": subject.routers[0].num_experts,
            "native_top_k": subject.native,
        },
        "text": {
            "name": subject.splits.name,
            "digest": subject.splits.digest,
            "calibration_tokens": subject.tokens,
            "length": subject.length,
            "notes": list(subject.splits.notes),
        },
        "targets": list(targets),
        "tokens": tokens,
        "native": _sums(native),
        "static": rungs,
        "static_perplexities": standings.static_perplexities(),
        "rows": sorted(entries, key=_place),
    }


def _entry(search: Search, family: Family, target: float) -> dict[str, Any]:
    """Return a row of the file, without what compares it."""
    subject = search.subject
    try:
        row = search.run(CONFIRMATION, family, family.at(target, subject.native), True)
    except BHError as error:  # before anything was measured: it has no such member
        row = Row(family.name, {}, failed=str(error))
    rule = family.options["rule"]
    solving = row.seconds or 0.0
    return {
        "name": family.name,
        "rule": rule,
        "source": METHODS[rule].source,
        "target": target,
        **asdict(row),
        "calibration_seconds": subject.calibration_seconds(family) + solving,
        "from_native": None,
        "from_static": None,
        "fidelity": None,
        "kl_from_static": None,
    }


def _place(entry: dict[str, Any]) -> tuple[float, bool, float]:
    """Return what rows are sorted by: the mean, then the loss; what failed comes last."""
    found = entry["from_native"]
    return entry["target"], found is None, 0.0 if found is None else found["relative"]


def _rungs(means: Sequence[float], native: int) -> range:
    """Return the numbers of experts that static top-k is measured at: around all means."""
    low = min(max(math.floor(min(means) + NEAR), 1), native - 1)
    return range(low, min(math.floor(max(means) + NEAR) + 1, native) + 1)


def _sums(row: Row) -> dict[str, list[float]]:
    return {part: getattr(row, part) for part in SUMS}
