"""Measures the methods of a league: each is solved for each mean and scored on unseen text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from lm_eval_bh.errors import BHError, ParameterError
from lm_eval_bh.policies.cost import EXPERTS, Cost
from lm_eval_bh.policies.league.standing import SUMS, Standings
from lm_eval_bh.policies.paired_differences import RESAMPLES
from lm_eval_bh.policies.tuning.candidates import Family, named, published, static, winner
from lm_eval_bh.policies.tuning.journal import Row
from lm_eval_bh.policies.tuning.search import FINALISTS, SHARED, Search
from lm_eval_bh.policies.tuning.subject import CONFIRMATION, Subject
from lm_eval_bh.routing.methods import METHODS

FORMAT_VERSION = 2  # 1 had no distinct experts
ALL = "all"
LIBRARIES = ("lm-eval-bh", "torch", "transformers")
JOURNAL = "measurements.json"


def families_of(methods: str) -> list[Family] | None:
    """Return the families named by a comma-separated list; None for ``all``.

    Raises
    ------
    ParameterError
        If a name is unknown or given twice, or the list is empty.
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
    cost: Cost = EXPERTS,
) -> dict[str, Any]:
    """Measure families at means, and compare them.

    Parameters
    ----------
    subject : Subject
        The model and the texts; rows are scored on the confirmation text.
    targets : sequence of float
        Means of the cost.
        The families to measure; by default every method with its own defaults, the recipes that won
        before, and the best combinations of statistics and gains found on validation text.
    progress : bool
        Whether to show a progress bar.
    cost : Cost
        The cost that methods are solved for and compared at: experts per token, or distinct
        experts per step, if the subject's documents are groups.

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
    if len(set(targets)) < len(targets):
        raise ParameterError("The targets name a mean twice: name it once.")
    search = Search(subject, progress=progress, cost=cost)
    for target in targets:
        search.check(target, CONFIRMATION)
    entries = []
    for target in targets:
        asked = families
        if asked is None:
            best = search.finalists(target, FINALISTS)
            usual = (*published(), winner(), winner(cost), *best)
            asked = list({family.name: family for family in usual}.values())
        search.expect(len(asked))
        entries += [_entry(search, family, target) for family in asked]
    measured = [entry[cost.measured] for entry in entries if entry["failed"] is None]
    controls = {
        family.name: _ladder(search, family, measured or list(targets))
        for family in ((static(),) if cost is EXPERTS else (static(), SHARED))
    }
    native = search.run(
        CONFIRMATION, static(), search.member(static(), subject.native), faithful=True
    )
    search.close()
    tokens = [int(size) for size in subject.documents[CONFIRMATION].tokens]
    standings = Standings(tokens, _sums(native), controls, cost.measured)
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
        "cost": cost.measured,
        "decode_batch": subject.decode_batch,
        "unit": subject.documents[CONFIRMATION].unit,
        "targets": list(targets),
        "tokens": tokens,
        "native": _sums(native) | {"distinct_experts": native.distinct_experts},
        "controls": controls,
        "static_perplexities": standings.static_perplexities(),
        "rows": sorted(entries, key=_place),
    }


def _entry(search: Search, family: Family, target: float) -> dict[str, Any]:
    """Return a row of the file, without its comparisons."""
    subject = search.subject
    try:
        config = search.choose(family, target, CONFIRMATION)
        row = search.run(CONFIRMATION, family, config, True)
    except BHError as error:  # nothing was measured: the family has no such member
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
        "from_oea": None,
        "fidelity": None,
        "kl_from_static": None,
    }


def _place(entry: dict[str, Any]) -> tuple[float, bool, float]:
    """Return the sorting key of rows: the mean, then the loss; failed rows come last."""
    found = entry["from_native"]
    return entry["target"], found is None, 0.0 if found is None else found["relative"]


def _ladder(search: Search, family: Family, costs: Sequence[float]) -> dict[str, Any]:
    """Return a control's rows at the whole numbers around all costs, by its parameter."""
    low, high = (search.below(CONFIRMATION, family, end) for end in (min(costs), max(costs)))
    rows = {}
    for k in range(low, high + 2):
        row = search.run(CONFIRMATION, family, search.member(family, k), True)
        rows[str(k)] = _sums(row) | {
            "mean_experts": row.mean_experts,
            "distinct_experts": row.distinct_experts,
        }
    return rows


def _sums(row: Row) -> dict[str, list[float]]:
    return {part: getattr(row, part) for part in SUMS}
