"""Reads finished experiments: tables, comparisons, figures, reports; needs no torch."""
