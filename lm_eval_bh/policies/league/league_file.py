"""The file of a league, and the check that its numbers follow from its documents' sums."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from lm_eval_bh.errors import BHError, DataError
from lm_eval_bh.policies.league.contest import FORMAT_VERSION
from lm_eval_bh.policies.league.standing import SUMS, Standings
from lm_eval_bh.policies.paired_differences import RESAMPLES
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.validation import mismatch, shown

CONTROLS = (("mean_experts", {"topk"}), ("distinct_experts", {"topk", "oea"}))
CLOSE = 1e-6  # relative tolerance for rounding on other machines and releases of NumPy


class LeagueModel(TypedDict):
    """The model of a league."""

    name: str
    fingerprint: str
    weights: str
    dtype: str
    device: str
    layers: int
    experts: int
    native_top_k: int


class LeagueText(TypedDict):
    """The text of a league, identified by content."""

    name: str
    digest: str
    calibration_tokens: int
    length: int
    notes: list[str]


class LeagueSums(TypedDict):
    """Sums over the tokens of each document."""

    losses: list[float]
    divergences: list[float]
    changed: list[float]


class LeagueNative(LeagueSums):
    """The unchanged model."""

    distinct_experts: float | None


class LeagueRung(LeagueSums):
    """A control with some number of experts."""

    mean_experts: float
    distinct_experts: float | None


class LeagueDifference(TypedDict):
    """See :class:`~lm_eval_bh.policies.paired_differences.Difference`."""

    perplexity: float
    control: float
    difference: float
    low: float
    high: float
    relative: float
    relative_low: float
    relative_high: float


class LeagueFidelity(TypedDict):
    """See :class:`~lm_eval_bh.policies.fidelity.Fidelity`."""

    kl: float
    changed: float
    worst: float


class LeagueInterval(TypedDict):
    """A difference in nats per token, with its 95 % interval."""

    difference: float
    low: float
    high: float


class LeagueRow(TypedDict):
    """One method at one mean, or the reason why it failed."""

    name: str
    rule: str
    source: str
    target: float
    config: dict[str, Any]
    mean_experts: float | None
    distinct_experts: float | None
    losses: list[float]
    divergences: list[float]
    changed: list[float]
    solved: dict[str, Any] | None
    failed: str | None
    seconds: float | None
    decision: float | None
    table_bytes: int | None
    calibration_seconds: float
    from_native: LeagueDifference | None
    from_static: LeagueDifference | None
    from_oea: LeagueDifference | None
    fidelity: LeagueFidelity | None
    kl_from_static: LeagueInterval | None


class LeagueFile(TypedDict):
    """The content of ``league.json``."""

    format_version: int
    versions: dict[str, str]
    resamples: int
    model: LeagueModel
    text: LeagueText
    cost: str
    decode_batch: int | None
    unit: str
    targets: list[float]
    tokens: list[int]
    native: LeagueNative
    controls: dict[str, dict[str, LeagueRung]]
    static_perplexities: dict[str, float]
    rows: list[LeagueRow]


def read_league(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the checked file of a league, and notes for its reader.

    Raises
    ------
    DataError
        If the file cannot be read, lacks something, or has a number that does not follow from its
        documents' sums.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")  # a pipe would block
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(
            f"{path} could not be read as JSON ({reason}): give a league.json."
        ) from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if type(found) is int and found != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {found}, and this release reads {FORMAT_VERSION}: "
            "make it again with this release, or check it with the one that made it."
        )
    reason = mismatch(content, LeagueFile, "the file") or _wrong(content)
    if reason:
        raise DataError(
            f"{path} is not a valid league ({reason}): run the league again, and submit its file "
            "unchanged."
        )
    made, here = content["versions"].get("lm-eval-bh"), version("lm-eval-bh")
    notes = [] if made == here else [f"it was made with lm-eval-bh {made}, and checked with {here}"]
    return content, notes


def _wrong(content: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a file whose fields have the right types, or None."""
    documents = len(content["tokens"])
    if documents < 2 or min(content["tokens"]) < 1:
        return "it must have at least two documents, of at least one token each"
    if content["resamples"] != RESAMPLES:
        return f"its intervals use {content['resamples']} resamples, not {RESAMPLES}"
    sums = [("native", content["native"])]
    controls, cost = content["controls"], content["cost"]
    if (cost, {*controls}) not in CONTROLS:
        return "its controls must be topk for mean_experts, topk and oea for distinct_experts"
    rungs = [(f"{n} {k}", rung) for n, found in controls.items() for k, rung in found.items()]
    sums += rungs
    measured = [(_called(row), row) for row in content["rows"] if row["failed"] is None]
    sums += measured
    for name, found in sums:
        if reason := _wrong_sums(found, documents):
            return f"{name}: {reason}"
    native, experts = content["model"]["native_top_k"], content["model"]["experts"]
    for name, found in controls.items():
        if not found or not all(k.isdecimal() and 1 <= int(k) <= native for k in found):
            return f"{name} must have numbers of experts from 1 to {native}"
    counted = content["decode_batch"] is not None
    for name, found in [
        *rungs,
        ("native", content["native"] | {"mean_experts": native}),
        *measured,
    ]:
        if reason := _wrong_costs(found, native, experts, counted):
            return f"{name}: {reason}"
    standings = Standings(content["tokens"], content["native"], controls, cost)
    said = {"static_perplexities": content["static_perplexities"]}
    if reason := _differs({"static_perplexities": standings.static_perplexities()}, said):
        return reason
    names = [(row["name"], row["target"]) for row in content["rows"]]
    for row in content["rows"]:
        if names.count((row["name"], row["target"])) > 1:
            return f"{_called(row)} occurs twice"
        if row["target"] not in content["targets"]:
            return f"{_called(row)} has no target of the file"
        if reason := _wrong_row(row, standings, content["decode_batch"]):
            return f"{_called(row)}: {reason}"
    return None


def _wrong_sums(found: Mapping[str, list[float]], documents: int) -> str | None:
    for part in SUMS:
        if len(found[part]) != documents:
            return f"it has {len(found[part])} {part} for {documents} documents"
        if not all(math.isfinite(value) and value >= 0 for value in found[part]):
            return f"its {part} must be numbers, 0 or more"
    return None


def _wrong_costs(found: Mapping[str, Any], native: int, experts: int, counted: bool) -> str | None:
    mean, distinct = found["mean_experts"], found["distinct_experts"]
    if mean is None or not 0 < mean <= native:
        return f"its mean must be more than 0 and at most {native}, not {mean}"
    if (distinct is not None) != counted:
        return "its distinct experts must be given with decode_batch, and only then"
    if distinct is not None and not 0 < distinct <= experts:
        return f"its distinct experts must be more than 0 and at most {experts}, not {distinct}"
    return None


def _wrong_row(
    row: Mapping[str, Any], standings: Standings, decode_batch: int | None
) -> str | None:
    if row["failed"] is not None:
        return None
    try:
        if RoutingConfig.named(row["config"]).as_dict() != row["config"]:
            return "its configuration lacks or adds parameters"
    except (BHError, TypeError) as error:
        return str(error).rstrip(".")
    if row["config"]["rule"] != row["rule"]:
        return f"its configuration has another rule, {row['config']['rule']}"
    if row["config"].get("decode_batch") != decode_batch:
        return "its configuration has another decode_batch"
    found = {"from_oea": None} | standings.of(row)
    return _differs(found, {name: row[name] for name in found})


def _differs(found: Mapping[str, Any], said: Mapping[str, Any]) -> str | None:
    """Return the first number that does not follow from the documents' sums, or None."""
    for name, values in found.items():
        given = said[name]
        if values is None and given is None:
            continue
        if values is None or given is None or given.keys() != values.keys():
            return f"{name} lacks or adds numbers"
        for part, value in values.items():
            if not math.isclose(given[part], value, rel_tol=CLOSE, abs_tol=CLOSE):
                return (
                    f"{name}.{part} is {shown(given[part])}, but its documents' sums give "
                    f"{value:.6g}"
                )
    return None


def _called(row: Mapping[str, Any]) -> str:
    return f"{row['name']} at {row['target']:g}"
