"""Print how often each rule rejects any hypothesis if all are null.

    python scripts/simulate_null.py

Under the global null every rejection is false, so the expected share of false rejections among the
rejections is the probability of rejecting at all: it should be at most alpha. The statistics of one
token are drawn from a normal distribution with the given correlations; the null distribution is the
true one. BH guarantees nothing if some correlations are negative; if a common shift moves all
logits of a token, rejections come in crowds, which the last column shows.

The second table has null models fitted to such statistics of other tokens with `trim`: here the
excluded statistics are null too, so the fitted tails are too light and the level is exceeded.

The last table has `family=all`: all decisions on a calibration text are tested at once, which gives
a cut-off for other tokens. Some experts of each token are needed: their statistics are larger by a
shift. The share of false rejections among all on the other tokens should be at most alpha times the
share of experts that are not needed. `null_from=unselected` fits the null to the experts below each
token's top 8, as for a model with that native top-k.

The correlations named tiny-olmoe are those of its router logits on the shipped demo texts, layer by
layer; only the dependence is the model's, the marginal distributions are normal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.special import ndtr
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import NullModel
from lm_eval_bh.files import replacing
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.routing.family import family_cutoff
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.selection import reject
from lm_eval_bh.routing.tables.calibration import collect_router_logits
from lm_eval_bh.routing.tables.texts import text_batches

EXPERTS, TOP_K = 64, 8
REPEATS = 20  # of a family, which covers all tokens
Matrix = np.ndarray[Any, np.dtype[np.float64]]


def equal(rho: float) -> Matrix:
    """Return a matrix in which every two experts have correlation rho."""
    return np.full((EXPERTS, EXPERTS), rho) + (1 - rho) * np.eye(EXPERTS)


def camps(rho: float) -> Matrix:
    """Return two halves of the experts, with correlation rho within, and -rho between them."""
    sign = np.where(np.arange(EXPERTS) % 2, -1.0, 1.0)
    matrix = rho * np.outer(sign, sign)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def of_tiny_olmoe() -> dict[str, Matrix]:
    """Return the correlations of the model's router logits, pooled within a layer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe())
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text(encoding="utf-8").splitlines()
    batches = text_batches(
        tokenizer, [json.loads(line)["page"] for line in lines], tokens=8192, length=512, batch=8
    )
    logits = collect_router_logits(model, [r.module for r in find_routers(model)], batches, False)
    return {
        f"tiny-olmoe, layer {at}": np.corrcoef(z.double().numpy().T) for at, z in logits.items()
    }


def normal(correlation: Matrix, tokens: int, rng: np.random.Generator) -> Matrix:
    """Return normal statistics [tokens, experts] with these correlations."""
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(values.clip(0))
    return np.asarray(rng.standard_normal((tokens, EXPERTS)) @ root.T)


def draw(correlation: Matrix, tokens: int, rng: np.random.Generator) -> torch.Tensor:
    """Return p-values of such statistics under the true null distribution."""
    return torch.from_numpy(ndtr(-normal(correlation, tokens, rng)))


def trimmed(trim: int, tokens: int, rng: np.random.Generator) -> torch.Tensor:
    """Return p-values [tokens, experts] of independent normal statistics under a fitted null."""
    fitted_on, fresh = rng.standard_normal((2, tokens, EXPERTS))
    null = NullModel.fit({0: fitted_on}, trim=trim)
    return null.p_values(0, torch.from_numpy(fresh))


def print_trimmed(levels: Sequence[float], tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """Print and return the shares of tokens in which BH rejects anything."""
    print(f"\n| trim | {' | '.join(f'alpha = {alpha:g}' for alpha in levels)} |")
    print(f"|---:|{'---:|' * len(levels)}")
    everything = {}
    for trim in (0, 1, 2, 4, 8):
        p = trimmed(trim, tokens, np.random.default_rng(seed))
        shares = {f"alpha {a:g}": float(reject(p, a).any(-1).double().mean()) for a in levels}
        everything[f"trim {trim}"] = shares
        print(f"| {trim} | {' | '.join(f'{share:.3f}' for share in shares.values())} |")
    return everything


def called_for(fewest: int, most: int, tokens: int, rng: np.random.Generator) -> Matrix:
    """Return which experts are needed: bool [tokens, experts], a random number per token."""
    counts = rng.integers(fewest, most + 1, (tokens, 1))
    return rng.permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1) < counts


@dataclass(frozen=True)
class Family:
    """One row of the table of families: distribution of the statistics, and assumed null."""

    name: str
    correlation: Matrix
    fewest: int = 8
    most: int = 8
    shift: float = 4.0

    def shares(
        self, levels: Sequence[float], fitted: bool, tokens: int, rng: np.random.Generator
    ) -> list[float]:
        """Return the share of false rejections at each level, on other tokens."""
        parts = []
        for _ in range(2):
            called = called_for(self.fewest, self.most, tokens, rng)
            parts.append((normal(self.correlation, tokens, rng) + self.shift * called, called))
        (seen, _), (fresh, called) = parts
        if fitted:
            null = NullModel.fit({0: seen}, top_k=TOP_K)
            p_seen, p = (null.p_values(0, torch.from_numpy(part)) for part in (seen, fresh))
        else:
            p_seen, p = (torch.from_numpy(ndtr(-part)) for part in (seen, fresh))
        family = p_seen.double().flatten().sort().values
        shares = []
        for level in levels:
            rejected = (p <= family_cutoff(family, level)).numpy()
            shares.append(float((rejected & ~called).sum() / max(rejected.sum(), 1)))
        return shares


def print_families(
    levels: Sequence[float], correlations: Mapping[str, Matrix], tokens: int, seed: int
) -> dict[str, dict[str, float]]:
    """Print and return the mean share of false rejections with a family of all decisions."""
    families = [
        Family("none needed", equal(0), 0, 0),
        *(Family(f"8 needed, shift 4, {name}", some) for name, some in correlations.items()),
        Family("8 needed, shift 2, independent", equal(0), shift=2.0),
        Family("0 to 16 needed, shift 4, independent", equal(0), 0, 16),
        Family("2 needed, shift 4, independent", equal(0), 2, 2),
    ]
    print(f"\n| statistics | null | {' | '.join(f'alpha = {alpha:g}' for alpha in levels)} |")
    print(f"|---|---|{'---:|' * len(levels)}")
    everything = {}
    for family in families:
        null_share = 1 - (family.fewest + family.most) / 2 / EXPERTS
        for null in ("true", "unselected"):
            rng = np.random.default_rng(seed)
            found = np.mean(
                [
                    family.shares(levels, null == "unselected", tokens // REPEATS, rng)
                    for _ in range(REPEATS)
                ],
                axis=0,
            )
            shares = {f"alpha {a:g}": float(share) for a, share in zip(levels, found, strict=True)}
            everything[f"one family, {family.name}, {null}"] = shares
            cells = [
                f"{share:.3f} (at most {a * null_share:.3f})"
                for a, share in zip(levels, found, strict=True)
            ]
            print(f"| {family.name} | {null} | {' | '.join(cells)} |")
    return everything


def main(
    alphas: str = "0.05,0.4,0.6",
    tokens: int = 40_000,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for all shares.")] = None,
) -> None:
    """Print one table of rules by correlations for each level."""
    correlations = {
        "independent": equal(0),
        "each two -1/63": equal(-1 / 63),
        "each two 0.3": equal(0.3),
        "each two 0.8": equal(0.8),
        "two camps, 0.5 and -0.5": camps(0.5),
        **of_tiny_olmoe(),
    }
    tests = [name for name, rule in METHODS.items() if rule.tests]
    p_values = {
        name: draw(matrix, tokens, np.random.default_rng(seed))
        for name, matrix in correlations.items()
    }
    everything: dict[str, Any] = {}
    levels = [float(alpha) for alpha in alphas.split(",")]
    for alpha in levels:
        error = 1.96 * np.sqrt(alpha * (1 - alpha) / tokens)
        print(f"\nalpha = {alpha:g}; a share at alpha is measured within ± {error:.4f}\n")
        print(f"| logits of a token | {' | '.join(tests)} | experts BH rejects, if any |")
        print(f"|---|{'---:|' * (len(tests) + 1)}")
        for name, p in p_values.items():
            shares = {}
            for rule in tests:
                rejected = reject(p, alpha, rule).sum(-1)
                shares[rule] = float((rejected > 0).double().mean())
                if rule == "bh":
                    crowd = float(rejected[rejected > 0].double().mean())
            everything[f"{name}, alpha {alpha:g}"] = shares | {"experts BH rejects, if any": crowd}
            cells = [f"{shares[rule]:.3f}" for rule in tests]
            print(f"| {name} | {' | '.join(cells)} | {crowd:.1f} |")
    everything |= print_trimmed(levels, tokens, seed)
    everything |= print_families(levels, correlations, tokens, seed)
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
