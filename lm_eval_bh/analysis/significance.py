"""The documented import of the paired tests; they live in :mod:`~lm_eval_bh.analysis.compare`."""

from lm_eval_bh.analysis.compare.paired import compare
from lm_eval_bh.analysis.table.matched_budget import matched_budget

__all__ = ["compare", "matched_budget"]
