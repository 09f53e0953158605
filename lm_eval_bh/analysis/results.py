"""The documented import of the tables; they live in :mod:`~lm_eval_bh.analysis.table`."""

from lm_eval_bh.analysis.read.loaded import Loaded
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.analysis.table.table_files import write_tables

__all__ = ["Loaded", "load_experiments", "write_tables"]
