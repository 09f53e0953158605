"""Null models: what scores are tested against, how it is fitted, kept and found."""
