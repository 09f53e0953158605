"""Patterns in routing logs: difficulty, specialisation, clusters.

:func:`~lm_eval_bh.analysis.patterns.findings.find_patterns` computes,
:func:`write_patterns` writes tables and pictures.
"""

from lm_eval_bh.analysis.patterns.writing import write_patterns

__all__ = ["write_patterns"]
