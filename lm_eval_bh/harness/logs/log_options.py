"""How much of the routing an evaluation logs, and where."""

from __future__ import annotations

from dataclasses import dataclass

from lm_eval_bh.errors import ParameterError, did_you_mean

LEVELS = ("off", "summary", "samples", "full")


@dataclass(frozen=True)
class LogOptions:
    """How much of the routing is logged, and where.

    Attributes
    ----------
    log_routing : str
        "off", "summary" (exact counters, in the harness's results), "samples" (also details of the
        first documents, as JSON) or "full" (also every token, as Parquet).
    log_dir : str or None
        The folder for samples and full; lm-eval does not tell a model its output path.
    log_samples : int or None
        Number of documents per task with details as JSON; None means 200 with "samples" and none
        with "full", which has every token anyway.
    log_logits : bool
        Whether "full" keeps the router logits too.

    Raises
    ------
    ParameterError
        If a value is unknown or contradicts another.
    """

    log_routing: str = "summary"
    log_dir: str | None = None
    log_samples: int | None = None
    log_logits: bool = False

    def __post_init__(self) -> None:
        if self.log_routing not in LEVELS:
            raise ParameterError(
                f"log_routing={self.log_routing!r} is unknown: choose one of {', '.join(LEVELS)}"
                f"{did_you_mean(str(self.log_routing), LEVELS)}."
            )
        if self.log_samples is not None and (
            isinstance(self.log_samples, bool) or not isinstance(self.log_samples, int)
        ):
            raise ParameterError(
                f"log_samples={self.log_samples!r} is not a number of documents: give an integer."
            )
        if self.log_samples is not None and self.log_samples < 0:
            raise ParameterError(
                f"log_samples={self.log_samples} is negative: give a number of documents, or 0."
            )
        if self.log_samples is not None and not self.details:
            raise ParameterError(
                f"log_samples={self.log_samples} has no effect with "
                f"log_routing={self.log_routing}: choose samples or full, or leave it out."
            )
        if not isinstance(self.log_logits, bool):
            raise ParameterError(f"log_logits={self.log_logits!r} is unknown: give True or False.")
        if self.log_logits and self.log_routing != "full":
            raise ParameterError(
                f"log_logits=True needs log_routing=full, not {self.log_routing}: "
                "logits are kept token by token."
            )
        if self.details and self.log_dir is None:
            raise ParameterError(
                f"log_routing={self.log_routing} needs a folder to write to: give log_dir."
            )
        if not self.details and self.log_dir is not None:
            raise ParameterError(
                f"log_dir={self.log_dir!r} has no effect with log_routing={self.log_routing}, "
                "which writes no log files: choose samples or full, or leave log_dir out."
            )

    @property
    def samples(self) -> int:
        """Number of documents per task with details as JSON."""
        if self.log_samples is not None:
            return self.log_samples
        return 200 if self.log_routing == "samples" else 0

    @property
    def details(self) -> bool:
        """Whether log files are written."""
        return self.log_routing in ("samples", "full")
