"""The kind of a null model: its statistic, its scope, and the experts used."""

from __future__ import annotations

from dataclasses import dataclass

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.routing.methods.scores import OF, STATISTICS
from lm_eval_bh.routing.methods.step_up import ORIGINS, SCOPES


@dataclass(frozen=True)
class NullKind:
    """Requirements on a null model; None accepts anything.

    Attributes
    ----------
    statistic : str
        One of :data:`~lm_eval_bh.routing.scores.statistic.STATISTICS`.
    null_scope : "layer", "expert", "model" or None
        Scope of one distribution.
    trim : int or None
        How many of each token's largest and smallest scores are left out.
    null_from : "all", "unselected" or None
        Whether all experts are used, or only those that the router does not select.
    of : "auto", "own" or "score"
        Which weight the statistic starts from.
    tables : tuple of str
        Further measured tables, keys of :data:`~lm_eval_bh.routing.tables.measurement.TABLES`.

    Raises
    ------
    ParameterError
        If statistic or scope is unknown.
    """

    statistic: str = "logit"
    null_scope: str | None = "layer"
    trim: int | None = 0
    null_from: str | None = "all"
    of: str = "auto"
    tables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.null_scope == "pooled":
            object.__setattr__(self, "null_scope", "layer")
        for name, names in (
            ("statistic", STATISTICS),
            ("null_scope", SCOPES),
            ("null_from", ORIGINS),
            ("of", OF),
        ):
            known = list(names)
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ParameterError(
                    f"{name} must be {', '.join(known[:-1])} or {known[-1]}: found {value!r}"
                    f"{did_you_mean(str(value), known)}."
                )

    def made(self) -> NullKind:
        """Return the kind to calibrate: None takes the default."""
        return NullKind(
            self.statistic,
            self.null_scope or "layer",
            self.trim or 0,
            self.null_from or "all",
            self.of,
            self.tables,
        )

    @property
    def scored(self) -> dict[str, str]:
        """The parameters of a method with these scores."""
        return {"statistic": self.statistic, "of": self.of}

    @property
    def suffix(self) -> str:
        """Suffix of file names; empty for the plain logits of a layer."""
        kind = self.made()
        if kind == LOGITS_OF_A_LAYER:
            return ""
        tables = "".join(f"-{name}" for name in kind.tables)
        scope = "pooled" if kind.null_scope == "layer" else kind.null_scope
        origin = "" if kind.null_from == "all" else f"-{kind.null_from}"
        weight = "" if kind.of == "auto" else f"-{kind.of}"
        return f"-{kind.statistic}{weight}-{scope}-trim{kind.trim}{origin}{tables}"

    def __str__(self) -> str:
        return (
            f"statistic={self.statistic}, null_scope={self.null_scope}, "
            f"null_from={self.null_from}, trim={self.trim}"
            + (f", with {', '.join(self.tables)}" if self.tables else "")
        )


LOGITS_OF_A_LAYER = NullKind()
