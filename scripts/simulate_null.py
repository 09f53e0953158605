"""Print how often each rule rejects anything when every null hypothesis is true.

    python scripts/simulate_null.py

Under the global null every rejection is false, so the expected share of false rejections among the
rejections is the probability of rejecting at all: it should be at most alpha. The statistics of one
token are drawn from a normal distribution with the given correlations; the null distribution is the
true one. BH promises nothing if some correlations are negative; if one shift moves all logits of a
token, rejections come in crowds, which the last column shows.

The last table is of null models that are fitted on such statistics, of other tokens, with `trim`:
here the excluded statistics are null too, so the fitted tails are too light and the level is lost.

The correlations named tiny-olmoe are those of its router logits on the demo texts that ship, layer
by layer; only the dependence is the model's, the marginal distributions are normal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from lm_eval_bh.routing.nulls.calibration import collect_router_logits
from lm_eval_bh.routing.nulls.texts import text_batches
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.routing.selection import reject

EXPERTS = 64
Matrix = np.ndarray[Any, np.dtype[np.float64]]


def equal(rho: float) -> Matrix:
    """Return a matrix in which every two experts have correlation rho."""
    return np.full((EXPERTS, EXPERTS), rho) + (1 - rho) * np.eye(EXPERTS)


def camps(rho: float) -> Matrix:
    """Return two halves of the experts, correlated by rho inside, and by -rho with each other."""
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


def draw(correlation: Matrix, tokens: int, rng: np.random.Generator) -> torch.Tensor:
    """Return p-values [tokens, experts] of normal statistics with this correlation."""
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(values.clip(0))
    return torch.from_numpy(ndtr(-rng.standard_normal((tokens, EXPERTS)) @ root.T))


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
    tests = [name for name, rule in RULES.items() if rule.tests]
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
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
