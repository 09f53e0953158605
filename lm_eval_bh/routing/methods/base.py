"""The base of all methods: declared parameters, calibrated tables, and short functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .declare import Parameter, choice
from .gains import folded, gained
from .router import RouterOutput
from .scores import OF, STATISTICS, log_predicted_norms, log_weights

METHODS: dict[str, type[Method]] = {}
Shown = tuple[str, Tensor, str, Tensor | None]

SCORED: dict[str, Parameter] = {
    "statistic": Parameter(
        "logit",
        "the score that is tested, compared and ranked: the router `logit`; the log of the "
        "expert's `weight`; or the log of the weight times the expert's mean output norm "
        "(`contribution`), the root mean square of its effect on the loss (`benefit`), or the norm "
        "that the hidden state predicts (`predicted`)",
        *choice(STATISTICS),
    ),
    "of": Parameter(
        "auto",
        "which weight a statistic starts from: the router's `own` output weight, the `score` "
        "before bias and rescaling, or `auto`: the score of softmax routers, else the own weight",
        *choice(OF),
    ),
}


class Method(nn.Module):
    """A way to decide which experts serve a token, in one layer.

    A method overrides one or two of :meth:`score`, :meth:`level`, :meth:`count` and :meth:`weigh`;
    :func:`~lm_eval_bh.routing.methods.pick.pick` calls them. It never asks which host runs it.

    Parameters
    ----------
    settings : mapping
        Plain values: the declared parameters by name, ``min_k``, ``max_k``, ``temperature``,
        ``num_experts`` and ``layer``; for tables that :meth:`load_state_dict` fills, their shapes
        under ``tables``.

    Attributes
    ----------
    name, label, source : str
        The value of ``rule=``, the name in tables and figures, and the publication. In a label that
        ends in ``k`` with a fixed count, the number replaces it: top-k, top-8.
    alpha : str
        Meaning of ``alpha`` as a phrase; empty for a method without it.
    declared : dict of str to Parameter
        Its own parameters; it takes no other method's.
    fixed_count, tests, random, recorded : bool
        Whether every token gets ``max_k`` experts; whether the method compares p-values and so
        needs a null distribution; whether experts are drawn; whether a log provides them.
    joint : bool
        Whether the tokens of a step are decided together, see :class:`~.batch.BatchMethod`.
    measured : tuple of str
        Names of tables read in :meth:`fit` or :meth:`level`, as ``self.tables[name]``,
        float64 ``[layers, ...]``; see ``routing/tables/measurement.py``.
    runs_experts : bool
        Whether it runs experts to decide, by ``run_experts``, which only hf-bh sets: hidden states
        ``[tokens, hidden]`` and experts ``[tokens, k]`` to outputs ``[tokens, k, hidden]``.
    first_only : bool
        Whether each of the router's first ``max_k`` experts is decided independently.
    """

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    source: ClassVar[str] = ""
    alpha: ClassVar[str] = ""
    declared: ClassVar[dict[str, Parameter]] = SCORED
    fixed_count: ClassVar[bool] = False
    tests: ClassVar[bool] = False
    random: ClassVar[bool] = False
    recorded: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    measured: ClassVar[tuple[str, ...]] = ()
    runs_experts: ClassVar[bool] = False
    run_experts: Callable[[Tensor, Tensor], Tensor] | None = None
    first_only: bool = False
    bounds: Tensor

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            METHODS[cls.name] = cls

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)
        self.min_k: int = settings["min_k"]
        self.max_k: int = settings["max_k"]
        self.temperature: float = settings["temperature"]
        self.num_experts: int = settings["num_experts"]
        self.fixed = self.fixed_count or self.min_k == self.max_k
        self.statistic = STATISTICS[self.scored_by(settings)]
        # Always there, so that no engine mistakes the router that holds this for a plain top-k and
        # replaces it.
        self.register_buffer("bounds", torch.tensor([self.min_k, self.max_k]))
        for table, (kind, shape) in settings.get("tables", {}).items():
            self.register_buffer(table, _bits(torch.zeros(shape, dtype=getattr(torch, kind))))
        self._kinds = {t: getattr(torch, k) for t, (k, _) in settings.get("tables", {}).items()}

    @classmethod
    def scored_by(cls, settings: Mapping[str, Any]) -> str:
        """Return the statistic to score; methods of weights replace the logit by the weight."""
        return str(settings.get("statistic", "logit"))

    @classmethod
    def needs(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the tables to calibrate, such as null or benefits."""
        table = STATISTICS[cls.scored_by(settings)].table
        own = (("null",) if cls.tests else ()) + ((table,) if table else ()) + cls.measured
        return own + (("folds",) if settings.get("fold") else ())

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Return the method's description in results, see ``lm_eval_bh.schema.RuleInfo``."""
        return {
            "name": cls.name,
            "label": cls.label,
            "source": cls.source,
            "fixed_count": cls.fixed_count,
            "tests": cls.tests,
            "random": cls.random,
            "alpha": cls.alpha,
        }

    def fit(self, tables: Any, alpha: float) -> None:
        """Take a layer's calibrated tables and the level.

        Parameters
        ----------
        tables : object or None
            A layer's tables, with ``factors`` (float64 ``[experts]``, or a predictor
            ``[hidden + 2, experts]``), ``measured`` (by name) and for tests ``thresholds``, see
            :class:`~lm_eval_bh.routing.tables.null_model.NullModel`.
        alpha : float
            The level, or the method's other parameter ``alpha``.
        """
        self.tables = dict(tables.measured) if tables is not None else {}
        if self.statistic.table and not (self.fixed and self.follows_router):
            factors = torch.tensor(tables.factors)
            self.keep("factors", factors.float() if self.statistic.predicts else factors.log())
        if self.folds:
            folds = self.tables["folds"][self.settings["layer"]]
            self.keep("folds_of_layer", torch.from_numpy(folds).float())
        level = self.level(alpha)
        if level is not None and not self.fixed:
            self.keep("thresholds", level)

    def score(self, router: RouterOutput) -> Tensor:
        """Return each expert's score, float32 or better ``[tokens, experts]``; larger is better."""
        if not self.statistic.weighs:
            logits = router.logits
            return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        scores = log_weights(router, self.settings.get("of", "auto"))
        if not self.statistic.table:
            return scores
        factors = self.table("factors").to(scores.dtype)
        if self.statistic.predicts:
            if router.hidden_states is None:
                raise ValueError("statistic=predicted needs the hidden states of the router.")
            factors = log_predicted_norms(factors, router.hidden_states)
        return scores + factors

    def level(self, alpha: float) -> Tensor | None:
        """Return the thresholds of ranked scores, float64; None if nothing is compared."""
        return None

    def rank(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores in descending order, and the experts (or slots) in that order."""
        return scores.sort(dim=-1, descending=True, stable=True)

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return how many experts are taken, ignoring the bounds: int64 ``[tokens]``.

        Parameters
        ----------
        ranked : Tensor
            float ``[tokens, experts]``, from :meth:`rank`.
        level : Tensor or None
            From :meth:`level`.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define count or decide.")

    def decide(self, ranked: Tensor) -> Tensor:
        """Return how many of the ranked experts are taken: int64 ``[tokens]``.

        A method may return a mask of the experts kept instead: bool, shaped like ``ranked``.
        """
        return self.count(ranked, self.table("thresholds") if "thresholds" in self._kinds else None)

    def keep_in_step(self, router: RouterOutput) -> Tensor:
        """Return which slots of the router serve each token, bool ``[tokens, slots]``.

        Only for methods whose decisions are ``joint``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not decide over a step.")

    def shown(self, ranked: Tensor, alpha: float) -> Shown | None:
        """Return what a page shows of a decision; None if nothing is compared.

        The name and values of what is compared, ``[tokens, experts]`` in ranked order; the name and
        values of the thresholds at each rank, or None where they differ by token.
        """
        return None

    def weigh(self, kept: Tensor, router: RouterOutput, experts: Tensor) -> Tensor:
        """Return the weights of the kept experts, both ``[tokens, max_k]``; by default a gain."""
        kept = gained(kept, router, self.settings)
        return folded(kept, experts, router, self.table("folds_of_layer")) if self.folds else kept

    @property
    def follows_router(self) -> bool:
        """Whether the kept experts are those that the router ranks first."""
        own = self.statistic.name == "weight" and self.settings.get("softmax", True)
        return self.statistic.name == "logit" or own

    def asks(self, native_k: int) -> int:
        """Return how many experts the router has to rank for this method."""
        if not (self.follows_router or self.first_only):
            return self.num_experts
        k2 = self.settings.get("k2") or 0
        return max(self.max_k, native_k, k2) if self.needs_native else self.max_k

    @property
    def needs_native(self) -> bool:
        """Whether the method needs weights in the scale of the native top-k."""
        given = self.settings.get("of") == "own" or not self.settings.get("softmax", True)
        own = self.statistic.weighs and given and not self.fixed
        return own or self.gains

    @property
    def gains(self) -> bool:
        """Whether a gain changes the weights beyond what the model does."""
        return self.folds or any(self.settings.get(name) is not None for name in ("mass", "k2"))

    @property
    def folds(self) -> bool:
        """Whether experts that are left out are folded into those that are kept."""
        return bool(self.settings.get("fold"))

    def keep(self, name: str, table: Tensor) -> None:
        """Keep a table as a buffer, as integer bits, which casting a model does not round."""
        self._kinds[name] = table.dtype
        self.register_buffer(name, _bits(table.to(self.bounds.device)))
        self.settings["tables"] = {
            table: (str(kind).removeprefix("torch."), list(getattr(self, table).shape))
            for table, kind in self._kinds.items()
        }

    def table(self, name: str) -> Tensor:
        """Return a kept table."""
        bits: Tensor = getattr(self, name)
        return bits.view(self._kinds[name])


def _bits(table: Tensor) -> Tensor:
    if not table.is_floating_point():
        return table
    return table.contiguous().view(torch.int64 if table.dtype == torch.float64 else torch.int32)
