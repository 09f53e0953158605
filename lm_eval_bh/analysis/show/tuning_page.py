"""The page of a policy search: a figure and a table of candidates and the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_bh.analysis.show.figure_page import figure_page
from lm_eval_bh.analysis.show.pareto_figure import DISTINCT, EXPERTS, Point, draw_pareto
from lm_eval_bh.files import write_text

PAGE, FIGURE = "tune.html", "tune.png"
BEATEN = 3  # runners-up named in the text
SHOWN = 5  # adaptive families in the figure, besides controls; the table has all


def write_tuning_page(account: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the page and the figure of a search.

    Parameters
    ----------
    account : mapping
        From :func:`lm_eval_bh.policies.tuning.run.tune`, as plain values.
    folder : Path
        Output folder of ``tune.html`` and ``tune.png``.
    """
    page = figure_page(
        "tune.html.j2",
        _figure(account),
        folder / FIGURE,
        account=account,
        goal=goal_of(account),
        verdict=verdict_of(account),
        findings=findings_of(account),
        screened=screened_rows(account),
        controls=[(name, *_texts(d)) for name, d in account["confirmation"]["controls"].items()],
        same="same distinct experts" if by_step(account) else "same mean",
        native=_texts(account["confirmation"]["native"]),
        tried=tried_rows(account),
        failed=[
            (row["name"], row["failed"])
            for row in {r["name"]: r for r in (*account["screened"], *account["tried"])}.values()
            if row["failed"]
        ],
        parameters=_parameters(account["winner"]),
    )
    return [write_text(folder / PAGE, page), folder / FIGURE]


def goal_of(account: Mapping[str, Any]) -> str:
    """Return the goal of the search, in words."""
    if account["target_experts"] is not None:
        return f"a mean of {account['target_experts']:g} experts per token"
    if by_step(account):
        return (
            f"a mean of {account['target_distinct']:g} distinct experts per layer and step of "
            f"{account['decode_batch']} rows"
        )
    return (
        f"the fewest experts that cost at most {100 * account['max_loss']:g} % of perplexity "
        f"against static top-{account['native_top_k']}"
    )


def by_step(account: Mapping[str, Any]) -> bool:
    """Return whether policies were compared at equal distinct experts."""
    return account["target_distinct"] is not None


def verdict_of(account: Mapping[str, Any]) -> str:
    """Return one or two sentences on the winner's results on unseen text."""
    name, found = account["winner"]["name"], account["confirmation"]
    native = found["native"]
    text = f"{account['documents']['confirmation']} unseen {account['unit']} of {account['text']}"
    same, takes = "the same mean", f"takes {found['mean_experts']:.2f} experts per token"
    if by_step(account):
        same = "the same number of distinct experts"
        reads = f"reads {found['distinct_experts']:.2f} distinct experts per layer and step"
        takes = f"{reads} and {takes}"
    loses = (
        f"It {takes}, and its perplexity differs from static top-{account['native_top_k']}'s by "
        f"{_signed(100 * native['relative'])} % ({_signed(100 * native['relative_low'])} to "
        f"{_signed(100 * native['relative_high'])})."
    )
    worse = [n for n, control in found["controls"].items() if control["high"] >= 0]
    if not worse:
        first = f"{name} is better than every control at {same} on {text}."
    else:
        first = f"{name} is not significantly better than {' and '.join(worse)} on {text}."
    if account["max_loss"] is not None:
        within = native["relative_high"] <= account["max_loss"]
        met = "met" if within else "not met"
        loses += f" The target, at most {100 * account['max_loss']:g} %, is {met} there."
    return f"{first} {loses}"


def findings_of(account: Mapping[str, Any]) -> list[str]:
    """Return further findings on the winner: runners-up, fidelity, tasks."""
    return [*_beaten(account), _fidelity(account), *_tasks(account)]


def _beaten(account: Mapping[str, Any]) -> list[str]:
    name = account["winner"]["name"]
    tried = [row[0] for row in tried_rows(account) if row[0] != name]
    if not tried:
        return []
    asked = {row["name"] for row in (*account["screened"], *account["tried"])} - {name}
    return [f"Chosen among {len(asked) + 1} policies, over {', '.join(tried[:BEATEN])} next."]


def _fidelity(account: Mapping[str, Any]) -> str:
    found, control = account["confirmation"], account["confirmation"]["controls"].get("topk")
    units = account["unit"]
    ours, theirs = found["fidelity"]["policy"], found["fidelity"]["topk"]
    kl = found["fidelity"]["kl_difference"]
    text = (
        f"Fidelity: its next-token distributions are {ours['kl']:.4f} nats per token from the "
        f"model's own ({ours['worst']:.4f} in the worst tenth of the {units}), and "
        f"{100 * ours['changed']:.1f} % of the first choices change; static top-k at that mean has "
        f"{theirs['kl']:.4f} ({theirs['worst']:.4f}) and {100 * theirs['changed']:.1f} %."
    )
    if control and control["high"] < 0 and kl["high"] >= 0:
        how = "is farther from" if kl["low"] > 0 else "is not shown to be nearer to"
        text += (
            f" Perplexity and fidelity disagree: it is better in perplexity, but {how} the model's "
            f"own distributions than static top-k ({kl['difference']:+.4f} nats per token, "
            f"{kl['low']:+.4f} to {kl['high']:+.4f})."
        )
    elif control and control["high"] >= 0 and kl["high"] < 0:
        text += " Perplexity and fidelity disagree: it is nearer to the model, but not better."
    return text


def _tasks(account: Mapping[str, Any]) -> list[str]:
    found = []
    control = account["confirmation"]["controls"].get("topk")
    for row in account.get("tasks", []):
        if "reason" in row:
            found.append(f"{row['task']}: not compared, {row['reason']}.")
            continue
        points, low, high, margin = (
            100 * row[part] for part in ("difference", "low", "high", "margin")
        )
        means = {
            "non-inferior": f"within the margin of {margin:g} %",
            "inferior": f"worse by more than the margin of {margin:g} %",
            "undecided": f"not shown to be within the margin of {margin:g} %",
        }
        text = (
            f"{row['task']}, {row['metric']}: {100 * row['policy']:.1f} % against "
            f"{100 * row['native']:.1f} % with the model's own top-k, {_signed(points)} "
            f"({_signed(low)} to {_signed(high)}) over {row['documents']} documents: "
            f"{means[row['verdict']]}."
        )
        against = row["from_topk"]
        if control and control["high"] < 0 and (against["high"] or 0) < 0:
            text += (
                " Perplexity and this task disagree: static top-k at that mean loses more "
                f"perplexity and has {-100 * against['difference']:.1f} points more."
            )
        found.append(text)
    return found


def screened_rows(account: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of the first look on little text, like :func:`tried_rows`."""
    rows = _rows(account["screened"], account["cost"]["measured"])
    few = by_step(account)  # groups, too few for an interval
    return [(*row[:-1], "") for row in rows] if few else rows


def tried_rows(account: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return (name, mean, perplexity, difference, interval) of all candidates, best first."""
    return _rows(account["tried"], account["cost"]["measured"])


def _rows(tried: Sequence[Mapping[str, Any]], cost: str) -> list[tuple[str, ...]]:
    rows = [row for row in tried if row["difference"] is not None]
    rows.sort(key=lambda row: row["difference"]["relative"])
    return [(row["name"], f"{row[cost]:.2f}", *_texts(row["difference"])) for row in rows]


def _texts(difference: Mapping[str, float]) -> tuple[str, str, str]:
    return (
        f"{difference['perplexity']:.2f}",
        _signed(difference["difference"]),
        f"{_signed(difference['low'])} to {_signed(difference['high'])}",
    )


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _parameters(winner: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(name, str(value)) for name, value in winner["config"].items() if value is not None]
    if winner["solved"]:
        alphas = winner["solved"]["alphas"]
        found.append(("alpha, solved", ", ".join(f"{value:.4g}" for value in alphas.values())))
    return found


def _figure(account: Mapping[str, Any]) -> Any:
    winner = account["winner"]["name"]
    rows = [row for row in account["tried"] if row["difference"] is not None]
    rows.sort(key=lambda row: row["difference"]["relative"])
    controls = {row["name"] for row in rows if not row["adaptive"]} | {
        *account["confirmation"]["controls"]
    }
    controls -= {"topk"}  # the line
    points: dict[str, list[Point]] = {winner: []}
    for row in rows:
        difference = row["difference"]
        point = Point(
            row[account["cost"]["measured"]],
            difference["perplexity"],
            difference["difference"],
            difference["low"],
            difference["high"],
        )
        control = row["name"] in controls
        if row["name"] in points or control or len(points) < SHOWN:
            points.setdefault(row["name"], []).append(point)
    title = f"{account['model']}: {goal_of(account)} (validation text of {account['text']})"
    static = {float(k): value for k, value in account["static"].items()}
    label = DISTINCT if by_step(account) else EXPERTS
    return draw_pareto(static, points, title=title, best=winner, cost=label)
