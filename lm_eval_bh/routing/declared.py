"""All routing parameters: the general ones, and those that methods declare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from lm_eval_bh.errors import did_you_mean
from lm_eval_bh.routing.layer_choice import check_layers
from lm_eval_bh.routing.methods import METHODS, Method
from lm_eval_bh.routing.methods.declare import Parameter, choice, integer, number, or_none
from lm_eval_bh.routing.methods.gains import PARAMETERS as GAINS

GENERAL: dict[str, Parameter] = {
    "rule": Parameter("bh", "the selection rule, see *Selection rules*", *choice(METHODS)),
    "min_k": Parameter(
        1, "fewest experts per token", *integer("an integer number of experts, 1 or more", 1)
    ),
    "max_k": Parameter(
        8,
        "most experts per token; if equal to `min_k`, exactly the model with that top-k",
        *integer("an integer number of experts, 1 or more", 1),
    ),
    "temperature": Parameter(
        1.0,
        "divides the router logits in the softmax of the weights; never touches p-values",
        # Below, a token's logits overflow and its weights become NaN.
        *number("a positive number, at least 1e-30", lambda value: value >= 1e-30),
    ),
    **GAINS,
    "mode": Parameter(
        "patch",
        "`patch` routes by the selection; `analyze` leaves the model unchanged and only counts",
        *choice(["patch", "analyze"]),
    ),
    "layers": Parameter(
        "all",
        "which MoE layers: `all`, `last4`, `first2`, `0-7`, `3`, or several joined by `+`",
        check_layers,
        "all, last4, first2, 0-7, 3, or several of these joined by '+'",
    ),
    "decode_batch": Parameter(
        None,
        "number of rows that are decoded together: their tokens at one position form a step, whose "
        "distinct experts are counted, and about which methods of a step decide together",
        *or_none(integer("an integer number of rows, 1 or more", 1)),
    ),
    "batch_seed": Parameter(
        0,
        "seed of the order in which rows form decode batches",
        *integer(f"an integer from 0 to {2**32 - 1}", 0, 2**32 - 1),
    ),
    "phase": Parameter(
        "all",
        "tokens about which methods of a step decide: `all`, or those that are decoded "
        "(`decode`); tokens of prompts then take the model's own top-k",
        *choice(["all", "decode"]),
    ),
}
# The targets for which a solver finds alpha, where a method has one.
SOLVED: dict[str, Parameter] = {
    "target_experts": Parameter(
        None,
        "the mean number of experts per token for which alpha is solved, on calibration text",
        *or_none(number("a number of experts", lambda value: value > 0)),
    ),
    "budget": Parameter(
        "model",
        "whether `target_experts` is met on average over the `model`, or in every `layer` with "
        "its own alpha",
        *choice(["model", "layer"]),
    ),
}
SOLVED_BY_STEP: dict[str, Parameter] = {
    "target_distinct": Parameter(
        None,
        "the mean number of distinct experts per layer and step for which alpha is solved, on "
        "calibration text",
        *or_none(number("a number of experts", lambda value: value > 0)),
    )
}
ALPHA = Parameter(
    0.05,
    "the rule's one parameter: the level of a test; the share of the weight for `top_p`, of "
    "the largest weight for `min_p`; the weight itself for `min_w`",
    *number("a positive number", lambda value: value > 0),
)


class Parameters(Mapping[str, Parameter]):
    """All routing parameters by name: the general ones and those of each method."""

    def __getitem__(self, name: str) -> Parameter:
        return _all(tuple(METHODS.values()))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_all(tuple(METHODS.values())))

    def __len__(self) -> int:
        return len(_all(tuple(METHODS.values())))


@cache
def _all(methods: tuple[type[Method], ...]) -> dict[str, Parameter]:
    found = {"alpha": ALPHA} | GENERAL
    for method in methods:
        found |= {n: p for n, p in method.declared.items() if n not in found}
    return found | SOLVED | SOLVED_BY_STEP


PARAMETERS = Parameters()


def known_to(method: type[Method]) -> dict[str, Parameter]:
    """Return the parameters that a method takes, by name."""
    found = GENERAL | dict(method.declared)
    if method.joint:
        return found | SOLVED_BY_STEP if "alpha" in method.declared else found
    return found if method.fixed_count or method.recorded else found | SOLVED | SOLVED_BY_STEP


def unknown_name(name: str) -> str:
    """Return the message for a parameter that does not exist."""
    return (
        f"{name!r} is not a routing parameter{did_you_mean(name, PARAMETERS)}: "
        f"use one of {', '.join(PARAMETERS)}."
    )


def serves(name: str, rule: str) -> bool:
    """Return whether a rule takes a parameter; True for those that are not about routing."""
    return name not in PARAMETERS or name == "alpha" or name in known_to(METHODS[rule])
