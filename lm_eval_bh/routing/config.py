"""A routing configuration: a method, its own parameters, and the general ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.declared import (
    ALPHA,
    GENERAL,
    PARAMETERS,
    known_to,
    unknown_name,
)
from lm_eval_bh.routing.layer_choice import chosen_layers
from lm_eval_bh.routing.methods import METHODS, Method
from lm_eval_bh.routing.methods.base import SCORED
from lm_eval_bh.routing.methods.declare import Parameter
from lm_eval_bh.routing.methods.scores import STATISTICS
from lm_eval_bh.routing.parameters import canonical, checked
from lm_eval_bh.routing.tables.null_kind import NullKind
from lm_eval_bh.schema import RuleInfo

# The parameters of release 0.2's files, in their order; files keep holding them.
IN_FILES = (
    *("alpha", "rule", "min_k", "max_k", "temperature", "renormalize", "mode", "layers"),
    *("statistic", "null_scope", "null_from", "family", "k_per_layer", "mass", "trim", "seed"),
    *("target_experts", "budget"),
)


class RoutingConfig:
    """How the experts of a token are selected; every value is checked on construction.

    Everything that takes routing parameters (the integration, ``hf-bh``, sweeps, the command line)
    takes these, by these names or by their :data:`~lm_eval_bh.routing.parameters.ALIASES`, see
    :meth:`named`. They are attributes; a parameter that only another method declares has its
    default.

    Parameters
    ----------
    **given : Any
        Parameters in :data:`~lm_eval_bh.routing.declared.GENERAL`, and those that the method
        declares: ``METHODS[rule].declared``. ``alpha`` may be given to methods without it, which
        ignore it.

    Raises
    ------
    ParameterError
        If a value is out of range, of the wrong type, or unknown to the method, or if two values
        contradict each other.
    """

    _values: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        rule = checked(GENERAL["rule"], "rule", given.get("rule", "bh"))
        known = {"alpha": ALPHA} | known_to(METHODS[rule])
        for name, value in given.items():
            if name not in known:
                self._refuse(name, value, rule, known)
        values = {
            name: checked(parameter, name, given.get(name, parameter.default))
            for name, parameter in known.items()
        }
        object.__setattr__(self, "_values", values)
        if self.k_per_layer is not None:
            if self.max_k not in (GENERAL["max_k"].default, max(self.counts_per_layer)):
                raise ParameterError(
                    f"max_k={self.max_k} contradicts k_per_layer={self.k_per_layer}: leave it out."
                )
            values["max_k"] = max(self.counts_per_layer)
        self._check_together()

    @staticmethod
    def _refuse(name: str, value: Any, rule: str, known: Mapping[str, Parameter]) -> None:
        """Raise for a parameter that the method does not know, unless it is None or the default."""
        if name not in PARAMETERS:
            raise ParameterError(unknown_name(name))
        if checked(PARAMETERS[name], name, value) != PARAMETERS[name].default:
            raise ParameterError(
                f"{name}={value!r} has no meaning with rule={rule}, whose parameters are "
                f"{', '.join(known)}: leave it out."
            )

    def _check_together(self) -> None:
        for name in ("mass", "k2", "fold"):
            value = getattr(self, name)
            if self.renormalize != "auto" and value not in (None, False):
                raise ParameterError(
                    f"renormalize={self.renormalize} contradicts {name}={value}, which rescales "
                    "weights in its own way (mass: 0 not at all, 1 to the native sum): give one of "
                    "them."
                )
        if self.family == "all" and self.budget == "layer":
            raise ParameterError(
                "budget='layer' contradicts family='all', which has one threshold: leave one out."
            )
        if self.max_k < self.min_k:
            raise ParameterError(
                f"max_k={self.max_k} is less than min_k={self.min_k}: raise max_k or lower min_k."
            )
        if self.decode_batch is None and (self.batch_seed or self.target_distinct):
            given = "batch_seed" if self.batch_seed else "target_distinct"
            raise ParameterError(
                f"{given}={getattr(self, given)!r} has no meaning without decode_batch: "
                "give the number of rows that are decoded together."
            )
        if self._values.get("step_budget", self.min_k) < self.min_k:
            raise ParameterError(
                f"step_budget={self.step_budget} is less than min_k={self.min_k}: a step has to "
                "load min_k experts per token; raise step_budget or lower min_k."
            )
        target, distinct = self.target_experts, self.target_distinct
        if target is None and self.budget == "layer":
            raise ParameterError(
                "budget='layer' has no meaning without target_experts: give the mean of a layer."
            )
        if distinct is not None and (target is not None or distinct <= self.min_k):
            raise ParameterError(
                f"target_distinct={distinct} must be more than min_k={self.min_k}, and cannot be "
                "combined with target_experts: give one target."
            )
        if target is not None and not self.min_k < target < self.max_k:
            raise ParameterError(
                f"target_experts must lie between min_k={self.min_k} and max_k={self.max_k}: "
                f"found {target!r}."
            )

    @classmethod
    def named(cls, given: Mapping[str, Any]) -> RoutingConfig:
        """Make a configuration from parameters under their names or aliases.

        Raises
        ------
        ParameterError
            If a parameter is unknown, given twice, or out of range.
        """
        return cls(**canonical(given))

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name in values:
            return values[name]
        if name.startswith("_") or name not in PARAMETERS:
            raise AttributeError(name)
        return PARAMETERS[name].default

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"A RoutingConfig cannot be changed: use replaced({name}=...).")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoutingConfig) and self._values == other._values

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"RoutingConfig({', '.join(f'{n}={v!r}' for n, v in self._values.items())})"

    def replaced(self, **changes: Any) -> RoutingConfig:
        """Return a copy with other values for some parameters."""
        return RoutingConfig(**(self._values | changes))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as written to results and policies.

        All parameters of :data:`IN_FILES`; those declared since only where they differ from the
        default, and the own parameters of a method of a step.
        """
        method = METHODS[self.rule]
        step = {*method.declared} - {*SCORED, *IN_FILES} if method.joint else set()
        own = {n: v for n, v in self._values.items() if v != PARAMETERS[n].default or n in step}
        return {name: getattr(self, name) for name in IN_FILES} | own

    @property
    def method(self) -> type[Method]:
        """The method that routes: with ``family=all`` a test becomes one fixed threshold."""
        return METHODS["p_value" if self.family == "all" else self.rule]

    @property
    def tests(self) -> bool:
        """Whether the rule compares p-values."""
        return METHODS[self.rule].tests

    @property
    def scored_by(self) -> str:
        """The statistic that the method scores on softmax routers."""
        return self.method.scored_by(self._values)

    @property
    def null_kind(self) -> NullKind:
        """The null model that it needs; None where anything will do."""
        return NullKind(
            self.scored_by,
            self.null_scope if self.tests else None,
            self.trim,
            self.null_from if self.tests else None,
            self.of,
            self.tables,
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of everything to calibrate, such as null or benefits."""
        return self.method.needs(self._values)

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of tables other than the null distribution and a statistic's factors."""
        beside = ("null", STATISTICS[self.scored_by].table)
        return tuple(sorted(name for name in self.needs if name not in beside))

    @property
    def needs_null(self) -> bool:
        """Whether a null model is needed: for p-values, factors of weights, or other tables."""
        return bool(self.needs)

    @property
    def solves(self) -> bool:
        """Whether a parameter is solved on calibration text."""
        targets = self.target_experts, self.target_distinct
        return targets != (None, None) or self.family == "all"

    @property
    def adaptive(self) -> bool:
        """Whether the number of experts depends on the token."""
        return not METHODS[self.rule].fixed_count

    @property
    def fixed_count(self) -> bool:
        """Whether every token gets ``max_k`` experts: because of its rule or of equal bounds."""
        return not self.adaptive or self.min_k == self.max_k

    @property
    def counts_per_layer(self) -> list[int]:
        """The numbers of ``k_per_layer``."""
        return [int(k) for k in (self.k_per_layer or "").split("-") if k]

    def for_layer(self, layer: int, num_layers: int) -> RoutingConfig:
        """Return the configuration of one routed layer, with its own number of experts."""
        if self.k_per_layer is None:
            return self
        k = self.counts_per_layer[self.select_layers(num_layers).index(layer)]
        return self.replaced(k_per_layer=None, max_k=k)

    def settings(self, layer: int, num_experts: int, softmax: bool = True) -> dict[str, Any]:
        """Return the method's settings as plain values, see :class:`Method`."""
        facts = {"layer": layer, "num_experts": num_experts, "softmax": softmax}
        return self._values | {name: getattr(self, name) for name in self.method.declared} | facts

    def check_experts(self, num_experts: int) -> None:
        """Raise :class:`ParameterError` if a layer has too few experts for the configuration."""
        for name in ("max_k", "k2", "step_budget", "k0", "target_distinct"):
            found = self._values.get(name) or 0
            if found > num_experts:
                raise ParameterError(
                    f"{name}={found} is more than the model's {num_experts} experts: "
                    f"give a {name} of at most {num_experts}."
                )

    def select_layers(self, num_layers: int) -> list[int]:
        """Return the sorted positions of the layers chosen among ``num_layers`` MoE layers."""
        chosen = chosen_layers(self.layers, num_layers)
        if self.k_per_layer is not None and len(chosen) != len(self.counts_per_layer):
            raise ParameterError(
                f"k_per_layer={self.k_per_layer} must have a number for each of the {len(chosen)} "
                f"routed layers: found {len(self.counts_per_layer)}."
            )
        return chosen


def rule_info(rule: str) -> RuleInfo:
    """Return the description of a rule that results hold."""
    return cast(RuleInfo, METHODS[rule].describe())


def one_configuration(
    alpha: float | RoutingConfig | None, config: RoutingConfig | None, given: Mapping[str, Any]
) -> RoutingConfig:
    """Return the configuration given whole, or make one from its parameters.

    Raises
    ------
    ParameterError
        If both were given.
    """
    if isinstance(alpha, RoutingConfig):
        config = alpha
    elif alpha is not None:
        given = {**given, "alpha": alpha}
    if config is None:
        return RoutingConfig.named(given)
    if RoutingConfig.named(given) != RoutingConfig():
        raise ParameterError(
            "Both a configuration and single parameters were given: "
            "put the parameters into the RoutingConfig."
        )
    return config
