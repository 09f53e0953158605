"""The configurations to compare, each ready to be applied to the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.harness.arguments import ROUTING_ARGUMENTS, routing_config
from lm_eval_bh.harness.logs.run_info import described_routing
from lm_eval_bh.harness.preflight import given_null_model
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.parameters import canonical
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.policy import Policy, check_alone
from lm_eval_bh.schema import SpeedConfiguration

NATIVE = "native"
OF_A_CONFIGURATION = ROUTING_ARGUMENTS | {"policy", "experts_implementation"}


@dataclass(frozen=True)
class Contestant:
    """A configuration: its name and its integration; None for the unchanged model."""

    name: str
    integration: BHRoutingIntegration | None

    @contextmanager
    def at_work(self) -> Iterator[BHRoutingIntegration | None]:
        """Apply the configuration within the block."""
        with nullcontext() if self.integration is None else self.integration as routing:
            yield routing

    def describe(self) -> SpeedConfiguration:
        """Return a description for readers of the file."""
        routing = None if self.integration is None else described_routing(self.integration)
        return {"name": self.name, "routing": None if routing is None else dict(routing)}


def arguments_of_one(text: str) -> dict[str, Any]:
    """Parse a word of the command line: a policy, or model_args.

    Raises
    ------
    ParameterError
        If it is empty, or sets something that must be equal for all.
    """
    if "=" not in text or Path(text).is_file():
        return {"policy": text}
    from lm_eval.utils import simple_parse_args_string

    given = canonical(dict(simple_parse_args_string(text)))
    if foreign := sorted(given.keys() - OF_A_CONFIGURATION):
        raise ParameterError(
            f"The configuration {text!r} sets {foreign[0]}, which must be the same for all: "
            "give it in --model-args."
        )
    return given


def name_of(arguments: Mapping[str, Any]) -> str:
    """Return a name for a configuration's routing arguments, independent of their order."""
    given = sorted((n, v) for n, v in arguments.items() if n in OF_A_CONFIGURATION)
    return ",".join(f"{name}={value}" for name, value in given)


def check_configurations(configurations: Sequence[Mapping[str, Any]]) -> list[RoutingConfig]:
    """Return the routing configurations, with all errors that can occur before weights load.

    Raises
    ------
    ParameterError, NullModelError, PolicyError
        If there is none, one is named twice, or an argument is unusable.
    """
    if not configurations:
        raise ParameterError(
            "There is no configuration to measure: give model_args such as alpha=0.4,max_k=8, or "
            "policy files."
        )
    names = [name_of(one) for one in configurations]
    for name in names:
        if names.count(name) > 1:
            raise ParameterError(f"The configuration {name} is named twice: name it once.")
    loaded = [_loaded(one) for one in configurations]
    return [policy.config if policy else options["config"] for policy, options in loaded]


def _loaded(arguments: Mapping[str, Any]) -> tuple[Policy | None, dict[str, Any]]:
    """Return the policy, if any, and the arguments of the integration."""
    given = {n: v for n, v in canonical(arguments).items() if n in OF_A_CONFIGURATION}
    experts = given.pop("experts_implementation", "auto")
    path = given.pop("policy", None)
    if path is not None:
        check_alone(given)
        return Policy.load(path), {"experts_implementation": experts}
    null = given_null_model(given.get("null_model"))
    return None, {
        "config": routing_config(given),
        "null_model": null,
        "experts_implementation": experts,
    }


def contestants(lm: Any, configurations: Iterable[Mapping[str, Any]]) -> list[Contestant]:
    """Return the unchanged model and each configuration, in a fixed order.

    Parameters
    ----------
    lm : HFLM
        An unpatched model, on which null models may be calibrated and targets solved.
    configurations : iterable of mapping
        The arguments of ``hf-bh`` for each; only routing arguments are used.
    """
    found = [Contestant(NATIVE, None)]
    for arguments in sorted(configurations, key=name_of):
        policy, options = _loaded(arguments)
        integration = BHRoutingIntegration(
            lm.model, policy=policy, collect_stats=False, tokenizer=lm.tokenizer, **options
        )
        found.append(Contestant(name_of(arguments), integration))
    return found
