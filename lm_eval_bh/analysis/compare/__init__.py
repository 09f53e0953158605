"""Paired comparisons of experiments, and what they recommend."""
